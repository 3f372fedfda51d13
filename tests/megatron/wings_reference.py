"""Wings in plain torch, sample by sample with whole matrices, by released names: both rules.

The public code's rule follows AIDC-AI/Wings 5dec325 (wings/model): padded samples, the decoder's mask cut to the length
of the text memory, lowest numbers added where a key is not seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from parrot_sys.modules.rotary import RopeScaling
from parrot_sys.systems.config import ParrotConfig

LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True, kw_only=True)
class Sequence:
    """One sample: ids with -200 on each row of its images, and these rows."""

    ids: Tensor  # [N]
    visual: Tensor  # [rows with -200, H]


def rotate(rows: Tensor, positions: Tensor, base: float, scaling: RopeScaling | None = None) -> Tensor:
    """[M, n, d] by its positions, pair (i, i + d / 2), one frequency after the other."""
    half = rows.shape[-1] // 2
    out = rows.clone()
    for i in range(half):
        frequency = base ** (-i / half)
        if scaling is not None:
            wave = 2 * math.pi / frequency
            long, short = (scaling.original_positions / f for f in (scaling.low_frequency, scaling.high_frequency))
            if wave > long:
                frequency /= scaling.factor
            elif wave > short:
                smooth = (scaling.original_positions / wave - scaling.low_frequency) / (
                    scaling.high_frequency - scaling.low_frequency
                )
                frequency = (1 - smooth) * frequency / scaling.factor + smooth * frequency
        angle = (positions.double() * frequency).float()[:, None]
        x, y = rows[..., i], rows[..., i + half]
        out[..., i] = x * angle.cos() - y * angle.sin()
        out[..., i + half] = y * angle.cos() + x * angle.sin()
    return out


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Output [N, n, d] and weights [n, N, M]; `mask` [N, M] is added to the scores."""
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    scores = torch.einsum("qnd,knd->nqk", query, key) / math.sqrt(query.shape[-1])
    weights = (scores + mask).softmax(-1)
    return torch.einsum("nqk,knd->qnd", weights, value), weights


class WingsReference:
    """Logits of samples from released tensors."""

    def __init__(self, state: dict[str, Tensor], config: ParrotConfig, blank: Tensor) -> None:
        self.state, self.config, self.blank = state, config, blank

    def logits(self, samples: list[Sequence]) -> list[Tensor]:
        """[N, vocabulary] of each sample."""
        with torch.no_grad():
            if self.config.wings.rule == "paper":
                return [self._decode(self._embed(sample, len(sample.ids)), self._paper(sample)) for sample in samples]
            longest = max(len(sample.ids) for sample in samples)
            return [
                self._decode(self._embed(sample, longest), self._released(sample, samples))[: len(sample.ids)]
                for sample in samples
            ]

    def _embed(self, sample: Sequence, length: int) -> Tensor:
        x = self.state["model.embed_tokens.weight"][sample.ids.clamp(min=0)]
        x[sample.ids < 0] = sample.visual
        return F.pad(x, (0, 0, 0, length - len(x)))

    def _paper(self, sample: Sequence) -> dict[str, object]:
        rows = torch.arange(len(sample.ids))
        seen = rows <= rows[:, None]
        is_visual = sample.ids < 0
        alone = not is_visual.any()
        text = ~is_visual & (alone | (rows >= self.config.wings.system_prompt_length))
        return {"causal": seen, "visual": (rows, seen & is_visual), "text": (rows, seen & text), "alone": alone}

    def _released(self, sample: Sequence, samples: list[Sequence]) -> dict[str, object]:
        longest = max(len(each.ids) for each in samples)
        rows, length, patches = torch.arange(longest), len(sample.ids), len(self.blank)
        skipped = self.config.wings.system_prompt_length
        seen = (rows <= rows[:, None]) & (rows < length)

        def entries(each: Sequence) -> list[int]:
            places = (each.ids < 0).nonzero().flatten().tolist()
            if not places:
                return list(range(longest))
            return list(range(skipped, places[0])) + list(range(places[0] + patches, longest))

        most, own = max(len(entries(each)) for each in samples), entries(sample)
        missing = most - len(own)
        own = own + own[-1:] * missing
        mask = seen[:, :most].clone()
        if missing:
            mask[-missing:] = False
        has_image = bool((sample.ids < 0).any())
        any_image = any(bool((each.ids < 0).any()) for each in samples)
        padded = any(len(entries(each)) != most for each in samples)
        first = int((sample.ids < 0).int().argmax()) if has_image else 0
        return {
            "causal": seen,
            "image": (torch.arange(first, first + patches), has_image) if any_image else None,
            "text": (torch.tensor(own), mask),
            "alone": not any_image,
            "once": padded and not missing,
        }

    def _decode(self, x: Tensor, facts: dict[str, object]) -> Tensor:
        first = x
        for layer in range(self.config.llm.num_layers):
            x = self._layer(layer, x, first, facts)
        x = self._norm(x, "model.norm.weight")
        return x @ self.state.get("lm_head.weight", self.state["model.embed_tokens.weight"]).T

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.state[name], self.config.llm.norm_eps)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"))

    def _layer(self, layer: int, x: Tensor, first: Tensor, facts: dict[str, object]) -> Tensor:
        llm, key = self.config.llm, f"model.layers.{layer}"
        normed, rows = self._norm(x, f"{key}.input_layernorm.weight"), torch.arange(len(x))
        q, k, v = (
            self._linear(normed, f"{key}.self_attn.{part}_proj").unflatten(1, (-1, llm.kv_channels)) for part in "qkv"
        )
        q, k = (rotate(part, rows, llm.rope_base, llm.rope_scaling) for part in (q, k))
        out, weights = attention(q, k, v, torch.where(facts["causal"], 0.0, LOWEST))
        u = x + self._linear(out.flatten(1), f"{key}.self_attn.o_proj")
        if self.config.wings.has_learners(layer):
            u = self._learners(key, u, first, weights, facts)
        normed = self._norm(u, f"{key}.post_attention_layernorm.weight")
        gate, up = (self._linear(normed, f"{key}.mlp.{part}_proj") for part in ("gate", "up"))
        return u + self._linear(F.silu(gate) * up, f"{key}.mlp.down_proj")

    def _learners(self, key: str, u: Tensor, first: Tensor, weights: Tensor, facts: dict[str, object]) -> Tensor:
        positions, seen = facts["text"]
        text = self._learn(f"{key}.attn_t_pool", u, first[positions], positions, seen)
        if facts["alone"]:
            return u + text
        if self.config.wings.rule == "paper":
            visual = self._learn(f"{key}.attn_pool", u, first[facts["visual"][0]], *facts["visual"])
        else:
            places, has_image = facts["image"]
            memory = first[places] if has_image else self.blank
            visual = self._learn(f"{key}.attn_pool", u, memory, places, torch.ones(len(u), len(places)).bool())
        router = f"{key}.reweight_module.linear"
        scores = weights.sum(0) @ self.state[f"{router}.weight"][:, : len(u)].T + self.state[f"{router}.bias"]
        shares = F.silu(scores).softmax(-1)
        blend = shares[:, :1] * visual + shares[:, 1:] * text
        if self.config.wings.rule == "paper":
            return u + blend
        return u + 2 * blend - (shares[:, :1] * visual if facts["once"] else 0)

    def _learn(self, key: str, rows: Tensor, memory: Tensor, positions: Tensor, seen: Tensor) -> Tensor:
        def project(x: Tensor, part: str) -> Tensor:
            low = x @ self.state[f"{key}.{part}_proj.0.weight"].T
            return low @ self.state[f"{key}.{part}_proj.1.weight"].T

        heads, base = self.config.llm.num_attention_heads, self.config.llm.rope_base
        q = (rows + project(rows, "q")).unflatten(1, (heads, -1))
        k, v = ((memory + project(memory, part)).unflatten(1, (heads, -1)) for part in "kv")
        out, _ = attention(
            rotate(q, torch.arange(len(rows)), base), rotate(k, positions, base), v, torch.where(seen, 0.0, LOWEST)
        )
        if self.config.wings.rule == "paper":
            out = torch.where(seen.any(1)[:, None, None], out, 0.0)
        return project(out.flatten(1), "o")

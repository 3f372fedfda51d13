"""MultiModal-GPT in plain PyTorch, sample by sample, around transformers' LLaMA and CLIP, with the released names.

Written after mlfoundations/open_flamingo 1 (src/helpers.py, src/flamingo.py) and open-mmlab/Multimodal-GPT: dense
masks, gated blocks in front of every n-th layer, updates of LoRA beside the linear layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

HEAD_DIM = 64


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of everything; no two alike that could be confused."""

    hidden: int = 48
    layers: int = 4
    heads: int = 6
    kv_heads: int = 6
    ffn: int = 40
    vocab: int = 61
    vision: int = 24
    vision_heads: int = 3
    image_size: int = 28
    latents: int = 5
    depth: int = 2
    perceiver_heads: int = 2
    gated_heads: int = 2
    multiplier: int = 2
    every: int = 2
    attend_previous: bool = False
    rank: int = 3
    alpha: float = 6.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "to_q", "to_kv", "to_out", "ff.1", "ff.3")


def feed_forward(width: int, multiplier: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, width * multiplier, bias=False),
        nn.GELU(),
        nn.Linear(width * multiplier, width, bias=False),
    )


def split_heads(rows: Tensor, heads: int) -> Tensor:
    """[..., N, heads * d] -> [..., heads, N, d]."""
    return rows.unflatten(-1, (heads, -1)).transpose(-2, -3)


class ReleasedBlock(nn.Module):
    """GatedCrossAttentionBlock for one sample."""

    def __init__(self, hidden: int, media: int, heads: int, head_dim: int, multiplier: int) -> None:
        super().__init__()
        inner = heads * head_dim
        self.heads, self.scale = heads, head_dim**-0.5
        self.attn = nn.ModuleDict(
            {
                "norm": nn.LayerNorm(hidden),
                "to_q": nn.Linear(hidden, inner, bias=False),
                "to_kv": nn.Linear(media, 2 * inner, bias=False),
                "to_out": nn.Linear(inner, hidden, bias=False),
            }
        )
        self.ff = feed_forward(hidden, multiplier)
        self.attn_gate, self.ff_gate = nn.Parameter(torch.tensor([0.4])), nn.Parameter(torch.tensor([-0.7]))

    def forward(self, x: Tensor, media: Tensor, locations: Tensor, attend_previous: bool) -> Tensor:
        """x [N, H], media [images, L, C], locations bool [N]."""
        time = locations.cumsum(0)
        if not attend_previous:
            time[~locations] += 1
            time[time > locations.sum()] = 0
        media_time = torch.arange(1, len(media) + 1).repeat_interleave(media.shape[1])
        q = split_heads(self.attn["to_q"](self.attn["norm"](x)), self.heads)
        k, v = (split_heads(each, self.heads) for each in self.attn["to_kv"](media.flatten(0, 1)).chunk(2, -1))
        scores = (q @ k.transpose(1, 2) * self.scale).masked_fill(
            time[:, None] != media_time, -torch.finfo(x.dtype).max
        )
        weights = scores.softmax(-1).masked_fill(time[:, None] == 0, 0.0)
        x = x + self.attn["to_out"]((weights @ v).transpose(0, 1).flatten(1)) * self.attn_gate.tanh()
        return x + self.ff(x) * self.ff_gate.tanh()


class ReleasedResampler(nn.Module):
    """PerceiverResampler."""

    def __init__(self, width: int, depth: int, latents: int, heads: int, multiplier: int) -> None:
        super().__init__()
        inner = heads * HEAD_DIM
        self.heads = heads
        self.latents = nn.Parameter(torch.randn(latents, width))
        self.layers = nn.ModuleList()
        for _ in range(depth):
            attention = nn.ModuleDict(
                {
                    "norm_media": nn.LayerNorm(width),
                    "norm_latents": nn.LayerNorm(width),
                    "to_q": nn.Linear(width, inner, bias=False),
                    "to_kv": nn.Linear(width, 2 * inner, bias=False),
                    "to_out": nn.Linear(inner, width, bias=False),
                }
            )
            self.layers.append(nn.ModuleList([attention, feed_forward(width, multiplier)]))
        self.norm = nn.LayerNorm(width)

    def forward(self, features: Tensor) -> Tensor:
        """[images, P, C] -> [images, L, C]."""
        latents = self.latents.expand(len(features), -1, -1)
        for attention, ff in self.layers:
            own = attention["norm_latents"](latents)
            q = split_heads(attention["to_q"](own), self.heads)
            rows = attention["to_kv"](torch.cat((attention["norm_media"](features), own), 1))
            k, v = (split_heads(each, self.heads) for each in rows.chunk(2, -1))
            weights = (q @ k.transpose(-1, -2) * HEAD_DIM**-0.5).softmax(-1)
            latents = latents + attention["to_out"]((weights @ v).transpose(1, 2).flatten(2))
            latents = latents + ff(latents)
        return self.norm(latents)


class ReleasedMultimodalGpt(nn.Module):
    """The whole model; `lora` holds the updates by their released names."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.llama = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=shape.hidden,
                num_hidden_layers=shape.layers,
                num_attention_heads=shape.heads,
                num_key_value_heads=shape.kv_heads,
                intermediate_size=shape.ffn,
                vocab_size=shape.vocab,
                max_position_embeddings=128,
                attn_implementation="eager",
            )
        )
        self.clip = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=shape.vision,
                intermediate_size=20,
                num_hidden_layers=2,
                num_attention_heads=shape.vision_heads,
                image_size=shape.image_size,
                patch_size=14,
            )
        )
        self.perceiver = ReleasedResampler(
            shape.vision, shape.depth, shape.latents, shape.perceiver_heads, shape.multiplier
        )
        self.blocks = nn.ModuleDict(
            {
                str(layer): ReleasedBlock(shape.hidden, shape.vision, shape.gated_heads, HEAD_DIM, shape.multiplier)
                for layer in range(shape.every - 1, shape.layers, shape.every)
            }
        )
        self.lora = {name: nn.Parameter(torch.randn(size) * 0.2) for name, size in self._lora_sizes().items()}
        self._current: tuple[Tensor, Tensor] | None = None
        for name, block in self.blocks.items():
            self.llama.model.layers[int(name)].register_forward_pre_hook(self._hook(block), with_kwargs=True)

    def _linears(self) -> dict[str, str]:
        """Name of each weight with an update -> its released name."""
        names = {}
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and any(name.endswith(f".{target}") for target in self.shape.targets):
                released = "lang_encoder.base_model.model.model.layers."
                if name.startswith("llama.model.layers."):
                    layer, _, rest = name.removeprefix("llama.model.layers.").partition(".")
                    names[name] = f"{released}{layer}.decoder_layer.{rest}"
                elif name.startswith("blocks."):
                    layer, _, rest = name.removeprefix("blocks.").partition(".")
                    names[name] = f"{released}{layer}.gated_cross_attn_layer.{rest}"
        return names

    def _lora_sizes(self) -> dict[str, tuple[int, int]]:
        sizes = {}
        for name, released in self._linears().items():
            rows, columns = self.get_submodule(name).weight.shape
            sizes[f"{released}.lora_A.default.weight"] = (self.shape.rank, columns)
            sizes[f"{released}.lora_B.default.weight"] = (rows, self.shape.rank)
        return sizes

    def _hook(self, block: nn.Module) -> Any:
        def read(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._current is None:
                return None
            hidden, *rest = args
            return (block(hidden[0], *self._current, self.shape.attend_previous)[None], *rest), kwargs

        return read

    def merged(self) -> dict[str, Tensor]:
        """Weights with their updates."""
        scale = self.shape.alpha / self.shape.rank
        return {
            f"{name}.weight": self.get_submodule(name).weight
            + scale * self.lora[f"{key}.lora_B.default.weight"] @ self.lora[f"{key}.lora_A.default.weight"]
            for name, key in self._linears().items()
        }

    def logits(self, ids: Tensor, pixels: Tensor | None) -> Tensor:
        """Of one sample: ids [N], pixels [images, 3, h, w] or None -> [N, vocabulary]."""
        return torch.func.functional_call(self, self.merged(), (ids, pixels))

    def forward(self, ids: Tensor, pixels: Tensor | None) -> Tensor:
        self._current = None
        if pixels is not None:
            with torch.no_grad():
                features = self.clip(pixels).last_hidden_state[:, 1:]
            self._current = self.perceiver(features), ids == self.shape.vocab - 1
        return self.llama(ids[None]).logits[0]

    def write(self, folder: Path) -> dict[str, Path]:
        """The released files; arguments of `parrot convert` by name."""
        self.llama.save_pretrained(folder / "llama")
        self.clip.save_pretrained(folder / "clip")
        (folder / "clip" / "preprocessor_config.json").write_text(
            f'{{"image_processor_type": "CLIPImageProcessor", "crop_size": {self.shape.image_size}, '
            f'"size": {{"shortest_edge": {self.shape.image_size}}}, "image_mean": [0.5, 0.5, 0.5], '
            f'"image_std": [0.5, 0.5, 0.5], "resample": 3}}'
        )
        flamingo = {f"perceiver.{name}": value for name, value in self.perceiver.state_dict().items()}
        for name, value in self.blocks.state_dict().items():
            flamingo[f"lang_encoder.gated_cross_attn_layers.{name}"] = value
        torch.save(flamingo, folder / "open_flamingo.pt")
        tuning = {"lora": True, "lora_r": self.shape.rank, "lora_alpha": self.shape.alpha, "lora_dropout": 0.0}
        updates = {f"module.{name}": value.detach() for name, value in self.lora.items()}
        torch.save({"epoch": 0, "model_state_dict": updates, "tuning_config": tuning}, folder / "mmgpt-lora.pt")
        return {
            "llm": folder / "llama",
            "flamingo": folder / "open_flamingo.pt",
            "lora": folder / "mmgpt-lora.pt",
            "vision": folder / "clip",
        }


def mean_loss(logits: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
    """Mean over all labels of all samples; labels are not shifted."""
    return F.cross_entropy(
        torch.cat([each[:-1] for each in logits]), torch.cat([each[1:] for each in labels]), ignore_index=-100
    )

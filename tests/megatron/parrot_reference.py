"""A tiny Parrot, micro-batches for it, and the same computation sample by sample in plain torch and transformers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen2ForCausalLM

from parrot_sys.data.batch import PackedBatch
from parrot_sys.data.constants import IGNORE_ID, IMAGE_TOKEN_ID
from parrot_sys.models.llm import LLMConfig
from parrot_sys.modules.routing_config import TextGuidedMoEConfig
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.towers import VisionConfig

CONFIG = ParrotConfig(
    vision=VisionConfig(
        image_size=28, patch_size=14, hidden_size=24, num_layers=2, num_attention_heads=3, ffn_hidden_size=40
    ),
    moe=TextGuidedMoEConfig(num_experts=3, ffn_hidden_size=20),
    llm=LLMConfig(
        hidden_size=32,
        num_layers=2,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=48,
        vocab_size=80,
        rope_base=10_000.0,
        max_position_embeddings=256,
    ),
)
V = CONFIG.vision.num_visual_rows


@dataclass(frozen=True)
class Sample:
    """`prompt` text rows, after the first of them the rows of `images` images, then `answer` rows with labels."""

    prompt: int
    images: int
    answer: int


MIXED = (
    Sample(prompt=5, images=1, answer=4),
    Sample(prompt=3, images=0, answer=6),
    Sample(prompt=6, images=2, answer=1),
)


def make_batch(
    samples: tuple[Sample, ...], *, pixels: bool = False, seed: int = 7, rows_per_image: int = V
) -> PackedBatch:
    """A packed micro-batch with random ids and random image features (or pixel values)."""
    generator = torch.Generator().manual_seed(seed)
    ids, labels, positions, lengths, guidance, spans, image_sample = [], [], [], [0], [], [], []
    row = 0
    for index, sample in enumerate(samples):
        text = torch.randint(0, CONFIG.llm.vocab_size, (sample.prompt + sample.answer,), generator=generator)
        visual = torch.full((sample.images * rows_per_image,), IMAGE_TOKEN_ID)
        sample_ids = torch.cat([text[:1], visual, text[1:]])
        first_answer = sample_ids.numel() - sample.answer
        shifted = torch.full_like(sample_ids, IGNORE_ID)
        shifted[first_answer - 1 : -1] = sample_ids[first_answer:]
        guiding = (sample_ids[:first_answer] != IMAGE_TOKEN_ID).nonzero().flatten() + row
        start = sum(g.numel() for g in guidance)
        guidance.append(guiding)
        spans += [(start, start + guiding.numel())] * sample.images
        image_sample += [index] * sample.images
        ids.append(sample_ids)
        labels.append(shifted)
        positions.append(torch.arange(sample_ids.numel()))
        lengths.append(sample_ids.numel())
        row += sample_ids.numel()
    if not samples:
        return PackedBatch.empty()
    all_ids, all_labels = torch.cat(ids), torch.cat(labels)
    visual_rows = (all_ids == IMAGE_TOKEN_ID).nonzero().flatten()
    n, vision = len(image_sample), CONFIG.vision
    features = torch.randn(n, V, vision.hidden_size, generator=generator)
    images = torch.randn(n, 3, vision.image_size, vision.image_size, generator=generator)
    return PackedBatch(
        input_ids=all_ids,
        labels=all_labels,
        label_rows=(all_labels != IGNORE_ID).nonzero().flatten(),
        position_ids=torch.cat(positions),
        cu_seqlens=torch.tensor(lengths).cumsum(0).int(),
        max_seqlen=max(lengths),
        visual_rows=visual_rows,
        visual_source=torch.arange(visual_rows.numel()),
        guidance_rows=torch.cat(guidance),
        guidance_start=torch.tensor([s for s, _ in spans], dtype=torch.int32),
        guidance_end=torch.tensor([e for _, e in spans], dtype=torch.int32),
        image_sample=torch.tensor(image_sample, dtype=torch.int64),
        pixel_values=images if pixels and n else None,
        image_features=features if n and not pixels else None,
    )


def moe_reference(state: dict[str, Tensor], features: Tensor, text: Tensor, residual_weight: float) -> Tensor:
    """One image: features [V, H], guiding text [N, H] (the released rule, every expert, in the order it is written)."""
    attention = torch.softmax(features[0] @ text.T / math.sqrt(features.shape[1]), dim=-1)
    probs = torch.softmax((attention @ text) @ state["router_weight"].T, dim=-1)
    output = residual_weight * features
    for e in range(probs.numel()):
        gate, up = state["w_gate_up"][e]
        output = output + probs[e] * ((F.silu(features @ gate.T) * (features @ up.T)) @ state["w_down"][e])
    return output


def reference_logits(
    reference: Qwen2ForCausalLM,
    model: torch.nn.Module,
    batch: PackedBatch,
    features: Tensor | None,
    *,
    use_moe: bool = True,
) -> Tensor:
    """Logits [T, vocabulary]: sample by sample, image by image; projector and MoE tensors are `model`'s own."""
    bounds, logits, image = batch.cu_seqlens.tolist(), [], 0
    moe = dict(model.moe.named_parameters())
    for index, (start, end) in enumerate(pairwise(bounds)):
        ids, labels = batch.input_ids[start:end], batch.labels[start:end]
        answer = torch.cat([labels.new_full((1,), IGNORE_ID), labels[:-1]]) != IGNORE_ID
        is_text = ids != IMAGE_TOKEN_ID
        words = reference.model.embed_tokens(ids[is_text])
        text = words[~answer[is_text]]
        parts, taken = [], 0
        for run in torch.unique_consecutive(is_text, return_counts=True)[1].split(1):
            if is_text[sum(p.shape[0] for p in parts)]:
                parts.append(words[taken : taken + int(run)])
                taken += int(run)
                continue
            for _ in range(int(run) // V):
                rows = model.projector(features[image])
                parts.append(moe_reference(moe, rows, text, CONFIG.moe.residual_weight) if use_moe else rows)
                assert int(batch.image_sample[image]) == index
                image += 1
        logits.append(reference(inputs_embeds=torch.cat(parts)[None]).logits[0])
    return torch.cat(logits)

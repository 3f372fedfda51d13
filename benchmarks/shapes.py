"""Named shapes that benchmarks share.

Image routing is that of Parrot: 577 rows an image (CLIP-L/336 with its CLS row) and one route. Token routing is that of
public MoE language models, and of the grid that SonicMoE (arXiv 2512.14080) measures: `d` hidden, `n` expert width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from parrot_kernels.testing import MoEShape

# Small enough for two cores. `cpu_dense` has Parrot's 577 rows an image and 6 experts at a quarter of its width.
CPU_DENSE = MoEShape(images=4, rows=577, hidden=1024, experts=6, ffn=1024, topk=2)
# Where the number of calls decides, not the size of the products.
CPU_MANY_SMALL = MoEShape(images=64, rows=17, hidden=256, experts=6, ffn=256, topk=2)

TEXT_ROWS = 60
"""Guiding text rows of each image."""

BATCHES = (4, 16, 1, 64)
"""Images in a micro-batch, the most telling first: a run that is out of time has measured those."""


@dataclass(frozen=True, kw_only=True)
class TokenShape:
    """Token routing: each of `tokens` rows goes to `topk` of `experts`."""

    tokens: int
    hidden: int
    experts: int
    ffn: int
    topk: int


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """Packed samples of one length; `keys` rows of an image for cross-attention."""

    samples: int
    length: int
    heads: int
    kv_heads: int
    width: int
    keys: int = 0


@dataclass(frozen=True, kw_only=True)
class HeadShape:
    """LM head over label rows."""

    labels: int
    hidden: int
    vocabulary: int


PARROT = {
    "parrot_7b": MoEShape(images=1, rows=577, hidden=4096, experts=6, ffn=4096),
    "parrot_14b": MoEShape(images=1, rows=577, hidden=5120, experts=6, ffn=4096),
}
CPU_IMAGES = {"cpu_images": MoEShape(images=3, rows=37, hidden=64, experts=6, ffn=48)}

TOKENS = {
    "d4096_n2048_e64_k4": TokenShape(tokens=32768, hidden=4096, experts=64, ffn=2048, topk=4),
    "d4096_n1024_e64_k4": TokenShape(tokens=32768, hidden=4096, experts=64, ffn=1024, topk=4),
    "d1536_n256_e128_k8": TokenShape(tokens=24576, hidden=1536, experts=128, ffn=256, topk=8),
    "qwen3_30b_a3b": TokenShape(tokens=32768, hidden=2048, experts=128, ffn=768, topk=8),
    # One of 8 expert-parallel ranks: 32 of the 256 experts, with the rows that 8 times 8192 tokens send there.
    "deepseek_v3_ep8": TokenShape(tokens=8192, hidden=7168, experts=32, ffn=2048, topk=8),
}
TOKEN_ROUTING = {
    "qwen3_30b_a3b": TOKENS["qwen3_30b_a3b"],
    "deepseek_v3": TokenShape(tokens=32768, hidden=7168, experts=256, ffn=2048, topk=8),
}
CPU_TOKENS = {"cpu_tokens": TokenShape(tokens=64, hidden=64, experts=8, ffn=48, topk=2)}

# Wings on Qwen1.5-7B, and a long context with grouped heads (Qwen2-7B).
ROUTER_ATTENTION = {
    "wings_7b": AttentionShape(samples=4, length=2048, heads=32, kv_heads=32, width=128),
    "qwen2_7b_8k": AttentionShape(samples=1, length=8192, heads=28, kv_heads=4, width=128),
}
CPU_ROUTER_ATTENTION = {"cpu": AttentionShape(samples=2, length=48, heads=4, kv_heads=2, width=16)}
# MultiModal-GPT (OpenFlamingo-9B): text rows to the 64 resampled tokens of their image.
SEGMENT_ATTENTION = {
    "flamingo_9b": AttentionShape(samples=16, length=512, heads=8, kv_heads=8, width=64, keys=64),
    "wings_7b": AttentionShape(samples=8, length=1024, heads=32, kv_heads=32, width=128, keys=577),
}
CPU_SEGMENT_ATTENTION = {"cpu": AttentionShape(samples=3, length=40, heads=2, kv_heads=2, width=16, keys=9)}
# Decoding with the paged cache: 64 answers of Qwen2-7B after 2,048 rows, and 32 of Qwen1.5-7B.
PAGED_ATTENTION = {
    "qwen2_7b": AttentionShape(samples=64, length=2048, heads=28, kv_heads=4, width=128),
    "wings_7b": AttentionShape(samples=32, length=1024, heads=32, kv_heads=32, width=128),
}
CPU_PAGED_ATTENTION = {"cpu": AttentionShape(samples=3, length=48, heads=4, kv_heads=2, width=16)}

HEADS = {
    "parrot_7b": HeadShape(labels=4096, hidden=4096, vocabulary=151_936),
    "parrot_14b": HeadShape(labels=4096, hidden=5120, vocabulary=152_064),
}
CPU_HEADS = {"cpu": HeadShape(labels=32, hidden=64, vocabulary=1000)}


def images(device: str) -> Iterator[tuple[str, MoEShape]]:
    """Image routing at every batch size, by name; one small shape on a CPU."""
    if device == "cpu":
        yield from CPU_IMAGES.items()
        return
    for batch in BATCHES:
        for name, shape in PARROT.items():
            yield f"{name}_b{batch}", sized(shape, images=batch)


def sized(shape: MoEShape, *, images: int | None = None, topk: int | None = None) -> MoEShape:
    """`shape` with another number of images or chosen experts."""
    return MoEShape(
        images=shape.images if images is None else images,
        rows=shape.rows,
        hidden=shape.hidden,
        experts=shape.experts,
        ffn=shape.ffn,
        topk=shape.topk if topk is None else topk,
    )

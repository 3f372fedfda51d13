"""Stage `accelerators`: models built of Transformer Engine's or apex's layers against the same ones built without.

A row builds a part of the model twice, gives both the same weights by name (so the names of their checkpoints must
agree), and compares outputs and all gradients with those in float64, by the rule of the stage `correctness`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.workload import Unavailable
from parrot_kernels.testing import assert_all_accurate, max_error

WORKERS = 1
ROW_SECONDS = 150
# Only these: Transformer Engine may multiply float32 in TF32.
DTYPE = torch.bfloat16
NORMS = {"decoder": "RMSNorm", "vision": "LayerNorm"}

Part = tuple[nn.Module, Callable[[], Tensor]]


def rows(device: str) -> list[str]:
    """`backend/part`; apex has nothing for the decoder."""
    return ["transformer_engine/decoder", "transformer_engine/vision", "apex/vision"]


def run_row(row: str, device: str) -> dict[str, Any]:
    """Errors of one part relative to the largest value, by output and gradient.

    Raises:
        AssertionError: names or results differ.
        Unavailable: the accelerator cannot be used here, or another one goes before it.
    """
    from parrot_sys.megatron.runtime import backends

    backend, part = row.split("/")
    why_not = backends.transformer_engine() if backend == "transformer_engine" else backends.apex()
    if why_not is not None:
        raise Unavailable(f"{backend}: {why_not}")
    with backends.building_for(torch.device(device)):
        if (chosen := backends.norm_backend(NORMS[part])) != backend:
            raise Unavailable(f"{backend}: {chosen} is taken here")
    return {"errors": compare(part, torch.device(device))}


def compare(part: str, device: torch.device) -> dict[str, float]:
    """Errors of the part as it is built here, after they were found small enough.

    Raises:
        AssertionError: they are not, or the names of the parameters differ.
    """
    from parrot_sys.megatron.runtime.initialize import initialize, shutdown

    initialize()
    try:
        exact, weights = _results(part, torch.float64, device, accelerated=False)
        plain, _ = _results(part, DTYPE, device, weights, accelerated=False)
        own, _ = _results(part, DTYPE, device, weights, accelerated=True)
    finally:
        shutdown()
    assert_all_accurate(own, exact, plain)
    scales = {name: float(value.abs().max()) or 1.0 for name, value in exact.items()}
    return {name: max_error(value, exact[name]) / scales[name] for name, value in own.items()}


def _results(
    part: str,
    dtype: torch.dtype,
    device: torch.device,
    weights: dict[str, Tensor] | None = None,
    *,
    accelerated: bool,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Output and gradients by name, and the weights; these are rounded to what DTYPE holds."""
    from parrot_sys.megatron.runtime import backends

    torch.manual_seed(0)
    built = contextlib.nullcontext() if accelerated else backends.without_accelerators()
    with built, backends.building_for(device):
        module, run = {"decoder": _decoder, "vision": _vision}[part](dtype, device)
    parameters = dict(module.named_parameters())
    if weights is None:
        weights = {name: p.detach().to(DTYPE) for name, p in parameters.items()}
    assert parameters.keys() == weights.keys(), "the names of the parameters differ"
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    output = run()
    output.backward(_normal(*output.shape).to(output))
    gradients = {f"grad_{name}": p.grad for name, p in parameters.items() if p.grad is not None}
    return {"output": output.detach(), **gradients}, weights


def _normal(*shape: int) -> Tensor:
    """The same values on every call, such as DTYPE holds."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DTYPE)


def _decoder(dtype: torch.dtype, device: torch.device) -> Part:
    """Two layers over a pack of three samples; logits."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from parrot_sys.megatron.config import to_transformer_config
    from parrot_sys.megatron.decoder import Decoder
    from parrot_sys.megatron.runtime.initialize import ParallelConfig
    from parrot_sys.models.llm import LLMConfig

    llm = LLMConfig(
        hidden_size=128,
        num_layers=2,
        num_attention_heads=2,
        num_query_groups=1,
        ffn_hidden_size=256,
        vocab_size=64,
        max_position_embeddings=128,
    )
    config = to_transformer_config(llm, ParallelConfig(), dtype=dtype)
    decoder = Decoder(llm, config, pg_collection=ProcessGroupCollection.use_mpu_process_groups()).to(device)
    lengths = (24, 8, 32)
    positions = torch.cat([torch.arange(n) for n in lengths]).to(device)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    embeddings = _normal(sum(lengths), llm.hidden_size).to(device, dtype)
    return decoder, lambda: decoder(embeddings, positions, cu_seqlens, max(lengths))


def _vision(dtype: torch.dtype, device: torch.device) -> Part:
    """A CLIP tower of two layers over two images."""
    from parrot_sys.megatron.vision import build_vision_tower
    from parrot_sys.towers import VisionConfig

    config = VisionConfig(
        image_size=56,
        patch_size=14,
        hidden_size=128,
        num_layers=2,
        num_attention_heads=2,
        ffn_hidden_size=256,
        select_layer=-1,
    )
    tower = build_vision_tower(config, dtype=dtype).to(device)
    pixels = _normal(2, 3, 56, 56).to(device, dtype)
    return tower, lambda: tower(pixels)

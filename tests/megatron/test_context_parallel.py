"""The model over context-parallel ranks: losses of every label row and summed gradients equal one process's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor

from parrot_sys.data.batch import PackedBatch
from parrot_sys.errors import ConfigError, DataError
from parrot_sys.megatron.model import MultimodalModel
from parrot_sys.megatron.runtime.initialize import ParallelConfig, initialize, shutdown
from parrot_sys.systems.build import build_model
from parrot_sys.testing.distributed import run_distributed
from tests.megatron.pages import Pages
from tests.megatron.parrot_reference import CONFIG, MIXED, Sample, make_batch

BATCHES = {
    "mixed": make_batch(MIXED, pixels=True),
    "text-only": make_batch((Sample(prompt=4, images=0, answer=3), Sample(prompt=1, images=0, answer=1)), pixels=True),
    "one short sample": make_batch((Sample(prompt=1, images=0, answer=1),), pixels=True),
    "five images": make_batch((Sample(prompt=3, images=5, answer=2),), pixels=True),
    # Rows go several times back and forth over two ranks; the last sample begins in the middle of a chunk.
    "long": make_batch(
        (Sample(prompt=40, images=2, answer=700), Sample(prompt=9, images=1, answer=330), *MIXED), pixels=True
    ),
    "empty": PackedBatch.empty(),
}


@pytest.fixture(autouse=True)
def _groups() -> Iterator[None]:
    yield
    shutdown()


def _model(parallel: ParallelConfig) -> MultimodalModel:
    initialize(parallel)
    torch.manual_seed(11)
    return build_model(CONFIG, parallel)


def _forward_backward(model: MultimodalModel) -> dict[str, tuple[Tensor, Tensor, dict[str, Tensor]]]:
    """Label rows of this rank, their losses, and gradients, for each micro-batch."""
    results = {}
    for name, batch in BATCHES.items():
        model.zero_grad()
        share = model.share_of_rank(batch)
        losses = model(share).losses
        losses.sum().backward()
        gradients = {key: p.grad.clone() for key, p in model.named_parameters()}
        with torch.no_grad():
            torch.testing.assert_close(model(share).losses, losses.detach())
        results[name] = (share.label_rows, losses.detach(), gradients)
    return results


@pytest.mark.parametrize("size", [2, 4])
def test_losses_and_gradients_are_those_of_one_process(size: int) -> None:
    wanted = _forward_backward(_model(ParallelConfig()))
    shutdown()
    ranks = run_distributed(lambda *_: _forward_backward(_model(ParallelConfig(context_parallel_size=size))), size)
    for name, (label_rows, losses, gradients) in wanted.items():
        rows, parts, _ = zip(*(rank[name] for rank in ranks), strict=True)
        order = torch.cat(rows).argsort()
        assert torch.equal(torch.cat(rows)[order], label_rows)
        torch.testing.assert_close(torch.cat(parts)[order], losses, rtol=1e-5, atol=1e-5)
        scale = max(float(gradient.abs().max()) for gradient in gradients.values())
        for key, gradient in gradients.items():
            total = sum(rank[name][2][key] for rank in ranks)
            # Biases of keys have no gradient but rounding errors: measured by the model's largest gradient.
            bound = 1e-5 * max(float(gradient.abs().max()), 1e-2 * scale)
            assert (total - gradient).abs().max() <= bound, f"{name}: {key}"


def test_what_it_cannot_do_is_an_error() -> None:
    def on_rank(rank: int, size: int) -> None:
        model = _model(ParallelConfig(context_parallel_size=size))
        batch = BATCHES["text-only"]
        with pytest.raises(DataError, match=rf"rank {rank} of 2, got a whole micro-batch: pass model.share_of_rank"):
            model(batch)
        share = model.share_of_rank(batch)
        with pytest.raises(ConfigError, match="losses for training only, got context_parallel_size=2 for logits"):
            model(share, mode="logits")
        with pytest.raises(ConfigError, match="for a KV cache"):
            model(share, paged=Pages(batch.num_samples, batch.max_seqlen).rows(batch.cu_seqlens.diff().tolist()))
        with pytest.raises(ConfigError, match="dealt over 2 context-parallel ranks, got a whole pack"):
            model.decoder(None, batch.position_ids, batch.cu_seqlens, batch.max_seqlen)
        parallel_state.destroy_model_parallel()
        alone = _model(ParallelConfig())
        assert alone.share_of_rank(batch) is batch
        with pytest.raises(DataError, match=rf"rank 0 of 1, got that of rank {rank} of 2"):
            alone(share)

    run_distributed(on_rank, 2)

"""Data-parallel ranks write even shares of a checkpoint, and share the reading."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from parrot_sys.megatron.checkpoint import reader as checkpoint_reader
from parrot_sys.megatron.checkpoint.shares import _cut
from parrot_sys.megatron.runtime.initialize import ParallelConfig
from parrot_sys.testing.distributed import run_distributed
from parrot_sys.training.config import CheckpointConfig, OptimizerConfig, TrainConfig
from parrot_sys.training.trainer import Trainer
from tests.training.tiny import MODEL, losses, signal_before, tiny_config


def _config(folder: Path, output: str, *, zero1: bool, parallel: ParallelConfig | None = None) -> TrainConfig:
    """With an embedding and a head that are more than half of the model: 80 MB with the optimizer."""
    base = tiny_config(folder, output=output, copies=1)
    llm = replace(base.model.llm, vocab_size=12_000, hidden_size=160, ffn_hidden_size=320)
    return replace(
        base,
        model=replace(base.model, llm=llm, tokenizer_path=str(MODEL)),
        optimizer=OptimizerConfig(lr=1e-3, distributed=zero1),
        parallel=parallel or ParallelConfig(),
        max_steps=2,
        checkpoint=CheckpointConfig(interval=1, export=False),
    )


def _written(config: TrainConfig, step: int) -> list[int]:
    """Bytes in the file of each rank."""
    folder = Path(config.output) / "checkpoints" / f"step-{step:08d}"
    return [path.stat().st_size for path in sorted(folder.glob("__*.distcp"))]


def _train(config: TrainConfig, ranks: int, *, stop_behind: int | None = None) -> list[int]:
    """The bytes that each rank has read of a checkpoint."""

    def rank_main(rank: int, size: int) -> int:
        read, taken = checkpoint_reader.DataReader.read_data, [0]

        def counted(self: Any, plan: Any, planner: Any) -> Any:
            taken[0] += sum(self.storage_data[item.storage_index].length for item in plan.items)
            return read(self, plan, planner)

        checkpoint_reader.DataReader.read_data = counted
        trainer = Trainer(config)
        if stop_behind is not None:
            signal_before(stop_behind, signal.SIGTERM)(trainer)
        trainer.run()
        return taken[0]

    return run_distributed(rank_main, ranks)


@pytest.mark.parametrize(
    ("ranks", "zero1", "parallel"),
    [
        pytest.param(2, False, ParallelConfig(), id="dp2", marks=pytest.mark.slow),
        pytest.param(2, True, ParallelConfig(), id="dp2-zero1"),
        pytest.param(4, True, ParallelConfig(), id="dp4-zero1", marks=pytest.mark.slow),
        pytest.param(4, True, ParallelConfig(expert_model_parallel_size=2), id="dp4-ep2-zero1", marks=pytest.mark.slow),
        pytest.param(4, False, ParallelConfig(tensor_model_parallel_size=2), id="tp2-dp2", marks=pytest.mark.slow),
    ],
)
def test_every_rank_writes_and_reads_its_share(
    ranks: int, zero1: bool, parallel: ParallelConfig, tmp_path: Path
) -> None:
    config = _config(tmp_path, "run", zero1=zero1, parallel=parallel)
    _train(config, ranks, stop_behind=1)
    written = _written(config, 1)
    even = sum(written) / ranks
    assert len(written) == ranks
    assert even > 10e6, "too small to tell"
    assert max(written) <= 1.1 * even, written
    assert min(written) >= 0.9 * even, written
    read = _train(config, ranks)
    assert sum(read) <= 1.05 * sum(written), "nothing is read twice"
    assert max(read) <= 0.75 * sum(written), read
    whole = _config(tmp_path, "whole", zero1=zero1, parallel=parallel)
    _train(whole, ranks)
    assert losses(config) == losses(whole)


@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 20),
    place=st.integers(1, 4).flatmap(lambda n: st.tuples(st.integers(0, n - 1), st.just(n))),
    layers=st.integers(0, 3),
    size=st.integers(1, 4000),
)
@settings(max_examples=150, deadline=None)
def test_pieces_are_the_tensor(rows: int, columns: int, place: tuple[int, int], layers: int, size: int) -> None:
    data = torch.arange(rows * columns, dtype=torch.float32).view(rows, columns)
    prepended = [(0, 0, layers)] if layers else []
    axis = len(prepended)
    tensor = ShardedTensor.from_rank_offsets("w", data, *prepended, (axis, *place), prepend_axis_num=axis)
    pieces = _cut(tensor, size)
    if isinstance(pieces, ShardedTensor):
        assert pieces is tensor
        return
    assert len(pieces) > 1
    assert torch.equal(torch.cat([piece.data for piece in pieces]), data)
    at = tensor.global_offset[axis]
    for piece in pieces:
        assert piece.global_offset[axis] == at
        assert piece.global_shape == tensor.global_shape
        assert piece.max_allowed_chunks()[axis:] == tuple(piece.data.shape), "a regular grid"
        at += len(piece.data)

"""Checkpoints of GroupedExperts and of Megatron's SequentialMLP load on each other, with the optimizer's state."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core import dist_checkpointing

from parrot_sys.megatron.runtime.initialize import ParallelConfig, initialize, shutdown
from parrot_sys.testing.distributed import run_distributed
from tests.megatron import gpt_training as gpt
from tests.megatron.gpt_training import LAYOUTS


@pytest.fixture
def _groups() -> Iterator[None]:
    initialize()
    yield
    shutdown()


@pytest.mark.parametrize(
    ("begin", "ours_begins", "end", "ours_ends"),
    [("tp2-ep2", True, "ep2", False), ("ep2", False, "tp2-ep2", True), ("tp2-etp2", True, "one", False)],
)
def test_training_goes_on_with_the_other_experts_on_another_layout(
    begin: str, ours_begins: bool, end: str, ours_ends: bool, tmp_path: Path
) -> None:
    layouts = {**LAYOUTS, "one": (1, ParallelConfig())}
    (size, parallel), (other_size, other) = layouts[begin], layouts[end]
    wanted, *_ = run_distributed(gpt.save_in_the_middle, size, parallel, tmp_path, ours_begins, timeout=120)
    for losses in run_distributed(gpt.go_on, other_size, other, tmp_path, ours_ends, timeout=120):
        np.testing.assert_allclose(losses, wanted[2:], rtol=1e-5, equal_nan=False)


@pytest.mark.parametrize("ours", [False, True])
def test_the_optimizer_of_two_expert_parallel_processes_does_not_go_to_one(ours: bool, tmp_path: Path) -> None:
    size, parallel = LAYOUTS["ep2"]
    run_distributed(gpt.save_in_the_middle, size, parallel, tmp_path, ours, timeout=120)
    with pytest.raises(Exception, match="optimizer"):  # a limit of Megatron's, with its own experts too
        run_distributed(gpt.go_on, 1, ParallelConfig(), tmp_path, ours, timeout=120)


@pytest.mark.usefixtures("_groups")
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("ours_first", [False, True])
def test_the_same_files_whoever_wrote_them(apart: bool, ours_first: bool, tmp_path: Path) -> None:
    config = gpt.make_config(ParallelConfig(), moe_shared_expert_intermediate_size=8)
    first, second = gpt.build(config, ours=ours_first), gpt.build(config, ours=not ours_first)
    gpt.save(first, tmp_path / "a", apart=apart)
    gpt.load(second, tmp_path / "a", apart=apart)
    gpt.save(second, tmp_path / "b", apart=apart)
    again = gpt.build(config, ours=ours_first)
    gpt.load(again, tmp_path / "b", apart=apart)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, dict(again.named_parameters())[name]), name
    mlp = (second if ours_first else first).decoder.layers[0].mlp.experts.local_experts[3]
    experts = (first if ours_first else second).decoder.layers[0].mlp.experts
    assert torch.equal(experts.w_gate_up[3].flatten(0, 1), mlp.linear_fc1.weight)
    assert torch.equal(experts.w_down[3], mlp.linear_fc2.weight)
    tensors = [dist_checkpointing.load_tensors_metadata(str(tmp_path / name)) for name in ("a", "b")]
    shapes = [{key: tensor.global_shape for key, tensor in found.items()} for found in tensors]
    assert shapes[0] == shapes[1]

"""run_distributed: results by rank, and that no failure of a rank hangs or hides."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parrot_sys.testing.distributed import run_distributed


def test_results_come_back_by_rank() -> None:
    offset = torch.tensor([1.0, 2.0])

    def reduce(rank: int, world_size: int, factor: float) -> tuple[Tensor, int, int]:
        value = (offset + rank) * factor
        dist.all_reduce(value)
        return value, rank, world_size

    results = run_distributed(reduce, 3, 2.0)
    assert [result[1:] for result in results] == [(0, 3), (1, 3), (2, 3)]
    for value, _, _ in results:
        torch.testing.assert_close(value, torch.tensor([12.0, 18.0]))


def test_gradients_work_after_the_parent_has_used_threads() -> None:
    def grad(rank: int, world_size: int) -> float:
        x = torch.ones(64, 64, requires_grad=True)
        (x @ x).sum().backward()
        assert x.grad is not None
        return float(x.grad.sum())

    torch.set_num_threads(2)
    try:
        x = torch.randn(256, 256, requires_grad=True)
        (x @ x).sum().backward()
    finally:
        torch.set_num_threads(1)
    assert run_distributed(grad, 2) == [2.0 * 64**3] * 2


def test_one_rank_forms_a_group_too() -> None:
    assert run_distributed(lambda rank, world_size: dist.get_world_size(), 1) == [1]


def test_the_traceback_of_a_failed_rank_is_shown_and_the_others_do_not_hang() -> None:
    def fail(rank: int, world_size: int) -> None:
        if rank == 1:
            raise ValueError("boom on purpose")
        time.sleep(100)

    start = time.monotonic()
    with pytest.raises(RuntimeError, match="boom on purpose") as caught:
        run_distributed(fail, 2, timeout=60)
    assert time.monotonic() - start < 30
    assert "--- rank 0 ---" in str(caught.value)
    assert "in fail" in str(caught.value)


def test_a_rank_that_hangs_is_killed_and_its_place_named() -> None:
    def wait_for_nothing(rank: int, world_size: int) -> None:
        if rank == 1:
            time.sleep(100)

    start = time.monotonic()
    with pytest.raises(RuntimeError, match="1 of 2 ranks failed") as caught:
        run_distributed(wait_for_nothing, 2, timeout=6)  # a busy machine needs seconds to reach the function
    assert time.monotonic() - start < 30
    assert "in wait_for_nothing" in str(caught.value)


def test_a_rank_that_dies_is_reported_with_its_exit_code() -> None:
    def die(rank: int, world_size: int) -> None:
        if rank == 0:
            os._exit(7)

    with pytest.raises(RuntimeError, match="exit code 7"):
        run_distributed(die, 2, timeout=10)


@pytest.mark.gpu
def test_nccl() -> None:
    assert run_distributed(_sum_on_gpu, 1, backend="nccl", timeout=120) == [3.0]


def _sum_on_gpu(rank: int, world_size: int) -> float:
    value = torch.tensor(3.0, device="cuda")
    dist.all_reduce(value)
    return value.item()

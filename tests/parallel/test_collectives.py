"""Collectives with autograd on two gloo ranks, and the vocabulary split over them."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from parrot_sys.parallel import (
    all_gather_rows,
    all_reduce_max,
    all_to_all_rows,
    copy_to_group,
    gather_from_group,
    reduce_from_group,
    reduce_scatter_rows,
    split_counts,
    split_to_group,
    vocab_parallel_linear_cross_entropy,
)
from parrot_sys.testing.distributed import run_distributed


def test_one_process_sends_nothing() -> None:
    x = torch.randn(3, requires_grad=True)
    assert reduce_from_group(x, None) is x
    assert copy_to_group(x, None) is x
    assert all_gather_rows(x, [3], None) is x
    assert torch.equal(all_reduce_max(x, None), x)
    assert split_to_group(x, None) is x
    assert gather_from_group(x, 3, None) is x
    assert all_gather_rows(x, [3], None) is x
    assert reduce_scatter_rows(x, [3], None) is x
    assert all_to_all_rows(x, [3], [3], None) is x


def test_values_and_gradients_on_two_ranks() -> None:
    def on_rank(rank: int, _: int) -> dict[str, torch.Tensor]:
        group = dist.group.WORLD
        x = torch.tensor([1.0 + rank, 5.0 - rank], requires_grad=True)
        factor = torch.tensor([2.0, 3.0 + rank])
        results = {"max": all_reduce_max(x, group), "reduced": reduce_from_group(x, group)}
        (results["reduce_grad"],) = torch.autograd.grad((results["reduced"] * factor).sum(), x)
        results["copied"] = copy_to_group(x, group)
        (results["copy_grad"],) = torch.autograd.grad((results["copied"] * factor).sum(), x)
        return {name: value.detach() for name, value in results.items()}

    for rank, results in enumerate(run_distributed(on_rank, 2)):
        assert results["max"].tolist() == [2.0, 5.0]
        assert results["reduced"].tolist() == [3.0, 9.0]
        assert results["reduce_grad"].tolist() == [2.0, 3.0 + rank]
        assert results["copied"].tolist() == [1.0 + rank, 5.0 - rank]


def test_uneven_rows_are_gathered_and_their_gradients_summed() -> None:
    def on_rank(rank: int, _: int) -> list[list[float]]:
        group, results = dist.group.WORLD, []
        for counts in ([2, 1], [0, 3], [1, 1], [0, 0]):
            start = sum(counts[:rank])
            rows = torch.arange(start, start + counts[rank], dtype=torch.float32, requires_grad=True)
            whole = all_gather_rows(rows, counts, group)
            (grad,) = torch.autograd.grad((whole * (1 + torch.arange(sum(counts))) * (1 + rank)).sum(), rows)
            results += [whole.tolist(), grad.tolist()]
        return results

    first, second = run_distributed(on_rank, 2)
    assert first == [[0, 1, 2], [3, 6], [0, 1, 2], [], [0, 1], [3], [], []]
    assert second == [[0, 1, 2], [9], [0, 1, 2], [3, 6, 9], [0, 1], [6], [], []]


def test_rows_are_dealt_as_equally_as_can_be() -> None:
    assert split_counts(7, 3) == [3, 2, 2]
    assert split_counts(1, 3) == [1, 0, 0]
    assert split_counts(0, 2) == [0, 0]


@pytest.mark.parametrize("counts", [(2, 2), (3, 1), (0, 4), (0, 0)])
def test_rows_of_all_ranks(counts: tuple[int, int]) -> None:
    """Values and gradients of each way to move rows; the gradients are those of the reverse way."""
    total = sum(counts)
    rows = torch.arange(2.0 * total).view(total, 2)
    factors = torch.randn(2, total, 2)  # of each rank

    def on_rank(rank: int, _: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        group, factor = dist.group.WORLD, factors[rank]
        own = rows.split(counts)[rank]
        send = [counts[rank] // 2, counts[rank] - counts[rank] // 2]
        receive = [counts[0] // 2, counts[1] // 2]
        if rank == 1:
            receive = [counts[0] - counts[0] // 2, counts[1] - counts[1] // 2]
        moves = {
            "all_gather": (own, lambda x: all_gather_rows(x, counts, group) * factor),
            "reduce_scatter": (rows * (rank + 1), lambda x: reduce_scatter_rows(x, counts, group) * (rank + 2)),
            "split": (rows, lambda x: split_to_group(x, group) * (rank + 2)),
            "gather": (rows.split(split_counts(total, 2))[rank], lambda x: gather_from_group(x, total, group) * 3),
            "all_to_all": (own, lambda x: all_to_all_rows(x, send, receive, group) * (rank + 2)),
        }
        results = {}
        for name, (tensor, move) in moves.items():
            leaf = tensor.clone().requires_grad_()
            output = move(leaf)
            output.sum().backward()
            results[name] = (output.detach(), leaf.grad)
        return results

    for rank, results in enumerate(run_distributed(on_rank, 2)):
        first, last = counts[rank] // 2, counts[rank] - counts[rank] // 2
        ones = torch.ones(total, 2)
        halves = split_counts(total, 2)
        assert torch.equal(results["all_gather"][0], rows * factors[rank])
        torch.testing.assert_close(results["all_gather"][1], factors.sum(0).split(counts)[rank])
        assert torch.equal(results["reduce_scatter"][0], 3 * (rank + 2) * rows.split(counts)[rank])
        of_rank = torch.cat([torch.full((counts[r], 2), r + 2.0) for r in (0, 1)])
        assert torch.equal(results["reduce_scatter"][1], of_rank)
        assert torch.equal(results["split"][0], rows.split(halves)[rank] * (rank + 2))
        assert torch.equal(results["split"][1], torch.cat([torch.full((halves[r], 2), r + 2.0) for r in (0, 1)]))
        assert torch.equal(results["gather"][0], rows * 3)
        assert torch.equal(results["gather"][1], 3 * ones.split(halves)[rank])
        cuts = rows.split([counts[0] // 2, counts[0] - counts[0] // 2, counts[1] // 2, counts[1] - counts[1] // 2])
        assert torch.equal(results["all_to_all"][0], torch.cat((cuts[rank], cuts[2 + rank])) * (rank + 2))
        assert results["all_to_all"][1].tolist() == [[2.0, 2.0]] * first + [[3.0, 3.0]] * last


def test_vocabulary_over_two_ranks_gives_the_loss_of_one_process() -> None:
    hidden = torch.randn(6, 8, dtype=torch.float64)
    weight = torch.randn(21, 8, dtype=torch.float64)
    targets = torch.tensor([0, 20, 10, 11, 5, 3])
    grad = torch.randn(6, dtype=torch.float64)
    bounds = [(0, 11), (11, 21)]

    def on_rank(rank: int, _: int) -> tuple[torch.Tensor, ...]:
        start, stop = bounds[rank]
        leaves = hidden.detach().clone().requires_grad_(), weight[start:stop].detach().clone().requires_grad_()
        losses = vocab_parallel_linear_cross_entropy(*leaves, targets, vocab_start=start, group=dist.group.WORLD)
        losses.backward(grad)
        return losses.detach(), leaves[0].grad, leaves[1].grad

    leaves = hidden.requires_grad_(), weight.requires_grad_()
    wanted = F.cross_entropy(leaves[0] @ leaves[1].T, targets, reduction="none")
    wanted.backward(grad)
    results = run_distributed(on_rank, 2)
    for losses, grad_hidden, _ in results:
        torch.testing.assert_close(losses, wanted.detach())
        torch.testing.assert_close(grad_hidden, leaves[0].grad)
    torch.testing.assert_close(torch.cat([result[2] for result in results]), leaves[1].grad)

    alone = vocab_parallel_linear_cross_entropy(hidden.detach(), weight.detach(), targets)
    torch.testing.assert_close(alone, wanted.detach())

"""Auxiliary losses: known values, and ranks together against one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from parrot_sys.modules.losses import load_balancing_loss, router_z_loss
from parrot_sys.ops import topk_routing
from parrot_sys.testing.distributed import run_distributed


def test_uniform_routing_gives_one() -> None:
    scores = torch.full((8, 4), 0.25)
    torch.testing.assert_close(load_balancing_loss(scores, torch.tensor([4, 4, 4, 4])), torch.tensor(1.0))


def test_all_to_one_expert_gives_the_number_of_experts() -> None:
    scores = torch.tensor([[0.0, 1.0, 0.0, 0.0]]).repeat(8, 1)
    torch.testing.assert_close(load_balancing_loss(scores, torch.tensor([0, 8, 0, 0])), torch.tensor(4.0))


def test_no_rows_give_zero_and_a_zero_gradient() -> None:
    scores = torch.empty(0, 4, requires_grad=True)
    lse = torch.empty(0, requires_grad=True)
    loss = load_balancing_loss(scores, torch.zeros(4, dtype=torch.int32)) + router_z_loss(lse)
    loss.backward()
    assert loss == 0
    assert scores.grad.shape == (0, 4)


# Rows of each rank; one rank has none.
@pytest.mark.parametrize("rows", [(3, 5), (4, 0)], ids=["uneven", "empty_rank"])
def test_ranks_together_give_the_loss_of_one_process(rows: tuple[int, int]) -> None:
    logits = torch.randn(sum(rows), 4, dtype=torch.float64)

    def losses(part: torch.Tensor, group: dist.ProcessGroup | None) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = part.clone().requires_grad_()
        route = topk_routing(leaf, 2, renormalize=True)
        loss = load_balancing_loss(route.scores, route.tokens_per_expert, group=group)
        loss = loss + router_z_loss(route.lse, group=group)
        loss.backward()
        return loss.detach(), leaf.grad

    def on_rank(rank: int, _: int) -> tuple[torch.Tensor, torch.Tensor]:
        return losses(logits.split(rows)[rank], dist.group.WORLD)

    wanted_loss, wanted_grad = losses(logits, None)
    results = run_distributed(on_rank, 2)
    for loss, _ in results:
        torch.testing.assert_close(loss, wanted_loss)
    torch.testing.assert_close(torch.cat([grad for _, grad in results]), wanted_grad)

"""The learning rate against the schedule of transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from parrot_sys.errors import ConfigError
from parrot_sys.training.schedule import CosineSchedule, warmup_steps


@pytest.mark.parametrize(("total", "warmup"), [(100, 0), (100, 3), (7, 6), (1, 0)])
def test_cosine_part_is_that_of_transformers(total: int, warmup: int) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-3)
    reference = get_cosine_schedule_with_warmup(optimizer, warmup, total)
    schedule = CosineSchedule(total, warmup)
    for step in range(total):
        if step >= warmup:
            assert schedule.lr(step, 2e-3, 0.0) == pytest.approx(reference.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        reference.step()


def test_warmup_rises_linearly_and_never_is_zero() -> None:
    schedule = CosineSchedule(20, 4)
    assert [schedule.lr(step, 1.0, 0.5) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_cosine_ends_at_the_minimum() -> None:
    schedule = CosineSchedule(10, 2)
    rates = [schedule.lr(step, 1.0, 0.1) for step in range(2, 11)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == 1.0
    assert rates[-1] == pytest.approx(0.1)
    assert schedule.lr(11, 1.0, 0.1) == pytest.approx(0.1)


def test_groups_have_their_own_peaks() -> None:
    groups = [{"max_lr": 1e-3, "min_lr": 0.0, "lr": 0.0}, {"max_lr": 2e-5, "min_lr": 1e-5, "lr": 0.0}]
    CosineSchedule(10, 0).apply(0, groups)
    assert [group["lr"] for group in groups] == [1e-3, 2e-5]


def test_warmup_steps() -> None:
    assert warmup_steps(4750, 0.03, None) == 143  # ceil, as the Hugging Face trainer
    assert warmup_steps(4750, 0.03, 7) == 7
    assert warmup_steps(1, 0.03, None) == 0


@pytest.mark.parametrize(("total", "warmup"), [(0, 0), (5, 5), (5, -1)])
def test_contradictions_are_refused(total: int, warmup: int) -> None:
    with pytest.raises(ConfigError):
        CosineSchedule(total, warmup)

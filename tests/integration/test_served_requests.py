"""Requests that two processes serve do not depend on their neighbours either, and get what one process answers."""

from __future__ import annotations

from pathlib import Path

import torch

from parrot_sys.megatron.runtime.initialize import ParallelConfig
from parrot_sys.testing.distributed import run_distributed
from tests.inference.mixed_requests import Answers, Mixed, assert_alone, limited

CHECKPOINT = Path(__file__).parents[1] / "fixtures" / "parrot_tiny" / "model"
MIX = [
    Mixed(number=1, length=5, pictures=1, new_tokens=2),
    Mixed(number=2, length=3, pictures=2, new_tokens=6, fills=True),
    Mixed(number=3, length=20, new_tokens=6),
    Mixed(number=4, length=1, pictures=1, new_tokens=6),
]


def _answers(parallel: ParallelConfig | None, requests: list[Mixed]) -> list[Answers]:
    model = limited(CHECKPOINT, parallel=parallel)
    answers: list[Answers] = []

    def program() -> int:
        for sampled in (False, True):
            answers.append(assert_alone(model, requests, ends_every=7, sampled=sampled))
        return 0

    model.lockstep.run(program)
    return answers


def test_answers_do_not_depend_on_neighbours_when_two_processes_serve_them() -> None:
    (alone,) = run_distributed(lambda rank, size: _answers(None, MIX), 1)
    layout = ParallelConfig(tensor_model_parallel_size=2)
    together, followed = run_distributed(lambda rank, size: _answers(layout, MIX), 2)
    assert followed == [], "the other rank repeats the calls of the first"
    assert [each.tokens for each in together] == [each.tokens for each in alone]
    for ours, wanted in zip(together, alone, strict=True):
        torch.testing.assert_close(ours.scores, wanted.scores, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.rows, wanted.rows, rtol=1e-4, atol=1e-4)

"""Runs on two machines with an agent each, started as `train/cluster` starts them: cut off, and gone on with."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from parrot_sys.cli import save_config
from parrot_sys.inference import chat
from parrot_sys.testing.distributed import run_distributed
from parrot_sys.training.config import TrainConfig
from parrot_sys.training.trainer import Trainer
from parrot_sys.training.writer import read_metrics
from tests.training.tiny import FIXTURE, MODEL, tiny_config
from tests.training.two_nodes import Node, agents, two_nodes, wait_until

STEPS = 24


@pytest.fixture
def nodes() -> Iterator[tuple[Node, Node]]:
    with two_nodes() as both:
        yield both


def _configs(folder: Path) -> tuple[TrainConfig, TrainConfig]:
    """A run for two forked processes, which no network disturbs, and the same for two machines."""
    whole, cut = (tiny_config(folder, output=name, global_batch_size=4, epochs=3.0) for name in ("whole", "cut"))
    save_config(cut, folder / "settings.yaml")
    run_distributed(lambda rank, size: Trainer(whole).run(), 2)
    return whole, cut


def _curve(config: TrainConfig) -> list[tuple[Any, ...]]:
    return [(record["step"], record["loss"], record["grad_norm"]) for record in read_metrics(config.output, "train")]


def _reached(config: TrainConfig, step: int) -> bool:
    return any(record["step"] >= step for record in read_metrics(config.output, "train"))


def test_a_node_that_is_lost_comes_back(nodes: tuple[Node, Node], tmp_path: Path) -> None:
    whole, cut = _configs(tmp_path)
    with agents(nodes, tmp_path) as start:
        arguments = ("train", "--config", str(tmp_path / "settings.yaml"))
        stays, lost = start(0, *arguments), start(1, *arguments)
        wait_until(lambda: _reached(cut, 5), "step 5", stays, lost)
        before = stays.workers()
        lost.kill()
        wait_until(lambda: not any(worker.is_running() for worker in before), "the end of the orphaned process", stays)
        assert len(_curve(cut)) < STEPS, "the run was over before the node was lost"
        comes_back = start(1, *arguments)
        assert stays.wait() == 0, stays.text()
        assert comes_back.wait() == 0, comes_back.text()
    assert "will restart worker group" in stays.text()
    (summary,) = read_metrics(cut.output, "summary")
    assert summary["finished"]
    assert summary["steps"] < STEPS, "it went on from a checkpoint"
    assert _curve(cut) == _curve(whole)
    assert len(_curve(cut)) == STEPS


def _chat_alone(arguments: tuple[str, ...]) -> str:
    def answer(rank: int, size: int) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as output:
            chat.main(arguments)
        return output.getvalue()

    return run_distributed(answer, 1)[0]


@pytest.mark.parametrize(
    ("processes", "layout"),
    [
        pytest.param(1, ("--parallel.pipeline-model-parallel-size", "2"), id="pp2"),
        pytest.param(
            2,
            ("--parallel.tensor-model-parallel-size", "2", "--parallel.pipeline-model-parallel-size", "2"),
            id="tp2-pp2",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_answers_of_two_nodes_are_those_of_one_process(
    processes: int, layout: tuple[str, ...], nodes: tuple[Node, Node], tmp_path: Path
) -> None:
    arguments = ("--checkpoint", str(MODEL), "--image", str(FIXTURE / "image_0.png"), "--max-new-tokens", "6")
    arguments += ("--message", "What is this?", "And which colour has it?")
    with agents(nodes, tmp_path) as start:
        started = [start(rank, "chat", *arguments, *layout, NPROC_PER_NODE=processes) for rank in range(2)]
        for agent in started:
            assert agent.wait() == 0, agent.text()
    # One process of all talks; the log of each has its place.
    printed = [log.read_text() for log in (tmp_path / "logs").glob("node*/*/attempt_0/*/stdout.log")]
    assert len(printed) == 2 * processes
    assert sorted(printed) == [""] * (2 * processes - 1) + [_chat_alone(arguments)]

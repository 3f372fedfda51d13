"""Runs on two machines with an agent each, started as `train/cluster` starts them: cut off, and gone on with."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from parrot_sys.cli import save_config
from parrot_sys.inference import chat
from parrot_sys.testing.distributed import run_distributed
from parrot_sys.training.config import TrainConfig
from parrot_sys.training.trainer import Trainer
from parrot_sys.training.writer import read_metrics
from tests.training.tiny import FIXTURE, MODEL, reached, tiny_config
from tests.training.two_nodes import Node, agents, is_alive, two_nodes, wait_until

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


def _ended(processes: list[psutil.Process]) -> bool:
    return not any(is_alive(process) for process in processes)


def _check_went_on(whole: TrainConfig, cut: TrainConfig, log: str) -> None:
    (summary,) = read_metrics(cut.output, "summary")
    assert summary["finished"]
    assert re.search(r"going on after step [1-9]\d* from", log)
    assert _curve(cut) == _curve(whole)
    assert len(_curve(cut)) == STEPS


@pytest.mark.slow
def test_a_node_that_is_lost_comes_back(nodes: tuple[Node, Node], tmp_path: Path) -> None:
    whole, cut = _configs(tmp_path)
    arguments = ("train", "--config", str(tmp_path / "settings.yaml"))
    with agents(nodes, tmp_path) as start:
        stays, lost = start(0, *arguments), start(1, *arguments)
        wait_until(lambda: reached(cut, 5), "step 5", stays, lost)
        before = stays.workers()
        lost.kill()
        wait_until(lambda: _ended(before), "the end of the process that is left alone", stays)
        assert len(_curve(cut)) < STEPS, "the run was over before the node was lost"
        comes_back = start(1, *arguments)
        for agent in (stays, comes_back):
            assert agent.wait() == 0, agent.text()
    assert "will restart worker group" in stays.text()
    _check_went_on(whole, cut, stays.text() + comes_back.text())


@pytest.mark.slow
def test_a_cable_that_is_pulled(nodes: tuple[Node, Node], tmp_path: Path) -> None:
    if not nodes[0].inside:
        # (The test above runs on loopback addresses too; a link that goes silent needs a link.)
        pytest.skip("network namespaces are not permitted here, and loopback addresses have no cable")
    whole, cut = _configs(tmp_path)
    arguments = ("train", "--config", str(tmp_path / "settings.yaml"), "--faults.hang-timeout", "8")
    arguments += ("--faults.checkpoint-timeout", "8")  # where it is left alone is a matter of chance
    with agents(nodes, tmp_path) as start:
        hosts, lost = start(0, *arguments), start(1, *arguments, STORE_TIMEOUT=20)
        wait_until(lambda: reached(cut, 5), "step 5", hosts, lost)
        before = hosts.workers()
        # Its agent's read of the rendezvous ends with the connection. docs/multi_node.md advises 8 (100 s); 5 is 13 s.
        nodes[1].run("sh", "-c", "echo 5 > /proc/sys/net/ipv4/tcp_retries2")
        nodes[1].plug(connected=False)
        # Nobody is told, both sides have to find out. The one without the rendezvous gives up, the other one waits.
        wait_until(lambda: _ended(before), "the end of the process that is left alone", hosts)
        assert "most recent call first" in hosts.text(), "where it stood is in the log"
        assert lost.wait() != 0
        assert not lost.workers()
        assert len(_curve(cut)) < STEPS, "the run was over before the cable was pulled"
        nodes[1].plug(connected=True)
        comes_back = start(1, *arguments)
        for agent in (hosts, comes_back):
            assert agent.wait() == 0, agent.text()
    _check_went_on(whole, cut, hosts.text() + comes_back.text())


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

"""Replicas: their metrics as one text, their logs, their ends."""

from __future__ import annotations

import asyncio
import signal
import sys

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from parrot_sys.serving.replica import Replica
from parrot_sys.serving.replicas import joined_metrics


def _text(value: int) -> str:
    registry = CollectorRegistry()
    Gauge("plain", "Without labels.", registry=registry).set(value)
    Counter("vllm:labelled", "With one.", ["model_name"], registry=registry).labels("a b}").inc(10 * value)
    return generate_latest(registry).decode()


def test_each_value_keeps_its_replica() -> None:
    families = list(text_string_to_metric_families(joined_metrics([(0, _text(1)), (1, _text(2))])))
    names = [family.name for family in families]
    assert len(names) == len(set(names)), "the lines of a metric are together"
    found = {(own.name, own.labels["engine"]): own.value for family in families for own in family.samples}
    assert (found[("plain", "0")], found[("plain", "1")]) == (1, 2)
    assert (found[("vllm:labelled_total", "0")], found[("vllm:labelled_total", "1")]) == (10, 20)
    labels = [own.labels for family in families for own in family.samples if own.name == "vllm:labelled_total"]
    assert labels == [{"engine": str(number), "model_name": "a b}"} for number in range(2)]


def _run(program: str) -> tuple[Replica, list[int | None], int]:
    """A program as a replica: the ports that were told when it was ready, and its exit code."""
    replica, ports = Replica(number=0), list[int | None]()
    command = [sys.executable, "-c", f"import sys\n{program}"]
    code = asyncio.run(asyncio.wait_for(replica.run(command, lambda: ports.append(replica.port)), 60))
    return replica, ports, code


def test_no_line_of_a_log_stops_a_replica(capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["{not ours}", "{}", "[1]", '{"event": 1}', '{"event": "ready"}', '{"event": "ready", "url": "x"}']
    lines += [20_000 * "{", '{"event": "ready", "url": "http://127.0.0.1:81"}']
    long = "x" * 3_000_000
    replica, ports, code = _run(f"print(*{lines}, {len(long)} * 'x', 'end', sep='\\n', file=sys.stderr); sys.exit(7)")
    assert (ports, code) == ([81], 7)
    assert (replica.port, replica.failed) == (None, False)
    assert capsys.readouterr().err == "\n".join([*lines, long, "end", ""])


def test_a_replica_that_was_never_ready_has_failed() -> None:
    replica, ports, code = _run("sys.exit(3)")
    assert (replica.failed, ports, code) == (True, [], 3)
    replica = Replica(number=0)
    with pytest.raises(FileNotFoundError):
        asyncio.run(replica.run(["/no/such/program"], lambda: None))
    assert replica.failed


def test_a_replica_whose_log_cannot_be_read_does_not_answer() -> None:
    """Whatever ends the reader: requests go to others, and the process is asked to end."""
    replica = Replica(number=0)
    ready = '{"event": "ready", "url": "http://127.0.0.1:81"}'
    command = [sys.executable, "-c", f"import sys, time; print({ready!r}, file=sys.stderr); time.sleep(60)"]

    def fails() -> None:
        assert replica.port == 81
        raise RuntimeError("asked for by the test")

    async def run() -> int:
        with pytest.raises(RuntimeError, match="asked for by the test"):
            await replica.run(command, fails)
        assert replica.port is None
        assert replica.process is not None
        return await asyncio.wait_for(replica.process.wait(), 30)

    assert asyncio.run(run()) == -signal.SIGTERM

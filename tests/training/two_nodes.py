"""Two "machines" inside this one: network namespaces joined by a cable, else two loopback addresses."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "train" / "cluster" / "torchrun_node.sh"
SECONDS = 120.0
# In a namespace of its own, as root of itself, also where the tests run as an ordinary user.
_AS_ROOT = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
_IN = [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """A machine: where it is reached, and what a command must start with to run on it."""

    rank: int
    address: str
    interface: str = "lo"
    """Its end of the cable, or the loopback interface."""
    port: int = 29400
    """Of the rendezvous."""
    inside: Sequence[str] = ()

    def run(self, *command: str) -> None:
        """Runs a command on the machine to its end."""
        subprocess.run([*self.inside, *command], check=True, capture_output=True, text=True)

    def plug(self, *, connected: bool) -> None:
        """Pulls the machine's cable, or puts it in again; whoever sends into it then is told nothing."""
        assert self.inside, "a loopback address has no cable"
        self.run("ip", "link", "set", self.interface, "up" if connected else "down")


def is_alive(process: psutil.Process) -> bool:
    """Whether a process runs; one that has ended and was not asked for its exit code yet does not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


@dataclass(kw_only=True, slots=True)
class Agent:
    """`train/cluster/torchrun_node.sh` on a machine."""

    node: Node
    process: subprocess.Popen[bytes]
    log: Path
    children: set[psutil.Process] = field(default_factory=set)

    def workers(self) -> list[psutil.Process]:
        """The training processes that it runs now."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self.children |= set(psutil.Process(self.process.pid).children(recursive=True))
        return [child for child in self.children if is_alive(child)]

    def kill(self) -> None:
        """What a power cut does, but for the cable: agent and processes end without a word."""
        workers = self.workers()  # listed before the agent is dead
        for process in (self.process, *workers):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def text(self) -> str:
        """What it has logged."""
        return self.log.read_text(errors="replace")

    def wait(self, seconds: float = SECONDS) -> int:
        """Exit code; fails the test when the agent does not end."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the agent of node {self.node.rank} did not end within {seconds:g} s:\n{self.text()}")


@contextlib.contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Two machines. The first one hosts the rendezvous; the second one has the smaller address.

    torchrun numbers the machines by address, so that the global rank 0, and the store of the process group with it, is
    on the machine that is not the rendezvous' host: the harder case for whoever is left when that machine is lost.
    """
    holders: list[subprocess.Popen[str]] = []
    try:
        yield _namespaces(holders)
    finally:
        for holder in holders:  # a namespace goes with its last process
            holder.kill()
            holder.wait()


def _namespaces(holders: list[subprocess.Popen[str]]) -> tuple[Node, Node]:
    tools = all(map(shutil.which, ("ip", "unshare", "nsenter")))
    first = _hold(["unshare", *_AS_ROOT, "--net"], holders) if tools else None
    if first is None or not _may_lay_cables(first):  # containers often forbid namespaces, or what is done in them
        with socket.socket() as free:
            free.bind(("127.0.0.3", 0))
            port = free.getsockname()[1]
        return Node(rank=0, address="127.0.0.3", port=port), Node(rank=1, address="127.0.0.2", port=port)
    inside_first = _inside(first)
    second = _hold([*inside_first, "unshare", "--net"], holders)
    assert second is not None, "where one namespace is permitted, another one is"
    nodes = (
        Node(rank=0, address="10.231.0.3", interface="port0", inside=inside_first),
        Node(rank=1, address="10.231.0.2", interface="port1", inside=_inside(second)),
    )
    nodes[0].run("ip", "link", "add", "port0", "type", "veth", "peer", "name", "port1", "netns", str(second))
    for node in nodes:
        node.run("ip", "address", "add", f"{node.address}/24", "dev", node.interface)
        node.run("ip", "link", "set", "lo", "up")
        node.plug(connected=True)
    return nodes


def _hold(unshare: list[str], holders: list[subprocess.Popen[str]]) -> int | None:
    """Process id of a process that keeps new namespaces open; None where they are not permitted."""
    command = [*unshare, "sh", "-c", "echo ready; exec sleep 600"]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    holders.append(holder)
    assert holder.stdout is not None
    return holder.pid if holder.stdout.readline() else None


def _may_lay_cables(pid: int) -> bool:
    command = [*_inside(pid), "ip", "link", "add", "probe0", "type", "veth", "peer", "name", "probe1"]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def _inside(pid: int) -> list[str]:
    return ["nsenter", "--target", str(pid), *_IN, "--net"]


@contextlib.contextmanager
def agents(nodes: tuple[Node, Node], folder: Path) -> Iterator[Callable[..., Agent]]:
    """`start(rank, *arguments of parrot, **settings of the script)`; whatever still runs at the end is killed."""
    started: list[Agent] = []

    def start(rank: int, *arguments: str, **settings: str | int) -> Agent:
        node = nodes[rank]
        log = folder / f"agent{rank}.log"
        values: dict[str, str | int] = {
            "NNODES": len(nodes),
            "NODE_RANK": rank,
            "RDZV_HOST": nodes[0].address,
            "RDZV_PORT": node.port,
            "NPROC_PER_NODE": 1,
            "INTERFACE": node.interface,
            "LOCAL_ADDRESS": node.address,
            "HEARTBEAT": 1,
            "LOG_DIR": str(folder / "logs"),
            "PYTHON": sys.executable,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
            "OMP_NUM_THREADS": 1,
        }
        environment = {**os.environ, **{name: str(value) for name, value in {**values, **settings}.items()}}
        with log.open("ab") as file:
            process = subprocess.Popen(
                [*node.inside, str(SCRIPT), *arguments], env=environment, stdout=file, stderr=file, cwd=folder
            )
        started.append(Agent(node=node, process=process, log=log))
        return started[-1]

    try:
        yield start
    finally:
        for agent in started:
            agent.kill()


def wait_until(condition: Callable[[], bool], what: str, *running: Agent, seconds: float = SECONDS) -> None:
    """Waits for a condition while `running` agents run; else fails with their logs."""
    end = time.monotonic() + seconds
    while not condition():
        ended = any(agent.process.poll() is not None for agent in running)
        if ended or time.monotonic() > end:
            logs = "\n".join(f"--- node {agent.node.rank} ---\n{agent.text()}" for agent in running)
            pytest.fail(f"{what}: not seen {'before an agent ended' if ended else f'within {seconds:g} s'}\n{logs}")
        time.sleep(0.05)

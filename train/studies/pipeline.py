"""Resumable steps: each runs a command once for its settings and leaves a stamp; the next start skips what is done.

A step's key is the hash of its settings and of the keys of the steps it builds on, so that a changed setting runs it
and everything after it again. A step that was interrupted keeps its folder and goes on there, as training and
evaluation do by themselves.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parrot_sys.errors import ParrotError
from parrot_sys.files import read_json
from parrot_sys.locks import OutputLock
from parrot_sys.paths import check_writable
from parrot_sys.processes import Stopped, run_program

_PROGRAM = Path(__file__).parent


class PipelineError(ParrotError):
    """A step's command failed; its own output says why."""


class NotDone(ParrotError):
    """A step is not done, and the pipeline only looks at what is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A step that is done."""

    name: str
    folder: Path
    """Folder of its results."""
    key: str
    seconds: float
    """Work on it, over all starts."""
    commits: frozenset[str] = frozenset()
    """Commits of the program that made it and the steps it builds on; `+` marks one with changes."""


class Pipeline:
    """Steps below one folder: results in ROOT/NAME, stamps in ROOT/stamps/NAME.json."""

    def __init__(self, root: Path, *, say: Callable[[str], None], fresh: bool = False, only_done: bool = False) -> None:
        """
        Args:
            root: folder of the run; made when needed.
            say: prints one line.
            fresh: forget what is there.
            only_done: run nothing: a step that is not done is an error (`NotDone`), and what is there stays.

        Raises:
            ConfigError: the folder cannot be written, or another process works in it.
        """
        check_writable(root)
        self._lock = OutputLock(root)
        if fresh:
            for path in root.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path != self._lock.path:
                    path.unlink()
        self.root = root
        self.say = say
        self.only_done = only_done
        self.steps: list[Step] = []
        self.seconds = 0.0
        """Work of this start."""

    def step(
        self,
        name: str,
        action: Callable[[Path], object],
        settings: Mapping[str, Any] | None = None,
        after: Sequence[Step] = (),
    ) -> Step:
        """Runs `action(folder)` unless it is done for the same settings.

        Args:
            name: of the step and its folder; may hold slashes.
            action: does the work; goes on where it was when it is called again on the same folder.
            settings: plain values that decide the result.
            after: steps whose results it reads.

        Raises:
            NotDone: it is not done, and the pipeline only looks.
        """
        folder = self.root / name
        key = _key({"name": name, "settings": settings or {}, "after": [step.key for step in after]})
        path = self.root / "stamps" / f"{name.replace('/', '.')}.json"
        stamp = read_json(path, PipelineError) if path.is_file() else {}
        done_before = stamp.get("key") == key and stamp["done"] and folder.exists()
        if self.only_done and not done_before:
            raise NotDone(f"step {name} is not done in {self.root}")
        if stamp.get("key") != key:
            # Its contents belong to other settings.
            shutil.rmtree(folder, ignore_errors=True)
            stamp = {"key": key, "done": False, "seconds": 0.0}
        if done_before:
            self.say(f"[{name}] done before ({stamp['seconds']:.0f} s)")
        else:
            self.say(f"[{name}] {'goes on' if stamp['seconds'] or folder.exists() else 'starts'}")
            stamp |= {"done": False, "commits": sorted({*stamp.get("commits", ()), commit()})}
            self._run(action, folder, stamp, path)
            self.say(f"[{name}] done in {stamp['seconds']:.0f} s")
        made_at = frozenset(stamp.get("commits", ("unknown",))).union(*(step.commits for step in after))
        done = Step(name=name, folder=folder, key=key, seconds=stamp["seconds"], commits=made_at)
        self.steps.append(done)
        return done

    def _run(self, action: Callable[[Path], object], folder: Path, stamp: dict[str, Any], path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, stamp)
        begin = time.perf_counter()
        try:
            action(folder)
            stamp["done"] = True
        except (KeyboardInterrupt, Stopped) as stop:
            number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
            message = "stopped; the same command goes on here"
            self.say(f"\n{message}")
            raise Stopped(message, number) from None
        finally:
            seconds = time.perf_counter() - begin
            self.seconds += seconds
            stamp["seconds"] += seconds
            _write(path, stamp)

    def command(self, arguments: Sequence[str]) -> None:
        """Runs a program with its output on this terminal.

        Raises:
            PipelineError: it ended with an error.
            Stopped: this process was asked to stop, and has passed it on; the program has ended.
        """
        self.say("$ " + " ".join(arguments))
        code = run_program(arguments)
        if code:
            raise PipelineError(
                f"exit code {code} of: {' '.join(arguments)}\nFix what it says and start again to go on here"
            )


@functools.cache
def commit() -> str:
    """The checkout's commit, with a `+` where one of its programs differs from it."""

    def git(*arguments: str) -> str | None:
        result = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, cwd=_PROGRAM)
        return result.stdout.strip() if result.returncode == 0 else None

    held = git("rev-parse", "HEAD")
    if held is None:
        return "unknown"
    programs = [f":/{folder}" for folder in ("parrot_sys", "kernels", "csrc", "train")]
    return held + "+" * (git("status", "--porcelain", "--untracked-files=no", "--", *programs) != "")


def _key(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _write(path: Path, stamp: Mapping[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(stamp) + "\n", encoding="utf-8")
    temporary.replace(path)

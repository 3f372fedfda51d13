"""Installs peers from carried wheels into a folder of their own, without a package index."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

REQUIREMENTS = Path(__file__).with_name("wheels.txt")


def requirements() -> list[str]:
    """`name==version`, one for each peer."""
    lines = (line.split("#")[0].strip() for line in REQUIREMENTS.read_text().splitlines())
    return [line for line in lines if line]


def names() -> list[str]:
    """Names of the peers' distributions."""
    return [line.split("==")[0] for line in requirements()]


def install(folder: Path, target: Path) -> dict[str, str | None]:
    """Installs each wheel of the list, and any other wheel in `folder`, from `folder` alone.

    One by one, since pip installs nothing where one is missing.

    Returns:
        None for each that is installed, else pip's error.
    """
    listed = {name.replace("-", "_") for name in names()}
    others = [str(path) for path in sorted(folder.glob("*.whl")) if path.name.split("-")[0].lower() not in listed]
    target.mkdir(parents=True, exist_ok=True)
    found: dict[str, str | None] = {}
    for wanted in (*requirements(), *others):
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
        command += ["--upgrade", "--find-links", str(folder), "--target", str(target), wanted]
        done = subprocess.run(command, capture_output=True, text=True)
        found[Path(wanted).name] = None if done.returncode == 0 else (done.stderr or done.stdout).strip()[-500:]
    # Last, so that nothing carried replaces what the machine has.
    sys.path.append(str(target))
    return found

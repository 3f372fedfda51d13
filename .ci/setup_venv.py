"""Creates .venv with everything that tests, demo and checks need. `make setup` calls it; calling it again is cheap.

A torch >= 2.11 that this Python already has is used and never replaced (.venv then sees the system's packages).
Otherwise torch is installed first and alone, and held fixed while the rest is installed.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
TORCH = os.environ.get("TORCH", "torch==2.13.0")
MIN_TORCH = (2, 11)
TRITON = "3.6.0"  # when torch brings none: the version whose interpreter the tests were written against
BUILD_PACKAGES = ["setuptools", "wheel", "ninja", "pybind11"]
# Programs that `make lint` calls: a package that the system has puts none into .venv/bin.
PROGRAMS = {"ruff": "ruff", "mypy": "mypy", "import-linter": "lint-imports", "clang-format": "clang-format"}
TORCH_PROBE = "import torch, os; print(torch.__version__, os.path.dirname(os.path.dirname(torch.__file__)))"


def fail(problem: str, debian_package: str | None = None) -> None:
    """Ends with what is missing and how to get it."""
    hint = f"\n  On Debian or Ubuntu: apt-get install {debian_package}" if debian_package else ""
    sys.exit(f"setup: {problem}{hint}")


def check_machine() -> None:
    """Python version, venv, headers and a C++ compiler."""
    major, minor = sys.version_info[:2]
    if (major, minor) not in ((3, 11), (3, 12)):
        want = "Python 3.11 or 3.12 is needed (Megatron-Core and torch support these)"
        fail(f"{want}, {sys.executable} is {major}.{minor}; name another: make setup PYTHON=python3.12")
    if not all(map(importlib.util.find_spec, ("venv", "ensurepip"))):
        fail(f"{sys.executable} has no venv module", f"python3.{minor}-venv")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        fail(f"Python.h of {sys.executable} is missing", f"python3.{minor}-dev")
    wanted = os.environ.get("CXX", "")
    if not any(map(shutil.which, [wanted.split()[0]] if wanted else ["c++", "g++", "clang++"])):
        fail(f"no C++ compiler found ({wanted or 'c++, g++ or clang++'})", "g++")


def find_torch(python: str | Path) -> tuple[str, str] | None:
    """(version, site-packages folder) of the torch that `python` imports."""
    probe = subprocess.run([python, "-c", TORCH_PROBE], capture_output=True, text=True, cwd="/", check=False)
    if probe.returncode:
        return None
    version, folder = probe.stdout.split(maxsplit=1)
    return version, folder.strip()


def is_suitable(version: str) -> bool:
    """Whether the stable ABI that the extension is built against is there."""
    return tuple(map(int, re.findall(r"\d+", version)[:2])) >= MIN_TORCH


def create_venv() -> None:
    """A virtual environment that sees the torch of this Python, if there is a suitable one."""
    found = find_torch(sys.executable)
    share = found is not None and is_suitable(found[0])
    print(f"setup: creating {VENV}" + (f" on top of the installed torch {found[0]}" if found and share else ""))
    options = ["--system-site-packages"] if share else []
    subprocess.run([sys.executable, "-m", "venv", "--clear", *options, VENV], check=True)
    if found and share and find_torch(VENV_PYTHON) is None:
        # This Python is a virtual environment itself: --system-site-packages shows the packages of its base only.
        purelib = subprocess.run(
            [VENV_PYTHON, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        Path(purelib, "parent_environment.pth").write_text(found[1] + "\n")


def pip_install(*arguments: str | Path) -> None:
    """pip of the virtual environment."""
    command = [VENV_PYTHON, "-m", "pip", "install", "--disable-pip-version-check", *arguments]
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        fail(f"pip install {' '.join(map(str, arguments))} failed; its message is above")


def installed_version(package: str) -> str | None:
    """Version of a package in the virtual environment."""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    probe = subprocess.run([VENV_PYTHON, "-c", code], capture_output=True, text=True, check=False)
    return probe.stdout.strip() or None


def write_constraints() -> Path:
    """constraints.txt plus the torch and triton of this environment, so that nothing replaces them."""
    path = VENV / "constraints.txt"
    triton = installed_version("triton") or TRITON
    own = f"torch=={installed_version('torch')}\ntriton=={triton}\n"
    path.write_text((ROOT / "constraints.txt").read_text() + own)
    return path


def main() -> None:
    """Checks, creates, installs."""
    check_machine()
    if not VENV_PYTHON.exists() or installed_version("pip") is None:
        create_venv()
    found = find_torch(VENV_PYTHON)
    if found is None:
        pip_install(TORCH)
    elif not is_suitable(found[0]):
        fail(f"{VENV} holds torch {found[0]}, at least {'.'.join(map(str, MIN_TORCH))} is needed; remove the folder")
    constraints = write_constraints()
    pip_install("-c", constraints, *BUILD_PACKAGES)
    # No isolation: an isolated build would download a torch of its own.
    pip_install("-c", constraints, "--no-build-isolation", "-e", ".[serve,demo,dev]")
    if missing := [package for package, program in PROGRAMS.items() if not (VENV / "bin" / program).exists()]:
        pip_install("-c", constraints, "--ignore-installed", "--no-deps", *missing)


if __name__ == "__main__":
    main()

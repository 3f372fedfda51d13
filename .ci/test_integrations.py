"""Runs tests/integrations against the real programs of others, each in an environment of its own.

    make test-integrations                   # all; ARGS="trackers packaging" for some
    make test-vllm                           # that of vLLM, which is large and runs only where it is named

tests/integrations/environments.toml lists the environments. Each is made once in build/integrations/NAME, and again
when its packages change. It sees the packages of .venv, and its own before them. Needs the package index on the first
run only.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "tests" / "integrations"
SITE_PACKAGES = "import sysconfig; print(sysconfig.get_path('purelib'))"


def site_packages(python: Path) -> Path:
    """Folder of the packages of an environment."""
    return Path(subprocess.check_output([python, "-c", SITE_PACKAGES], text=True).strip())


def make_environment(name: str, packages: list[str], alone: list[str], without: list[str]) -> Path:
    """Python of the environment; nothing is done where it is there with these packages.

    Args:
        name: of the environment.
        packages: with their dependencies, as far as .venv lacks them.
        alone: packages that are installed without any, whatever Python they ask for.
        without: packages that came along and are removed.
    """
    folder = ROOT / "build" / "integrations" / name
    python, stamp, wanted = folder / "bin" / "python", folder / "packages.txt", "\n".join([*packages, *alone, *without])
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    print(f"test-integrations: making {folder}", flush=True)
    base = ROOT / ".venv" / "bin" / "python"
    subprocess.run([base, "-m", "venv", "--clear", folder], check=True)
    (site_packages(python) / "base.pth").write_text(f"{site_packages(base)}\n")
    for options, wishes in (([], packages), (["--no-deps", "--ignore-requires-python"], alone)):
        if wishes:
            pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
            subprocess.run([*pip, *options, *wishes], check=True)
    if without:
        subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", *without], check=True)
    stamp.write_text(wanted)
    return python


def run_tests(name: str, environment: dict[str, Any]) -> bool:
    """Whether the tests of an environment pass."""
    python = make_environment(
        name, environment["packages"], environment.get("alone", []), environment.get("without", [])
    )
    files = [str(FOLDER / file) for file in environment["tests"]]
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PATH": f"{python.parent}:{os.environ['PATH']}"}
    print(f"test-integrations: {name}", flush=True)
    command = [python, "-m", "pytest", "-m", "", "--durations=3", *files]
    return subprocess.run(command, cwd=ROOT, env=variables, check=False).returncode == 0


def main() -> int:
    """Runs the environments that the arguments name, or all but those that run only where they are named."""
    environments = tomllib.loads((FOLDER / "environments.toml").read_text())
    names = sys.argv[1:] or [name for name, own in environments.items() if not own.get("only_by_name", False)]
    if unknown := set(names) - set(environments):
        sys.exit(f"test-integrations: no environment {', '.join(unknown)}; there are {', '.join(environments)}")
    failed = [name for name in names if not run_tests(name, environments[name])]
    print(
        f"test-integrations: {len(names) - len(failed)} of {len(names)} passed" + f"; failed: {failed}" * bool(failed)
    )
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())

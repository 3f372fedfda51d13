"""What users install: sdist and wheel on each Python without a compiler, the citation file, the Dockerfile."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
import yaml

import parrot_sys

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = [
    name
    for name in ("python3.11", "python3.12")
    if shutil.which(name) and not subprocess.run([name, "-c", ""], capture_output=True, check=False).returncode
]
NAME = f"parrot_sys-{parrot_sys.__version__}"

# Data packing, which is C++ where it was compiled, and what there is to import without torch.
PROGRAM = """
import parrot_sys, parrot_kernels
from parrot_kernels import host
print(parrot_sys.__version__, host.first_fit_decreasing([8, 3, 5], 8), host.why_not())
"""


def run(*command: str | Path, **environment: str) -> str:
    """What a program prints; it sees neither a compiler nor this checkout."""
    bare = {name: value for name, value in os.environ.items() if name not in ("CXX", "PYTHONPATH", "VIRTUAL_ENV")}
    folder = Path(command[0]).parent
    variables = {**bare, "PATH": str(folder), **environment}
    result = subprocess.run(
        [str(part) for part in command],
        cwd="/",
        env=variables,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution of the files that git knows."""
    folder = tmp_path_factory.mktemp("sdist")
    listed = subprocess.check_output(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT)
    for name in filter(None, listed.decode().split("\0")):
        if not name.startswith("tests/") and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    build = "import build_backend; build_backend.build_sdist('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=folder, check=True, timeout=300)
    return folder / "dist" / f"{NAME}.tar.gz"


def environment(name: str, folder: Path) -> Path:
    """Python of a new virtual environment that is empty but for NumPy."""
    subprocess.run([name, "-m", "venv", folder], check=True, timeout=300)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "numpy")
    return python


@pytest.mark.slow
@pytest.mark.parametrize("name", PYTHONS)
def test_sdist_and_wheel_install_and_import_without_a_compiler(name: str, sdist: Path, tmp_path: Path) -> None:
    python = environment(name, tmp_path / "from_sdist")
    run(python, "-m", "pip", "install", "-q", "--no-deps", sdist)
    wanted = f"{parrot_sys.__version__} [[0], [2, 1]] not built"
    assert run(python, "-c", PROGRAM).startswith(wanted)
    run(python, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, sdist)
    wheel = tmp_path / f"{NAME}-py3-none-any.whl"  # of any machine and Python, such as the other one
    target = environment(PYTHONS[PYTHONS.index(name) - 1], tmp_path / "from_wheel")
    run(target, "-m", "pip", "install", "-q", "--no-deps", wheel)
    assert run(target, "-c", PROGRAM).startswith(wanted)


@pytest.mark.slow
def test_parrot_info_says_what_is_not_compiled(sdist: Path, tmp_path: Path) -> None:
    """With the dependencies of this environment, but an installation of its own."""
    python = environment(sys.executable, tmp_path / "venv")
    run(python, "-m", "pip", "install", "-q", "--no-deps", sdist)
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    ours = Path(sysconfig.get_path("purelib"))
    below = ours / "base.pth"  # an environment for integrations stands on another one
    (packages / "base.pth").write_text(f"{ours}\n" + (below.read_text() if below.exists() else ""))
    said = run(python.parent / "parrot", "info")
    assert f"parrot_sys           {parrot_sys.__version__}" in said
    assert "installed without its C++ extension (no C++ compiler, or PARROT_SKIP_EXTENSION=1)" in said
    assert "data packing         not built" in said
    code = "import parrot_sys; print(type(parrot_sys.load_pretrained({!r})[0]).__name__)"
    model = ROOT / "tests" / "fixtures" / "parrot_tiny" / "model"
    assert run(python, "-c", code.format(str(model))).strip() == "ParrotForConditionalGeneration"


def test_the_citation_is_valid_and_of_this_version() -> None:
    cffconvert = pytest.importorskip("cffconvert", reason="make test-integrations ARGS=packaging")
    text = (ROOT / "CITATION.cff").read_text()
    cffconvert.Citation(text).validate()
    assert yaml.safe_load(text)["version"] == parrot_sys.__version__
    assert f"## {parrot_sys.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_dockerfile_has_no_lint_and_names_extras_that_there_are() -> None:
    hadolint = shutil.which("hadolint") or pytest.skip("make test-integrations ARGS=packaging")
    assert subprocess.check_output([hadolint, str(ROOT / "Dockerfile")], text=True) == ""
    text = (ROOT / "Dockerfile").read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(text.split('".[')[1].split("]")[0].split(",")) <= extras.keys()
    copied = [word for line in text.splitlines() if line.startswith("COPY") for word in line.split()[1:-1]]
    assert all((ROOT / name).exists() for name in copied)

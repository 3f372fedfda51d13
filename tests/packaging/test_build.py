"""The build: content of the wheel, incremental compilation, the CUDA switch. Runs in a copy with the smallest csrc."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOP_FILES = [
    "setup.py",
    "build_backend.py",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "NOTICE",
    "THIRD_PARTY_NOTICES.md",
    "MANIFEST.in",
]

CUDA_SOURCE = """
__global__ void fill(float* out, float value) { out[threadIdx.x] = value; }
extern "C" int parrot_fill(void* stream, float* out, float value) {
  fill<<<1, 32, 0, static_cast<cudaStream_t>(stream)>>>(out, value);
  return static_cast<int>(cudaGetLastError());
}
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("project") / "parrot with space"
    leave = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.py", "cpu", "cuda")
    for folder in ("parrot_sys", "kernels"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so", "_build*"))
    shutil.copytree(ROOT / "csrc", copy / "csrc", ignore=leave)
    for name in TOP_FILES:
        shutil.copy(ROOT / name, copy / name)
    return copy


def build(project: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`setup.py build_ext --inplace` in the copy."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    env: Mapping[str, str] = {**os.environ, "PARROT_CUDA": "0", "CXXFLAGS": "-O0", **environment}
    return subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, timeout=300)


def has_cuda_kernels(project: Path) -> str:
    """What the freshly built binary says of itself."""
    code = f"import torch; torch.ops.load_library({str(project / 'kernels/parrot_kernels/_C.abi3.so')!r})"
    code += "; print(torch.ops.parrot_ext.has_cuda_kernels())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100).stdout.strip()


@pytest.mark.slow
def test_a_second_build_compiles_nothing_and_a_header_only_its_users(project: Path) -> None:
    first = build(project)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "link _C.abi3.so" in first.stdout
    again = build(project)
    assert "no work to do" in again.stdout
    header = project / "csrc" / "host" / "packing.h"
    header.write_text(header.read_text() + "\n")
    third = build(project)
    assert "packing.cpp" in third.stdout
    assert "module.cpp" in third.stdout
    assert "registration.cpp" not in third.stdout
    assert has_cuda_kernels(project) == "False"
    assert "why_no_cuda = 'PARROT_CUDA=0'" in (project / "kernels/parrot_kernels/_build_info.py").read_text()


def test_a_broken_source_fails_with_the_message_of_the_compiler(project: Path) -> None:
    broken = project / "csrc" / "host" / "broken.cpp"
    broken.write_text("int f() { return missing_name; }\n")
    try:
        result = build(project)
    finally:
        broken.unlink()
    assert result.returncode != 0
    assert "missing_name" in result.stdout + result.stderr


def test_the_wheel_holds_both_packages_and_nothing_else(project: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-q", "-w", tmp_path, "."]
    result = subprocess.run(
        command,
        cwd=project,
        env={**os.environ, "PARROT_CUDA": "0", "CXXFLAGS": "-O0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("parrot_sys-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"parrot_kernels", "parrot_sys"}
    assert "parrot_kernels/_C.abi3.so" in names
    assert "parrot_kernels/_build_info.py" in names
    assert any(name.startswith("parrot_kernels/_host.") for name in names)
    package = project / "parrot_sys"
    data = [*(package / "presets").rglob("*.yaml"), *(package / "data" / "corpora" / "default" / "assets").rglob("*")]
    files = [path.relative_to(project) for path in [*package.rglob("*.py"), *data] if path.is_file()]
    assert not [str(path) for path in files if str(path) not in names]
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {"parrot_kernels/py.typed", "parrot_sys/py.typed"} <= set(names)


def test_without_a_compiler_nothing_is_compiled(project: Path) -> None:
    result = build(project, CXX="", PATH="/nowhere")
    assert result.returncode == 0, result.stderr
    assert "ninja" not in result.stdout


def test_without_extension_nothing_is_compiled(project: Path) -> None:
    result = build(project, PARROT_SKIP_EXTENSION="1", CXX="no-such-compiler")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"PARROT_CUDA": "yes"}, "PARROT_CUDA must be 0, 1 or auto, got 'yes'"),
        ({"PARROT_CUDA": "1", "CUDA_HOME": "/nowhere", "CUDACXX": "/nowhere/nvcc", "PATH": "/usr/bin:/bin"}, "nvcc"),
        ({"CXX": "no-such-compiler"}, "no C++ compiler (no-such-compiler) found"),
        ({"PARROT_SKIP_EXTENSION": "0", "CXX": "", "PATH": "/nowhere"}, "no C++ compiler (c++, g++, clang++) found"),
        ({"PARROT_SKIP_EXTENSION": "yes"}, "PARROT_SKIP_EXTENSION must be 0, 1 or auto, got 'yes'"),
    ],
)
def test_what_the_build_lacks_is_named(project: Path, environment: dict[str, str], message: str) -> None:
    result = build(project, **environment)
    assert result.returncode != 0
    assert message in result.stderr


# (nvcc is the host's to bring; without it the CUDA sources are left out of a build.)
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_cuda_sources_are_compiled_in(project: Path) -> None:
    source = project / "csrc" / "cuda" / "fill.cu"
    source.parent.mkdir()
    source.write_text(CUDA_SOURCE)
    result = build(project, PARROT_CUDA="1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "fill.cu" in result.stdout
    assert has_cuda_kernels(project) == "True"
    assert "cuda_sources = ['fill.cu']" in (project / "kernels/parrot_kernels/_build_info.py").read_text()
    assert "no work to do" in build(project, PARROT_CUDA="1").stdout

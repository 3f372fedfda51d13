"""Builds the two C++ modules; everything else about the package stands in pyproject.toml.

* `parrot_kernels._C`: torch operators against torch's stable ABI (no Python API, one binary for every torch >= 2.11):
  csrc/registration.cpp, csrc/cpu/*.cpp and, when an nvcc >= 12.3 is found, csrc/cuda/*.{cpp,cu}.
* `parrot_kernels._host`: pybind11 helpers without torch from csrc/host/*.cpp.

Where there is no C++ compiler, neither is built: ops run on Triton or the PyTorch reference, data packing in Python.

Compilation goes through ninja with dependency files, so that a second build only compiles what changed:

    pip install --no-build-isolation -e .        # or, after an edit in csrc: python setup.py build_ext --inplace

Environment (see ENVs.md): PARROT_SKIP_EXTENSION, PARROT_CUDA, PARROT_CUDA_ARCHS, PARROT_BUILD_DIR, CXX, CXXFLAGS,
MAX_JOBS.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # (pip runs this file without it)

from build_backend import compiles, find_cxx  # noqa: E402

CSRC = ROOT / "csrc"
# The oldest torch whose stable ABI the sources use: 2.11.
TORCH_TARGET_VERSION = "0x020b000000000000"
MIN_NVCC = (12, 3)  # first nvcc that knows sm_90a well enough for wgmma
# -fno-trapping-math: without it a comparison that selects a value keeps its branch, and its loop is not vectorised.
CXX_FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fopenmp-simd", "-fno-trapping-math", "-fvisibility=hidden"]
CXX_FLAGS += ["-Wall", "-Wextra"]
NVCC_FLAGS = ["-O3", "-std=c++17", "-lineinfo", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden"]

NINJA_RULES = """\
ninja_required_version = 1.5

rule cxx
  command = {cxx} $flags -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = c++ $in

rule nvcc
  command = {nvcc} $flags --generate-dependencies-with-compile --dependency-output $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = nvcc $in

rule link
  command = {cxx} -shared -o $out $in $flags
  description = link $out
"""


@dataclass(frozen=True)
class Nvcc:
    """An nvcc that is new enough, and what it compiles for."""

    path: str
    version: tuple[int, int]
    archs: list[str]


def find_nvcc() -> Nvcc | str:
    """The first nvcc >= 12.3 of CUDACXX, CUDA_HOME, PATH, /usr/local/cuda, or why CUDA kernels are left out.

    PARROT_CUDA=0 wants none, 1 insists.
    """
    wish = os.environ.get("PARROT_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        sys.exit(f"PARROT_CUDA must be 0, 1 or auto, got {wish!r}")
    if wish == "0":
        return "PARROT_CUDA=0"
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    candidates = (os.environ.get("CUDACXX"), f"{home}/bin/nvcc", shutil.which("nvcc"))
    for path in filter(None, candidates):
        if not os.path.exists(path):
            continue
        release = re.search(r"release (\d+)\.(\d+)", subprocess.check_output([path, "--version"], text=True))
        if release and (version := (int(release[1]), int(release[2]))) >= MIN_NVCC:
            archs = os.environ.get("PARROT_CUDA_ARCHS", "90a").split(";")
            return Nvcc(path, version, archs)
    missing = "no nvcc >= 12.3 in CUDACXX, CUDA_HOME, PATH, /usr/local/cuda"
    if wish == "1":
        sys.exit(f"PARROT_CUDA=1, but there is {missing}")
    return missing


def cuda_library_dirs(nvcc: str, source: Path) -> list[str]:
    """Folders that hold libcudart_static.a. nvcc on PATH may be a wrapper script, so it is asked where it lives."""
    dry_run = subprocess.run([nvcc, "--dryrun", "-c", str(source)], capture_output=True, text=True, check=False).stderr
    top = re.search(r"#\$ TOP=(\S+)", dry_run)
    if top is None:
        sys.exit(f"cannot find the CUDA toolkit of {nvcc}: `{nvcc} --dryrun` names no TOP")
    return [f"{top[1]}/lib64", f"{top[1]}/targets/{os.uname().machine}-linux/lib"]


def find_ninja() -> str:
    """ninja of the Python package (the virtual environment's bin folder need not be on PATH), else the one on PATH."""
    try:
        import ninja
    except ImportError:
        path = shutil.which("ninja")
        return path or sys.exit("ninja is needed to build: pip install ninja")
    return os.path.join(ninja.BIN_DIR, "ninja")


class NinjaFile:
    """The text of one build.ninja: object files, and the libraries linked from them."""

    def __init__(self, cxx: str, nvcc: str) -> None:
        self.text = NINJA_RULES.format(cxx=cxx, nvcc=nvcc)

    def add_library(self, name: str, sources: list[tuple[Path, str, list[str]]], link_flags: list[str]) -> None:
        """Adds `name` (a file name) linked from (source, rule, flags) triples."""
        objects = []
        for source, rule, flags in sources:
            target = f"{source.relative_to(CSRC)}.o"
            objects.append(target)
            path = re.sub(r"([$ :])", r"$\1", str(source))
            self.text += f"\nbuild {target}: {rule} {path}\n  flags = {command_line(flags)}\n"
        self.text += f"\nbuild {name}: link {' '.join(objects)}\n  flags = {command_line(link_flags)}\n"

    def run(self, build_dir: Path) -> None:
        """Writes build.ninja and brings every library up to date."""
        (build_dir / "build.ninja").write_text(self.text)
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        if subprocess.run([find_ninja(), "-C", str(build_dir), *jobs], check=False).returncode:
            sys.exit("the C++ extension did not build; the compiler's message is above")


def command_line(flags: list[str]) -> str:
    """Flags quoted for the shell, then for ninja."""
    return shlex.join(flags).replace("$", "$$")


class NinjaBuild(build_ext):
    """Replaces setuptools' compiler calls by one ninja run."""

    def run(self) -> None:
        """Builds, copies the libraries to their place and writes `_build_info.py` beside them."""
        super().run()
        if not self.extensions:
            return
        target = Path(self.get_ext_fullpath("parrot_kernels._C")).parent / "_build_info.py"
        lines = [f"{name} = {value!r}" for name, value in self.facts.items()]
        target.write_text('"""Written by setup.py: what this build was made with."""\n\n' + "\n".join(lines) + "\n")

    def build_extensions(self) -> None:
        """Compiles and links both modules."""
        try:
            import pybind11
            import torch
        except ImportError as error:
            sys.exit(f"{error.name} is needed to build; install it and use `pip install --no-build-isolation`")
        default = ROOT / "build" / f"ninja-{sys.implementation.cache_tag}"
        build_dir = Path(os.environ.get("PARROT_BUILD_DIR", default)).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        cxx, found = find_cxx(), find_nvcc()
        assert cxx is not None, "without one there are no modules"
        nvcc = found if isinstance(found, Nvcc) else None
        cuda_sources = sorted((CSRC / "cuda").glob("*.cu")) if nvcc else []
        ninja = NinjaFile(cxx, nvcc.path if nvcc else "nvcc")
        self.add_torch_library(ninja, Path(torch.__file__).parent, nvcc if cuda_sources else None, cuda_sources)
        self.add_host_library(ninja, pybind11.get_include())
        ninja.run(build_dir)
        for ext in self.extensions:
            target = Path(self.get_ext_fullpath(ext.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(build_dir / target.name), str(target))
        self.facts: dict[str, Any] = {
            "torch_version": torch.__version__,
            "cxx": subprocess.run([*cxx.split(), "--version"], capture_output=True, text=True).stdout.split("\n")[0],
            "cxx_flags": [*CXX_FLAGS, *os.environ.get("CXXFLAGS", "").split()],
            "nvcc": ".".join(map(str, nvcc.version)) if nvcc else None,
            "cuda_archs": nvcc.archs if nvcc and cuda_sources else [],
            "cuda_sources": [source.name for source in cuda_sources],
            "why_no_cuda": None if isinstance(found, Nvcc) else found,
        }

    def add_torch_library(self, ninja: NinjaFile, torch_dir: Path, nvcc: Nvcc | None, cuda_sources: list[Path]) -> None:
        """`_C`: operators for torch, with the CUDA half when `nvcc` is given."""
        flags = [*CXX_FLAGS, f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
        flags += [f"-I{CSRC}", f"-isystem{torch_dir}/include"]
        sources = [CSRC / "registration.cpp", *sorted((CSRC / "cpu").glob("*.cpp"))]
        link = [f"-L{torch_dir}/lib", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", "-Wl,--as-needed"]
        cuda = []
        if nvcc:
            flags.append("-DPARROT_WITH_CUDA")
            sources += sorted((CSRC / "cuda").glob("*.cpp"))
            archs = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in nvcc.archs]
            cuda = [(source, "nvcc", [*NVCC_FLAGS, f"-I{CSRC}", *archs]) for source in cuda_sources]
            # The static runtime: the binary must load where no CUDA is installed.
            folders = [f"-L{folder}" for folder in cuda_library_dirs(nvcc.path, cuda_sources[0])]
            link += [*folders, "-lcudart_static", "-lrt", "-ldl", "-lpthread"]
        flags += os.environ.get("CXXFLAGS", "").split()
        name = Path(self.get_ext_filename("parrot_kernels._C")).name
        ninja.add_library(name, [*((source, "cxx", flags) for source in sources), *cuda], link)

    def add_host_library(self, ninja: NinjaFile, pybind11_include: str) -> None:
        """`_host`: pybind11, no torch."""
        include = Path(sysconfig.get_path("include"))
        if not (include / "Python.h").exists():
            package = f"python3.{sys.version_info.minor}-dev"
            sys.exit(
                f"{include}/Python.h is missing; on Debian or Ubuntu: apt-get install {package}, or set "
                "PARROT_SKIP_EXTENSION=1 to install without C++ modules"
            )
        flags = [*CXX_FLAGS, f"-isystem{include}", f"-isystem{pybind11_include}"]
        flags += os.environ.get("CXXFLAGS", "").split()
        name = Path(self.get_ext_filename("parrot_kernels._host")).name
        ninja.add_library(name, [(source, "cxx", flags) for source in sorted((CSRC / "host").glob("*.cpp"))], [])


def extensions() -> list[Extension]:
    """Both modules, or none where nothing is compiled. The sources are listed for the source distribution."""
    if not compiles():
        return []
    torch_sources = [CSRC / "registration.cpp", *sorted((CSRC / "cpu").glob("*.cpp"))]
    host_sources = sorted((CSRC / "host").glob("*.cpp"))
    return [
        Extension("parrot_kernels._C", [str(path.relative_to(ROOT)) for path in torch_sources], py_limited_api=True),
        Extension("parrot_kernels._host", [str(path.relative_to(ROOT)) for path in host_sources]),
    ]


setup(
    packages=[*find_packages(include=["parrot_sys*"]), *find_packages("kernels", include=["parrot_kernels*"])],
    package_dir={"parrot_sys": "parrot_sys", "parrot_kernels": "kernels/parrot_kernels"},
    ext_modules=extensions(),
    cmdclass={"build_ext": NinjaBuild},
)

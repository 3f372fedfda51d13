"""The CUDA ops of csrc/cuda, host code included, compiled for the CPU: see device_emulator.h.

`library()` builds them (seconds; nothing when nothing changed) and returns `torch.ops.parrot_emulated`, whose ops take
CPU tensors. `device(...)` plays another device or another order of threads.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch

from parrot_kernels import cuda_support

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "cuda-emulator"
NEEDS_A_DEVICE = ("device_info.cu",)
OPS = (
    "text_guided_routing_cuda_fwd",
    "text_guided_routing_cuda_bwd",
    "m_grouped_gemm_cuda",
    "m_grouped_swiglu_cuda",
    "m_grouped_gemm_fp8_cuda",
    "m_grouped_swiglu_fp8_cuda",
    "k_grouped_gemm_cuda",
    "expert_combine_cuda",
    "expert_combine_fp8_cuda",
    "expert_hidden_bwd_cuda",
    "topk_routing_cuda_fwd",
    "topk_routing_cuda_bwd",
)

FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-Wall", "-Wno-unknown-pragmas"]
FLAGS += ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
FLAGS += ['-DPARROT_DEVICE_EMULATOR="device_emulator.h"', f"-I{HERE}", f"-I{CSRC}"]

NINJA = """\
rule cxx
  command = {cxx} {flags} -MD -MF $out.d -x c++ -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {cxx} -shared -o $out $in -L{torch}/lib -Wl,--no-as-needed -ltorch -ltorch_cpu -lc10
"""


@functools.cache
def _path() -> Path:
    """Brings the library up to date."""
    import ninja  # not needed where there is a GPU

    torch_dir = Path(torch.__file__).parent
    cxx = os.environ.get("CXX") or shutil.which("c++") or "g++"
    text = NINJA.format(
        cxx=cxx, flags=shlex.join([*FLAGS, f"-isystem{torch_dir}/include"]), torch=shlex.quote(str(torch_dir))
    )
    sources = [*CSRC.glob("cuda/*.cu"), *CSRC.glob("cuda/*.cpp"), HERE / "emulator.cpp"]
    objects = []
    for source in sorted(source for source in sources if source.name not in NEEDS_A_DEVICE):
        objects.append(f"{source.name}.o")
        text += f"build {objects[-1]}: cxx {str(source).replace(' ', '$ ')}\n"
    text += f"build emulated.so: link {' '.join(objects)}\n"
    BUILD.mkdir(parents=True, exist_ok=True)
    (BUILD / "build.ninja").write_text(text)
    result = subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", BUILD], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return BUILD / "emulated.so"


@functools.cache
def library() -> ModuleType:
    """The emulated ops: `library().text_guided_routing_cuda_fwd(...)` and so on."""
    torch.ops.load_library(_path())
    return torch.ops.parrot_emulated


@contextmanager
def device(*, seed: int = 0, multiprocessors: int = 2) -> Iterator[None]:
    """Inside, threads run in the order that `seed` gives, on a device with so many multiprocessors; not on a GPU."""
    if not library.cache_info().currsize:
        yield
        return
    switch = ctypes.CDLL(str(_path())).parrot_emulator_set
    switch(seed, multiprocessors)
    try:
        yield
    finally:
        switch(0, 2)


@contextmanager
def in_place_of_cuda() -> Iterator[None]:
    """Inside, the `cuda` back ends take CPU tensors and run on the emulator."""
    ops, extension = library(), torch.ops.parrot_ext
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_support, "why_not", lambda *args, **kwargs: None)
        for name in OPS:
            patch.setattr(extension, name, getattr(ops, name), raising=False)
        yield

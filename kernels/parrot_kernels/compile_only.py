"""Compiles the Triton kernels for GPUs that are not there, and checks what the compiler made of them.

    python -m parrot_kernels.compile_only [--op NAME] [--arch 90] [--which all]   check against compile_figures.json
    python -m parrot_kernels.compile_only [--op NAME] [--arch 90] --update        compile all and write the figures

`parrot_kernels/<op>/compile_cases.py` holds `CASES`, calls of the op's launchers with meta tensors. A driver that never
launches stands in for CUDA's, so each call compiles the kernels that it would launch, in every tile size that it may
choose. Of each compiled kernel this checks that nothing spills, that shared memory fits, and that it has the
instructions that its case claims; figures must equal the recorded ones where the same Triton made them. Without
--which, kernels whose source and compiler did not change are not compiled again, except those of an op's first case on
sm_90.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher
from triton.runtime.driver import driver

import parrot_kernels
from parrot_kernels import env

FIGURES = Path(__file__).with_name("compile_figures.json")
ARCHS = (80, 90, 100)
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that one block may use
# Loads and stores of local memory are the spills.
# Stages of the pipeline that brings in the operands of products: the smallest number of copies of a tile that it keeps.
_BUFFERS = re.compile(r"ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x(?:bf16|f16|f8E4M3FN)\b")
INSTRUCTIONS = ("HGMMA", "QGMMA", "HMMA", "UTCHMMA", "UTMALDG", "UTMASTG", "LDGSTS", "LDL", "STL")

Figures = dict[str, Any]
Which = Literal["changed", "some", "all"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of a launcher, and what must be seen in the code that it compiles."""

    name: str
    run: Callable[[], object]
    """Calls the launcher; on meta tensors it needs no memory."""
    archs: tuple[int, ...] = (90,)
    """Compute capabilities that the kernels claim."""
    instructions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Kernel name, and constants that pick some of its tiles -> instructions (of INSTRUCTIONS) that they must have on
    sm_90; with UTMALDG as many copies of a tile as stages, too."""


class _Anything:
    """Stands in for driver functions whose results nobody looks at."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


class _Utils(_Anything):
    # Shared memory without end, so that a kernel that needs too much is reported with its figures.
    _properties: ClassVar = {"max_shared_mem": 1 << 30, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, *args: object) -> tuple[object, object, int, int, int]:
        return object(), object(), 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return self._properties


class SilentLauncher(CudaLauncher):
    """Triton's launcher without CUDA; memory that a kernel asks the host for is allocated as ever."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.num_ctas = getattr(metadata, "num_ctas", 1)
        self.launch = lambda *args: None
        for kind in ("global", "profile"):
            for what in ("size", "align"):
                setattr(self, f"{kind}_scratch_{what}", getattr(metadata, f"{kind}_scratch_{what}"))
        self.launch_cooperative_grid, self.launch_pdl = metadata.launch_cooperative_grid, metadata.launch_pdl


class CompileOnlyDriver(_Anything):
    """Says that there is a GPU of `arch` and launches nothing."""

    def __init__(self, arch: int) -> None:
        self._target = GPUTarget("cuda", arch, 32)
        self.utils = _Utils()
        self.launcher_cls: Any = SilentLauncher

    # (The methods are those that Triton asks a driver for.)

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default stream."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """The architecture."""
        return self._target

    def get_active_torch_device(self) -> torch.device:
        """Where tensors are."""
        return torch.device("meta")

    def get_benchmarker(self) -> Callable[..., list[float]]:
        """Refuses."""
        raise AssertionError("a launch must choose its tile without timing anything: see tile_choice.py")

    def map_python_to_cpp_type(self, kind: str) -> str:
        """As for CUDA."""
        from triton.backends.nvidia.driver import ty_to_cpp

        return ty_to_cpp(kind)


def _cuobjdump(option: str, path: str) -> str:
    tool = Path(sys.modules["triton"].__file__ or "").parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout


def narrow_strides(ttir: str) -> int:
    """Strides of TMA descriptors that are products of 32 bits, widened too late: wrong from 2**31 elements on."""
    made_by = dict(re.findall(r"(%[\w#]+) = (.+)", ttir))
    count = 0
    for operands in re.findall(r"tt\.make_tensor_descriptor [^,]+, \[[^\]]*\], \[([^\]]*)\]", ttir):
        for stride in operands.split(", "):
            widened = re.match(r"arith\.extsi (%[\w#]+) : i32 to i64", made_by.get(stride, ""))
            count += bool(widened and made_by.get(widened[1], "").startswith("arith.muli"))
    return count


def figures_of(kernel: Any) -> Figures:
    """Registers, shared memory, buffers and instruction counts (those that are not 0) of one compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = _cuobjdump("--dump-resource-usage", file.name), _cuobjdump("-sass", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, f"cuobjdump names no registers: {usage}"
    counts = {name: len(re.findall(rf"\b{name}\b", code)) for name in INSTRUCTIONS}
    counts["buffers"] = min(map(int, _BUFFERS.findall(kernel.asm["ttgir"])), default=0)
    counts["narrow_strides"] = narrow_strides(kernel.asm["ttir"])
    return {
        "registers": int(registers[1]),
        "shared": kernel.metadata.shared,
        **{name: count for name, count in counts.items() if count},
    }


class Recorder:
    """Triton's compile hooks: which kernels one case compiles, skipping those that are known and unchanged."""

    def __init__(self, known: Mapping[str, Figures], seen: set[str], compile_all: bool) -> None:
        self._known, self._seen, self._compile_all = known, seen, compile_all
        self.rows: dict[str, Figures] = {}
        self.compiled = 0
        self._names: dict[str, str] = {}  # digest of a kernel -> its row

    def before(self, *, key: Any, fn: Any, compile: dict[str, Any], **_: object) -> bool:
        """Called before a compilation; True skips it."""
        source = fn.jit_function.cache_key
        digest = hashlib.sha256(f"{triton.__version__} {source} {key}".encode()).hexdigest()[:16]
        if digest in self._seen:  # by an earlier case of this op
            return True
        self._seen.add(digest)
        constants = {fn.jit_function.arg_names[path[0]]: value for path, value in compile["constants"].items()}
        options = {**constants, "warps": compile["num_warps"], "stages": compile["num_stages"]}
        name = f"{fn.jit_function.__name__}[{', '.join(f'{k}={v}' for k, v in options.items() if v is not None)}]"
        while name in self.rows:  # the same constants, other dtypes
            name += "'"
        self._names[str(key)] = name
        row = self._known.get(name, {})
        skip = row.get("digest") == digest and not self._compile_all
        self.rows[name] = dict(row) if skip else {"digest": digest}
        return skip

    def after(self, *, key: Any, fn: Any, compile: dict[str, Any], **_: object) -> None:
        """Called after a compilation."""
        kernel = fn.jit_function.device_caches[compile["device"]][0][key]
        self.rows[self._names[str(key)]] |= figures_of(kernel)
        self.compiled += 1


def op_names() -> list[str]:
    """Ops that have compile cases."""
    ops = [module.name for module in pkgutil.iter_modules(parrot_kernels.__path__) if module.ispkg]
    return [op for op in ops if importlib.util.find_spec(f"parrot_kernels.{op}.compile_cases")]


def problems_of(case: Case, rows: Mapping[str, Figures], known: Mapping[str, Figures] | None, arch: int) -> list[str]:
    """What is wrong with the kernels that `case` compiled; `known` None compares no figures."""
    found = [] if rows else ["compiles nothing that no earlier case of the op compiles"]
    for name, row in rows.items():
        if "LDL" in row or "STL" in row:
            found.append(
                f"{name} spills {row['registers']} registers: {row.get('LDL', 0)} LDL, {row.get('STL', 0)} STL"
            )
        if row["shared"] > SHARED_MEMORY[arch]:
            found.append(f"{name} needs {row['shared']} bytes of shared memory, sm_{arch} has {SHARED_MEMORY[arch]}")
        if row.get("narrow_strides"):
            found.append(f"{name} multiplies the stride of a TMA descriptor in 32 bits: cast a factor to int64")
        recorded = None if known is None else known.get(name, {})
        if recorded is not None and {**row, "digest": None} != {**recorded, "digest": None}:
            found.append(f"{name} is recorded as {recorded}, and compiles to {row}; --update if that is meant")
    if known is not None:
        found += [f"{name} is recorded and no longer compiled; run --update" for name in known if name not in rows]
    for kernel, wanted in case.instructions.items() if arch == 90 else ():
        start, *constants = kernel.split()
        own = {
            name: row
            for name, row in rows.items()
            if name.startswith(f"{start}[") and all(f"{one}," in name for one in constants)
        }
        found += [f"claims {kernel}, which it does not compile"] if not own else []
        for name, row in own.items():
            found += [f"{name} has no {what}" for what in wanted if not row.get(what)]
            stages = int(name.rpartition("stages=")[2].rstrip("]'"))
            if "UTMALDG" in wanted and row.get("buffers", 0) < stages:
                found.append(f"{name} keeps {row.get('buffers', 0)} copies of a tile, not one for each stage")
    return found


def compile_op(op: str, arch: int, recorded: Figures | None, which: Which) -> tuple[Figures, list[str]]:
    """Figures by case and kernel, and what is wrong with them; `recorded` None compares no figures."""
    figures: Figures = {}
    problems: list[str] = []
    seen: set[str] = set()
    cases = [case for case in importlib.import_module(f"parrot_kernels.{op}.compile_cases").CASES if arch in case.archs]
    for number, case in enumerate(cases):
        known = None if recorded is None else recorded.get(case.name, {})
        recorder = Recorder(known or {}, seen, which == "all" or (which == "some" and number == 0 and arch == 90))
        knobs.runtime.jit_cache_hook, knobs.runtime.jit_post_compile_hook = recorder.before, recorder.after
        case.run()
        figures[case.name] = recorder.rows
        found = problems_of(case, recorder.rows, known, arch)
        problems += [f"sm_{arch} {op} {case.name}: {problem}" for problem in found]
        print(f"sm_{arch} {op} {case.name}: {len(recorder.rows)} kernels, {recorder.compiled} compiled", flush=True)
    return figures, problems


def read_figures() -> Figures:
    """What compile_figures.json holds; empty before it was first written."""
    return json.loads(FIGURES.read_text()) if FIGURES.exists() else {}


def write_figures(op: str, arch: int, figures: Figures) -> None:
    """Replaces the figures of one op on one architecture in the file as it is now."""
    content = read_figures()
    if content.get("triton") != triton.__version__:
        content = {"triton": triton.__version__}  # figures of two compilers in one file could not be compared
    content.setdefault(f"sm_{arch}", {})[op] = figures
    FIGURES.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def compile_ops(ops: list[str], arch: int, which: Which, update: bool) -> list[str]:
    """Compiles the cases of `ops` for one architecture; returns what is wrong."""
    driver.set_active(CompileOnlyDriver(arch))
    content = read_figures()
    compare = content.get("triton") == triton.__version__ and not update
    problems = []
    for op in ops:
        recorded = content.get(f"sm_{arch}", {}).get(op, {}) if compare else None
        figures, found = compile_op(op, arch, recorded, which)
        if update and figures and not found:
            write_figures(op, arch, figures)
        problems += found
    return problems


def main() -> int:
    """Exit status 0 when every kernel passes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--op", choices=op_names(), action="append", help="only this op; may be repeated")
    parser.add_argument("--arch", type=int, choices=ARCHS, help="only this compute capability")
    parser.add_argument(
        "--which",
        choices=get_args(Which),
        default="some",
        help="changed: what changed since its figures were recorded; some (default): also one case of each op; all",
    )
    parser.add_argument("--update", action="store_true", help="compile everything and write compile_figures.json")
    args = parser.parse_args()
    if env.triton_interpret():
        parser.error("TRITON_INTERPRET is set, and nothing compiles then")
    if args.arch is None:
        # One process for each architecture: Triton's caches of compiled kernels do not know the architecture.
        command = [sys.executable, "-m", "parrot_kernels.compile_only", *sys.argv[1:], "--arch"]
        return max(subprocess.run([*command, str(arch)], check=False).returncode for arch in ARCHS)
    problems = compile_ops(args.op or op_names(), args.arch, "all" if args.update else args.which, args.update)
    print("\n".join(problems))
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())

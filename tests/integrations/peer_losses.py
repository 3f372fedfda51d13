"""Runs `pretrain_gpt.py` of a release of Megatron-LM on CPU processes, with its own parts and with ours."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from tests.integrations.peer_suite import ROOT, checkout

MODEL = """
--num-layers 2 --hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 128 --num-experts 4 --moe-router-topk 2
--moe-ffn-hidden-size 64 --moe-aux-loss-coeff 1e-2 --moe-token-dispatcher-type alltoall --swiglu --disable-bias-linear
--normalization RMSNorm --position-embedding-type rope --seq-length 32 --max-position-embeddings 32
--untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0
--mock-data --tokenizer-type NullTokenizer --vocab-size 127 --make-vocab-size-divisible-by 64 --split 98,1,1
--micro-batch-size 2 --global-batch-size 4 --lr 1e-3 --min-lr 1e-4 --lr-decay-iters 4 --lr-decay-style cosine
--seed 7 --num-workers 0 --eval-iters 0 --eval-interval 1000 --log-interval 1
"""
ON_A_CPU = """
--transformer-impl local --distributed-backend gloo --use-cpu-initialization --no-persist-layer-norm
--no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion
--no-rope-fusion
"""
STEPS = 4


@dataclass(frozen=True, slots=True)
class Layout:
    """A layout by its name in the documentation, its processes and its options."""

    name: str
    processes: int
    options: str = ""
    needs_norms: bool = False
    model: str = ""
    """Further options of the model."""


LAYOUTS = (
    Layout("one process", 1),
    Layout("EP2", 2, "--expert-model-parallel-size 2"),
    Layout("PP2", 2, "--pipeline-model-parallel-size 2"),
    Layout("TP2 + SP", 2, "--tensor-model-parallel-size 2 --sequence-parallel", needs_norms=True),
    Layout("one process, QK norms", 1, model="--qk-layernorm"),
)


def spec(version: str, *, ours: bool, needs_norms: bool) -> str:
    """Options that choose the parts; nothing for Megatron's own."""
    old = version.startswith("0.16")
    if ours:
        name = ("layer" if old else "gpt_moe") + "_norms" * needs_norms
        return f"--spec parrot_sys.megatron.specs {name}"
    # (Megatron's own norms do without Transformer Engine and apex only where there is no sequence parallelism.)
    return f"--spec peer_specs {'layer' if old else 'gpt_moe'}_norms" if needs_norms else ""


def losses(version: str, folder: Path, layout: Layout, *, ours: bool) -> list[float]:
    """Losses of the first steps from the checkpoint in `folder`, which is made where there is none."""
    folder = folder / layout.model.replace(" ", "")
    folder.mkdir(exist_ok=True)
    if not (start := folder / f"start-{version}").is_dir():
        keep = f"--save {start}.new --save-interval 1 --no-save-optim --no-save-rng"
        _run(version, LAYOUTS[0], f"{layout.model} --train-iters 1 {keep}", folder / f"start-{version}.log")
        Path(f"{start}.new").rename(start)
    chosen = spec(version, ours=ours, needs_norms=layout.needs_norms)
    resume = f"--train-iters {STEPS} --load {start} --finetune --no-load-optim --no-load-rng"
    log = folder / f"{version}-{layout.name.replace(' ', '')}-{'ours' if ours else 'theirs'}.log"
    said = _run(version, layout, f"{layout.model} {layout.options} {chosen} {resume}", log)
    assert ("topk_routing runs on" in said) == ours, f"{log}: the router is not the one that was asked for"
    found = [float(each) for each in re.findall(r"lm loss: (\S+)", said)]
    assert len(found) == STEPS, f"{log}: {len(found)} losses"
    return found


def _run(version: str, layout: Layout, options: str, log: Path) -> str:
    """What the program printed."""
    sources = checkout(version)
    folder = Path(__file__).parent
    paths = [folder / "python_3_11", ROOT, ROOT / "kernels", folder, sources]
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PYTHONDONTWRITEBYTECODE": "1",
        # Megatron-LM's make asks the first python3 and python3-config; a virtual environment has no python3-config.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "MAKEFLAGS": "e",
        "LIBEXT": sysconfig.get_config_var("EXT_SUFFIX"),
        "OMP_NUM_THREADS": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(layout.processes)]
    command += ["--master-port", str(29100 + os.getpid() % 400), "-m", "parrot_sys.megatron.run"]
    command += [str(sources / "pretrain_gpt.py"), *f"{MODEL} {ON_A_CPU} {options}".split()]
    with open(log, "w", encoding="utf-8") as file:
        done = subprocess.run(
            command, cwd=log.parent, env=variables, stdout=file, stderr=file, timeout=900, check=False
        )
    said = log.read_text(encoding="utf-8")
    assert done.returncode == 0, f"{log}\n{said[-4000:]}"
    return said

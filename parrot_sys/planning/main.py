"""`parrot plan`: which layout a training run should have on a cluster, from formulas."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from parrot_sys.cli import parse_config
from parrot_sys.planning.config import PlanConfig
from parrot_sys.planning.estimate import Estimate
from parrot_sys.planning.report import PREDICTED, explain, report, scaling_report, scaling_table, table
from parrot_sys.planning.search import NothingFits, choose, find_layouts
from parrot_sys.systems.registry import SYSTEMS
from parrot_sys.training.config import TrainConfig

_EXAMPLES = "\n".join(
    "  $ parrot plan " + " ".join(f"--config {preset}" for preset in system.example) for system in SYSTEMS.values()
)
DESCRIPTION = f"""Predicts memory and step time of training on a cluster, for every layout (tensor, sequence, pipeline,
virtual pipeline, context, expert, expert tensor and data parallel, micro-batch, recomputation, ZeRO-1), and says which
is best and why. Nothing runs and no GPU is needed: figures come from data sheets, formulas and assumed efficiencies.

Eight H200 for the second stage of Parrot-7B:

  $ parrot plan --config parrot_7b --config parrot_instruct --cluster.gpu H200

Every system, decoder and tower can be planned, with low-rank updates (LoRA) and frozen parts as a stage has them:

{_EXAMPLES}

Token-routed decoders, and pictures that are cut into tiles (their size decides how many):

  $ parrot plan --config parrot_qwen3_30b_a3b --config parrot_instruct --cluster.nodes 4
  $ parrot plan --config MODEL --config STAGE --sample.picture-width 640 --sample.picture-height 480

Four nodes, 64 experts of which two work on an image, tensor parallelism decided:

  $ parrot plan --config parrot_14b --cluster.nodes 4 --model.moe.num-experts 64 --model.moe.routing topk \\
        --fix.tensor 2

Memory alone of a layout you have: fix everything (--fix.tensor, --fix.pipeline, ...). From 8 GPUs to 4,096:

  $ parrot plan --config parrot_7b --scaling.gpus 8 64 512 4096 --scaling.samples-per-gpu 16 --plot scaling.svg

Files may hold settings of `parrot train` that do not matter here (learning rates, paths) or that are searched
(parallel, recompute, optimizer.distributed): they are left out; --fix decides. With your own measured efficiencies
(--cluster.efficiency.gemm and the others) the times become better."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `parrot plan` with `argv`; 0 when a layout fits."""
    config = parse_config(PlanConfig, argv, prog="parrot plan", description=DESCRIPTION, leave_out=TrainConfig)
    if config.scaling.gpus:
        return _scaling(config)
    estimates = find_layouts(config)
    best, shown = choose(estimates), estimates[: config.top]
    if best not in shown:
        shown = [*shown[:-1], best]
    if config.json:
        print(json.dumps(report(config, estimates, best), indent=1))
    else:
        print(table(shown, best))
        print(f"({len(shown)} of {len(estimates)} layouts that fit, fastest first)\n")
        print(explain(config, best))
    if config.plot is not None:
        from parrot_sys.planning import plots

        plots.layouts(shown, config.cluster, Path(config.plot))
        print(f"figure: {config.plot}", file=sys.stderr)
    return 0


def _scaling(config: PlanConfig) -> int:
    best, without = scale(config)
    if not best:
        raise without[-1]
    if config.json:
        print(json.dumps(scaling_report(config, best), indent=1))
    else:
        print("\n\n".join([scaling_table(best), *map(str, without), PREDICTED]))
    if config.plot is not None:
        from parrot_sys.planning import plots

        plots.scaling(best, config.cluster, Path(config.plot))
        print(f"figure: {config.plot}", file=sys.stderr)
    return 0


def scale(config: PlanConfig) -> tuple[list[tuple[int, Estimate]], list[NothingFits]]:
    """The best layout on each number of GPUs of `scaling` (whole nodes, or a part of one), and where nothing fits."""
    best, without = [], []
    numbers = config.scaling.gpus
    for number in tqdm(numbers, desc="planning", unit="cluster", disable=config.json or not sys.stderr.isatty()):
        per_node = min(number, config.cluster.gpus_per_node)
        cluster = replace(config.cluster, nodes=number // per_node, gpus_per_node=per_node)
        samples = config.scaling.samples_per_gpu
        size = config.global_batch_size if samples is None else samples * number
        try:
            found = find_layouts(replace(config, cluster=cluster, global_batch_size=size))
            best.append((number, choose(found)))
        except NothingFits as error:
            without.append(error)
    return best, without

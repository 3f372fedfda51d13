"""The experiment of a system, three seeds each, from the demo's data and stages.

    python train/experiment.py                  parrot: experts on and off, three language mixes (an hour or more)
    python train/experiment.py --model wings    what visual tuning costs in questions about text, and what learners keep
    python train/experiment.py --model routers    parrot: which routers carry the language, and what that costs
    python train/experiment.py --model multimodal_gpt    how long answers are with and without a set of short ones
    python train/experiment.py --fresh          from the start; otherwise what is done is not done again
    python train/experiment.py --quick          one seed and four steps a stage, to see that it works

Work lies below runs/experiment or runs/experiment-MODEL, results so far and their report too. What a whole experiment
gave is kept in benchmarks/results/DEVICE (not with --quick).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from parrot_sys.cli import run_main

SEEDS = (0, 1, 2)


def parse(argv: list[str]) -> argparse.Namespace:
    from studies.variants import EXPERIMENTS

    parser = argparse.ArgumentParser(
        prog="experiment.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", choices=list(EXPERIMENTS), default="parrot", help="the system (parrot)")
    parser.add_argument("--fresh", action="store_true", help="forget earlier runs and start from the beginning")
    parser.add_argument("--quick", action="store_true", help="one seed, little data, four steps a stage")
    help = "training processes (one per GPU, or two on a CPU); results differ by rounding only"
    parser.add_argument("--processes", type=int, help=help)
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    options = parse(argv)
    from parrot_sys import platform
    from studies import experiment, recipes
    from studies.pipeline import Pipeline
    from studies.variants import EXPERIMENTS

    chosen = EXPERIMENTS[options.model]
    recipes.processes = options.processes
    name = "experiment" if options.model == "parrot" else f"experiment-{options.model}"
    root = Path(f"runs/{name}-quick" if options.quick else f"runs/{name}")
    device = "gpu" if platform.cuda_available() else "cpu"
    kept = root / chosen.file if options.quick else Path("benchmarks/results") / device / chosen.file
    pipeline = Pipeline(root, say=lambda line: print(line, flush=True), fresh=options.fresh)
    data = recipes.build_data(pipeline, recipes.QUICK_DATA if options.quick else ())
    content = experiment.experiment_content(chosen, recipes.provenance())
    report = root / "report" / "report.md"
    evaluations: dict[str, dict[str, Path]] = {}
    for seed in SEEDS[:1] if options.quick else SEEDS:
        flags = recipes.QUICK_TRAIN if options.quick else ()
        run = experiment.Run(pipeline=pipeline, data=data, seed=seed, flags=flags)
        for variant in chosen.variants:
            folder = variant.evaluate(run).folder
            evaluations.setdefault(variant.name, {})[str(seed)] = folder
            accuracy, counts = chosen.measure(folder)
            record = {"accuracy": accuracy, "n": counts}
            if chosen.routes is not None:
                record["routes"] = chosen.routes(folder)
            content["results"].setdefault(variant.name, {})[str(seed)] = record
            content["summary"] = experiment.summarize(content["results"], chosen.comparisons)
            content["summary"] |= experiment.compare_variants(chosen, evaluations)
            experiment.write_result(content, root / chosen.file)
            report = experiment.write_report(content, root / "report")
            print(f"{variant.name}, seed {seed}: " + ", ".join(f"{p} {a['mean']:.1f}" for p, a in accuracy.items()))
    experiment.write_result(content, kept)
    print("\n" + report.read_text(encoding="utf-8"))
    seconds = sum({step.name: step.seconds for step in pipeline.steps}.values())
    print(f"{seconds / 60:.0f} minutes of work in all; numbers: {kept}; report: {report}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(lambda argv: main(list(argv)), sys.argv[1:], prog="experiment.py"))

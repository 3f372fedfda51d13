"""The experiment: experts on and off, three language mixes, three seeds, from the demo's data and stages.

    python train/experiment.py            everything (an hour or more); what is done is not done again
    python train/experiment.py --fresh    from the start
    python train/experiment.py --quick    one seed and four steps a stage, to see that it works

Each result is kept in benchmarks/results/DEVICE/experiment.json as soon as it is there
(--quick: in runs/experiment-quick/experiment.json).
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

from parrot_sys.cli import run_main

SEEDS = (0, 1, 2)
QUICK_DATA = [
    "--concepts",
    "24",
    "--held-out",
    "8",
    "--text-rounds",
    "2",
    "--instruct-rounds",
    "2",
    "--align-rounds",
    "1",
]
QUICK_TRAIN = ["--max-steps", "4"]


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="experiment.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--fresh", action="store_true", help="forget earlier runs and start from the beginning")
    parser.add_argument("--quick", action="store_true", help="one seed, little data, four steps a stage")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    options = parse(argv)
    from parrot_sys import platform
    from parrot_sys.evaluation import experiment, recipes
    from parrot_sys.evaluation.pipeline import Pipeline

    root = Path("runs/experiment-quick" if options.quick else "runs/experiment")
    if options.fresh:
        shutil.rmtree(root, ignore_errors=True)
    device = "gpu" if platform.cuda_available() else "cpu"
    kept = root / "experiment.json" if options.quick else Path("benchmarks/results") / device / "experiment.json"
    pipeline = Pipeline(root, say=lambda line: print(line, flush=True))
    data = recipes.build_data(pipeline, QUICK_DATA if options.quick else [])
    content: dict[str, Any] = {
        **recipes.provenance(),
        "chance": 25.0,
        "variants": {variant.name: variant.description for variant in experiment.VARIANTS},
        "results": {},
    }
    report = root / "report" / "report.md"
    for seed in SEEDS[:1] if options.quick else SEEDS:
        for variant in experiment.VARIANTS:
            flags = QUICK_TRAIN if options.quick else []
            evaluation = experiment.run_variant(pipeline, data, variant, seed, flags)
            accuracy, counts = experiment.accuracies(evaluation.folder)
            record = {"accuracy": accuracy, "n": counts}
            content["results"].setdefault(variant.name, {})[str(seed)] = record
            content["summary"] = experiment.summarize(content["results"])
            experiment.write_result(content, kept)
            report = experiment.write_report(content, root / "report")
            print(f"{variant.name}, seed {seed}: " + ", ".join(f"{p} {a['mean']:.1f}" for p, a in accuracy.items()))
    print("\n" + report.read_text(encoding="utf-8"))
    seconds = sum({step.name: step.seconds for step in pipeline.steps}.values())
    print(f"{seconds / 60:.0f} minutes of work in all; numbers: {kept}; report: {report}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(lambda argv: main(list(argv)), sys.argv[1:], prog="experiment.py"))

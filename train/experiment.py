"""The studies of docs/evidence.md: variants of one small model, three seeds each, from the demo's data and stages.

    python train/experiment.py                        languages: which routers carry the language, where experts help
    python train/experiment.py --study wings_curve    text kept against pictures learned, over the decoder's rate
    python train/experiment.py --study joint          multimodal_gpt: tuned on pictures, on text, on both: dialogues
    python train/experiment.py --study answers        the same, and tuned on short answers: their length and repetition
    python train/experiment.py --only frozen          only variants whose name holds a text, as 'frozen decoder, 6 '
    python train/experiment.py --seeds 0              only some seeds (side by side in copies of a folder of runs)
    python train/experiment.py --report               train nothing: result and report of what is done so far
    python train/experiment.py --join FILE            train nothing: add a result made elsewhere to the kept one
    python train/experiment.py --fresh                from the start; otherwise what is done is not done again
    python train/experiment.py --quick                one seed and four steps a stage, to see that it works

Stop it at any time (Ctrl-C): the same command goes on with the variant and step that it was at. Work lies below
runs/evidence, where the studies share what they have in common; results so far and their report are in report/STUDY
there. A whole study, and what --report finds, is kept in benchmarks/results/DEVICE (not with --quick).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from parrot_sys.cli import run_main

if TYPE_CHECKING:
    from studies.experiment import Experiment

SEEDS = (0, 1, 2)


def parse(argv: list[str]) -> argparse.Namespace:
    from studies.catalog import EXPERIMENTS

    parser = argparse.ArgumentParser(
        prog="experiment.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    choices = list(EXPERIMENTS)
    parser.add_argument("--study", choices=choices, default=choices[0], help=f"the study, see above ({choices[0]})")
    parser.add_argument("--only", action="append", help="text in the names of variants to train; repeat to narrow down")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="seeds to train from (0 1 2)")
    parser.add_argument("--report", action="store_true", help="train nothing; write the result of what is done")
    help = "train nothing; add the variants of another result of the study, made at another commit, to the kept one"
    parser.add_argument("--join", type=Path, help=help)
    parser.add_argument("--fresh", action="store_true", help="forget earlier runs and start from the beginning")
    parser.add_argument("--quick", action="store_true", help="one seed, little data, four steps a stage")
    help = "training processes (one per GPU, or two on a CPU); results differ by rounding only"
    parser.add_argument("--processes", type=int, help=help)
    return parser.parse_args(argv)


def kept_result(chosen: Experiment) -> Path:
    """Where the result of a study is kept."""
    from parrot_sys import platform

    return Path("benchmarks/results") / ("gpu" if platform.cuda_available() else "cpu") / chosen.file


def join(chosen: Experiment, file: Path) -> int:
    """Adds the variants of a result to the kept one, and writes the report of both below runs/."""
    from parrot_sys.errors import DataError
    from parrot_sys.files import read_json
    from studies.experiment import write_result
    from studies.experiment_report import write_report
    from studies.joining import join_results

    kept = kept_result(chosen)
    old, new = (read_json(path, DataError) for path in (kept, file))
    content = join_results(old, new, {name: (first, second) for name, first, second in chosen.comparisons})
    report = write_report(chosen, content, Path("runs/joined") / Path(chosen.file).stem)
    write_result(content, kept)
    print(f"numbers: {kept}; report: {report}")
    return 0


def main(argv: list[str]) -> int:
    options = parse(argv)
    from studies import recipes
    from studies.catalog import EXPERIMENTS
    from studies.experiment import Run, write_result
    from studies.pipeline import Pipeline
    from studies.running import train_variants

    chosen = EXPERIMENTS[options.study]
    if options.join is not None:
        return join(chosen, options.join)
    recipes.processes = options.processes
    root = Path("runs/evidence-quick" if options.quick else "runs/evidence")
    pipeline = Pipeline(root, say=lambda line: print(line, flush=True), fresh=options.fresh, only_done=options.report)
    data_flags = recipes.QUICK_DATA if options.quick else ()
    data = recipes.build_data(pipeline, data_flags)
    runs = [
        Run(
            pipeline=pipeline,
            data=data,
            seed=seed,
            flags=recipes.QUICK_TRAIN if options.quick else (),
            data_flags=data_flags,
        )
        for seed in (options.seeds[:1] if options.quick else options.seeds)
    ]
    variants = [each for each in chosen.variants if all(text in each.name for text in options.only or ())]
    content = train_variants(chosen, variants, runs, root / "report" / options.study)
    whole = len(variants) == len(chosen.variants) and set(SEEDS) <= set(options.seeds)
    if (whole or options.report) and not options.quick:
        kept = kept_result(chosen)
        write_result(content, kept)
        print(f"numbers: {kept}")
    seconds = sum({step.name: step.seconds for step in pipeline.steps}.values())
    print(f"{seconds / 60:.0f} minutes of work in all; report: {root / 'report' / options.study / 'report.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(lambda argv: main(list(argv)), sys.argv[1:], prog="experiment.py"))

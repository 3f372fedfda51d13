"""The studies of docs/evidence.md: variants of one small model, three seeds each, from the demo's data and stages.

    python train/experiment.py                        languages: which routers carry the language, where experts help
    python train/experiment.py --study wings_curve    text kept against pictures learned, over the decoder's rate
    python train/experiment.py --study joint          multimodal_gpt: tuned on pictures, on text, on both: dialogues
    python train/experiment.py --study answers        the same, and tuned on short answers: their length and repetition
    python train/experiment.py --row NAME             only what one row of that page needs, by its second column
    python train/experiment.py --only frozen          only variants whose name holds a text, as 'frozen decoder, 6 '
    python train/experiment.py --seeds 0              only some seeds (side by side in copies of a folder of runs)
    python train/experiment.py --report               train nothing: result and report of what is done so far
    python train/experiment.py --fresh                from the start; otherwise what is done is not done again
    python train/experiment.py --quick                one seed and four steps a stage, to see that it works

Stop it at any time (Ctrl-C): the same command goes on with the variant and step that it was at. Work lies below
runs/evidence, where the studies share what they have in common; results so far and their report are in report/STUDY
there. The result is kept in benchmarks/results/DEVICE, unless the one that is there has cells that it lacks.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parrot_sys.cli import run_main

if TYPE_CHECKING:
    from studies.experiment import Experiment, Variant

SEEDS = (0, 1, 2)


def parse(argv: list[str]) -> argparse.Namespace:
    from studies.catalog import EXPERIMENTS

    parser = argparse.ArgumentParser(
        prog="experiment.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    choices = list(EXPERIMENTS)
    parser.add_argument("--study", choices=choices, default=choices[0], help=f"the study, see above ({choices[0]})")
    parser.add_argument("--row", help="a comparison of the study, or one of its variants: train only what it needs")
    parser.add_argument("--only", action="append", help="text in the names of variants to train; repeat to narrow down")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="seeds to train from (0 1 2)")
    parser.add_argument("--report", action="store_true", help="train nothing; write the result of what is done")
    parser.add_argument("--fresh", action="store_true", help="forget earlier runs and start from the beginning")
    parser.add_argument("--quick", action="store_true", help="one seed, little data, four steps a stage")
    help = "training processes (one per GPU, or two on a CPU); results differ by rounding only"
    parser.add_argument("--processes", type=int, help=help)
    return parser.parse_args(argv)


def choose(study: Experiment, row: str | None, texts: Sequence[str]) -> list[Variant]:
    """Variants that one row of docs/evidence.md needs, or all, less those whose name lacks one of the texts."""
    from parrot_sys.errors import ConfigError

    rows = {variant.name: {variant.name} for variant in study.variants}
    rows |= {name: {first, second} for name, first, second in study.comparisons}
    if row is not None and row not in rows:
        near = difflib.get_close_matches(row, rows, n=3, cutoff=0.3)
        hint = f"; the nearest: {'; '.join(near)}" if near else ""
        raise ConfigError(f"--row must be a comparison or a variant of the study, got {row}{hint}")
    wanted = {variant.name for variant in study.variants} if row is None else rows[row]
    return [each for each in study.variants if each.name in wanted and all(text in each.name for text in texts)]


def keep(study: Experiment, content: Mapping[str, Any]) -> None:
    """Puts a result in the place of the kept one, unless that has cells which this one lacks."""
    from parrot_sys import platform
    from parrot_sys.errors import DataError
    from parrot_sys.files import read_json
    from studies.experiment import cells_of, write_result

    kept = Path("benchmarks/results") / ("gpu" if platform.cuda_available() else "cpu") / study.file
    lost = cells_of(read_json(kept, DataError)) - cells_of(content) if kept.is_file() else set()
    if lost:
        print(f"{kept} stays as it is: it has {len(lost)} cells that are not done here")
    else:
        write_result(content, kept)
        print(f"numbers: {kept}")


def main(argv: list[str]) -> int:
    options = parse(argv)
    from studies import recipes
    from studies.catalog import EXPERIMENTS
    from studies.experiment import Run
    from studies.pipeline import Pipeline
    from studies.running import train_variants

    chosen = EXPERIMENTS[options.study]
    variants = choose(chosen, options.row, options.only or ())
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
    content = train_variants(chosen, variants, runs, root / "report" / options.study)
    if content["results"] and not options.quick:
        keep(chosen, content)
    print(f"report: {root / 'report' / options.study / 'report.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(lambda argv: main(list(argv)), sys.argv[1:], prog="experiment.py"))

"""The demo: builds the default data, trains Parrot in its three stages, evaluates six languages, reports, and talks.

    python train/demo.py            everything; what is done is not done again
    python train/demo.py --fresh    from the start
    python train/demo.py --quick    a few steps of everything, to see that it works (own folder, runs/demo-quick)

Results: runs/demo/report/report.md (with plots) and report.json; the model: runs/demo/instruct/hf.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

from parrot_sys.cli import run_main

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
    parser = argparse.ArgumentParser(prog="demo.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="forget earlier results and start from the beginning")
    parser.add_argument("--quick", action="store_true", help="little data and four steps a stage: shows that it works")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    options = parse(argv)
    from parrot_sys.evaluation import recipes
    from parrot_sys.evaluation.conversation import sample_conversations
    from parrot_sys.evaluation.pipeline import Pipeline
    from parrot_sys.evaluation.report import ReportInput, build_report

    begin = time.perf_counter()
    root = Path("runs/demo-quick" if options.quick else "runs/demo")
    if options.fresh:
        shutil.rmtree(root, ignore_errors=True)
    pipeline = Pipeline(root, say=lambda line: print(line, flush=True))
    flags = QUICK_TRAIN if options.quick else []
    data = recipes.build_data(pipeline, QUICK_DATA if options.quick else [])
    pretrain = recipes.train(pipeline, recipes.PRETRAIN, data, flags=flags)
    align = recipes.train(pipeline, recipes.ALIGN, data, pretrain, flags=flags)
    instruct = recipes.train(pipeline, recipes.INSTRUCT, data, align, flags=flags, validate=True)
    routings = ["--routing", "model", "off", "other-language", "--max-new-tokens", "16"]
    evaluation = recipes.evaluate(pipeline, instruct, data, flags=routings)
    runs = {"0 text": pretrain.folder, "1 alignment": align.folder, "2 instruction": instruct.folder}

    def report(folder: Path) -> None:
        notes = [
            f"The demo's small model ({recipes.MODEL_PRESET}) on its default data; every held-out question is asked."
        ]
        title = "Parrot demo: held-out questions in six languages"
        build_report(ReportInput(evaluation=evaluation.folder, output=folder, runs=runs, title=title, notes=notes))

    reported = pipeline.step("report", report, after=[evaluation])
    talked = pipeline.step(
        "conversation",
        lambda folder: sample_conversations(recipes.released(instruct), data.folder / "benchmark", folder),
        after=[instruct, data],
    )
    print("\n" + (talked.folder / "conversation.txt").read_text(encoding="utf-8"))
    print("\n".join(f"{step.seconds:7.0f} s  {step.name}" for step in pipeline.steps))
    work = sum(step.seconds for step in pipeline.steps)
    print(f"{work:7.0f} s  of work in all, {time.perf_counter() - begin:.0f} s now")
    print(f"report: {reported.folder / 'report.md'}")
    print(f"talk to it: .venv/bin/parrot chat --checkpoint {recipes.released(instruct)} --image PICTURE --show-routing")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(lambda argv: main(list(argv)), sys.argv[1:], prog="demo.py"))

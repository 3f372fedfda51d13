"""The demo of a system: builds the default data, trains the small model in its stages, evaluates, reports, and talks.

    python train/demo.py                   everything; what is done is not done again
    python train/demo.py --model wings     another system: parrot, wings, multimodal_gpt or llava
    python train/demo.py --fresh           from the start
    python train/demo.py --quick           a few steps of everything, to see that it works (runs/demo-quick)

Results of Parrot: runs/demo/report/report.md (with plots) and report.json; the model: runs/demo/instruct/hf. Those of
another system lie below runs/demo-MODEL.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from parrot_sys.cli import run_main

DIALOGUES = 30
"""Dialogues of each type and language that are asked before and after visual tuning."""


def parse(argv: list[str]) -> argparse.Namespace:
    from studies.recipes import SYSTEMS

    parser = argparse.ArgumentParser(prog="demo.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=list(SYSTEMS), default="parrot", help="the system (parrot)")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results and start from the beginning")
    parser.add_argument("--quick", action="store_true", help="little data and four steps a stage: shows that it works")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    options = parse(argv)
    from parrot_sys.files import replace_text
    from studies import recipes
    from studies.conversation import sample_conversations
    from studies.demo import evaluate_demo, report_demo
    from studies.pipeline import Pipeline, Step

    begin = time.perf_counter()
    system = recipes.SYSTEMS[options.model]
    name = "demo" if system is recipes.PARROT else f"demo-{system.name}"
    root = Path(f"runs/{name}-quick" if options.quick else f"runs/{name}")
    pipeline = Pipeline(root, say=lambda line: print(line, flush=True), fresh=options.fresh)
    flags = recipes.QUICK_TRAIN if options.quick else ()
    data = recipes.build_data(pipeline, recipes.QUICK_DATA if options.quick else ())
    stages: list[Step] = []
    for stage in system.stages:
        last = stage is system.stages[-1]
        start = stages[-1] if stages else None
        stages.append(recipes.train(pipeline, system, stage, data, start, flags=flags, validate=last))
    evaluations = evaluate_demo(pipeline, system, stages, data, limit=2 if options.quick else DIALOGUES)
    reported = report_demo(pipeline, system, stages, evaluations)
    model = recipes.released(stages[-1])
    talked = pipeline.step(
        "conversation",
        lambda folder: sample_conversations(model, data.folder / recipes.BENCHMARK, folder, speaker=system.title),
        after=[stages[-1], data],
    )
    print("\n" + (talked.folder / "conversation.txt").read_text(encoding="utf-8"))
    print("\n".join(f"{step.seconds:7.0f} s  {step.name}" for step in pipeline.steps))
    work = sum(step.seconds for step in pipeline.steps)
    times = {step.name: round(step.seconds, 1) for step in pipeline.steps}
    replace_text(
        root / "report" / "seconds.json",
        json.dumps({**recipes.provenance(), "model": system.name, "seconds": times, "sum": round(work, 1)}, indent=1)
        + "\n",
    )
    print(f"{work:7.0f} s  of work in all, {time.perf_counter() - begin:.0f} s now")
    print(f"report: {reported.folder / 'report.md'}")
    print(f"talk to it: .venv/bin/parrot chat --checkpoint {model} --image PICTURE --show-routing")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(lambda argv: main(list(argv)), sys.argv[1:], prog="demo.py"))

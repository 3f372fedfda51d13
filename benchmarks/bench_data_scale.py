"""A rehearsal of training on more records than memory holds: index, warm start, training, resume after kill -9.

    python -m benchmarks.bench_data_scale --folder /tmp/scale --json benchmarks/results/cpu/data_scale.json
    python -m benchmarks.bench_data_scale --folder /tmp/small --records 20000 --pictures 50    # the small form

Steps write their figures to FOLDER/figures.json and are not repeated: the command may be stopped and given again.

* `generate`: records, pictures and a tokenizer (benchmarks/data_sets.py), from a seed.
* `index`: `parrot data index` is killed with SIGKILL after a tenth of the records, and started again.
* `start`: a process of its own opens the loader on the warm index and takes the first batch. Private memory is the
  part of a process that no other one shares (USS), less that of the process before.
* `million`: the first million records alone, indexed without a stop, and a start on them. The rate counts all processor
  seconds of the command, those of its start too.
* `train`: ranks on the CPU train a toy model for some steps, from the index; again, killed with SIGKILL in the middle
  and started again: the models at the end must be equal to the bit.
* `rate`: processor seconds of building the index of two sizes, with one worker.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import data_sets
from benchmarks.harness import ROOT, machine
from benchmarks.memory import Memory, private_mb

VOCABULARY = 8192
BATCH = 8
RATE_RECORDS = (20_480, 122_880)
MILLION = 1_000_000
MAX_SEQ_LEN = 512
ROWS_OF_A_PICTURE = 17
CONFIG = """
model:
  max_seq_len: 512
  vision: {{type: efficientnet_lite0, image_size: 128, patch_size: 32, hidden_size: 1280}}
  moe: {{num_experts: 2, ffn_hidden_size: 32, routing: dense}}
  llm: {{hidden_size: 32, num_layers: 2, num_attention_heads: 2, num_query_groups: 2, ffn_hidden_size: 64,
        vocab_size: {vocabulary}, max_position_embeddings: 1024, tie_word_embeddings: true, family: qwen2,
        qkv_bias: true}}
  tokenizer_path: {folder}/tokenizer
precision: fp32
trainable: {{vision: true}}
data: {{paths: [{folder}/records.json], image_roots: [{folder}/pictures], index_dir: {folder}/index,
        max_tokens_per_micro_batch: 1024}}
optimizer: {{lr: 1.0e-3}}
global_batch_size: {batch}
max_steps: {steps}
checkpoint: {{interval: {interval}, export: true}}
logging: {{interval: 1, trackers: [], progress: false}}
"""


class Rehearsal:
    """The steps, one after the other."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.folder = options, options.folder.absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = self.folder / "figures.json"
        self.figures: dict[str, Any] = json.loads(self._file.read_text()) if self._file.exists() else {}

    def step(self, name: str, run: Callable[[], dict[str, Any]]) -> None:
        """Runs a step unless its figures are there."""
        if name not in self.figures:
            start = time.monotonic()
            figures = run()
            load = round(os.getloadavg()[0], 1)
            self.figures[name] = figures | {"step_seconds": time.monotonic() - start, "load_average": load}
            self._file.write_text(json.dumps(self.figures, indent=1) + "\n")
        print(f"{name}: {json.dumps(self.figures[name])}", flush=True)

    def run(self) -> None:
        """All steps, then the result."""
        for step in (self.generate, self.million, self.index, self.start, self.train, self.rate):
            if self.options.only in (None, step.__name__):
                self.step(step.__name__, step)
        if (path := self.options.json) is not None:
            settings = {name: getattr(self.options, name) for name in ("records", "pictures", "ranks", "steps")}
            result = {"benchmark": "data_scale", "machine": machine(), "settings": settings, **self.figures}
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result, indent=1) + "\n")

    def generate(self) -> dict[str, Any]:
        """Records, pictures, tokenizer."""
        if not (self.folder / "records.json").exists():
            data_sets.write_tokenizer(self.folder / "tokenizer", vocab_size=VOCABULARY)
            data_sets.write_pictures(self.folder / "pictures", self.options.pictures, side=128)
            part = self.folder / "part.json"
            data_sets.write_records(part, self.options.records, pictures=self.options.pictures)
            part.rename(self.folder / "records.json")
        return {"bytes": (self.folder / "records.json").stat().st_size}

    def index(self) -> dict[str, Any]:
        """The index, through a kill."""
        command = _parrot("data", "index", "records.json", "--output", "index")
        command += ["--model.tokenizer-path", "tokenizer", "--workers", str(self.options.workers)]
        wanted = max(1, self.options.records // 20_480)
        with subprocess.Popen(command, cwd=self.folder, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and self._parts() < wanted:
                time.sleep(0.1)
            process.kill()
        time.sleep(3)  # (workers end with the block that they are at)
        kept = self._parts()
        start, process = time.monotonic(), subprocess.Popen(command, cwd=self.folder)
        with Memory(process.pid) as memory:
            _, status, used = os.wait4(process.pid, 0)
        assert status == 0, f"parrot data index ended with status {status}"
        seconds, processor = time.monotonic() - start, used.ru_utime + used.ru_stime
        (header,) = (self.folder / "index").glob("records.json-*/index.json")
        count = json.loads(header.read_text())["records"]
        tokens = _tokens(header.parent)
        done = count - kept * 2048
        return {
            "records": count,
            "tokens_a_record": tokens / count,
            "bytes": sum(file.stat().st_size for file in header.parent.iterdir()),
            "workers": self.options.workers,
            "records_kept_from_the_killed_build": kept * 2048,
            "seconds": seconds,
            "processor_seconds": processor,
            "records_per_processor_second": done / processor,
            "peak_private_mb_of_a_process": memory.peak_mb,
        }

    def _parts(self) -> int:
        return len(list((self.folder / "index").glob(".records.json-*.parts/*.npz")))

    def rate(self) -> dict[str, Any]:
        """Records that a core indexes in a second: two sizes tell what starting costs, and what a record does."""
        small, large = (self._build(count) for count in RATE_RECORDS)
        count = RATE_RECORDS[1] - RATE_RECORDS[0]
        a_record = (large - small) / count
        return {
            "records": list(RATE_RECORDS),
            "processor_seconds": [small, large],
            "records_per_core_second": 1 / a_record,
            "processor_seconds_of_the_start": small - RATE_RECORDS[0] * a_record,
        }

    def _build(self, count: int) -> float:
        """Processor seconds of `parrot data index` with one worker, on the first records."""
        folder = self.folder / "rate"
        self._copy_first(count, folder)
        return self._index_all(folder, workers=1)[0]

    def _copy_first(self, count: int, folder: Path) -> None:
        """The first records, in a folder of their own."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        with (self.folder / "records.json").open(encoding="utf-8") as file, (folder / "records.json").open("w") as part:
            for line in itertools.islice(file, 1, 1 + count):  # (the first line is the bracket)
                part.write(line.rstrip(",\n") + "\n")

    def _index_all(self, folder: Path, *, workers: int) -> tuple[float, float]:
        """Indexes the records of a folder without a stop; processor seconds and seconds."""
        command = _parrot("data", "index", "records.json", "--output", "index", "--workers", str(workers))
        start = time.monotonic()
        process = subprocess.Popen([*command, "--model.tokenizer-path", str(self.folder / "tokenizer")], cwd=folder)
        _, status, used = os.wait4(process.pid, 0)
        assert status == 0, f"parrot data index ended with status {status}"
        return used.ru_utime + used.ru_stime, time.monotonic() - start

    def million(self) -> dict[str, Any]:
        """A million records, from nothing to the first batch."""
        folder, count = self.folder / "million", min(MILLION, self.options.records)
        self._copy_first(count, folder)
        processor, seconds = self._index_all(folder, workers=self.options.workers)
        return {
            "machine": machine(),
            "workers": self.options.workers,
            "seconds": seconds,
            "processor_seconds": processor,
            "records_per_core_second_with_the_start": count / processor,
            "start": self._start(folder),
        }

    def start(self) -> dict[str, Any]:
        """The first batch on a warm index, in a process of its own."""
        return self._start(self.folder)

    def _start(self, data: Path) -> dict[str, Any]:
        command = [sys.executable, "-m", "benchmarks.bench_data_scale", "--folder", str(self.folder)]
        command += ["--measure-start", str(data)]
        return json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout)

    def train(self) -> dict[str, Any]:
        """Two runs, one of them killed in its middle."""
        steps, interval = self.options.steps, max(1, self.options.steps // 4)
        text = CONFIG.format(vocabulary=VOCABULARY, folder=self.folder, batch=BATCH, steps=steps, interval=interval)
        (self.folder / "config.yaml").write_text(text)
        whole = self._train("whole")
        killed = self._train("killed", kill_after=interval * 2 + 1)
        resumed = self._train("killed")
        digests = [_digest(self.folder / name / "hf" / "model.safetensors") for name in ("whole", "killed")]
        assert digests[0] == digests[1], "the run that was killed ended with another model"
        losses = [_losses(self.folder / name) for name in ("whole", "killed")]
        assert losses[0] == losses[1], "the run that was killed had other losses"
        return {
            "ranks": self.options.ranks,
            "steps": steps,
            "whole": whole,
            "killed_after_step": killed["last_step"],
            "resumed": resumed,
            "bit_equal": True,
            "first_and_last_loss": [losses[0][0], losses[0][-1]],
        }

    def _train(self, name: str, kill_after: int | None = None) -> dict[str, Any]:
        output = self.folder / name
        if kill_after is None and name == "whole":
            shutil.rmtree(output, ignore_errors=True)
        command = [sys.executable, "-m", "parrot_sys.launcher", "--standalone", "--nproc-per-node"]
        command += [str(self.options.ranks), "-m", "parrot_sys", "train", "--config", str(self.folder / "config.yaml")]
        start, first = time.monotonic(), None
        log = (self.folder / f"{name}.log").open("a")
        process = subprocess.Popen(
            [*command, "--output", str(output)], cwd=ROOT, stdout=log, stderr=log, start_new_session=True
        )
        begun = len(_losses(output))
        with log, Memory(process.pid) as memory:
            while process.poll() is None:
                done = len(_losses(output))
                if first is None and done > begun:
                    first = time.monotonic() - start
                if kill_after is not None and done >= kill_after:
                    os.killpg(process.pid, signal.SIGKILL)
                    for rank in memory.seen:
                        _kill(rank)
                    process.wait()
                time.sleep(0.2)
        if kill_after is None:
            assert process.returncode == 0, f"training ended with {process.returncode}: {self.folder / name}.log"
        return {
            "seconds_to_first_step": first,
            "seconds": time.monotonic() - start,
            "last_step": len(_losses(output)),
            "peak_private_mb_of_a_rank": memory.peak_mb,
        }


def measure_start(folder: Path, data: Path) -> dict[str, Any]:
    """Opens the loader on a warm index in this process and takes the first batch.

    Args:
        folder: of the rehearsal.
        data: that has records and index.
    """
    from parrot_sys.data.config import DataConfig
    from parrot_sys.data.loader import ParrotDataLoader
    from parrot_sys.data.processor import ParrotProcessor

    processor = ParrotProcessor.for_tower(folder / "tokenizer", "efficientnet_lite0", 128)
    processor.encode_text("warm")
    config = DataConfig(
        paths=(str(data / "records.json"),),
        image_roots=(str(folder / "pictures"),),
        index_dir=str(data / "index"),
    )
    before = private_mb(os.getpid())
    start, processor_start = time.monotonic(), time.process_time()
    with Memory(os.getpid()) as memory:
        loader = ParrotDataLoader(
            config,
            processor,
            num_visual_rows=ROWS_OF_A_PICTURE,
            max_seq_len=MAX_SEQ_LEN,
            global_batch_size=BATCH,
        )
        opened = time.monotonic() - start
        steps = iter(loader)
        next(steps)
        first, used = time.monotonic() - start, time.process_time() - processor_start
        after = private_mb(os.getpid())
        steps.close()
    return {
        "records": len(loader.datasets[0]),
        "seconds_to_open": opened,
        "seconds_to_first_batch": first,
        "processor_seconds_to_first_batch": used,
        "private_mb_before": before,
        "private_mb_of_the_loader": after - before,
        "peak_private_mb_of_the_loader": memory.peak_mb - before,
    }


def _tokens(folder: Path) -> int:
    import numpy as np

    return int(np.load(folder / "tokens.npy").sum())


def _losses(output: Path) -> list[float]:
    from parrot_sys.training.writer import read_metrics

    return [record["loss"] for record in read_metrics(output, "train")]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _parrot(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "parrot_sys", *arguments]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is left of the rehearsal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, required=True, help="for data, index and runs (6 GB for 2 million records)"
    )
    parser.add_argument("--records", type=int, default=2_000_000)
    parser.add_argument("--pictures", type=int, default=5_000)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2, help="processes that build the index")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument(
        "--only", choices=("generate", "million", "index", "start", "train", "rate"), help="run this step alone"
    )
    parser.add_argument("--measure-start", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.measure_start:
        print(json.dumps(measure_start(options.folder.absolute(), options.measure_start)))
    else:
        Rehearsal(options).run()


if __name__ == "__main__":
    main()

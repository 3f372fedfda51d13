"""Our loader beside two others that make the same batches from the same records: samples a core second, and memory.

    python -m benchmarks.bench_loader --folder /tmp/loader --photographs PICTURES \\
        --json benchmarks/results/cpu/loader.json

Needs `pip install datasets megatron-energon scikit-image`, best in an environment of their own. Photographs are any
folder of pictures; that of scikit-image when none is given.

* `ours`: ParrotDataLoader on a JSON file and a folder of pictures, with an index.
* `hugging_face`: the same files by `datasets` and a DataLoader, whose collator tokenises, pads pictures to a square as
  LLaVA's code does, and calls transformers' image processor.
* `energon`: WebDataset shards that `energon prepare` indexed; its task encoder does what that collator does.

Each runs in a process of its own and takes an epoch. Ids, labels and pixels of every sample are compared before a
figure is written. `--only threads` decodes the pictures by threads and by worker processes; with `--only feed` our
loader feeds steps that sleep, as on a GPU, and steps that need the interpreter (loader_threads.py). Without it all
parts run.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import data_sets
from benchmarks.harness import ROOT, machine
from benchmarks.loader_peers import PEERS, Samples
from benchmarks.loader_threads import WAYS, decode, feed, interpret, processor_seconds, rounds_of, sleep
from benchmarks.memory import Memory

VOCABULARY = 8192
SIDE = 640
TOWER, IMAGE_SIZE, ROWS = "clip", 336, 577
SAMPLES_A_SECOND_A_GPU = 25
CORES_A_GPU = 2  # 16 cores feed 8 GPUs


def write_pictures(folder: Path, photographs: Path, count: int) -> None:
    """Stretches of photographs as JPEG files of 640 x 480 or 480 x 640 pixels, each another one."""
    sources = []
    for path in sorted(photographs.iterdir()):
        if path.suffix in (".png", ".jpg", ".jpeg") and path.stat().st_size > 200_000:
            sources.append(Image.open(path).convert("RGB"))
    if not sources:
        raise SystemExit(f"{photographs} must hold photographs (.png, .jpg) of more than 200 kB, got none")
    for number in range(count):
        path = folder / data_sets.picture_name(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        generator, source = np.random.default_rng([0, number]), sources[number % len(sources)]
        size = (SIDE, SIDE * 3 // 4) if number % 4 else (SIDE * 3 // 4, SIDE)
        scale = min(source.width / size[0], source.height / size[1]) * generator.uniform(0.6, 1.0)
        wide, high = int(size[0] * scale), int(size[1] * scale)
        left, top = (int(generator.integers(0, rest + 1)) for rest in (source.width - wide, source.height - high))
        part = source.crop((left, top, left + wide, top + high))
        part.resize(size, Image.Resampling.BICUBIC).save(path, quality=90)


def generate(folder: Path, photographs: Path, count: int) -> None:
    """Records, pictures and a tokenizer, and the same as WebDataset shards."""
    if (folder / "records.json").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    data_sets.write_tokenizer(folder / "tokenizer", vocab_size=VOCABULARY)
    write_pictures(folder / "pictures", photographs, count)
    records = list(data_sets.records(count, pictures=count))
    data_sets.write_shards(folder / "shards", records, folder / "pictures", shards=4)
    data_sets.write_records(folder / "records.json", count, pictures=count)


def prepare_energon(folder: Path) -> None:
    """Lets energon index the shards."""
    if not (folder / "shards/.nv-meta").exists():
        program = Path(sys.executable).with_name("energon")
        options = [
            "--non-interactive",
            "--split-ratio",
            "1,0,0",
            "--sample-type",
            "CrudeWebdataset",
            "--num-workers",
            "1",
        ]
        subprocess.run([program, "prepare", *options, folder / "shards"], check=True, stdout=subprocess.DEVNULL)


def ours(folder: Path, workers: int, batch: int) -> Samples:
    """Our loader: id, ids, labels (not shifted) and pixels of each sample, a list a step."""
    return _unpacked(iter(_loader(folder, workers, batch)))


def _loader(folder: Path, workers: int, batch: int, prefetch: int = 2) -> Any:
    from parrot_sys.data.config import DataConfig
    from parrot_sys.data.loader import ParrotDataLoader
    from parrot_sys.data.processor import ParrotProcessor

    processor = ParrotProcessor.for_tower(folder / "tokenizer", TOWER, IMAGE_SIZE)
    config = DataConfig(
        paths=(str(folder / "records.json"),),
        image_roots=(str(folder / "pictures"),),
        index_dir=str(folder / "index"),
        num_workers=workers,
        prefetch_steps=prefetch,
        exif="ignore",
        max_tokens_per_micro_batch=batch * 1024,
    )
    return ParrotDataLoader(config, processor, num_visual_rows=ROWS, max_seq_len=1024, global_batch_size=batch)


def _unpacked(steps: Iterator[Any]) -> Samples:
    from parrot_sys.data.constants import IGNORE_ID, IMAGE_TOKEN_ID

    for step in steps:
        found = []
        for packed in step:
            images = iter(() if packed.pixel_values is None else packed.pixel_values.numpy())
            ends = packed.cu_seqlens.tolist()
            for name, start, end in zip(packed.record_ids, ends, ends[1:], strict=False):
                ids, labels = packed.input_ids[start:end].numpy(), packed.labels[start:end].numpy()
                labels = np.concatenate([[IGNORE_ID], labels[:-1]])
                extra = ids == IMAGE_TOKEN_ID  # rows of a picture but its first are no ids
                extra[1:] &= extra[:-1].copy()
                extra[0] = False
                found.append((name.split(":")[1], ids[~extra], labels[~extra], next(images) if extra.any() else None))
        yield found


LOADERS: dict[str, Callable[[Path, int, int], Samples]] = {"ours": ours, **PEERS}


def measure(name: str, folder: Path, workers: int, batch: int) -> dict[str, Any]:
    """An epoch of one loader in this process: figures, and a digest of each sample."""
    import torch

    torch.set_num_threads(1)
    steps = LOADERS[name](folder, workers, batch)
    digests: dict[str, str] = {}
    begun, start, checking = processor_seconds(), time.perf_counter(), 0.0
    with Memory(os.getpid(), "Pss") as memory:
        for step in steps:
            now = time.thread_time()
            digests |= {record: _digest(*parts) for record, *parts in step}
            checking += time.thread_time() - now
    seconds = time.perf_counter() - start
    processor = processor_seconds() - begun - checking
    return {
        "loader": name,
        "workers": workers,
        "samples": len(digests),
        "samples_per_core_second": len(digests) / processor,
        "samples_per_second": len(digests) / seconds,
        "peak_resident_mb": memory.peak_mb,
        "digests": digests,
    }


def _digest(ids: Any, labels: Any, pixels: Any) -> str:
    arrays = [np.asarray(ids, dtype=np.int64), np.asarray(labels, dtype=np.int64)]
    arrays += [] if pixels is None else [np.ascontiguousarray(pixels, dtype=np.float32)]
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


def compare_ways(folder: Path, workers: int) -> list[dict[str, Any]]:
    """Pictures by threads and by worker processes, one and several of each; all must give the same."""
    from parrot_sys.data.processor import ParrotProcessor

    processor = ParrotProcessor.for_tower(folder / "tokenizer", TOWER, IMAGE_SIZE)
    files = sorted((folder / "pictures").rglob("*.jpg"))
    rows = [decode(processor, files, way, count) for count in (1, workers) for way in WAYS]
    checks = {row.pop("check") for row in rows}
    assert len(checks) == 1, f"threads and processes give other pictures: {checks}"
    return rows


def feed_steps(folder: Path, steps: int) -> dict[str, Any]:
    """How long steps wait for their samples.

    16 cores for 8 GPUs that take 25 samples a second each are 2 cores for the loader of one GPU. That is what runs
    here: one rank on 2 cores, a fifth of a second for 5 samples. A step that needs the interpreter takes longer beside
    the threads of the loader than alone: what they hold its lock for, and what they take of its core.
    """
    batch = SAMPLES_A_SECOND_A_GPU // 5
    seconds = batch / SAMPLES_A_SECOND_A_GPU
    rounds = rounds_of(seconds)
    alone = [interpret(rounds) for _ in range(5)]
    found: dict[str, Any] = {"samples_per_second": SAMPLES_A_SECOND_A_GPU, "cores": CORES_A_GPU}
    for name, work in (("sleeps", sleep), ("needs_the_interpreter", lambda _: interpret(rounds))):
        iterator = iter(_loader(folder, CORES_A_GPU, batch, prefetch=4))
        found[name] = feed(iterator, steps, seconds, work)
        iterator.close()  # type: ignore[attr-defined]
    found["needs_the_interpreter"]["median_step_seconds_alone"] = sorted(alone)[2]
    busy = found["sleeps"]["processor_seconds_a_step"] / seconds / CORES_A_GPU
    return found | {"share_of_the_cores_that_is_busy": busy}


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """All loaders, each in a process of its own."""
    rows, reasons = [], {}
    for name, workers in ((name, options.workers) for name in LOADERS):
        command = [sys.executable, "-m", "benchmarks.bench_loader", "--folder", str(options.folder)]
        command += ["--run", name, "--workers", str(workers), "--batch", str(options.batch)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            reasons[name] = done.stderr.strip().splitlines()[-1]
            continue
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    digests = [row.pop("digests") for row in rows]
    for row, own in zip(rows, digests, strict=True):
        wrong = [record for record, digest in own.items() if digests[0].get(record) != digest]
        assert not wrong, f"{row['loader']} and ours differ in {len(wrong)} samples, the first is {wrong[0]}"
    whole = {row["loader"]: row for row in rows}
    peers = [row["samples_per_core_second"] for name, row in whole.items() if name != "ours"]
    return {
        "rows": rows,
        "did_not_run": reasons,
        "equal_samples": [len(own) for own in digests],
        "ours_over_best_peer": whole["ours"]["samples_per_core_second"] / max(peers) if peers else None,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Generates the data, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for data and index")
    parser.add_argument("--photographs", type=Path, help="folder of pictures (default: those of scikit-image)")
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2, help="threads or processes of each loader")
    parser.add_argument("--steps", type=int, default=60, help="of the step that sleeps")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--only", choices=("loaders", "threads", "feed"), help="measure this part alone")
    parser.add_argument("--generate", action="store_true", help="only make the data")
    parser.add_argument("--run", choices=LOADERS, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.folder = options.folder.absolute()
    if options.run:
        print(json.dumps(measure(options.run, options.folder, options.workers, options.batch)))
        return
    if options.photographs is None:
        package = importlib.util.find_spec("skimage")
        if package is None or package.origin is None:
            raise SystemExit("--photographs must name a folder of pictures, or: pip install scikit-image")
        options.photographs = Path(package.origin).parent / "data"
    generate(options.folder, options.photographs, options.samples)
    if options.generate or options.only in (None, "loaders"):
        prepare_energon(options.folder)
    next(ours(options.folder, 1, 1))  # (builds the index)
    if options.generate:
        return
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "loaders": lambda: compare(options),
        "threads": lambda: {"threads_and_processes": compare_ways(options.folder, options.workers)},
        "feed": lambda: {"steps": feed_steps(options.folder, options.steps)},
    }
    result: dict[str, Any] = {"benchmark": "loader", "machine": machine()}
    for name, run in parts.items():
        if options.only in (None, name):
            result |= run()
    print(json.dumps(result, indent=1))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Resumed runs: their records are those of an undisturbed run, and they do what their settings say."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from parrot_sys.data.batch import PackedBatch
from parrot_sys.data.constants import IGNORE_ID
from parrot_sys.data.tokenizer_files import load_tokenizer
from parrot_sys.errors import ConfigError
from parrot_sys.modules.released_experts import is_expert_bias
from parrot_sys.testing.distributed import run_distributed
from parrot_sys.training.config import (
    CheckpointConfig,
    LoggingConfig,
    OptimizerConfig,
    TrainConfig,
    ValidationConfig,
)
from parrot_sys.training.export import exported_step
from parrot_sys.training.schedule import RunLength
from parrot_sys.training.trainer import Trainer
from parrot_sys.training.writer import read_metrics
from tests.training.tiny import FIXTURE, MODEL, run, signal_before, tiny_config

WALL_CLOCK = {"seconds", "tokens_per_second", "mfu"}


def _records(config: TrainConfig) -> list[dict[str, Any]]:
    return [{name: v for name, v in record.items() if name not in WALL_CLOCK} for record in read_metrics(config.output)]


def _start(config: TrainConfig) -> str:
    """The error of a start."""

    def start(rank: int, size: int) -> str:
        with pytest.raises(ConfigError) as error:
            Trainer(config)
        return str(error.value)

    (message,) = run_distributed(start, 1)
    return message


def test_records_do_not_depend_on_interruptions(tmp_path: Path) -> None:
    """Interrupted at random steps, by SIGTERM, Ctrl-C and kill -9, with records over three steps."""
    settings: dict[str, Any] = {
        "logging": LoggingConfig(interval=3, trackers=(), progress=False),
        "checkpoint": CheckpointConfig(interval=2, load_from=str(MODEL), export=False, asynchronous=False),
        "validation": ValidationConfig(
            paths=(str(tmp_path / "records.json"),), image_roots=(str(FIXTURE),), interval=4, batches=1
        ),
    }
    whole = tiny_config(tmp_path, output="whole", **settings)
    run(whole)
    wanted = _records(whole)
    assert [(r["kind"], r["step"]) for r in wanted] == [
        ("train", 3),
        ("validation", 4),
        ("train", 6),
        ("train", 8),
        ("validation", 8),
        ("summary", 8),
    ]
    chosen = random.SystemRandom()
    for number in range(3):
        stops = sorted(chosen.sample(range(1, 9), 2))
        config = tiny_config(tmp_path, output=f"run{number}", **settings)
        for step in stops:
            by = chosen.choice([signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
            hook = signal_before(step, by)
            if by is signal.SIGKILL:
                with pytest.raises(RuntimeError, match="ranks failed"):
                    run(config, 1, hook)
            else:
                run(config, 1, hook)
        run(config)
        assert _records(config) == wanted, stops


def test_bias_and_scale_of_the_router_go_on_where_they_were(tmp_path: Path) -> None:
    """Stopped at a step in the middle of the schedule; the model that it starts from has no bias."""
    plain = tiny_config(tmp_path)
    moe = dataclasses.replace(
        plain.model.moe,
        **{"routing": "topk", "topk": 1, "expert_bias": True, "bias_update_rate": 0.03},
        **{"router_scale_start": 0.25, "router_scale_steps": 7},
    )
    checkpoint = CheckpointConfig(
        interval=2,
        load_from=str(MODEL),
        allow_differences=("model.moe.routing", "model.moe.topk", "model.moe.expert_bias"),
    )
    model = dataclasses.replace(plain.model, moe=moe)
    runs = [tiny_config(tmp_path, output=name, model=model, checkpoint=checkpoint) for name in ("whole", "stopped")]
    run(runs[0])
    run(runs[1], 1, signal_before(4, signal.SIGTERM))
    run(runs[1])
    assert _records(runs[0]) == _records(runs[1])
    whole, stopped = (load_file(Path(each.output) / "hf" / "model.safetensors") for each in runs)
    assert all(torch.equal(stopped[name], tensor) for name, tensor in whole.items())
    (bias,) = (tensor for name, tensor in whole.items() if is_expert_bias(name))
    assert bias.any()
    start = dataclasses.replace(checkpoint, load_from=str(Path(runs[0].output) / "hf"), allow_differences=())
    later = tiny_config(tmp_path, output="later", model=model, checkpoint=start)

    def loaded(rank: int, size: int) -> torch.Tensor:
        buffer = Trainer(later).chunks[0].bridge.moe.selection_bias
        return buffer.clone()

    assert torch.equal(run_distributed(loaded, 1)[0], bias), "a later stage starts from it"


@pytest.mark.parametrize(
    ("precision", "distributed"),
    [
        ("fp32", False),
        pytest.param("fp32", True, marks=pytest.mark.slow),
        pytest.param("bf16", False, marks=pytest.mark.slow),
        ("bf16", True),
    ],
)
def test_changed_optimizer_settings_take_effect(precision: str, distributed: bool, tmp_path: Path) -> None:
    first = OptimizerConfig(lr=1e-3, lrs={"projector": 2e-3, "router": 4e-3}, weight_decay=0.1, distributed=distributed)
    config = tiny_config(tmp_path, precision=precision, optimizer=first, max_steps=4)
    run(config, 1, signal_before(2, signal.SIGTERM))
    changed = OptimizerConfig(
        lr=5e-4,
        lrs={"projector": 3e-3, "moe": 1e-4, "router": 2e-3},
        weight_decay=0.3,
        betas=(0.8, 0.9),
        eps=1e-6,
        distributed=distributed,
    )
    again = dataclasses.replace(config, optimizer=changed)

    def go_on(rank: int, size: int) -> list[dict[str, Any]]:
        trainer = Trainer(again)
        trainer.run()
        return [{k: v for k, v in group.items() if k != "params"} for group in trainer.optimizer.param_groups]

    (groups,) = run_distributed(go_on, 1)
    assert {group["max_lr"] for group in groups} == {5e-4, 3e-3, 1e-4, 2e-3}
    for group in groups:
        assert (tuple(group["betas"]), group["eps"]) == ((0.8, 0.9), 1e-6)
        assert group["weight_decay"] == pytest.approx(0.3 * group["wd_mult"])
        assert group["step"] == 4, "the averages go on"
    last = read_metrics(config.output, "train")[-1]
    logged = {last["lr"], last["lr/projector"], last["lr/moe"], last["lr/router"]}
    assert logged == {group["lr"] for group in groups}, "the log has what was applied"


@given(
    samples=st.integers(1, 200),
    begun=st.integers(1, 40),
    later=st.integers(1, 40),
    epochs=st.floats(0.1, 4.0),
    stop=st.floats(0.0, 1.0),
)
def test_length_follows_samples(samples: int, begun: int, later: int, epochs: float, stop: float) -> None:
    """Steps are taken as the loader deals them: the last of an epoch may be smaller."""
    length = RunLength.of(samples, begun, epochs=epochs, max_steps=None)
    position, epoch, done, size, steps, switched = 0.0, 0, 0, begun, 0, False
    assert length.steps_left(0, 0, begun) == length.total_steps
    consumed = 0
    while position < length.total_steps:
        if size == begun:
            assert position == steps, "with the first batch size positions are numbers of steps"
        if not switched and position >= stop * length.total_steps:
            size, switched, left, at = later, True, length.steps_left(epoch, done, later), steps
        taken = min(size, samples - done)
        consumed, done, steps = consumed + taken, done + taken, steps + 1
        if done == samples:
            epoch, done = epoch + 1, 0
        before, position = position, length.position(epoch, done)
        assert position > before
    if switched:
        assert steps - at == left
    steps_of_epoch = -(-samples // begun)
    whole, rest = divmod(length.total_steps, steps_of_epoch)
    end = whole * samples + min(rest * begun, samples)
    assert end <= consumed < end + size, "the end is where it was, to within a step"


@pytest.mark.parametrize(("size", "steps"), [(4, 8), pytest.param(16, 2, marks=pytest.mark.slow)])
def test_another_batch_size_takes_the_same_samples(
    size: int, steps: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for settings in ({"epochs": 2.0}, {"max_steps": 8}):
        output = "-".join(settings)
        config = tiny_config(tmp_path, output=output, **settings)
        run(config, 1, signal_before(4, signal.SIGTERM))
        (summary,) = run(dataclasses.replace(config, global_batch_size=size))
        assert summary["steps"] == steps
        records = read_metrics(config.output, "train")
        assert sum(record["samples"] for record in records) == 64
        assert "began with global_batch_size 8 and goes on with" in capfd.readouterr().err
        assert records[4]["lr"] == pytest.approx(records[3]["lr"], rel=0.5), "the schedule does not jump"
        again = dataclasses.replace(config, global_batch_size=size)
        assert run(again)[0] == {"finished": True, "steps": 0}


def test_another_text_precision_or_split_of_fp32_is_refused(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, max_steps=1)
    run(config)
    tokenizer = tmp_path / "tokenizer"
    other = load_tokenizer(MODEL)
    other.add_tokens(["zebra"])
    other.save_pretrained(tokenizer)
    model = dataclasses.replace(config.model, tokenizer_path=str(tokenizer))
    message = _start(dataclasses.replace(config, max_steps=2, model=model))
    assert "the tokenizer is not the one" in message
    assert "hash" in message
    message = _start(dataclasses.replace(config, max_steps=2, precision="bf16"))
    assert "was trained with precision fp32, now it is bf16" in message
    split = dataclasses.replace(config.optimizer, distributed=True)
    message = _start(dataclasses.replace(config, max_steps=2, optimizer=split))
    assert "without optimizer.distributed" in message


@pytest.mark.parametrize(
    ("precision", "before"),
    [
        pytest.param("fp32", True, marks=pytest.mark.slow),
        ("bf16", True),
        pytest.param("bf16", False, marks=pytest.mark.slow),
    ],
)
def test_the_optimizers_state_may_be_split_later_on(precision: str, before: bool, tmp_path: Path) -> None:
    """ZeRO on or off makes no difference to what is trained."""
    one, other = (OptimizerConfig(lr=1e-3, distributed=distributed) for distributed in (before, not before))
    whole, config = (
        tiny_config(tmp_path, output=name, max_steps=4, precision=precision, optimizer=one) for name in ("whole", "run")
    )
    run(whole)
    run(config, 1, signal_before(2, signal.SIGTERM))
    run(dataclasses.replace(config, optimizer=other))
    found, wanted = ([r["loss"] for r in read_metrics(each.output, "train")] for each in (config, whole))
    assert found == pytest.approx(wanted, rel=1e-5)


def test_weights_to_start_from_need_not_exist_when_a_run_goes_on(tmp_path: Path) -> None:
    start = tmp_path / "start"
    shutil.copytree(MODEL.parent, start)
    checkpoint = CheckpointConfig(load_from=str(start / "model"), export=False)
    config = tiny_config(tmp_path, max_steps=1, checkpoint=checkpoint)
    run(config)
    shutil.rmtree(start)
    (summary,) = run(dataclasses.replace(config, max_steps=2))
    assert summary["steps"] == 1


def test_an_export_belongs_to_a_step(tmp_path: Path) -> None:
    """The run went on and was killed between its last checkpoint and the export: the next start exports."""
    checkpoint = CheckpointConfig(load_from=str(MODEL))
    config = tiny_config(tmp_path, max_steps=1, checkpoint=checkpoint)
    run(config)
    folder = Path(config.output) / "hf"
    first = (folder / "model.safetensors").read_bytes()
    assert exported_step(folder) == 1
    longer = dataclasses.replace(config, max_steps=2)

    def killed(trainer: Trainer) -> None:
        trainer._export = lambda: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]

    with pytest.raises(RuntimeError, match="ranks failed"):
        run(longer, 1, killed)
    assert exported_step(folder) == 1
    assert run(longer)[0]["steps"] == 0
    assert exported_step(folder) == 2
    assert (folder / "model.safetensors").read_bytes() != first


def test_a_step_without_labels_measures_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(tmp_path, max_steps=3)

    def no_labels(trainer: Trainer) -> None:
        batches = trainer._batches

        def emptied() -> Iterator[list[PackedBatch]]:
            for number, step in enumerate(batches(), 1):
                yield [_without_labels(batch) for batch in step] if number == 2 else step

        trainer._batches = emptied  # type: ignore[method-assign]

    run(config, 1, no_labels)
    _, second, third = read_metrics(config.output, "train")
    assert "loss" not in second
    assert second["skipped_steps"] == 1
    assert third["loss"] > 0
    said = capfd.readouterr()
    assert "step 2 is left out: not one of its 8 samples has a label" in said.err
    assert "loss 0.0000" not in said.out + said.err


def _without_labels(batch: PackedBatch) -> PackedBatch:
    return dataclasses.replace(batch, labels=torch.full_like(batch.labels, IGNORE_ID), label_rows=batch.label_rows[:0])

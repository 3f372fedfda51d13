"""Whole runs of the tiny model: records, validation, resuming after kills, frozen stages, cached features, export."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from parrot_sys.errors import CheckpointError, ConfigError
from parrot_sys.megatron.runtime.initialize import ParallelConfig
from parrot_sys.modules.lora import LoRAConfig
from parrot_sys.systems.wings.config import WingsConfig
from parrot_sys.testing.distributed import run_distributed
from parrot_sys.training import checkpoint
from parrot_sys.training.config import (
    CheckpointConfig,
    LoggingConfig,
    OptimizerConfig,
    TrainConfig,
    ValidationConfig,
)
from parrot_sys.training.trainer import Trainer
from parrot_sys.training.writer import MetricsWriter, read_metrics
from tests.comparisons import differ
from tests.training.tiny import FIXTURE, MODEL, kill_in_save, losses, run, signal_before, tiny_config


def _weights(config: TrainConfig) -> dict[str, torch.Tensor]:
    return load_file(Path(config.output) / "hf" / "model.safetensors")


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_run_goes_on_bit_equal(ranks: int, tmp_path: Path) -> None:
    whole = tiny_config(tmp_path, output="whole")
    run(whole, ranks)
    # Written before training goes on, so that it is known which checkpoint a start finds.
    checkpoints = CheckpointConfig(interval=3, load_from=str(MODEL), export=False, asynchronous=False)
    killed = tiny_config(tmp_path, output="killed", checkpoint=checkpoints)
    # Checkpoints stand at steps 3 and 6; an epoch has 4 steps, so both lie in mid-epoch.
    for hook in (
        signal_before(6, signal.SIGKILL, rank=ranks - 1),
        kill_in_save(6),
        signal_before(8, signal.SIGKILL),
    ):
        with pytest.raises(RuntimeError, match="ranks failed"):
            run(killed, ranks, hook)
    (summary, *_) = run(killed, ranks)
    assert summary["steps"] == 2, "the last start goes on after step 6"
    assert losses(killed) == losses(whole)
    assert [step for step, *_ in losses(whole)] == list(range(1, 9))
    names = sorted(path.name for path in (Path(killed.output) / "checkpoints").iterdir())
    assert names == ["step-00000006", "step-00000008"], "half-written checkpoints and old ones are gone"


@pytest.mark.parametrize(("ranks", "distributed"), [(1, False), (2, True)])
def test_bf16_goes_on_bit_equal(ranks: int, distributed: bool, tmp_path: Path) -> None:
    optimizer = OptimizerConfig(lr=1e-3, distributed=distributed)
    whole, stopped = (
        tiny_config(tmp_path, output=name, precision="bf16", max_steps=4, optimizer=optimizer, recompute="full")
        for name in ("whole", "stopped")
    )
    run(whole, ranks)
    run(stopped, ranks, signal_before(2, signal.SIGTERM))
    run(stopped, ranks)
    assert losses(stopped) == losses(whole)


def test_two_ranks_train_like_one(tmp_path: Path) -> None:
    one, two = (tiny_config(tmp_path, output=name) for name in ("one", "two"))
    run(one, 1)
    run(two, 2)
    for (_, loss, norm), (_, other_loss, other_norm) in zip(losses(one), losses(two), strict=True):
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert other_norm == pytest.approx(norm, rel=1e-4)


def test_context_parallel_run_is_that_of_one_process(tmp_path: Path) -> None:
    """Validation, a checkpoint in the middle that one process goes on from and ends with, and the export."""
    context = ParallelConfig(context_parallel_size=2)
    one, both, moved = (
        tiny_config(tmp_path, output=name, max_steps=4, parallel=parallel, validation=validation)
        for name, parallel in (("one", ParallelConfig()), ("both", context), ("moved", context))
        for validation in [ValidationConfig(paths=(str(tmp_path / "records.json"),), image_roots=(str(FIXTURE),))]
    )
    both, one = (dataclasses.replace(c, checkpoint=dataclasses.replace(c.checkpoint, export=True)) for c in (both, one))
    run(one)
    run(both, 2)
    run(moved, 2, signal_before(2, signal.SIGTERM, rank=1))
    run(dataclasses.replace(moved, parallel=ParallelConfig()))
    wanted = losses(one)
    for config in (both, moved):
        for (step, loss, norm), (_, other_loss, other_norm) in zip(wanted, losses(config), strict=True):
            assert other_loss == pytest.approx(loss, rel=1e-5), step
            assert other_norm == pytest.approx(norm, rel=1e-4), step
    for kind in ("train", "validation"):
        ours, theirs = read_metrics(both.output, kind)[-1], read_metrics(one.output, kind)[-1]
        for name in ("samples", "rows", "labels", "images"):
            assert ours[name] == theirs[name]
        assert {name: v for name, v in ours.items() if name.startswith("experts/")}.keys() == {
            name for name in theirs if name.startswith("experts/")
        }
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert _weights(both).keys() == _weights(one).keys()


@pytest.mark.parametrize("distributed", [False, True])
def test_checkpoint_of_two_ranks_goes_on_with_one(distributed: bool, tmp_path: Path) -> None:
    optimizer = OptimizerConfig(lr=1e-3, lrs={"moe": 5e-4}, distributed=distributed)
    whole = tiny_config(tmp_path, output="whole", optimizer=optimizer)
    moved = tiny_config(tmp_path, output="moved", optimizer=optimizer)
    run(whole, 1)
    run(moved, 2, signal_before(5, signal.SIGTERM))
    assert [step for step, *_ in losses(moved)] == [1, 2, 3, 4, 5]
    run(moved, 1)
    assert [loss for _, loss, _ in losses(moved)] == pytest.approx([loss for _, loss, _ in losses(whole)], rel=1e-5)


def test_sigterm_to_one_rank_saves_and_ends_all(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    for summary in run(config, 2, signal_before(2, signal.SIGTERM, rank=1)):
        assert (summary["finished"], summary["steps"]) == (False, 2)
    assert checkpoint.latest_checkpoint(Path(config.output) / "checkpoints").name == "step-00000002"
    (summary, _) = run(config, 2)
    assert (summary["finished"], summary["steps"]) == (True, 6)


def test_finished_run_starts_again_without_work(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, max_steps=2)
    run(config)
    before = losses(config)
    (summary,) = run(config)
    assert summary == {"finished": True, "steps": 0}
    assert losses(config) == before
    assert len(read_metrics(config.output, "summary")) == 1


def test_stages_freeze_bypass_and_follow_each_other(tmp_path: Path) -> None:
    align = tiny_config(
        tmp_path,
        output="align",
        max_steps=2,
        bypass=("moe",),
        trainable={"llm": False},
        optimizer=OptimizerConfig(lr=1e-3),
        checkpoint=CheckpointConfig(load_from=str(MODEL)),
    )
    run(align)
    exported, start = _weights(align), load_file(MODEL / "model.safetensors")
    for name, tensor in start.items():
        assert torch.equal(exported[name], tensor) != name.startswith("model.mm_projector."), name
    assert json.loads((Path(align.output) / "hf" / "config.json").read_text())["use_moe"] is False

    by_run, by_export = (
        tiny_config(tmp_path, output=name, max_steps=1, checkpoint=CheckpointConfig(load_from=f"{align.output}{below}"))
        for name, below in (("by_run", ""), ("by_export", "/hf"))
    )
    run(by_run)
    run(by_export)
    assert losses(by_run) == losses(by_export)
    assert losses(by_run)[0][1] < 7
    changed = _weights(by_run)
    assert differ(changed["model.moe_model.gate.weight"], start["model.moe_model.gate.weight"])
    tower = [name for name in changed if "vision_tower" in name]
    assert tower
    assert all(torch.equal(changed[name], exported[name]) for name in tower)


@pytest.mark.parametrize(("ranks", "context"), [(1, 1), (2, 1), (2, 2)])
def test_cached_features_train_like_images(ranks: int, context: int, tmp_path: Path) -> None:
    parallel = ParallelConfig(context_parallel_size=context)
    plain, cached = (
        tiny_config(tmp_path, output=name, max_steps=3, cache_image_features=name == "cached", parallel=parallel)
        for name in ("plain", "cached")
    )
    run(plain, ranks)
    run(cached, ranks)
    assert losses(cached) == losses(plain)
    shards = list((Path(cached.output) / "features").rglob("*.npy"))
    assert len(shards) == ranks, "four images, each computed once"
    times = [shard.stat().st_mtime_ns for shard in shards]
    run(dataclasses.replace(cached, max_steps=4), ranks)
    assert [shard.stat().st_mtime_ns for shard in (Path(cached.output) / "features").rglob("*.npy")] == times


def test_validation_is_over_the_same_samples_and_leaves_training_alone(tmp_path: Path) -> None:
    """With dropout: validation neither drops anything out nor draws."""
    model = dataclasses.replace(tiny_config(tmp_path).model, lora=LoRAConfig(rank=2, dropout=0.5))
    plain = tiny_config(tmp_path, output="plain", max_steps=5, model=model)
    validation = ValidationConfig(paths=plain.data.paths, image_roots=(str(FIXTURE),), interval=2, batches=4)
    config = dataclasses.replace(plain, output=str(tmp_path / "validated"), validation=validation)
    run(plain)
    run(config)
    assert losses(config) == losses(plain)
    records = read_metrics(config.output, "validation")
    assert [record["step"] for record in records] == [2, 4, 5]
    assert {record["samples"] for record in records} == {32}
    assert {f"loss/{name}" for name in ("en", "zh", "pt", "ar", "tr", "ru")} <= records[0].keys()
    assert records[-1]["loss"] < records[0]["loss"]


def test_records_and_files_of_a_run(tmp_path: Path) -> None:
    logging = LoggingConfig(interval=3, trackers=("tensorboard",), progress=False)
    checkpoints = CheckpointConfig(interval=3, load_from=str(MODEL))
    config = tiny_config(tmp_path, logging=logging, checkpoint=checkpoints)
    run(config)
    records = read_metrics(config.output, "train")
    assert [record["step"] for record in records] == [3, 6, 8]
    assert sum(record["samples"] for record in records) == 64
    assert records[0]["lr/projector"] == pytest.approx(2 * records[0]["lr"])
    assert records[-1]["lr"] < records[0]["lr"]
    assert {"grad_norm", "tokens_per_second", "seconds", "epoch", "loss/tr", "experts/tr/probability"} <= records[
        0
    ].keys()
    assert sum(records[0]["experts/tr/probability"]) == pytest.approx(1.0, rel=1e-5)
    assert [r["finished"] for r in read_metrics(config.output, "summary")] == [True]
    board = EventAccumulator(str(Path(config.output) / "tensorboard")).Reload()
    assert {event.step for event in board.Scalars("train/loss")} == {3, 6, 8}
    for tag in board.Tags()["scalars"]:
        assert board.SummaryMetadata(tag).summary_description, tag
    assert "all labels of the steps since the last record" in board.SummaryMetadata("train/loss").summary_description
    assert [record["batches"] for record in records] == [3, 3, 2]
    folder = Path(config.output) / "checkpoints" / "step-00000008"
    assert {"config.yaml", "model_config.yaml", "processor", "metadata.json"} <= {
        path.name for path in folder.iterdir()
    }
    assert (Path(config.output) / "config.yaml").read_text() == (folder / "config.yaml").read_text()
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= {
        p.name for p in (Path(config.output) / "hf").iterdir()
    }


def test_wrong_weights_are_named(tmp_path: Path) -> None:
    base = tiny_config(tmp_path, output="base", max_steps=1)
    run(base)
    moe = dataclasses.replace(base.model.moe, ffn_hidden_size=40)
    llm = dataclasses.replace(base.model.llm, num_layers=3)
    wrong = dataclasses.replace(
        base,
        output=str(tmp_path / "wrong"),
        model=dataclasses.replace(base.model, moe=moe, llm=llm),
        checkpoint=CheckpointConfig(load_from=base.output),
    )

    def build(rank: int, size: int, config: TrainConfig) -> str:
        with pytest.raises((CheckpointError, ConfigError)) as error:
            Trainer(config)
        return f"{type(error.value).__name__}: {error.value}"

    (message,) = run_distributed(build, 1, wrong)
    assert message.startswith("ConfigError: the settings contradict the weights of ")
    assert "model.llm.num_layers: wanted 3, found 2" in message
    assert "model.moe.ffn_hidden_size: wanted 40, found 96" in message
    # Let through by name, it is the tensors that do not fit.
    differences = ("model.llm.num_layers", "model.moe.ffn_hidden_size")
    forced = CheckpointConfig(load_from=base.output, allow_differences=differences)
    (message,) = run_distributed(build, 1, dataclasses.replace(wrong, checkpoint=forced))
    assert "moe.w_down has (6, 96, 64), the model wants (6, 40, 64)" in message
    (message,) = run_distributed(
        build, 1, dataclasses.replace(wrong, checkpoint=CheckpointConfig(load_from="/nowhere"))
    )
    assert message.startswith("CheckpointError")
    assert "/nowhere" in message
    again = dataclasses.replace(base, checkpoint=CheckpointConfig(load_from=str(MODEL), resume=False))
    (message,) = run_distributed(build, 1, again)
    assert message.startswith("ConfigError: checkpoint.resume is false")
    frozen = dataclasses.replace(base, max_steps=2, trainable={"llm": False})
    frozen_first = dataclasses.replace(frozen, output=str(tmp_path / "frozen"), max_steps=1)
    run(frozen_first)
    (message,) = run_distributed(build, 1, dataclasses.replace(base, output=frozen_first.output))
    assert message.startswith("ConfigError")
    assert "was trained with trainable.llm False, now it is True" in message
    plain = dataclasses.replace(base.model.moe, num_experts=0)
    wings = dataclasses.replace(base.model, moe=plain, wings=WingsConfig(rank=4, router_positions=512))
    (message,) = run_distributed(build, 1, dataclasses.replace(base, model=wings))
    assert message.startswith("ConfigError: this run is with model.wings, unlike")
    paper = dataclasses.replace(base.model, moe=dataclasses.replace(base.model.moe, residual="paper"))
    (message,) = run_distributed(build, 1, dataclasses.replace(base, model=paper))
    assert "was trained with model.moe.residual code, now it is paper" in message


def test_interrupted_metrics_are_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"kind": "train", "step": step, "loss": 1.0}) for step in (1, 2, 3)]
    path.write_text("\n".join(lines) + '\n{"kind": "train", "st')

    config = dataclasses.replace(tiny_config(tmp_path), output=str(tmp_path))

    def write(rank: int, size: int) -> None:
        with MetricsWriter(config, total_steps=5, start_step=2) as writer:
            writer.write("train", 3, {"loss": 0.5})
            writer.write("validation", 3, {"loss": float("nan")})

    run_distributed(write, 2)
    found = [(r["step"], r["loss"]) for r in read_metrics(tmp_path)]
    assert found == [(1, 1.0), (2, 1.0), (3, 0.5), (3, None)], "and JSON has no NaN"

"""Bad steps: found before they update anything, left out or ending the run, with their records written down."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from parrot_sys.data.batch import PackedBatch
from parrot_sys.errors import ConfigError
from parrot_sys.testing.distributed import run_distributed
from parrot_sys.training.config import FaultConfig, OptimizerConfig, TrainConfig
from parrot_sys.training.faults import BAD_STEPS_FILE, StepGuard
from parrot_sys.training.trainer import Trainer
from parrot_sys.training.writer import read_metrics
from tests.training.tiny import Hook, losses, run, tiny_config

CPU = torch.device("cpu")


def _bad_steps(config: TrainConfig) -> list[dict[str, Any]]:
    path = Path(config.output) / BAD_STEPS_FILE
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _state(trainer: Trainer) -> list[torch.Tensor]:
    """Parameters and everything the optimizer keeps."""
    values = [p.detach().clone() for chunk in trainer.chunks for p in chunk.parameters()]
    for optimizer in trainer.optimizer.chained_optimizers:
        for group in optimizer.optimizer.param_groups:
            values.append(torch.tensor(group.get("step", 0)))
            for p in group["params"]:
                values += [value.clone() for value in optimizer.optimizer.state[p].values()]
    return values


def _spoil(step: int, rank: int = 0, unchanged: list[bool] | None = None, kind: str = "loss") -> Hook:
    """Makes loss or gradient of `step` NaN on one rank; `unchanged` gets whether the step left all state alone."""

    def hook(trainer: Trainer) -> None:
        batches, before = trainer._batches, []

        def spoilt() -> Iterator[list[PackedBatch]]:
            for micro_batches in batches():
                if unchanged is not None and before:
                    unchanged.append(all(torch.equal(a, b) for a, b in zip(before.pop(), _state(trainer), strict=True)))
                if trainer.step + 1 == step:
                    before.append(_state(trainer))
                    if torch.distributed.get_rank() == rank:
                        micro_batches = _with_nan(micro_batches) if kind == "loss" else micro_batches
                        if kind == "gradient":
                            _spoil_gradient(trainer)
                yield micro_batches

        trainer._batches = spoilt

    return hook


def _with_nan(batches: list[PackedBatch]) -> list[PackedBatch]:
    at = next(i for i, batch in enumerate(batches) if batch.pixel_values is not None)
    pixels = batches[at].pixel_values.clone()
    pixels[0, 0, 0, 0] = float("nan")
    return [*batches[:at], dataclasses.replace(batches[at], pixel_values=pixels), *batches[at + 1 :]]


def _spoil_gradient(trainer: Trainer) -> None:
    """Once, behind the backward pass of the next step: an overflow that the loss does not show."""
    finalize = trainer.wrapped[0].module.config.finalize_model_grads_func

    def spoilt(chunks: list[Any], *args: Any, **kwargs: Any) -> None:
        next(p for p in chunks[0].parameters() if p.requires_grad).main_grad.view(-1)[0] = float("inf")
        trainer.wrapped[0].module.config.finalize_model_grads_func = finalize
        finalize(chunks, *args, **kwargs)

    trainer.wrapped[0].module.config.finalize_model_grads_func = spoilt


@pytest.mark.parametrize(
    ("kind", "ranks", "distributed", "precision"),
    [("loss", 2, True, "fp32"), ("gradient", 2, False, "fp32"), ("gradient", 1, True, "bf16")],
)
def test_a_skipped_step_changes_nothing_on_any_rank(
    kind: str, ranks: int, distributed: bool, precision: Any, tmp_path: Path
) -> None:
    config = tiny_config(
        tmp_path,
        max_steps=4,
        precision=precision,
        faults=FaultConfig(on_nonfinite="skip"),
        optimizer=OptimizerConfig(lr=1e-3, distributed=distributed),
    )

    def train(rank: int, size: int) -> tuple[dict[str, Any], list[bool], list[float]]:
        trainer, unchanged = Trainer(config), []
        _spoil(3, rank=ranks - 1, unchanged=unchanged, kind=kind)(trainer)
        summary = trainer.run()
        return summary, unchanged, [float(p.double().sum()) for c in trainer.chunks for p in c.parameters()]

    results = run_distributed(train, ranks)
    assert [unchanged for _, unchanged, _ in results] == [[True]] * ranks
    assert results[0][0]["finished"]
    assert all(sums == results[0][2] for *_, sums in results), "the ranks hold the same parameters"
    (bad,) = _bad_steps(config)
    assert (bad["step"], bad["action"]) == (3, "skip")
    assert bad["reason"] == f"{kind} is no number"
    assert len(bad["record_ids"]) == 8, "all records of the global batch"
    # Those packed with the bad one may be among them.
    assert bool(bad["nonfinite_record_ids"]) == (kind == "loss")
    assert set(bad["nonfinite_record_ids"]) < set(bad["record_ids"])
    records = read_metrics(config.output, "train")
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert records[2]["skipped_steps"] == 1
    assert "loss" not in records[2]


def test_too_many_skips_in_a_row_end_the_run(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, faults=FaultConfig(on_nonfinite="skip", max_consecutive_skips=1))

    def hook(trainer: Trainer) -> None:
        _spoil(3)(trainer)
        _spoil(4)(trainer)

    with pytest.raises(RuntimeError, match=r"2 steps in a row are more than faults\.max_consecutive_skips=1"):
        run(config, 1, hook)
    assert [(bad["step"], bad["action"]) for bad in _bad_steps(config)] == [(3, "skip"), (4, "stop")]


def test_a_spike_is_left_out_also_after_a_restart(tmp_path: Path) -> None:
    """Step 6 has labels that nobody would expect; the losses that it is compared with come from the checkpoint."""
    faults = FaultConfig(spike_factor=1.2, spike_window=8)
    optimizer = OptimizerConfig(lr=1e-2)  # learns fast enough for odd labels to stand out
    whole, resumed = (
        tiny_config(tmp_path, output=name, faults=faults, optimizer=optimizer) for name in ("whole", "resumed")
    )

    def spike(trainer: Trainer) -> None:
        batches = trainer._batches

        def odd() -> Iterator[list[PackedBatch]]:
            for step in batches():
                yield [_odd_labels(batch) for batch in step] if trainer.step + 1 == 6 else step

        trainer._batches = odd

    def spike_and_stop(trainer: Trainer) -> None:
        spike(trainer)
        batches = trainer._batches

        def stopped() -> Iterator[list[PackedBatch]]:
            for step in batches():
                if trainer.step + 1 == 5:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield step

        trainer._batches = stopped

    run(whole, 1, spike)
    run(resumed, 1, spike_and_stop)
    run(resumed, 1, spike)
    for config in (whole, resumed):
        (bad,) = _bad_steps(config)
        assert (bad["step"], bad["reason"], bad["action"]) == (6, "loss spike", "skip")
        assert bad["loss"] > 1.2 * bad["median"]
    records = [read_metrics(config.output, "train") for config in (whole, resumed)]
    assert [r.get("loss") for r in records[0]] == [r.get("loss") for r in records[1]]


def _odd_labels(batch: PackedBatch) -> PackedBatch:
    labels = batch.labels.clone()
    labels[batch.label_rows] = 3
    return dataclasses.replace(batch, labels=labels)


def test_stop_keeps_the_checkpoint_that_was_being_written(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    with pytest.raises(RuntimeError, match=r"step 4: the loss is not finite for .* records: .*were not updated"):
        run(config, 2, _spoil(4))
    assert [path.name for path in (Path(config.output) / "checkpoints").iterdir()] == ["step-00000003"]
    (bad,) = _bad_steps(config)
    assert (bad["step"], bad["action"]) == (4, "stop")
    run(config, 2)
    assert _bad_steps(config) == [], "the step was done again, and well"
    assert len(losses(config)) == 8


def test_ranks_agree_and_few_losses_say_nothing() -> None:
    def judge(rank: int, size: int) -> list[str | None]:
        guard = StepGuard(FaultConfig(spike_factor=2.0, spike_window=4))
        found = [guard.judge(1, 9.0, 1.0, CPU), guard.judge(2, 1.0, 1.0, CPU)]  # fewer than half a window before both
        found.append(guard.judge(3, 11.0, 1.0, CPU))  # above twice the median of 9 and 1
        found.append(guard.judge(4, 2.0, float("inf") if rank else 1.0, CPU))
        copy = StepGuard(FaultConfig(spike_factor=2.0, spike_window=4))
        copy.load_state_dict(json.loads(json.dumps(guard.state_dict())))
        found.append(copy.judge(5, 10.1, 1.0, CPU))
        return [None if bad is None else bad.reason for bad in found]

    wanted = [None, None, "loss spike", "gradient is no number", "loss spike"]
    assert run_distributed(judge, 2) == [wanted, wanted]


@pytest.mark.parametrize(
    ("settings", "name"),
    [({"spike_factor": 1.0}, "spike_factor"), ({"spike_window": 0}, "spike_window"), ({"hang_timeout": 0.0}, "hang")],
)
def test_wrong_settings_are_named(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=f"faults.{name}"):
        FaultConfig(**settings)

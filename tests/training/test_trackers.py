"""Trackers of a run: TensorBoard holds numbers, pictures, settings; one that fails is left out; sample answers."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from parrot_sys.errors import ConfigError
from parrot_sys.inference.model import ParrotForConditionalGeneration
from parrot_sys.megatron.runtime.initialize import ParallelConfig
from parrot_sys.testing.distributed import run_distributed
from parrot_sys.training.config import LoggingConfig, ValidationConfig
from parrot_sys.training.trackers import registry
from parrot_sys.training.trackers.base import CaptionedImage, Number, RunFacts, flattened
from parrot_sys.training.trackers.identity import IDENTITY_FILE, run_identity
from parrot_sys.training.trackers.registry import Trackers
from parrot_sys.training.trainer import Trainer
from parrot_sys.training.writer import read_metrics
from tests.training.tiny import FIXTURE, losses, run, tiny_config

TRACKED = LoggingConfig(interval=1, samples=3, sample_tokens=6, name="a name", progress=False)


def tracked_config(folder: Path, *, output: str = "run", **changes: Any) -> Any:
    """A run of four steps with two validations, tracked by TensorBoard."""
    plain = tiny_config(folder, output=output, max_steps=4)
    validation = ValidationConfig(paths=plain.data.paths, image_roots=(str(FIXTURE),), interval=2, batches=1)
    return dataclasses.replace(plain, validation=validation, **({"logging": TRACKED} | changes))


def test_tensorboard_has_numbers_pictures_settings_and_the_steps_stay_the_same(tmp_path: Path) -> None:
    config = tracked_config(tmp_path)
    untracked = tracked_config(tmp_path, output="plain", logging=LoggingConfig(interval=1, trackers=(), progress=False))
    run(config)
    run(untracked)
    assert losses(config) == losses(untracked)
    board = EventAccumulator(str(Path(config.output) / "tensorboard")).Reload()
    tags = board.Tags()
    assert {event.step for event in board.Scalars("train/loss")} == {1, 2, 3, 4}
    assert set(tags["images"]) == {
        "train/routing/0",
        "validation/routing/0",
        *(f"validation/answers/{i}" for i in range(3)),
    }
    assert [event.step for event in board.Images("validation/answers/2")] == [2, 4]
    assert [event.step for event in board.Images("train/routing/0")] == [4]
    assert board.Images("validation/answers/0")[0].encoded_image_string.startswith(b"\x89PNG")
    texts = {tag: board.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in tags["tensors"]}
    assert "global_batch_size: 8" in texts["config/text_summary"]
    assert '"processes": 1' in texts["environment/text_summary"]
    assert "answer: " in texts["validation/answers/0/text_summary"]


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        (2, ParallelConfig(pipeline_model_parallel_size=2)),
        pytest.param(2, ParallelConfig(tensor_model_parallel_size=2), marks=pytest.mark.slow),
        pytest.param(2, ParallelConfig(expert_model_parallel_size=2), marks=pytest.mark.slow),
    ],
    ids=["pp2", "tp2", "ep2"],
)
def test_sample_answers_are_the_same_on_any_layout(ranks: int, parallel: ParallelConfig, tmp_path: Path) -> None:
    config = tracked_config(tmp_path)
    (wanted,) = run_distributed(_captions, 1, config)
    assert len(wanted) == 3
    assert all("wanted: " in caption and "\nanswer: \n" not in caption for caption in wanted)
    assert run_distributed(_captions, ranks, dataclasses.replace(config, parallel=parallel))[0] == wanted


def _captions(rank: int, size: int, config: Any) -> list[str]:
    return [card.caption for card in Trainer(config).samples.answer()]


def test_sample_answers_are_those_of_the_model_alone(tmp_path: Path) -> None:
    (pairs,) = run_distributed(_beside_generate, 1, tracked_config(tmp_path))
    assert len(pairs) == 3
    for caption, text in pairs:
        assert f"\nanswer: {text}\n" in caption


def _beside_generate(rank: int, size: int, config: Any) -> list[tuple[str, str]]:
    trainer = Trainer(config)
    cards, processor = trainer.samples.answer(), trainer.processor
    alone = ParrotForConditionalGeneration(trainer.chunks[0], eos_token_ids=[processor.tokenizer.eos_token_id])
    pairs = []
    for card, question in zip(cards, trainer.samples._questions, strict=True):
        ids = torch.as_tensor(question.sample.input_ids)[None]
        output = alone.generate(ids, images=question.sample.pixel_values, max_new_tokens=question.max_new_tokens)
        pairs.append((card.caption, processor.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)))
    return pairs


class _Recorder:
    """A tracker that fails at its n-th call."""

    calls: list[tuple[str, int]]

    def __init__(self, name: str, fails_at: int) -> None:
        self.name, self.fails_at, self.calls = name, fails_at, []

    def _call(self, step: int) -> None:
        self.calls.append((self.name, step))
        if len(self.calls) == self.fails_at:
            raise ConnectionError("gone")

    def write_numbers(self, step: int, numbers: Sequence[Number]) -> None:
        self._call(step)

    def write_images(self, step: int, name: str, images: Sequence[CaptionedImage]) -> None:
        self._call(step)

    def close(self, *, failed: bool = False) -> None:
        self._call(-1)


@settings(max_examples=30)
@given(
    fails_at=st.lists(st.integers(1, 8), min_size=2, max_size=2),
    steps=st.lists(st.booleans(), max_size=6),
)
def test_a_tracker_that_fails_is_left_out_and_the_others_get_everything(fails_at: list[int], steps: list[bool]) -> None:
    trackers = Trackers((), lambda: pytest.fail("without trackers nobody asks"))
    recorders = [_Recorder(name, at) for name, at in zip(("wandb", "mlflow"), fails_at, strict=True)]
    trackers._trackers = {recorder.name: recorder for recorder in recorders}  # type: ignore[misc]
    for step, is_image in enumerate(steps):
        trackers.write_images(step, "x", []) if is_image else trackers.write_numbers(step, [])
    trackers.close()
    wanted = [*range(len(steps)), -1]
    for recorder in recorders:
        assert recorder.calls == [(recorder.name, step) for step in wanted][: recorder.fails_at]


def test_what_is_not_installed_or_does_not_start_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"names wandb, which is not installed: pip install 'parrot_sys\[trackers\]'"):
        registry.check_installed(["wandb"])
    facts = RunFacts(output=tmp_path / "file", project="p", name="n", config={}, environment={}, start_step=0)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ConfigError, match=r"tensorboard cannot start \(.*Error: "), caplog.at_level(logging.ERROR):
        Trackers(["tensorboard"], lambda: facts)


LEAVES = st.none() | st.integers() | st.text(max_size=3) | st.lists(st.integers(), max_size=2)
NAMES = st.text("abc_", min_size=1, max_size=4)
NESTED = st.recursive(LEAVES, lambda inner: st.dictionaries(NAMES, inner, max_size=3))


@settings(max_examples=50)
@given(
    st.dictionaries(NAMES, st.recursive(LEAVES, lambda inner: st.dictionaries(NAMES, inner, max_size=3)), max_size=4)
)
def test_flattened_settings_are_the_nested_ones(nested: dict[str, Any]) -> None:
    rebuilt: dict[str, Any] = {}
    for name, value in flattened(nested).items():
        *sections, last = name.split(".")
        place = rebuilt
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    assert rebuilt == nested


def test_a_run_keeps_its_identity(tmp_path: Path) -> None:
    assert run_identity(tmp_path, "wandb", lambda: "one") == "one"
    assert run_identity(tmp_path, "mlflow", lambda: "two") == "two"
    assert run_identity(tmp_path, "wandb", lambda: "three") == "one"
    (tmp_path / IDENTITY_FILE).write_text("{")
    with pytest.raises(ConfigError, match=r"trackers\.json"):
        run_identity(tmp_path, "wandb", lambda: "four")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trackers": ("wandb", "wandb")}, "each tracker once"),
        ({"trackers": (), "samples": 1}, "logging.samples needs logging.trackers"),
        ({"samples": 300}, "logging.samples must be <= 256"),
        ({"image_interval": 0}, "logging.image_interval must be >= 1, got 0"),
    ],
)
def test_settings_that_contradict_each_other(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoggingConfig(**change)


def test_samples_need_records_and_a_layout_that_answers(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"logging\.samples needs validation\.paths"):
        tiny_config(tmp_path, logging=TRACKED)
    with pytest.raises(ConfigError, match=r"logging\.samples must be 0 with parallel\.context_parallel_size=2, got 3"):
        tracked_config(tmp_path, parallel=ParallelConfig(context_parallel_size=2))


def test_a_run_that_goes_on_has_each_step_once(tmp_path: Path) -> None:
    config = tracked_config(tmp_path, logging=dataclasses.replace(TRACKED, samples=0))
    run(dataclasses.replace(config, max_steps=3))
    run(config)
    assert [record["step"] for record in read_metrics(config.output, "train")] == [1, 2, 3, 4]
    board = EventAccumulator(str(Path(config.output) / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2, 3, 4]
    assert torch.isfinite(torch.tensor([event.value for event in board.Scalars("train/loss")])).all()

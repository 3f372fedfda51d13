"""The studies of docs/evidence.md: settings of every cell, order and resume, paired intervals, plots."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import experiment as program
from parrot_sys import platform
from parrot_sys.cli import parse_config
from parrot_sys.errors import ConfigError
from parrot_sys.systems.constants import comparable
from parrot_sys.training.config import TrainConfig
from studies import recipes
from studies.catalog import EXPERIMENTS
from studies.experiment import Experiment, Run, Variant, compare_variants
from studies.languages import LANGUAGES
from studies.measures import with_averages
from studies.pipeline import Pipeline, PipelineError, Step
from studies.recipes import Stage, System
from studies.running import train_variants
from tests.studies.evaluations import evaluations_of


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[str, ...]]:
    """Step -> arguments that its training would have; nothing is trained, built or answered."""
    found: dict[str, tuple[str, ...]] = {}

    def step(name: str) -> Step:
        return Step(name=name, folder=Path("runs") / name, key=name, seconds=0.0)

    def train(pipeline: Pipeline, system: System, stage: Stage, data: Step, start: Any = None, **more: Any) -> Step:
        base = ["--config", system.model, "--config", stage.preset, "--output", "x", "--model.tokenizer-path", "x"]
        arguments = (*base, "--data.paths", *stage.records, *more["flags"])
        assert found.setdefault(more["name"], arguments) == arguments, "one name for two ways to train"
        return step(more["name"])

    monkeypatch.setattr(recipes, "train", train)
    for made in ("build_data", "evaluate", "evaluate_dialogues", "without_experts", "with_one_expert", "bare_decoder"):
        monkeypatch.setattr(recipes, made, lambda *given, name="data", **more: step(name))
    monkeypatch.setattr("studies.joint.split", lambda run: {"pictures.json": 30, "words.json": 10})
    return found


def settings_of(arguments: Sequence[str]) -> TrainConfig:
    config = parse_config(TrainConfig, list(arguments))
    assert set(config.checkpoint.allow_differences) <= {f"model.{name}" for name in comparable(config.model)}
    return config


def base_arguments() -> list[str]:
    """The preset of the instruction stage alone."""
    base = ["--config", recipes.PARROT.model, "--config", recipes.INSTRUCT.preset, "--output", "x"]
    return [*base, "--data.paths", "x.json", "--model.tokenizer-path", "x"]


def run_of(pipeline: Pipeline, seed: int = 0) -> Run:
    return Run(pipeline=pipeline, data=Step(name="data", folder=Path("data"), key="", seconds=0.0), seed=seed)


def evaluate_all(folder: Path, *studies: str) -> None:
    run = run_of(Pipeline(folder, say=lambda line: None))
    for study in studies:
        steps = [variant.evaluate(run).name for variant in EXPERIMENTS[study].variants]
        assert len(set(steps)) == len(steps)


@pytest.mark.parametrize("study", list(EXPERIMENTS))
def test_each_cell_is_a_way_of_its_own(study: str, trained: dict[str, tuple[str, ...]], tmp_path: Path) -> None:
    evaluate_all(tmp_path, study)
    cells = [each for name, each in trained.items() if not any(word in name for word in ("align", "pretrain"))]
    assert len(set(cells)) == len(cells) > 0


@pytest.mark.slow
def test_settings_of_all_cells_are_valid(trained: dict[str, tuple[str, ...]], tmp_path: Path) -> None:
    evaluate_all(tmp_path, *EXPERIMENTS)
    for arguments in trained.values():
        settings_of(arguments)


def test_cells_train_what_their_names_say(trained: dict[str, tuple[str, ...]], tmp_path: Path) -> None:
    evaluate_all(tmp_path, "languages", "wings_curve", "answers")

    def cell(name: str) -> TrainConfig:
        return settings_of(trained[name])

    def learning(config: TrainConfig) -> list[str]:
        return [part for part, learns in config.learning().items() if learns]

    frozen = cell("seed0/default-frozen-imbalanced")
    assert learning(frozen) == ["projector", "moe"]
    assert learning(cell("seed0/default-LoRA-imbalanced")) == ["projector", "moe", "lora"]
    assert frozen.data.language_weights == dict.fromkeys(("zh", "pt", "ar", "tr", "ru"), 0.1)
    many = cell("48/seed0/default-frozen-imbalanced").data.language_weights
    assert (len(many), set(many.values())) == (47, {0.1})
    wide = cell("seed0/wide-frozen-balanced")
    assert wide.data.language_weights == {}
    assert wide.model.moe.num_experts * wide.model.moe.ffn_hidden_size == 6 * frozen.model.moe.ffn_hidden_size
    assert not wide.model.moe.has_losses
    bias = cell("seed0/bias-frozen-imbalanced").model.moe
    assert (bias.routing, bias.topk, bias.expert_bias, bias.evenness_coeff) == ("topk", 1, True, 0.0)
    dense = cell("seed0/dense-tuned-balanced").model.moe
    assert (dense.normalize_guidance, dense.router_scale, dense.has_losses) == (False, 1.0, False)
    default = cell("seed0/default-tuned-balanced").model.moe
    assert default == settings_of(base_arguments()).model.moe
    assert default.information_coeff > 0
    assert cell("seed0/projector-tuned-balanced").model.moe.num_experts == 0
    assert cell("seed0/wings-router-off-5e-4").model.wings.routing == "even"
    assert "llm" not in learning(cell("seed0/wings-0"))
    assert cell("seed0/wings-5e-4").part_lrs()["llm"] == cell("seed0/plain-lora-5e-4").part_lrs()["llm"] == 5e-4
    assert "textual_learners" not in learning(cell("seed0/wings-visual-learners-only-5e-4"))
    for name in ("wings-textual-learners-only-5e-4", "align-wings-trainable.no-visual-learners"):
        assert "visual_learners" not in learning(cell(f"seed0/{name}"))
    joint = cell("seed0/mmgpt-joint").data
    assert joint.weights == pytest.approx((1 / 3, 1.0)), "half of what is seen is about pictures"
    short = cell("seed0/mmgpt-long-and-short-answers").data
    assert (short.paths, short.weights) == (("detail.json", "align.json"), ())


def test_one_expert_computes_what_experts_with_uniform_routes_do(tmp_path: Path) -> None:
    count, hidden, inner = 3, 4, 5
    generator = torch.Generator().manual_seed(0)
    prefix = recipes.EXPERT_PREFIX
    tensors = {"model.norm.weight": torch.ones(hidden), f"{prefix}gate.weight": torch.zeros(count, hidden)}
    for expert in range(count):
        for layer, shape in (
            ("gate_proj", (inner, hidden)),
            ("up_proj", (inner, hidden)),
            ("down_proj", (hidden, inner)),
        ):
            tensors[f"{prefix}experts.{expert}.{layer}.weight"] = torch.randn(*shape, generator=generator)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"num_experts": count, "moe_intermediate_size": inner}))
    rows = torch.randn(7, hidden, generator=generator)

    def outputs(held: dict[str, torch.Tensor], experts: int) -> torch.Tensor:
        each = []
        for expert in range(experts):
            gate, up, down = (
                held[f"{prefix}experts.{expert}.{layer}.weight"] for layer in ("gate_proj", "up_proj", "down_proj")
            )
            each.append((F.silu(rows @ gate.T) * (rows @ up.T)) @ down.T)
        return torch.stack(each).mean(0)

    wanted = outputs(tensors, count)
    recipes.join_experts(tmp_path)
    joined = load_file(tmp_path / "model.safetensors")
    torch.testing.assert_close(outputs(joined, 1), wanted)
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "num_experts": 1,
        "moe_intermediate_size": count * inner,
    }
    assert sum(each.numel() for each in joined.values()) == sum(each.numel() for each in tensors.values()) - 2 * hidden


def study_of(names: Sequence[str], evaluate: Callable[..., Step], ranks: Sequence[int]) -> Experiment:
    return Experiment(
        title="A study",
        about="For a test.",
        variants=tuple(
            Variant(name=name, description=name, evaluate=partial(evaluate, name=name), rank=rank)
            for name, rank in zip(names, ranks, strict=True)
        ),
        comparisons=(("a - b", "a", "b"),),
        file="study.json",
    )


def test_a_study_can_stop_anywhere_and_reports_what_is_there(tmp_path: Path) -> None:
    """Cells of low rank come first from all seeds; a report of a stopped study holds what is done, and no more."""
    order: list[tuple[str, int]] = []
    right = {"a": "110110", "b": "100110"}

    def evaluate(run: Run, *, name: str) -> Step:
        def answer(folder: Path) -> None:
            if len(order) == 3:
                raise KeyboardInterrupt
            order.append((name, run.seed))
            made = evaluations_of(folder, {name: {str(run.seed): right[name[0]]}})
            (folder / "mmmb").symlink_to(made[name][str(run.seed)].relative_to(folder) / "mmmb")

        return run.pipeline.step(run.name(name), answer)

    study = study_of(("a2", "a", "b"), evaluate, (1, 0, 0))

    def go(only_done: bool) -> dict[str, Any]:
        pipeline = Pipeline(tmp_path / "runs", say=lambda line: None, only_done=only_done)
        return train_variants(study, study.variants, [run_of(pipeline, seed) for seed in (0, 1)], tmp_path / "report")

    with pytest.raises(SystemExit):
        go(only_done=False)
    assert order == [("a", 0), ("b", 0), ("a", 1)]
    content = go(only_done=True)
    assert {name: list(seeds) for name, seeds in content["results"].items()} == {"a": ["0", "1"], "b": ["0"]}
    paired = content["summary"]["paired_intervals"]["a - b"]["style"]["mean"]
    assert (paired["n"], paired["seeds"], paired["pictures"]) == (12, 1, 6)
    assert paired["difference"] == pytest.approx(100 / 6)
    text = (tmp_path / "report" / "report.md").read_text()
    assert "* **a2**: a2 (not run)" in text
    assert "* **a**: a (seeds 0, 1)" in text
    assert "| a - b | 12 | 6 | 1 | +16.7 [" in text
    assert json.loads((tmp_path / "report" / "study.json").read_text()) == json.loads(json.dumps(content))
    assert len(order) == 3, "a report trains nothing"


def test_paired_intervals_count_pictures_and_seeds(tmp_path: Path) -> None:
    """Seeds that agree leave the interval of the pictures; seeds that disagree widen it."""
    study = study_of(("a", "b"), lambda run, name: None, (0, 0))
    none = "0" * 8
    widths = []
    for folder, marks in (("alike", ("11110000", "11110000")), ("apart", ("11111111", none))):
        right = {"a": dict(zip("01", marks, strict=True)), "b": {"0": none, "1": none}}
        evaluations = evaluations_of(tmp_path / folder, right)
        found = compare_variants(study, evaluations)["paired_intervals"]["a - b"]["style"]
        assert list(found) == ["mean", "mean but en"]
        low, high = found["mean"]["interval"]
        assert found["mean"]["difference"] == pytest.approx((low + high) / 2) == 50.0
        widths.append(high - low)
    assert widths[1] > 3 * widths[0]


def test_means_over_languages() -> None:
    assert with_averages({"en": 4.0, "pt": 1.0, "zh": 1.0}) == {
        "en": 4.0,
        "pt": 1.0,
        "zh": 1.0,
        "mean": 2.0,
        "mean but en": 1.0,
    }
    assert with_averages({"en": 4.0}) == {"en": 4.0, "mean": 4.0}
    assert with_averages({"pt": 4.0, "zh": 2.0}) == {"pt": 4.0, "zh": 2.0, "mean": 3.0}


@pytest.mark.parametrize(("study", "part"), [("languages", "style"), ("wings_curve", "T")])
def test_plots_of_what_is_there(study: str, part: str, tmp_path: Path) -> None:
    """Also with cells missing, and before there is any."""
    experiment = EXPERIMENTS[study]
    assert experiment.plot is not None
    parts = ("style",) if study == "languages" else ("T", "TT", "TTT", "V", "TV")
    record = {
        "accuracy": {name: {"mean": 50.0, "mean but en": 40.0} for name in parts},
        "routes": {part: {"language": {"bits": 1.5}}},
    }
    at = {variant.name: variant.at for variant in experiment.variants if variant.at}
    some = {name: {"0": record, "1": record} for name in list(at)[::2]}
    for results in ({}, some):
        drawn = experiment.plot({"at": at, "results": results, "chance": 25.0}, tmp_path)
        assert bool(drawn) == bool(results)
        assert all((tmp_path / name).stat().st_size > 5000 for name in drawn)


def test_comparisons_of_the_grid_differ_in_one_setting() -> None:
    at = {variant.name: variant.at for variant in LANGUAGES.variants}
    for name, first, second in LANGUAGES.comparisons:
        differs = [axis for axis in at[first] if at[first][axis] != at[second][axis]]
        assert differs == (["mix"] if name.startswith("balanced - ") else ["line"]), name


def test_a_row_trains_what_it_needs_and_no_more() -> None:
    def names(row: str | None, *texts: str) -> list[str]:
        return [each.name for each in program.choose(LANGUAGES, row, texts)]

    place = "frozen decoder, 6 languages, imbalanced"
    assert names(f"default - projector, {place}") == [f"projector, {place}", f"default, {place}"]
    assert names(f"default, {place}") == [f"default, {place}"]
    assert names(None) == [each.name for each in LANGUAGES.variants]
    assert names(None, "wide", "imbalanced") == [f"wide, {place}"]
    with pytest.raises(ConfigError, match=f"the nearest: .*default - projector, {place}"):
        names(f"default - projectors, {place}")


def test_a_part_of_a_study_does_not_replace_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    study = study_of(("a", "b"), lambda run, name: None, (0, 0))
    whole = {"results": {"a": {"0": 1, "1": 2}, "b": {"0": 3}}}
    part = {"results": {"a": {"0": 1, "1": 2}}}
    other = {"results": {"a": {"0": 5, "1": 6}, "b": {"0": 7, "1": 8}}}
    kept = Path("benchmarks/results") / ("gpu" if platform.cuda_available() else "cpu") / "study.json"
    for content, held in ((whole, whole), (part, whole), (other, other)):
        program.keep(study, content)
        assert json.loads(kept.read_text()) == held
    assert "has 1 cells that are not done here" in capsys.readouterr().out


def test_steps_say_at_which_commits_they_were_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the steps before them too, and of every start of a step that went on."""

    def go(commit: str, fails: bool = False) -> Step:
        monkeypatch.setattr("studies.pipeline.commit", lambda: commit)
        pipeline = Pipeline(tmp_path, say=lambda line: None)
        first = pipeline.step("first", lambda folder: folder.mkdir())

        def work(folder: Path) -> None:
            folder.mkdir(exist_ok=True)
            if fails:
                raise PipelineError("stopped")

        return pipeline.step("second", work, after=[first])

    with pytest.raises(PipelineError):
        go("one", fails=True)
    assert go("two").commits == {"one", "two"}
    assert go("three").commits == {"one", "two"}, "nothing was done again"
    assert json.loads((tmp_path / "stamps" / "first.json").read_text())["commits"] == ["one"]

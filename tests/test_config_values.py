"""Plain values <-> configuration classes: round trips, and what each mistake is answered with."""

from __future__ import annotations

import dataclasses
import math
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest

from parrot_sys.cli import config_from_dict, config_to_dict, load_config, save_config
from parrot_sys.config_values import build, merge
from parrot_sys.errors import ConfigError
from parrot_sys.inference.chat import ChatConfig
from parrot_sys.planning.config import PlanConfig
from parrot_sys.training.config import TrainConfig
from tests.config_classes import AdapterConfig, ModelConfig, MoEConfig, RunConfig, SourceConfig

FULL = RunConfig(
    output=Path("/runs/a"),
    model=ModelConfig(
        moe=MoEConfig(num_experts=4, topk=4, routing="topk"), dropout=0.5, adapter=AdapterConfig(targets=("v",))
    ),
    lr=1e-5,
    name="none",
    languages=(),
    mix={"en": 0.8, "zh": 0.2},
    sources=(SourceConfig(path=Path("a")), SourceConfig(path=Path("b"), weight=3.0)),
    resume=True,
    size=(7, 8),
)


@pytest.mark.parametrize("config", [FULL, RunConfig(output=Path("x"))])
def test_round_trips(config: RunConfig, tmp_path: Path) -> None:
    assert config_from_dict(RunConfig, config_to_dict(config)) == config
    save_config(config, tmp_path / "c.yaml")
    assert load_config(RunConfig, tmp_path / "c.yaml") == config


def test_dict_holds_plain_values_only() -> None:
    values = config_to_dict(FULL)
    assert values["output"] == "/runs/a"
    assert values["sources"] == [{"path": "a", "weight": 1.0}, {"path": "b", "weight": 3.0}]
    assert values["model"]["moe"] == {"num_experts": 4, "topk": 4, "routing": "topk"}


def test_a_partial_mapping_keeps_the_defaults_of_the_enclosing_class() -> None:
    config = config_from_dict(RunConfig, {"output": "x", "model": {"moe": {"num_experts": 8}}})
    assert config.model.moe == MoEConfig(num_experts=8, topk=3)


def test_an_optional_section_is_off_on_and_off_again() -> None:
    def adapter(*values: object) -> AdapterConfig | None:
        merged: dict[str, object] = {}
        for value in values:
            merge(RunConfig, merged, {"output": "x", "model": {"adapter": value}}, where="")
        return build(RunConfig, merged, checked=True).model.adapter

    assert config_from_dict(RunConfig, {"output": "x", "model": {}}).model.adapter is None
    assert adapter({}) == AdapterConfig()
    assert adapter({"rank": 2}, {"targets": ["v"]}) == AdapterConfig(rank=2, targets=("v",))
    assert adapter({"rank": 2}, None) is None
    assert adapter(None, {"rank": 2}) == AdapterConfig(rank=2)


def test_numbers_that_yaml_reads_as_text(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("output: x\nlr: 1e-4\nmodel: {dropout: 1}\n")
    config = load_config(RunConfig, tmp_path / "c.yaml")
    assert config.lr == 1e-4
    assert config.model.dropout == 1.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nam": "x"}, "unknown setting nam; the nearest is name"),
        ({"model": {"adapter": {"rnk": 3}}}, "unknown setting model.adapter.rnk; the nearest is model.adapter.rank"),
        ({"model": {"adapter": 3}}, "model.adapter must be a mapping of settings, got 3"),
        (
            {"model": {"moe": {"num_expert": 3}}},
            "unknown setting model.moe.num_expert; the nearest is model.moe.num_experts",
        ),
        ({"topk": 3}, "unknown setting topk; the nearest is model.moe.topk"),
        ({"model.moe.topks": 3}, "unknown setting model.moe.topks; the nearest is model.moe.topk"),
        ({"zzzzzz": 3}, "unknown setting zzzzzz"),
        ({"sources": [{"paht": "x"}]}, r"unknown setting sources[0].paht; the nearest is sources[0].path"),
        ({"sources": [{}]}, r"missing setting sources[0].path (Path)"),
        ({"model": {"moe": {"topk": "three"}}}, "model.moe.topk must be int, got 'three'"),
        ({"model": {"moe": {"topk": True}}}, "model.moe.topk must be int, got True"),
        ({"model": {"moe": {"topk": 2.0}}}, "model.moe.topk must be int, got 2.0"),
        ({"model": {"moe": {"routing": "Dense"}}}, "model.moe.routing must be one of dense, topk, got 'Dense'"),
        ({"model": {"dropout": "high"}}, "model.dropout must be float, got 'high'"),
        ({"model": 3}, "model must be a mapping of settings, got 3"),
        ({"resume": "yes"}, "resume must be bool, got 'yes'"),
        ({"lr": False}, "lr must be float, got False"),
        ({"name": 3}, "name must be str, got 3"),
        ({"languages": "en"}, "languages must be tuple[str, ...], got 'en'"),
        ({"languages": ["en", 1]}, "languages[1] must be str, got 1"),
        ({"size": [1, 2, 3]}, "size must have 2 values, got 3: [1, 2, 3]"),
        ({"mix": {"en": "much"}}, "mix.en must be float, got 'much'"),
        ({"model": {"moe": {"topk": 9}}}, "moe.topk must be in [1, moe.num_experts=6], got 9"),
        ({"output": None}, "output must be Path, got None"),
    ],
)
def test_mistakes_name_the_setting_what_was_wanted_and_what_came(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_dict(RunConfig, {"output": "x", **values})
    assert str(caught.value) == message


def test_a_missing_setting_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^missing setting output \(Path\)$"):
        config_from_dict(RunConfig, {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n", "must hold a mapping of settings, got list"),
        ("a: [", "is no YAML"),
        ("lrr: 1", "in .*c.yaml; the near"),
    ],
)
def test_files_that_are_no_configuration(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(RunConfig, tmp_path / "c.yaml")


def test_a_file_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes("name: \xfc".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"c\.yaml must be UTF-8 text"):
        load_config(RunConfig, tmp_path / "c.yaml")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*none\.yaml: No such file"):
        load_config(RunConfig, tmp_path / "none.yaml")


def test_an_empty_file_sets_nothing(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("# nothing\n")
    assert load_config(MoEConfig, tmp_path / "c.yaml") == MoEConfig()


def _floats(cls: type, prefix: str = "") -> dict[str, Callable[[float], Any]]:
    """Dotted name of each setting below `cls` that holds floats -> how a number is written for it."""
    found: dict[str, Callable[[float], Any]] = {}
    for name, hint in get_type_hints(cls).items():
        choices = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        for choice in choices:
            if dataclasses.is_dataclass(choice):
                found |= _floats(choice, f"{prefix}{name}.")
            elif choice is float:
                found[prefix + name] = lambda value: value
            elif get_origin(choice) is dict and float in get_args(choice):
                found[prefix + name] = lambda value: {"en": value}
            elif get_origin(choice) is tuple and float in get_args(choice):
                count = len([each for each in get_args(choice) if each is float])
                found[prefix + name] = lambda value, count=count: [0.5] * (count - 1) + [value]
    return found


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "nan", "-Infinity"])
@pytest.mark.parametrize("cls", [RunConfig, TrainConfig, PlanConfig, ChatConfig])
def test_no_setting_takes_what_is_no_number(cls: type, value: float) -> None:
    """NaN passes each range check in one of its two directions, so that it must not get there."""
    settings = _floats(cls)
    assert settings, "each of these programs has some"
    for name, write in settings.items():
        nested = write(value)
        for part in reversed(name.split(".")):
            nested = {part: nested}
        with pytest.raises(ConfigError, match=rf"^{re.escape(name)}\S* must be a finite number, got '?{value}"):
            config_from_dict(cls, nested)


@pytest.mark.parametrize(
    "text", ["a: 2024-13-45", "a: " + "[" * 5000, "a: 0b" + "1" * 3 + "2\n\tb", "? [a]\n: b", "a: !!int x"]
)
def test_yaml_that_its_library_cannot_read(text: str, tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text(text)
    with pytest.raises(ConfigError, match=f"{tmp_path}/settings.yaml"):
        load_config(_Anything, tmp_path / "settings.yaml")


@dataclasses.dataclass(kw_only=True, frozen=True)
class _Anything:
    b: int = 0

"""Every constant that weights bring with them is compared with the settings of a run that starts from them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parrot_sys.config_values import build, config_to_dict, leaves, merge, save_config
from parrot_sys.errors import ConfigError
from parrot_sys.files import read_json
from parrot_sys.models.llm import TokenExpertsConfig
from parrot_sys.modules.lora import LoRAConfig
from parrot_sys.modules.rotary import RopeScaling
from parrot_sys.modules.routing_config import TextGuidedMoEConfig
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.systems.constants import Difference, check_constants, comparable, find_differences
from parrot_sys.systems.hf_config import config_from_hf, config_to_hf
from parrot_sys.systems.multimodal_gpt.config import FlamingoConfig
from parrot_sys.systems.wings.config import WingsConfig

FIXTURES = Path(__file__).parents[1] / "fixtures"
PARROT, WINGS = FIXTURES / "parrot_tiny" / "model", FIXTURES / "wings_tiny" / "model"


def _model(directory: Path) -> ParrotConfig:
    return config_from_hf(read_json(directory / "config.json"), directory)


def _training_checkpoint(folder: Path, **changes: Any) -> tuple[Path, ParrotConfig]:
    model = replace(ParrotConfig(template="chatml"), **changes)
    save_config(model, folder / "model_config.yaml")
    return folder, model


def _flamingo(folder: Path) -> tuple[Path, ParrotConfig]:
    return _training_checkpoint(folder, moe=TextGuidedMoEConfig(num_experts=0), flamingo=FlamingoConfig())


def _topk(folder: Path) -> tuple[Path, ParrotConfig]:
    scaling = RopeScaling(factor=8.0, low_frequency=1.0, high_frequency=4.0, original_positions=8192)
    llm = replace(ParrotConfig().llm, rope_scaling=scaling, head_dim=64)
    return _training_checkpoint(folder, moe=TextGuidedMoEConfig(routing="topk", topk=2), llm=llm)


ROUTED = replace(ParrotConfig().llm, family="qwen3_moe", qkv_bias=False, experts=TokenExpertsConfig(dense_layers=(2,)))


def _routed(folder: Path) -> tuple[Path, ParrotConfig]:
    return _training_checkpoint(folder, llm=ROUTED)


def _released_routed(folder: Path) -> tuple[Path, ParrotConfig]:
    model = ParrotConfig(llm=ROUTED)
    (folder / "config.json").write_text(json.dumps(config_to_hf(model, None, folder)), encoding="utf-8")
    return folder, model


STARTS: dict[str, Callable[[Path], tuple[Path, ParrotConfig]]] = {
    "released Parrot": lambda _: (PARROT, _model(PARROT)),
    "released Wings": lambda _: (WINGS, _model(WINGS)),
    "training checkpoint, MultiModal-GPT": _flamingo,
    "training checkpoint, top-k": _topk,
    "training checkpoint, token-routed": _routed,
    "released Parrot, token-routed": _released_routed,
}


def _other(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return [*value, 99] if isinstance(value, list) else f"another {value}"


def _with(model: ParrotConfig, changes: dict[str, Any]) -> ParrotConfig:
    """`model` with settings changed, whether the result is a model or not (one change alone often makes none)."""
    merged: dict[str, Any] = {}
    merge(ParrotConfig, merged, config_to_dict(model), where="")
    for field, value in changes.items():
        *path, last = field.split(".")
        section = merged
        for name in path:
            section = section[name]
        section[last] = value
    changed: ParrotConfig = build(ParrotConfig, merged, checked=False)
    return changed


@pytest.mark.parametrize("start", STARTS)
def test_each_constant_that_differs_is_named(start: str, tmp_path: Path) -> None:
    directory, model = STARTS[start](tmp_path)
    assert find_differences(model, directory) == []
    fields = {name: value for name, value in comparable(model).items() if value is not None}
    assert len(fields) > 20
    for name, value in fields.items():
        differences = find_differences(_with(model, {name: _other(value)}), directory)
        found = {difference.field: difference for difference in differences}
        assert f"model.{name}" in found, name
        # The number of experts and the kind of routing decide which other settings are read at all.
        if name not in ("moe.num_experts", "moe.routing"):
            assert list(found) == [f"model.{name}"]
        assert found[f"model.{name}"].found == value
        assert found[f"model.{name}"].wanted == _other(value)


@pytest.mark.parametrize("start", STARTS)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_any_set_of_differences_is_listed_whole(start: str, data: st.DataObject, tmp_path_factory: Any) -> None:
    directory, model = STARTS[start](tmp_path_factory.mktemp("start"))
    names = [name for name, value in comparable(model).items() if value is not None and not name.startswith("moe.")]
    chosen = data.draw(st.lists(st.sampled_from(names), unique=True))
    changed = _with(model, {name: _other(comparable(model)[name]) for name in chosen})
    wanted = {f"model.{name}" for name in chosen}
    assert {difference.field for difference in find_differences(changed, directory)} == wanted
    check_constants(changed, directory, allowed=wanted)
    if chosen:
        allowed = data.draw(st.sets(st.sampled_from(sorted(wanted)), max_size=len(wanted) - 1))
        with pytest.raises(ConfigError) as error:
            check_constants(changed, directory, allowed=allowed)
        for name in wanted:
            assert (f"\n  {name}: wanted " in str(error.value)) == (name not in allowed)


def test_the_message_says_what_was_wanted_what_was_found_where_and_the_fix() -> None:
    model = _model(PARROT)
    changed = replace(model, llm=replace(model.llm, rope_base=5e5), moe=replace(model.moe, residual="paper"))
    with pytest.raises(ConfigError) as error:
        check_constants(changed, PARROT)
    assert f"contradict the weights of {PARROT} in 2 constants:" in str(error.value)
    assert f"model.llm.rope_base: wanted 500000.0, found 10000.0 in {PARROT / 'config.json'}" in str(error.value)
    assert "model.moe.residual: wanted paper, found code" in str(error.value)
    assert "--checkpoint.allow-differences model.llm.rope_base model.moe.residual" in str(error.value)
    with pytest.raises(ConfigError, match=r"allow-differences must name fields .* got model.llm.rope_bas$"):
        check_constants(model, PARROT, allowed=["model.llm.rope_bas"])


def test_what_a_run_chooses_may_differ() -> None:
    model = _model(PARROT)
    numbers = ("aux_loss_coeff", "z_loss_coeff", "information_coeff", "evenness_coeff", "entropy_coeff")
    schedule = {"router_scale_start": 0.5, "router_scale_steps": 7, "bias_update_rate": 0.0}
    moe = replace(model.moe, recompute=True, fp8=True, **dict.fromkeys(numbers, 0.1), **schedule)
    vision = replace(model.vision, path=None)
    chosen = replace(model, moe=moe, vision=vision, lora=LoRAConfig(), max_seq_len=7, tokenizer_path="elsewhere")
    assert find_differences(chosen, PARROT) == []
    wings = _model(WINGS)
    assert (
        find_differences(wings.with_compat("paper"), WINGS)
        == find_differences(wings.with_compat("released"), WINGS)
        == []
    )


def test_experts_that_a_stage_bypassed_are_there(tmp_path: Path) -> None:
    """A stage of text alone exports with `use_moe` false; the next stage uses the experts."""
    shutil.copytree(PARROT, tmp_path / "model")
    hf = {**read_json(PARROT / "config.json"), "use_moe": False}
    (tmp_path / "model" / "config.json").write_text(json.dumps(hf), encoding="utf-8")
    model = _model(PARROT)
    assert find_differences(replace(model, vision=replace(model.vision, path=None)), tmp_path / "model") == []
    more = replace(model, moe=replace(model.moe, num_experts=model.moe.num_experts + 1))
    assert [found.field for found in find_differences(more, tmp_path / "model")] == ["model.moe.num_experts"]


def test_a_section_that_one_side_lacks_is_one_difference() -> None:
    model = _model(WINGS)
    (plain,) = find_differences(replace(model, wings=None), WINGS)
    assert (plain.field, plain.wanted, plain.found) == ("model.wings", "unset", "set")
    parrot = _model(PARROT)
    with_wings = replace(parrot, moe=TextGuidedMoEConfig(num_experts=0), wings=WingsConfig())
    assert [difference.field for difference in find_differences(with_wings, PARROT)] == [
        "model.moe.num_experts",
        "model.wings",
    ]


def test_a_bare_language_model_is_compared_with_the_decoder_alone(tmp_path: Path) -> None:
    hf = {**read_json(PARROT / "config.json"), "model_type": "qwen2"}
    (tmp_path / "config.json").write_text(json.dumps(hf), encoding="utf-8")
    model = replace(_model(PARROT), wings=None, vision=ParrotConfig().vision, moe=TextGuidedMoEConfig(num_experts=3))
    assert find_differences(model, tmp_path) == []
    changed = replace(model, llm=replace(model.llm, norm_eps=1e-3))
    file = str(tmp_path / "config.json")
    assert find_differences(changed, tmp_path) == [Difference("model.llm.norm_eps", 1e-3, 1e-6, file)]


def test_a_tower_in_a_directory_of_its_own_is_compared_with_its_config(tmp_path: Path) -> None:
    shutil.copytree(PARROT, tmp_path / "model")
    tower = tmp_path / "elsewhere"
    shutil.copytree(PARROT.parent / "clip-vit-tiny", tower)
    model = _model(PARROT)
    outside = replace(model, vision=replace(model.vision, path=str(tower)))
    assert find_differences(outside, tmp_path / "model") == []
    changed = replace(outside, vision=replace(outside.vision, layer_norm_eps=1e-3))
    (difference,) = find_differences(changed, tmp_path / "model")
    assert (difference.field, difference.wanted, difference.file) == (
        "model.vision.layer_norm_eps",
        1e-3,
        str(tower / "config.json"),
    )


def test_the_fields_of_every_section_are_compared_or_named_as_choices() -> None:
    """A new setting is compared unless somebody says that it is a choice."""
    for model in (ParrotConfig(), _model(WINGS), replace(ParrotConfig(), moe=TextGuidedMoEConfig(routing="topk"))):
        every = {
            name
            for name, _ in leaves(config_to_dict(model))
            if name.split(".")[0] in ("llm", "vision", "projector", "moe", "wings", "flamingo", "llava")
        }
        left_out = {
            *("vision.path", "moe.recompute", "moe.fp8", "moe.aux_loss_coeff", "moe.z_loss_coeff"),
            *("moe.information_coeff", "moe.evenness_coeff", "moe.entropy_coeff"),
            *("moe.router_scale_start", "moe.router_scale_steps", "moe.bias_update_rate"),
            *("wings.rule", "flamingo.media_rule"),
        }
        if not model.moe.num_experts:
            left_out |= {name for name in every if name.startswith("moe.") and name != "moe.num_experts"}
        elif model.moe.routing == "dense":
            left_out |= {"moe.topk", "moe.renormalize", "moe.expert_bias"}
        assert every - left_out == set(comparable(model))

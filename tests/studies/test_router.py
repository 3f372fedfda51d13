"""The experiment on routers: settings of its variants, and the table of what routes tell."""

from __future__ import annotations

from parrot_sys.cli import parse_config
from parrot_sys.systems.constants import comparable
from parrot_sys.training.config import TrainConfig
from studies.recipes import INSTRUCT, PARROT
from studies.route_tables import routes_table
from studies.router import VARIANTS, router_flags


def test_each_variant_sets_what_its_name_says() -> None:
    base = [
        "--config",
        PARROT.model,
        "--config",
        INSTRUCT.preset,
        "--output",
        "x",
        "--data.paths",
        "x.json",
        "--model.tokenizer-path",
        "x",
    ]
    configs = {name: parse_config(TrainConfig, [*base, *router_flags(each)]) for name, (_, each) in VARIANTS.items()}
    moes = {name: config.model.moe for name, config in configs.items()}
    assert moes["projector only"].num_experts == 0
    released = moes["released"]
    assert (released.normalize_guidance, released.router_scale) == (False, 1.0)
    assert (released.information_coeff, released.evenness_coeff) == (0.0, 0.0)
    assert not moes["released"].has_losses
    assert moes["default"] == parse_config(TrainConfig, base).model.moe
    assert moes["default"].normalize_guidance
    assert (moes["default, top-2"].routing, moes["default, top-2"].topk) == ("topk", 2)
    assert moes["default, top-2"].information_coeff == moes["default"].information_coeff > 0
    for config in configs.values():  # names that no check knows would stop the run
        assert set(config.checkpoint.allow_differences) <= {f"model.{name}" for name in comparable(config.model)}


def test_table_of_routes() -> None:
    def run(bits: float, dead: list[int]) -> dict:
        told = {"bits": bits, "by_chance": 0.01, "most": 2.585}
        routes = {
            "language": told,
            "category": {**told, "most": 3.9},
            "entropy": 2.5,
            "picture_entropy": 0.1,
            "dead": dead,
        }
        return {"routes": {"style": routes}}

    results = {
        "plain": {"0": {"routes": {}}},
        "a": {"0": run(2.0, []), "1": run(1.0, [3, 4])},
        "b": {"0": run(0.0, [1])},
    }
    lines = routes_table(results, "style")
    assert len(lines) == 4
    assert lines[2].startswith("| a | 1.50 \u00b1 0.71 of 2.59 (by chance 0.010) | 1.50 \u00b1 0.71 of 3.90")
    assert lines[2].endswith("| 0, 2 |")
    assert lines[3].startswith("| b | 0.00 of 2.59")
    assert routes_table(results, "concept") == []

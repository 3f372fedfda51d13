"""Settings that contradict each other fail at once; the stage presets hold the paper's numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from parrot_sys.cli import config_from_dict, list_presets, load_config, parse_config, save_config
from parrot_sys.errors import ConfigError
from parrot_sys.modules.lora import LoRAConfig
from parrot_sys.systems.registry import rate_of
from parrot_sys.training.config import TrainConfig

NAN, INFINITY = float("nan"), float("inf")
NEEDED = {"output": "run", "data": {"paths": ["a.json"]}, "model": {"tokenizer_path": "t"}}
FLAGS = ["--output", "run", "--data.paths", "a.json", "--model.tokenizer-path", "t"]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"output": ""}, "output"),
        ({"data": {"paths": []}}, "data.paths"),
        ({"model": {"tokenizer_path": None}}, "tokenizer_path"),
        ({"global_batch_size": 0}, "global_batch_size"),
        ({"max_steps": 0}, "max_steps"),
        ({"epochs": 0.0}, "epochs"),
        ({"cache_image_features": True, "trainable": {"vision": True}}, "cache_image_features"),
        ({"optimizer": {"lrs": {"moe": 1e-3}}, "bypass": ["moe"]}, "lrs.moe has no effect, because bypass"),
        ({"optimizer": {"lrs": {"moe": 1e-3}}, "model": {"tokenizer_path": "t", "moe": {"num_experts": 0}}}, "lrs.moe"),
        ({"bypass": ["moe"], "trainable": {"moe": True, "others": False}}, "without those that bypass names .moe."),
        ({"trainable": {"projector": False, "moe": False, "llm": False}}, "trainable"),
        ({"optimizer": {"lr": 0.0}}, "optimizer.lr"),
        ({"optimizer": {"lrs": {"llm": 1e-5}, "min_lr": 1.5e-5}}, "min_lr must be <= optimizer.lrs.llm=1e-05"),
        ({"optimizer": {"betas": [0.9, 1.0]}}, "betas"),
        ({"optimizer": {"warmup_fraction": 1.0}}, "warmup_fraction"),
        ({"checkpoint": {"keep_last": 0}}, "keep_last"),
        ({"parallel": {"pipeline_model_parallel_size": 64}}, "pipeline stages"),
        ({"precision": "fp16"}, "precision"),
        ({"optimizer": {"learning_rate": 1.0}}, "learning_rate"),
        ({"optimizer": {"lrs": {"vision": 1e-5}}}, "lrs.vision has no effect, with trainable.vision=false"),
        ({"optimizer": {"lrs": {"moe": 1e-5}}, "trainable": {"moe": False}}, "lrs.moe has no effect"),
        ({"optimizer": {"lrs": {"proyector": 1e-5}}}, "lrs.proyector: Parrot has no such part.*nearest is projector"),
        ({"trainable": {"resampler": True}}, "trainable.resampler: Parrot has no such part; its parts are vision, llm"),
        ({"trainable": {"llms": True}}, "the nearest is llm"),
        ({"bypass": ["llm"]}, "bypass must name parts of Parrot that can be passed by .moe., got llm"),
        ({"use_moe": False}, r"unknown setting use_moe: it is bypass: \[moe\] for false"),
        ({"optimizer": {"moe_lr": 1e-5}}, "unknown setting optimizer.moe_lr: it is lrs.moe now"),
        *(({"optimizer": {name: NAN}}, name) for name in ("lr", "min_lr", "weight_decay", "clip_grad", "eps")),
        ({"optimizer": {"lr": INFINITY}}, "optimizer.lr"),
        ({"epochs": NAN}, "epochs"),
        ({"epochs": INFINITY}, "epochs"),
        ({"model": {"tokenizer_path": "t", "max_seq_len": 0}}, "max_seq_len must be >= 1"),
        ({"model": {"tokenizer_path": "t", "max_seq_len": 32769}}, "max_position_embeddings=32768, got 32769"),
        ({"validation": {"image_roots": ["images"]}}, "validation.image_roots needs validation.paths"),
        ({"parallel": {"expert_model_parallel_size": 4}}, "num_experts must be .*expert_model_parallel_size=4, got 6"),
        ({"parallel": {"expert_tensor_parallel_size": 3}}, "ffn_hidden_size must be .*expert_tensor_.*=3, got 4096"),
        (
            {
                "parallel": {"expert_model_parallel_size": 3},
                "model": {
                    "tokenizer_path": "t",
                    "llm": {"family": "qwen3_moe", "qkv_bias": False, "experts": {"num_experts": 64}},
                },
            },
            "must divide both model.moe.num_experts=6 and model.llm.experts.num_experts=64, because .*, got 3: .* 1, 2",
        ),
        (
            {
                "parallel": {"tensor_model_parallel_size": 4},
                "model": {"tokenizer_path": "t", "llm": {"num_query_groups": 2}},
            },
            "model.llm.num_query_groups must be a multiple .*=4, got 2: the nearest size that fits is 2",
        ),
        (
            {
                "model": {"tokenizer_path": "t", "moe": {"num_experts": 0}},
                "parallel": {"expert_model_parallel_size": 2},
            },
            "expert_model_parallel_size must be 1 without experts",
        ),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        config_from_dict(TrainConfig, NEEDED | settings)


def test_stage_presets_hold_the_papers_hyper_parameters() -> None:
    presets = list_presets()
    for name, lr, batch, bypass, learning in (
        ("parrot_align", 1e-3, 256, ("moe",), {"vision": False, "projector": True, "moe": False, "llm": False}),
        ("parrot_instruct", 2e-5, 128, (), {"vision": False, "projector": True, "moe": True, "llm": True}),
    ):
        config = parse_config(TrainConfig, ["--config", str(presets[name]), *FLAGS])
        assert config.optimizer.lr == lr
        assert config.global_batch_size == batch
        assert config.bypass == bypass
        assert config.learning().items() >= learning.items()
        assert (config.optimizer.warmup_fraction, config.optimizer.weight_decay) == (0.03, 0.0)
        assert (config.optimizer.betas, config.optimizer.eps, config.optimizer.clip_grad) == ((0.9, 0.999), 1e-8, 1.0)
        assert config.optimizer.distributed, "the papers used ZeRO"
        assert (config.epochs, config.precision, config.model.max_seq_len) == (1.0, "bf16", 2048)


def test_flags_win_over_presets() -> None:
    argv = ["--config", "parrot_instruct", "--optimizer.lr", "3e-5", *FLAGS]
    config = parse_config(TrainConfig, argv)
    assert config.optimizer.lr == 3e-5
    assert config.data.paths == ("a.json",)


def test_rates_of_parts_leave_out_those_equal_to_the_base() -> None:
    config = config_from_dict(TrainConfig, NEEDED | {"optimizer": {"lr": 1e-3, "lrs": {"moe": 1e-3, "llm": 1e-5}}})
    assert config.part_lrs() == {"llm": 1e-5}


def test_the_router_has_a_rate_of_its_own_within_its_part() -> None:
    lrs = {"moe": 1e-4, "router": 1e-3, "llm": 1e-5}
    config = config_from_dict(TrainConfig, NEEDED | {"optimizer": {"lr": 1e-3, "lrs": lrs}})
    assert config.part_lrs() == {"moe": 1e-4, "llm": 1e-5}
    named = {"moe.router_weight": "router", "moe.w_down": "moe", "decoder.x": "llm", "projector.x": "", "other": ""}
    assert {name: rate_of(name, config.model, lrs) for name in named} == named
    assert rate_of("moe.router_weight", config.model, {"moe": 1e-4}) == "moe"
    assert rate_of("moe.router_weight", config.model, {}) == ""
    with pytest.raises(ConfigError, match="router has no effect, with trainable"):
        config_from_dict(TrainConfig, NEEDED | {"optimizer": {"lrs": {"router": 1e-3}}, "trainable": {"moe": False}})


def test_resolved_config_reads_back(tmp_path: Path) -> None:
    config = parse_config(TrainConfig, ["--config", "parrot_align", *FLAGS])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(TrainConfig, tmp_path / "config.yaml") == config


def test_presets_of_model_and_stage_combine() -> None:
    argv = [
        "--config",
        "parrot_7b",
        "--config",
        "parrot_align",
        *FLAGS,
        "--trainable.llm",
        "--optimizer.lrs.llm",
        "3e-5",
    ]
    config = parse_config(TrainConfig, argv)
    assert config.model.llm.hidden_size == 4096
    assert (config.bypass, config.learning()) == (
        ("moe",),
        {"vision": False, "llm": True, "projector": True, "moe": False, "lora": False},
    )
    assert config.part_lrs() == {"llm": 3e-5}
    frozen = parse_config(TrainConfig, ["--config", "parrot_instruct", *FLAGS, "--trainable.no-llm"])
    assert frozen.trainable == {"vision": False, "others": True, "llm": False}


def test_the_sets_of_multimodal_gpt_with_and_without_short_answers() -> None:
    base = [
        *("--config", "multimodal_gpt_9b", "--config", "multimodal_gpt_instruct"),
        *("--output", "x", "--model.tokenizer-path", "t"),
    ]
    without, with_short = (
        parse_config(TrainConfig, [*base, "--config", name])
        for name in ("multimodal_gpt_data", "multimodal_gpt_data_short_answers")
    )
    assert without.data.text_ratio == with_short.data.text_ratio == 1.0
    sources = with_short.data.sources()
    assert [source for source in sources if source.name != "vqa_v2"] == list(without.data.sources())
    assert len(sources) == len(without.data.sources()) + 1


def test_lora_needs_something_to_learn() -> None:
    values = {**NEEDED, "trainable": {"lora": True, "others": False}}
    with_lora = {**values, "model": {"tokenizer_path": "t", "lora": {"rank": 4}}, "optimizer": {"lrs": {"lora": 1e-3}}}
    config = config_from_dict(TrainConfig, with_lora)
    assert config.model.lora == LoRAConfig(rank=4)
    assert config.part_lrs() == {"lora": 1e-3}
    for wrong, message in (
        (values, r"trainable must leave a part to learn, got none: .*; it lacks lora"),
        (
            {**NEEDED, "optimizer": {"lrs": {"lora": 1e-3}}},
            r"optimizer\.lrs\.lora has no effect, because the model has none: set model\.lora",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            config_from_dict(TrainConfig, wrong)


@pytest.mark.parametrize("model", ["parrot_7b", "wings_qwen1_5_7b", "multimodal_gpt_9b"])
def test_the_lora_preset_freezes_everything_else(model: str) -> None:
    config = parse_config(TrainConfig, ["--config", model, "--config", "lora_instruct", *FLAGS])
    assert [name for name, learns in config.learning().items() if learns] == ["lora"]
    assert config.model.lora == LoRAConfig()


@pytest.mark.parametrize(
    ("model", "stage", "learning"),
    [
        ("llava_next_qwen3_8b", "llava_align", {"projector"}),
        ("llava_next_qwen3_8b", "llava_instruct", {"vision", "projector", "llm"}),
        ("llava_tiny_cpu", "tiny_pretrain", {"llm"}),
        ("llava_tiny_cpu", "tiny_llava_align", {"projector"}),
        ("llava_tiny_cpu", "tiny_instruct", {"projector", "llm"}),
    ],
)
def test_stages_of_llava_train_the_parts_that_they_are_for(model: str, stage: str, learning: set[str]) -> None:
    presets = list_presets()
    config = parse_config(TrainConfig, ["--config", str(presets[model]), "--config", str(presets[stage]), *FLAGS])
    assert {part for part, learns in config.learning().items() if learns} == learning
    assert config.part_lrs() == ({"vision": 2e-6} if stage == "llava_instruct" else {})

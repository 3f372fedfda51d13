"""The two stages of Wings, from the released layout to the released layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from parrot_sys.megatron.runtime.initialize import ParallelConfig
from parrot_sys.systems.hf_config import config_from_hf, read_json
from parrot_sys.systems.registry import part_of
from parrot_sys.testing.distributed import run_distributed
from parrot_sys.training.config import CheckpointConfig, OptimizerConfig, TrainConfig
from parrot_sys.training.trainer import Trainer
from tests.comparisons import differ
from tests.training.tiny import run, tiny_config

RELEASED = Path(__file__).parents[1] / "fixtures" / "wings_tiny" / "model"


def _config(folder: Path, output: str, load_from: Path, **settings: object) -> TrainConfig:
    model = replace(config_from_hf(read_json(RELEASED / "config.json"), RELEASED), max_seq_len=512)
    checkpoint = CheckpointConfig(load_from=str(load_from), export=True)
    return tiny_config(folder, output=output, copies=1, model=model, checkpoint=checkpoint, max_steps=1, **settings)


def _moved(path: Path, before: dict[str, torch.Tensor]) -> set[str]:
    after = load_file(path / "hf" / "model.safetensors")
    assert after.keys() == before.keys()
    return {name for name in after if differ(after[name], before[name])}


def test_stages(tmp_path: Path) -> None:
    released = load_file(RELEASED / "model.safetensors")
    align = {"projector": True, "visual_learners": True, "others": False}
    first = _config(tmp_path, "first", RELEASED, trainable=align, bypass=("textual_learners",))
    run(first)
    wanted = {name for name in released if "mm_projector" in name or ".attn_pool." in name}
    assert _moved(tmp_path / "first", released) == wanted
    second = _config(
        tmp_path,
        "second",
        tmp_path / "first",
        optimizer=OptimizerConfig(lr=1e-4, lrs={"projector": 1e-3}),
        parallel=ParallelConfig(pipeline_model_parallel_size=2),
    )
    run(second, 2)
    moved = _moved(tmp_path / "second", load_file(tmp_path / "first" / "hf" / "model.safetensors"))
    assert moved == {name for name in released if "vision_tower" not in name}


def test_learning_rates_by_part(tmp_path: Path) -> None:
    settings = OptimizerConfig(lr=1e-4, lrs={"projector": 1e-3, "visual_learners": 2e-4, "textual_learners": 3e-4})
    config = _config(tmp_path, "rates", RELEASED, optimizer=settings)

    def rates(rank: int, size: int) -> dict[str, float]:
        trainer = Trainer(config)
        of = {id(p): group["max_lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
        named = trainer.chunks[0].named_parameters()
        return {name: of[id(parameter)] for name, parameter in named if parameter.requires_grad}

    (found,) = run_distributed(rates, 1)
    parts = {"projector": 1e-3, "visual_learners": 2e-4, "textual_learners": 3e-4, "llm": 1e-4}
    assert {part_of(name, config.model) for name in found} == set(parts)
    for name, rate in found.items():
        assert rate == parts[part_of(name, config.model)], name

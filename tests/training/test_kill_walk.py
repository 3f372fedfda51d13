"""Runs that are killed at random moments end like runs that were not: for every system, bit for bit."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from parrot_sys.modules.gated_cross_attention import GatedCrossAttentionConfig
from parrot_sys.modules.lora import LoRAConfig
from parrot_sys.modules.perceiver import ResamplerConfig
from parrot_sys.modules.routing_config import TextGuidedMoEConfig
from parrot_sys.systems.multimodal_gpt.config import FlamingoConfig
from parrot_sys.systems.wings.config import WingsConfig
from parrot_sys.testing.distributed import run_distributed
from parrot_sys.training.config import CheckpointConfig, OptimizerConfig, TrainConfig
from parrot_sys.training.trainer import Trainer
from tests.training.tiny import MODEL, losses, tiny_config

KILLS = 3
"""In each of 12 walks."""

_SYSTEMS: dict[str, dict[str, Any]] = {
    "parrot": {},
    "wings": {"wings": WingsConfig(rank=4, router_positions=512), "moe": TextGuidedMoEConfig(num_experts=0)},
    "multimodal_gpt": {
        "flamingo": FlamingoConfig(
            resampler=ResamplerConfig(num_latents=4, num_layers=1, num_attention_heads=2, head_dim=8),
            cross_attention=GatedCrossAttentionConfig(num_attention_heads=4, head_dim=6, ffn_multiplier=2),
            every_n_layers=2,
            image_token_id=1,
        ),
        "moe": TextGuidedMoEConfig(num_experts=0),
        "lora": LoRAConfig(rank=4),
    },
}


def _config(folder: Path, system: str, *, asynchronous: bool, zero1: bool) -> TrainConfig:
    base = tiny_config(folder, output="whole", max_steps=8)
    return replace(
        base,
        model=replace(base.model, tokenizer_path=str(MODEL), **_SYSTEMS[system]),
        checkpoint=CheckpointConfig(interval=1, asynchronous=asynchronous, keep_last=2),
        optimizer=OptimizerConfig(lr=1e-3, distributed=zero1),
    )


def _run(config: TrainConfig, ranks: int, kill: tuple[float, int | None] | None = None) -> bool:
    """Whether the run came to its end; `kill` says after how many seconds which rank, or all of them, are killed."""

    def rank_main(rank: int, size: int) -> None:
        if kill is not None and kill[1] in (None, rank):
            threading.Timer(kill[0], os.kill, (os.getpid(), signal.SIGKILL)).start()
        Trainer(config).run()

    with contextlib.suppress(RuntimeError) if kill is not None else contextlib.nullcontext():
        run_distributed(rank_main, ranks, timeout=120)
        return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("system", list(_SYSTEMS))
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("asynchronous", [True, False], ids=["background", "waiting"])
def test_killed_at_random_moments(system: str, ranks: int, asynchronous: bool, tmp_path: Path) -> None:
    draw = random.Random(f"{system} {ranks} {asynchronous}")
    whole = _config(tmp_path, system, asynchronous=asynchronous, zero1=ranks == 2)
    begin = time.perf_counter()
    _run(whole, ranks)
    seconds = time.perf_counter() - begin
    config = replace(whole, output=str(tmp_path / "killed"))
    kills, moments = 0, []
    while kills < KILLS:
        moments.append((draw.uniform(0.0, seconds), draw.choice([None, *range(ranks)])))
        assert len(moments) < 12 * KILLS, "kills come too late"
        if _run(config, ranks, moments[-1]):
            shutil.rmtree(config.output)  # it was done first
        else:
            kills += 1
    _run(config, ranks)
    assert losses(config) == losses(whole), moments
    ours, wanted = (load_file(Path(each.output) / "hf" / "model.safetensors") for each in (config, whole))
    assert ours.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert ours[name].equal(tensor), (name, moments)
    folder = Path(config.output)
    assert not list((folder / "checkpoints").glob(".*")), "left-over folders"
    assert not list(folder.glob(".hf*")), "left-over folders"

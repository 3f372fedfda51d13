"""Building the part of a model that a rank holds: vision tower, the system's bridge, decoder."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any, cast

import torch
from megatron.core.pipeline_parallel.utils import is_pp_first_stage, is_vp_first_stage
from megatron.core.process_groups_config import ProcessGroupCollection

from parrot_sys.megatron.config import Recompute, to_transformer_config
from parrot_sys.megatron.lora import is_merged
from parrot_sys.megatron.model import MultimodalModel
from parrot_sys.megatron.runtime import backends
from parrot_sys.megatron.runtime.initialize import ParallelConfig
from parrot_sys.megatron.vision import build_vision_tower
from parrot_sys.systems.bridge import SystemBridge
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.systems.registry import system_of


def build_model(
    model: ParrotConfig,
    parallel: ParallelConfig | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    recompute: Recompute = "none",
    with_vision_tower: bool = True,
    initialize_weights: bool = True,
    pg_collection: ProcessGroupCollection | None = None,
    vp_stage: int | None = None,
    bypass: Collection[str] = (),
) -> MultimodalModel:
    """Build the part of the model that this rank holds; `initialize` must have been called.

    Args:
        model: sizes and options.
        parallel: layout, as given to `initialize`.
        dtype: of parameters and activations.
        device: where the parameters are; `meta` gives shapes only, in no time and no memory.
        recompute: `full` computes the activations of each decoder layer again in the backward pass.
        with_vision_tower: False when all batches bring cached features.
        initialize_weights: False leaves the decoder's weights uninitialised, for checkpoints.
        pg_collection: process groups; those of `initialize` when not given.
        vp_stage: chunk number under the interleaved pipeline schedule.
        bypass: parts that are kept as they are, and passed by (first stages of training).

    Raises:
        ConfigError: the model cannot be cut as `parallel` asks; a part cannot be passed by.
    """
    system = system_of(model)
    system.check_bypass(bypass)
    parallel = parallel or ParallelConfig()
    device = torch.device(device)
    groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
    config = to_transformer_config(
        model.llm,
        parallel,
        dtype=dtype,
        recompute=recompute,
        initialize_weights=initialize_weights and device.type != "meta",
    )
    first = is_vp_first_stage(vp_stage, parallel.virtual_pipeline_model_parallel_size) and is_pp_first_stage(groups.pp)
    with torch.device("meta" if device.type == "meta" else "cpu"), backends.building_for(device):
        tower = None
        if with_vision_tower and first:
            tower = build_vision_tower(
                model.vision, parallel, dtype=dtype, initialize_weights=config.perform_initialization
            )
        bridge = system.bridge()(model, config, groups, pre_process=first, bypass=bypass)
        some_experts = len({model.llm.has_experts(layer) for layer in range(model.llm.num_layers)}) > 1
        config.hetereogenous_dist_checkpoint = bridge.layers_differ or some_experts  # (Megatron's spelling)
        built = MultimodalModel(
            bridge, config, pg_collection=groups, vision_tower=tower, lora=model.lora, vp_stage=vp_stage
        )
    return built if device.type == "meta" else built.to(device)


def build_chunks(model: ParrotConfig, parallel: ParallelConfig, **settings: Any) -> list[MultimodalModel]:
    """All parts of the model that this rank holds: several under the interleaved pipeline schedule, else one.

    Args:
        model: sizes and options.
        parallel: layout, as given to `initialize`.
        **settings: see `build_model`.
    """
    virtual = parallel.virtual_pipeline_model_parallel_size
    stages = [None] if virtual is None else range(virtual)
    return [build_model(model, parallel, vp_stage=stage, **settings) for stage in stages]


def config_of(model: MultimodalModel) -> ParrotConfig:
    """Configuration of a model that `build_model` built; without LoRA where its updates are merged into the weights."""
    config = cast(SystemBridge, model.bridge).model
    return replace(config, lora=None) if config.lora is not None and is_merged(model) else config

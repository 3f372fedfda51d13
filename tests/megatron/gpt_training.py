"""A tiny token-routed GPT trained as Megatron's users train it, on any layout, with its own experts or with ours."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig

from parrot_sys.megatron.checkpoint.writer import CheckpointWrite
from parrot_sys.megatron.embed.moe_layer import with_grouped_experts
from parrot_sys.megatron.norms import with_norms
from parrot_sys.megatron.runtime.adam import install_adam
from parrot_sys.megatron.runtime.initialize import ParallelConfig, initialize

VOCAB, SEQ, LAYERS, EXPERTS, SAMPLES = 32, 8, 2, 8, 4

ON_CPU: dict[str, Any] = {
    "use_cpu_initialization": True,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "apply_rope_fusion": False,
}
"""Fields of a `TransformerConfig` that a machine without a GPU asks for."""
LLAMA_STYLE: dict[str, Any] = {
    "add_bias_linear": False,
    "gated_linear_unit": True,
    "activation_func": F.silu,
    "normalization": "RMSNorm",
}


LAYOUTS = {
    "ep2": (2, ParallelConfig(expert_model_parallel_size=2)),
    "tp2-etp2": (2, ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)),
    "tp2-ep2": (
        2,
        ParallelConfig(
            tensor_model_parallel_size=2,
            sequence_parallel=True,
            expert_model_parallel_size=2,
            expert_tensor_parallel_size=1,
        ),
    ),
    "ep4": (4, ParallelConfig(expert_model_parallel_size=4)),
    "ep2-dp2": (4, ParallelConfig(expert_model_parallel_size=2)),
    "tp2-ep2-etp2": (
        4,
        ParallelConfig(
            tensor_model_parallel_size=2,
            sequence_parallel=True,
            expert_model_parallel_size=2,
            expert_tensor_parallel_size=2,
        ),
    ),
    "pp2": (2, ParallelConfig(pipeline_model_parallel_size=2)),
    "pp2-ep2": (4, ParallelConfig(pipeline_model_parallel_size=2, expert_model_parallel_size=2)),
}
"""Name -> processes and layout."""


def make_config(parallel: ParallelConfig, **moe: Any) -> TransformerConfig:
    """Sizes of the model, and the settings of its MoE layers."""
    return TransformerConfig(
        num_layers=LAYERS,
        hidden_size=16,
        num_attention_heads=2,
        ffn_hidden_size=20,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        pipeline_dtype=torch.float32,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        **ON_CPU,
        **LLAMA_STYLE,
        # Large router weights, so that the experts of a token are not chosen by rounding.
        init_method_std=0.3,
        **{
            "num_moe_experts": EXPERTS,
            "moe_router_topk": 2,
            "moe_ffn_hidden_size": 12,
            "moe_aux_loss_coeff": 0.0,
            "moe_router_load_balancing_type": "none",
            **moe,
        },
    )


def build(config: TransformerConfig, *, ours: bool) -> GPTModel:
    """Megatron's GPTModel with its own router and SequentialMLP, or with ours."""
    layers = LAYERS // config.pipeline_model_parallel_size
    spec = with_norms(get_gpt_layer_local_spec(num_experts=EXPERTS, normalization="RMSNorm"), layers)
    return GPTModel(
        config=config,
        transformer_layer_spec=with_grouped_experts(spec) if ours else spec,
        vocab_size=VOCAB,
        max_sequence_length=SEQ,
        position_embedding_type="rope",
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )


def save(model: torch.nn.Module, folder: Path, optimizer: Any = None, *, apart: bool = False) -> None:
    """Writes the weights, and the optimizer's state where there is one, with Megatron's distributed checkpoints.

    With `apart` each expert has keys of its own (`singleton_local_shards`).
    """
    folder.mkdir(exist_ok=True)
    CheckpointWrite(folder, _state(model, optimizer, apart, loading=False), copy=False).complete()


def load(model: torch.nn.Module, folder: Path, optimizer: Any = None, *, apart: bool = False) -> None:
    """Reads what `save` wrote, on whatever layout and with whichever experts."""
    state = dist_checkpointing.load(_state(model, optimizer, apart, loading=True), str(folder))
    model.load_state_dict(state["model"])
    if optimizer is not None:
        with torch.no_grad():
            optimizer.load_state_dict(state["optimizer"])


def _state(model: torch.nn.Module, optimizer: Any, apart: bool, *, loading: bool) -> dict[str, Any]:
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    metadata = {
        "dp_cp_group": group,
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": apart,
    }
    state = {"model": model.sharded_state_dict(metadata=metadata)}
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(state["model"], is_loading=loading, metadata=metadata)
    return state


@dataclass
class Run:
    """What three steps gave: losses, the first step's gradients by checkpoint key, where each rank's part lies."""

    losses: list[float] = field(default_factory=list)
    gradients: list[tuple[str, tuple[int, ...], tuple[int, ...], np.ndarray]] = field(default_factory=list)
    expert_bias: dict[int, np.ndarray] = field(default_factory=dict)
    """Number of the layer -> bias."""
    chosen: np.ndarray | None = None


class Trainer:
    """Megatron's data-parallel wrapper, schedule and Adam around a model."""

    def __init__(self, model: GPTModel, *, distributed_optimizer: bool = False, overlap: bool = False) -> None:
        install_adam()
        self.model = model
        self.first_gradients: list[Any] = []
        config = model.config
        settings = DistributedDataParallelConfig(
            use_distributed_optimizer=distributed_optimizer,
            overlap_grad_reduce=overlap,
            bucket_size=500 if overlap else None,
        )
        self.wrapped = DistributedDataParallel(config, settings, model)
        config.no_sync_func = self.wrapped.no_sync if overlap else None
        config.finalize_model_grads_func = finalize_model_grads
        options = OptimizerConfig(
            optimizer="adam", lr=1e-2, weight_decay=0.0, use_distributed_optimizer=distributed_optimizer
        )
        self.optimizer = get_megatron_optimizer(options, [self.wrapped])
        config.grad_scale_func = self.optimizer.scale_loss

    def step(self, number: int) -> float:
        """One step over the same global batch on every layout; the mean loss."""
        rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        generator = torch.Generator().manual_seed(number)
        tokens = torch.randint(0, VOCAB, (SAMPLES, SEQ + 1), generator=generator)
        self.wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        reports = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=iter(tokens.chunk(size)[rank].split(1)),
            model=self.wrapped,
            num_microbatches=SAMPLES // size,
            seq_length=SEQ,
            micro_batch_size=1,
            forward_only=False,
        )
        loss = torch.stack([report["loss"] for report in reports]).mean() if reports else torch.zeros(())
        torch.distributed.all_reduce(loss, group=parallel_state.get_data_parallel_group())
        torch.distributed.all_reduce(loss, group=parallel_state.get_pipeline_model_parallel_group())
        self.first_gradients = gradients(self.model) if number == 0 else self.first_gradients
        self.optimizer.step()
        return float(loss / size)


def _forward_step(data: Iterator[torch.Tensor], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    tokens = next(data)
    mask = torch.triu(torch.ones(SEQ, SEQ, dtype=torch.bool), 1)[None, None]
    output = model(tokens[:, :-1], torch.arange(SEQ)[None], mask, labels=tokens[:, 1:])
    return output, _loss


def _loss(output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return output.mean(), {"loss": output.detach().mean()}


def train(parallel: ParallelConfig, folder: Path, *, ours: bool, steps: int = 3, **moe: Any) -> Run:
    """Loads the weights in `folder` and takes three steps."""
    model = build(make_config(parallel, **moe), ours=ours)
    load(model, folder)
    router = model.decoder.layers[-1].mlp.router
    maps: list[torch.Tensor] = []
    hook = router.register_forward_hook(lambda _, __, output: maps.append(output[1]))
    trainer = Trainer(model)
    run = Run(losses=[trainer.step(number) for number in range(steps)], gradients=trainer.first_gradients)
    hook.remove()
    # The forward passes of the first step.
    run.chosen = torch.cat(maps[: len(maps) // steps]).numpy()
    if router.expert_bias is not None:
        run.expert_bias = {layer.layer_number: layer.mlp.router.expert_bias.numpy() for layer in model.decoder.layers}
    return run


def gradients(model: torch.nn.Module) -> list[tuple[str, tuple[int, ...], tuple[int, ...], np.ndarray]]:
    """(checkpoint key, global shape, offset, values) of this rank's parts of every gradient."""
    by_tensor = {id(p.data): p for p in model.parameters()} | {id(p): p for p in model.parameters()}
    by_address = {p.data_ptr(): p for p in model.parameters()}
    found = []
    for entry in model.sharded_state_dict().values():
        if not isinstance(entry, ShardedTensor | ShardedTensorFactory):
            continue
        parameter = by_tensor.get(id(entry.data), by_address.get(entry.data.data_ptr()))
        if parameter is None:  # a buffer
            continue
        changed = dataclasses.replace(entry, data=parameter.main_grad.view_as(entry.data))
        for piece in changed.build() if isinstance(changed, ShardedTensorFactory) else [changed]:
            # Expert and layer axes that Megatron prepends are not in the data.
            values = piece.data.detach().clone().numpy()
            values = values.reshape((1,) * (len(piece.global_shape) - values.ndim) + values.shape)
            found.append((piece.key, tuple(piece.global_shape), tuple(piece.global_offset), values))
    return found


def assemble(runs: list[Run]) -> dict[str, np.ndarray]:
    """Whole gradients from all ranks' parts; ranks that hold the same part must agree."""
    whole: dict[str, np.ndarray] = {}
    for key, shape, offset, values in (part for run in runs for part in run.gradients):
        target = whole.setdefault(key, np.full(shape, np.nan, dtype=values.dtype))
        region = tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))
        known = target[region]
        if not np.isnan(known).any():
            np.testing.assert_allclose(
                values, known, rtol=0, atol=1e-6 * max(abs(known).max(), 1e-3), err_msg=key, equal_nan=False
            )
        target[region] = values
    assert not [key for key, values in whole.items() if np.isnan(values).any()]
    return whole


def save_in_the_middle(rank: int, size: int, parallel: ParallelConfig, folder: Path, ours: bool) -> list[float]:
    """Losses of four steps; weights and optimizer are saved after the second."""
    initialize(parallel)
    torch.manual_seed(5)
    trainer = Trainer(build(make_config(parallel), ours=ours), distributed_optimizer=True)
    losses = [trainer.step(0), trainer.step(1)]
    save(trainer.model, folder, trainer.optimizer)
    return [*losses, trainer.step(2), trainer.step(3)]


def go_on(rank: int, size: int, parallel: ParallelConfig, folder: Path, ours: bool) -> list[float]:
    """Losses of the third step of what `save_in_the_middle` began, and of the fourth, which needs the optimizer."""
    initialize(parallel)
    trainer = Trainer(build(make_config(parallel), ours=ours), distributed_optimizer=True)
    load(trainer.model, folder, trainer.optimizer)
    return [trainer.step(2), trainer.step(3)]


def on_ranks(rank: int, size: int, parallel: ParallelConfig, folder: Path, moe: dict[str, Any]) -> tuple[Run, Run]:
    """The peer's run and ours, on one rank."""
    initialize(parallel)
    run = functools.partial(train, parallel, folder, **moe)
    return run(ours=False), run(ours=True)

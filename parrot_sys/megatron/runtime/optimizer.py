"""Data-parallel wrapping and the optimizer: Megatron's gradient buffers and Adam, a learning rate for each part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, ParamKey, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MixedPrecisionOptimizer
from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate

from parrot_sys.megatron.model import MultimodalModel
from parrot_sys.megatron.runtime.adam import install_adam


def wrap_data_parallel(
    chunks: Sequence[MultimodalModel], *, distributed_optimizer: bool = False, overlap: bool = False
) -> list[DistributedDataParallel]:
    """The parts of the model with gradient buffers for their trainable parameters; frozen ones get none.

    Gradients are SUMMED over the data-parallel ranks: the loss has to be divided by a count over all of them
    (`calculate_per_token_loss` is Megatron's name for that).

    Args:
        chunks: from `build_chunks`, with their final `requires_grad` flags.
        distributed_optimizer: the optimizer's state will be split over the data-parallel ranks.
        overlap: reduce a bucket of gradients while the rest of the backward pass runs; on the CPU both would fight for
            the same cores.
    """
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap,
        use_distributed_optimizer=distributed_optimizer,
    )
    wrapped = []
    for index, model in enumerate(chunks):
        model.config.calculate_per_token_loss = True
        # Only the first chunk's gradients are reduced while later ones are computed (Megatron's own training does so).
        wrapped.append(DistributedDataParallel(model.config, settings, model, disable_bucketing=index > 0))
    # The schedules read these from the first chunk.
    config = chunks[0].config
    config.finalize_model_grads_func = _finalize
    no_sync = [chunk.no_sync for chunk in wrapped]
    config.no_sync_func = (no_sync if len(no_sync) > 1 else no_sync[0]) if overlap else None
    return wrapped


def _finalize(model: list[Any], num_tokens: torch.Tensor | None = None, **kwargs: Any) -> None:
    # The loss is already divided by the labels of the whole step: Megatron must not scale the buffers once more.
    finalize_model_grads(model, None, **kwargs)


def build_optimizer(
    chunks: Sequence[DistributedDataParallel],
    *,
    lr: float,
    min_lr: float = 0.0,
    part_lrs: Mapping[str, float] | None = None,
    part_of: Callable[[str], str] = lambda name: "",
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    clip_grad: float = 1.0,
) -> MegatronOptimizer:
    """AdamW over the trainable parameters; every group carries `max_lr` and `min_lr` for the schedule.

    Args:
        chunks: from `wrap_data_parallel`.
        lr: peak learning rate.
        min_lr: final learning rate.
        part_lrs: part of the model -> its own peak.
        part_of: name of a parameter of the model -> its part.
        weight_decay: decoupled; biases and one-dimensional parameters never decay.
        betas: decay rates of the averages.
        eps: Adam's epsilon.
        clip_grad: largest norm of all gradients together; 0 does not clip.
    """
    install_adam()
    dtype = chunks[0].config.params_dtype
    config = OptimizerConfig(
        optimizer="adam",
        lr=lr,
        min_lr=min_lr,
        weight_decay=weight_decay,
        adam_beta1=betas[0],
        adam_beta2=betas[1],
        adam_eps=eps,
        clip_grad=clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=chunks[0].ddp_config.use_distributed_optimizer,
    )
    overrides: dict[Any, Any] = {_no_decay_key(): {"wd_mult": 0.0}}
    for part, peak in (part_lrs or {}).items():
        # `lr_mult` has no effect on our schedule; Megatron tells groups apart by it when it loads a checkpoint.
        overrides[_part_key(part, part_of)] = {"max_lr": peak, "min_lr": min_lr, "lr_mult": peak / lr}
    optimizer = get_megatron_optimizer(config, list(chunks), config_overrides=overrides)
    for group in optimizer.param_groups:
        group["weight_decay"] = weight_decay * group["wd_mult"]
    _gather_parameters_once(optimizer)
    return optimizer


def _gather_parameters_once(optimizer: MegatronOptimizer) -> None:
    """Leaves the gathering of updated parameters to the last of the chained optimizers.

    Each would gather those of all of them, once too often where experts have an optimizer of their own
    (github.com/NVIDIA/Megatron-LM/issues/1527).
    """
    for part in getattr(optimizer, "chained_optimizers", [])[:-1]:
        if isinstance(part, DistributedOptimizer):
            # What DistributedOptimizer adds to it is the gathering.
            part.step_with_ready_grads = partial(MixedPrecisionOptimizer.step_with_ready_grads, part)


def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """Norm of all gradients that the next `optimizer.step()` will use, over all ranks; nothing is clipped or updated.

    Megatron computes it again in that step: gradients are read twice, so that a bad one can be left out.
    """
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


def applied_lr(optimizer: MegatronOptimizer, max_lr: float) -> float | None:
    """Learning rate of the last step of the groups with this peak; None on a rank that has no such group."""
    return next((group["lr"] for group in optimizer.param_groups if group["max_lr"] == max_lr), None)


def _no_decay_key() -> ParamKey:
    return ParamKey(
        with_name_predicate=ParamWithNamePredicate(
            name="no_decay", fn=lambda parameter, name: parameter.dim() == 1 or name.endswith(".bias")
        )
    )


def _part_key(part: str, part_of: Callable[[str], str]) -> ParamKey:
    def belongs(_: Any, name: str) -> bool:
        return part_of(name.removeprefix("module.")) == part

    return ParamKey(with_name_predicate=ParamWithNamePredicate(name=part, fn=belongs))


def data_parallel_group() -> torch.distributed.ProcessGroup:
    """Ranks that hold copies of this rank's part of the model and see other samples."""
    return parallel_state.get_data_parallel_group()


def data_parallel_rank() -> int:
    """Number of this rank among them."""
    return parallel_state.get_data_parallel_rank()


def data_parallel_world_size() -> int:
    """Number of these ranks."""
    return parallel_state.get_data_parallel_world_size()


def replica_group() -> torch.distributed.ProcessGroup:
    """Ranks that hold copies of this rank's part of the model, whatever rows they see: data and context parallel.

    Gradients, losses and counts are summed over them.
    """
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def sees_samples_first() -> bool:
    """Whether this rank is the first of those that share its samples: one in each data-parallel rank."""
    return (
        tensor_parallel_rank() == 0
        and parallel_state.get_context_parallel_rank() == 0
        and parallel_state.get_pipeline_model_parallel_rank() == 0
    )


def tensor_parallel_rank() -> int:
    """Number of this rank among those that share its samples."""
    return parallel_state.get_tensor_model_parallel_rank()

"""Model, optimizer and random state in Megatron's distributed checkpoints (`torch_dist`), which load on any layout."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor

from parrot_sys.errors import CheckpointError
from parrot_sys.megatron.checkpoint.checksums import verify_checksums
from parrot_sys.megatron.checkpoint.optimizer_state import groups_of, use_saved_keys, with_saved_step
from parrot_sys.megatron.checkpoint.reader import load_common, load_sharded, tensors_of
from parrot_sys.megatron.checkpoint.writer import CheckpointWrite
from parrot_sys.megatron.model import MultimodalModel
from parrot_sys.models.checkpoint_files import check_whole

_MODEL = "model"
_OPTIMIZER = "optimizer"
_WANTED = "wanted_optimizer"
_RANDOM = "random"
_COMMON = "common"
_LAYOUT = "layout"


def begin_save(
    folder: str | Path,
    chunks: Sequence[MultimodalModel],
    optimizer: MegatronOptimizer | None,
    common: dict[str, Any],
    *,
    copy: bool = False,
) -> CheckpointWrite:
    """Starts to write one checkpoint into the existing, empty `folder`; every rank calls it with the same `common`.

    Args:
        folder: seen by every rank.
        chunks: the parts of the model on this rank, without their data-parallel wrappers.
        optimizer: saved with its state when given.
        common: numbers, strings, lists and dicts that are the same on all ranks.
        copy: write from a copy in host memory; otherwise nothing may change until the writer is done.

    Returns:
        The write, which its `complete` ends: until then the folder is no checkpoint.
    """
    state = _sharded_model(chunks)
    if optimizer is not None:
        state[_OPTIMIZER] = optimizer.sharded_state_dict(state[_MODEL], metadata=_metadata())
        state[_RANDOM] = _sharded_random()
    state[_COMMON], state[_LAYOUT] = common, _layout()
    return CheckpointWrite(Path(folder), state, copy=copy)


def save_distributed(
    folder: str | Path, chunks: Sequence[MultimodalModel], optimizer: MegatronOptimizer | None, common: dict[str, Any]
) -> None:
    """Writes one checkpoint to its end; arguments as in `begin_save`.

    Raises:
        CheckpointWriteError: it could not be written; the folder is gone.
    """
    begin_save(folder, chunks, optimizer, common).complete()


def load_model_weights(folder: str | Path, chunks: Sequence[MultimodalModel], *, verify: bool = True) -> dict[str, Any]:
    """Loads the weights of a checkpoint into the parts of a model on this rank and returns its `common`.

    LoRA keeps its initial values when the checkpoint has none.

    Args:
        folder: the checkpoint.
        chunks: to be filled.
        verify: compare the files with their checksums first.

    Raises:
        CheckpointError: names the files that are damaged, or the keys that are missing or have another shape.
    """
    check_whole(folder)
    if verify:
        verify_checksums(folder)
    state = _sharded_model(chunks)
    if not _has_lora(tensors_of(folder)):
        for name, tensors in state[_MODEL].items():
            state[_MODEL][name] = {key: tensor for key, tensor in tensors.items() if not _has_lora((key,))}
    _check_tensors(folder, state[_MODEL])
    dict_list_map_inplace(lambda part: _in_place(part) if isinstance(part, ShardedTensorFactory) else part, state)
    loaded = load_sharded(state, folder)
    _load_chunks(chunks, loaded)
    return loaded[_COMMON]


def _in_place(factory: ShardedTensorFactory) -> ShardedTensorFactory:
    """Parts that were read into the tensor of which they are views are not joined in a copy."""
    whole = factory.data

    def merge(parts: Any) -> Any:
        tensors = parts.values() if isinstance(parts, dict) else parts
        storage = whole.untyped_storage().data_ptr()
        if all(isinstance(part, Tensor) and part.untyped_storage().data_ptr() == storage for part in tensors):
            return whole.detach()
        return factory.merge_fn(parts)

    return replace(factory, merge_fn=merge)


def load_training_state(
    folder: str | Path, chunks: Sequence[MultimodalModel], optimizer: MegatronOptimizer
) -> dict[str, Any]:
    """Loads weights, optimizer and, on the layout that saved it, the random state; returns `common`.

    The files are taken as they are: `verify_checksums` is the caller's to call, who may have another checkpoint.

    Raises:
        CheckpointError: the checkpoint was made with other shapes or other trainable parts.
    """
    state = _sharded_model(chunks)
    _check_tensors(folder, state[_MODEL])
    wanted = optimizer.sharded_state_dict(state[_MODEL], is_loading=True, metadata=_metadata())
    use_saved_keys(wanted, tensors_of(folder))
    _check_tensors(folder, wanted, hint="; resume with the trainable parts it was saved with")
    # Under another name than it was saved with: what is not a tensor stays apart, and finds its place below.
    state[_WANTED] = wanted
    # Elsewhere each rank keeps the state it started with: tensor-parallel ranks must draw alike.
    if same_ranks := load_common(folder).get(_LAYOUT) == _layout():
        state[_RANDOM] = _sharded_random()
    loaded = load_sharded(state, folder)
    _load_chunks(chunks, loaded)
    # The state is copied into leaves that require gradients.
    with torch.no_grad():
        optimizer.load_state_dict(with_saved_step(wanted, loaded[_WANTED], groups_of(loaded[_OPTIMIZER])))
    if same_ranks:
        _set_random_state(loaded[_RANDOM])
    return loaded[_COMMON]


def _layout() -> dict[str, int]:
    """Which parts ranks have; equal where each rank does what the rank of its number did."""
    state = parallel_state
    return {
        "world_size": dist.get_world_size(),
        "tensor": state.get_tensor_model_parallel_world_size(),
        "pipeline": state.get_pipeline_model_parallel_world_size(),
        "virtual": state.get_virtual_pipeline_model_parallel_world_size() or 1,
        "context": state.get_context_parallel_world_size(),
        "expert": state.get_expert_model_parallel_world_size(),
        "expert_tensor": state.get_expert_tensor_parallel_world_size(),
    }


def read_progress(folder: str | Path) -> dict[str, Any]:
    """The `common` that a checkpoint was saved with, without its tensors."""
    return dict(load_common(folder)[_COMMON])


def _metadata() -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _sharded_model(chunks: Sequence[MultimodalModel]) -> dict[str, Any]:
    return {_MODEL: {f"chunk{i}": chunk.sharded_state_dict(metadata=_metadata()) for i, chunk in enumerate(chunks)}}


def _load_chunks(chunks: Sequence[MultimodalModel], loaded: dict[str, Any]) -> None:
    for i, chunk in enumerate(chunks):
        own = {key: tensor for key, tensor in chunk.state_dict().items() if _has_lora((key,))}
        chunk.load_state_dict(own | loaded[_MODEL][f"chunk{i}"])


def _has_lora(names: Iterable[str]) -> bool:
    return any(".lora." in name for name in names)


def _sharded_random() -> ShardedObject:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    return ShardedObject("random_state", _random_state(), (world_size,), (rank,), replica_id=0)


def _random_state() -> dict[str, Any]:
    """Every generator's state in tensors and plain values, which load without unpickling code."""
    version, values, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": (version, torch.tensor(values), gauss),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "megatron": dict(get_cuda_rng_tracker().get_states()),
    }


def _set_random_state(state: dict[str, Any]) -> None:
    version, values, gauss = state["python"]
    random.setstate((version, tuple(values.tolist()), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["megatron"])


def _check_tensors(folder: str | Path, wanted: Any, hint: str = "") -> None:
    """Compares names and shapes before Megatron does, whose messages do not list them."""
    saved = tensors_of(folder)
    missing, other_shape, tensors = set(), set(), _sharded_tensors(wanted)
    if _has_lora(saved) and not _has_lora(tensor.key for tensor in tensors):
        raise CheckpointError(
            f"{folder} has LoRA, the model has none: set model.lora as its model_config.yaml does, or merge it first "
            "(parrot convert --merge-lora)"
        )
    for tensor in tensors:
        if tensor.key not in saved:
            missing.add(tensor.key)
        elif tuple(saved[tensor.key].global_shape) != tuple(tensor.global_shape):
            shapes = f"{tuple(saved[tensor.key].global_shape)}, the model wants {tuple(tensor.global_shape)}"
            other_shape.add(f"{tensor.key} has {shapes}")
    if missing or other_shape:
        lists = "; ".join(
            f"{title}: {', '.join(sorted(keys))}"
            for title, keys in (("missing", missing), ("other shape", other_shape))
            if keys
        )
        raise CheckpointError(f"{folder} does not fit the model: {lists}{hint}")


def _sharded_tensors(state: Any) -> list[ShardedTensor]:
    if isinstance(state, ShardedTensorFactory):
        return _sharded_tensors(state.build())
    if isinstance(state, ShardedTensor):
        return [state]
    if isinstance(state, dict):
        return [tensor for value in state.values() for tensor in _sharded_tensors(value)]
    if isinstance(state, list | tuple):
        return [tensor for value in state for tensor in _sharded_tensors(value)]
    return []

"""Whole tensors and the (possibly sharded) parameters of a MultimodalModel that they make up."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from parrot_sys import platform
from parrot_sys.errors import CheckpointError
from parrot_sys.megatron.checkpoint.reader import tensors_of
from parrot_sys.megatron.model import MultimodalModel
from parrot_sys.models.efficientnet import EfficientNetLite0
from parrot_sys.models.finite import NonFinite
from parrot_sys.models.tensor_files import TensorFiles
from parrot_sys.models.tensor_map import TensorMap, check_tensors, single
from parrot_sys.models.tower_maps import VISION_MODEL, is_passed_over, tower_maps
from parrot_sys.parallel import ExpertGroups
from parrot_sys.towers import VisionConfig

_LAYER = re.compile(r"^decoder\.decoder\.layers\.(\d+)\.")


def model_tensors(model: MultimodalModel) -> dict[str, Tensor]:
    """Parameters and buffers that this rank holds, with decoder layers numbered over the whole model."""
    offset = model.decoder.decoder.layers[0].layer_number - 1 if len(model.decoder.decoder.layers) else 0
    tensors = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        tensors[_LAYER.sub(lambda found: f"decoder.decoder.layers.{int(found[1]) + offset}.", name)] = tensor
    shared = tensors.pop("decoder.output_layer.weight", None) if model.share_embeddings_and_output_weights else None
    if shared is not None:  # a last pipeline stage holds its own copy of the tied embedding
        tensors.setdefault("decoder.embedding.word_embeddings.weight", shared)
    return tensors


def local_experts(entry: TensorMap, rank: int, size: int) -> TensorMap:
    """The part of an expert tensor that expert-parallel rank `rank` of `size` holds, all inner columns."""
    count = len(entry.keys) // size
    mine = slice(rank * count, (rank + 1) * count)
    return replace(entry, keys=entry.keys[mine], shapes=entry.shapes[mine])


def _cut_dim(whole: Sequence[int], part: Sequence[int]) -> int | None:
    """Dimension in which a tensor is cut over ranks; Megatron's own marks are missing on uninitialised parameters."""
    return next((dim for dim, (all_rows, rows) in enumerate(zip(whole, part, strict=True)) if all_rows != rows), None)


def local_part(entry: TensorMap, whole: Tensor, shape: Sequence[int], *, rank: int, size: int) -> Tensor:
    """The part of a whole tensor of the model that tensor-parallel rank `rank` of `size` holds, in this shape."""
    dim = _cut_dim(whole.shape, shape)
    if dim is None:
        return whole
    halves = whole.chunk(2) if entry.gated else (whole,)
    return torch.cat([half.chunk(size, dim)[rank] for half in halves])


def whole_tensor(entry: TensorMap, part: Tensor, group: ProcessGroup) -> Tensor:
    """The reverse of `local_part`, on every rank of the tensor-parallel group.

    Args:
        entry: what the tensor is made of.
        part: a parameter of this rank, or its gradient.
        group: tensor-parallel group; all of its ranks call this.
    """
    dim = _cut_dim(entry.pack([torch.empty(shape, device="meta") for shape in entry.shapes]).shape, part.shape)
    if dim is None:
        return part
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group=group)
    if not entry.gated:
        return torch.cat(parts, dim)
    return torch.cat([torch.cat(halves, dim) for halves in zip(*(each.chunk(2) for each in parts), strict=True)])


_COPIED_BYTES = 16 * 2**20
"""Bytes of the model copied from a checkpoint at once."""


def fill(
    targets: dict[str, Tensor],
    maps: Iterable[TensorMap],
    read: Callable[[str], Tensor],
    *,
    rank: int = 0,
    size: int = 1,
    non_finite: NonFinite | None = None,
) -> None:
    """Copy released tensors into those of `targets` that `maps` names, one at a time, casting to the target's dtype.

    The largest come first: then the least of the model is in memory beside the copies that packing a tensor makes.

    Args:
        targets: tensors of the model by name, whole or this rank's parts.
        maps: what each is made of.
        read: released name -> tensor; called again for each part of a large one.
        rank: of this process among those that share tensors.
        size: how many they are.
        non_finite: counts values that are no numbers, as they are in the model.
    """
    found = NonFinite() if non_finite is None else non_finite
    with torch.no_grad():
        for entry in sorted(maps, key=_num_values, reverse=True):
            if (target := targets.get(entry.name)) is None:
                continue
            if entry.pack is single and tuple(target.shape) == tuple(entry.shapes[0]):
                _copy(target, entry.keys[0], read, found)
                continue
            parts = []
            for key in entry.keys:
                parts.append(read(key).to(target.dtype))
                found.look(key, parts[-1])
            target.copy_(local_part(entry, entry.pack(parts), target.shape, rank=rank, size=size))


def _num_values(entry: TensorMap) -> int:
    return sum(math.prod(shape) for shape in entry.shapes)


def _copy(target: Tensor, key: str, read: Callable[[str], Tensor], found: NonFinite) -> None:
    """A tensor that is the same in both, some rows at a time."""
    rows = max(1, _COPIED_BYTES * len(target) // max(1, target.nbytes)) if target.dim() else 1
    for start in range(0, len(target) if target.dim() else 1, rows):
        here = slice(start, start + rows) if target.dim() else ...
        target[here].copy_(read(key)[here])
        found.look(key, target[here])


def fill_experts(
    targets: Mapping[str, Tensor],
    entry: TensorMap,
    read: Callable[[str], Tensor],
    groups: ExpertGroups,
    non_finite: NonFinite,
) -> None:
    """This rank's experts, which are one tensor of the model, one expert after the other."""
    if (held := targets.get(entry.name)) is None:
        return
    for number in range(len(held)):
        one = local_experts(entry, groups.ep_rank * len(held) + number, groups.ep_size * len(held))
        own = {entry.name: held.detach()[number : number + 1]}
        fill(own, [one], read, rank=groups.etp_rank, size=groups.etp_size, non_finite=non_finite)


def refuse_non_finite(chunks: Sequence[MultimodalModel], where: object, *, allow: bool = False) -> None:
    """Looks at the weights that were loaded into the parts of a model on this rank; every rank calls this.

    Raises:
        CheckpointError: some are NaN or infinite, and these are not allowed; names their tensors.
    """
    found = NonFinite()
    for chunk in chunks:
        for name, tensor in model_tensors(chunk).items():
            found.look(name, tensor)
    refuse(found, where, allow=allow)


def refuse(found: NonFinite, where: object, *, allow: bool) -> None:
    """Refuses weights that are no numbers, on every rank, whichever of them holds the tensors.

    Raises:
        CheckpointError: there are some, and these are not allowed; names their tensors.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        counts: list[dict[str, int]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(counts, found.counts)
        found.merge(counts)
    found.refuse(where, allow=allow)


def stored_dtype(directory: str | Path) -> torch.dtype:
    """Type of the weights in a training checkpoint."""
    saved = tensors_of(directory)
    dtype: torch.dtype = saved["decoder.embedding.word_embeddings.weight"].dtype
    return dtype


def load_tower(
    tower: nn.Module,
    config: VisionConfig,
    directory: Path | None = None,
    *,
    rank: int = 0,
    size: int = 1,
    non_finite: NonFinite | None = None,
) -> None:
    """Fill a vision tower from `directory`, else from `config.path`, else (EfficientNet) from its Python package.

    Args:
        tower: to be filled.
        config: its sizes.
        directory: its checkpoint.
        rank: of this process among those that share tensors.
        size: how many they are.
        non_finite: counts weights that are no numbers, for the caller to judge; they are an error when not given.

    Raises:
        CheckpointError: the weights are nowhere, or do not fit.
    """
    source = directory or (Path(config.path) if config.path else None)
    if source is None:
        if not isinstance(tower, EfficientNetLite0):
            raise CheckpointError(
                f"no weights for the vision tower ({config.type}): set model.vision.path to the directory of its "
                "Hugging Face checkpoint"
            )
        tower.load_state_dict(EfficientNetLite0.from_package().state_dict())
        return
    with TensorFiles(source) as files:
        # The vision half of a whole CLIP has the same names after the same prefix; newer files have none.
        prefix = VISION_MODEL if any(key.startswith(VISION_MODEL) for key in files.names()) else ""
        maps = tower_maps(config, key_prefix=prefix)
        held = {
            key: files.shape(key)
            for key in files.names()
            if key.startswith(prefix) and not is_passed_over(key.removeprefix(prefix), config)
        }
        check_tensors(maps, held, str(source))
        found = NonFinite() if non_finite is None else non_finite
        tensors = dict([*tower.named_parameters(), *tower.named_buffers()])
        fill(tensors, maps, files.tensor, rank=rank, size=size, non_finite=found)
    if non_finite is None:
        found.refuse(source)


def tower_tensors(model: MultimodalModel) -> dict[str, Tensor]:
    """Whole weights of the vision tower, by name; every tensor-parallel rank of the first pipeline stage calls this."""
    tower = model.vision_tower
    if tower is None:
        return {}
    parts = dict([*tower.named_parameters(), *tower.named_buffers()])
    maps = tower_maps(model.bridge.vision)
    return {entry.name: whole_tensor(entry, parts[entry.name].detach(), model.tp_group) for entry in maps}


def whole_tensors(
    chunks: Sequence[MultimodalModel],
    maps: Iterable[TensorMap],
    value: Callable[[Tensor], Tensor | None] = lambda tensor: tensor,
) -> Iterator[tuple[str, Tensor]]:
    """(released name, whole tensor) one after the other; every rank that holds a part of this copy must iterate.

    Args:
        chunks: the parts of the model that this rank holds.
        maps: what is wanted; tensors that the model does not have are left out.
        value: what to take for each parameter or buffer, such as its gradient; None leaves it out.
    """
    groups = chunks[0].pg_collection
    parts = {}
    for chunk in chunks:
        for name, tensor in model_tensors(chunk).items():
            if (part := value(tensor)) is not None:
                parts[name] = part.detach()
    owners = _owners(parts, groups.pp)
    for entry in maps:
        if entry.name in owners:
            for each, whole in _gathered(entry, parts.get(entry.name), groups):
                yield from zip(each.keys, each.unpack(_from_stage(each, whole, owners, groups.pp)), strict=True)


def _gathered(
    entry: TensorMap, part: Tensor | None, groups: ProcessGroupCollection
) -> Iterator[tuple[TensorMap, Tensor | None]]:
    """The whole tensor from a stage's ranks, None on other stages; experts come in parts, so that no rank holds all."""
    if not entry.experts:
        yield entry, None if part is None else whole_tensor(entry, part, groups.tp)
        return
    ranks = [local_experts(entry, rank, groups.ep.size()) for rank in range(groups.ep.size())]
    if part is not None:
        part = whole_tensor(ranks[groups.ep.rank()], part, groups.expt_tp)
    for rank, each in enumerate(ranks):
        experts = part
        if part is not None and len(ranks) > 1:
            experts = part.clone() if rank == groups.ep.rank() else torch.empty_like(part)
            dist.broadcast(experts, group=groups.ep, group_src=rank)
        yield each, experts


def _owners(parts: Mapping[str, Tensor], stages: ProcessGroup) -> dict[str, tuple[int, torch.dtype]]:
    """For each tensor the first pipeline stage that holds it, and its dtype."""
    names: list[dict[str, torch.dtype]] = [{} for _ in range(stages.size())]
    own = {name: part.dtype for name, part in parts.items()}
    if stages.size() == 1:
        names = [own]
    else:
        dist.all_gather_object(names, own, group=stages)
    owners: dict[str, tuple[int, torch.dtype]] = {}
    for stage, held in enumerate(names):
        for name, dtype in held.items():
            owners.setdefault(name, (stage, dtype))
    return owners


def _from_stage(
    entry: TensorMap, whole: Tensor | None, owners: Mapping[str, tuple[int, torch.dtype]], stages: ProcessGroup
) -> Tensor:
    """The tensor as its owner has it, on every pipeline stage."""
    if stages.size() == 1:
        assert whole is not None, "the only stage holds every tensor"
        return whole
    stage, dtype = owners[entry.name]
    if stages.rank() == stage:
        assert whole is not None, "the owner holds the tensor"
        tensor = whole.contiguous()
    else:
        shape = entry.pack([torch.empty(shape, device="meta") for shape in entry.shapes]).shape
        tensor = torch.empty(shape, dtype=dtype, device=platform.device())
    dist.broadcast(tensor, group=stages, group_src=stage)
    return tensor

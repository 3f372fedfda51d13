"""TensorMap: one tensor of the model and the released tensors it is made of; the ways to pack them, in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from parrot_sys.errors import CheckpointError

Shape = tuple[int, ...]
Pack = Callable[[Sequence[Tensor]], Tensor]
"""Released tensors of one tensor of the model -> that tensor."""
Unpack = Callable[[Tensor], Sequence[Tensor]]
"""The reverse."""


def single(tensors: Sequence[Tensor]) -> Tensor:
    """The one tensor, as it is."""
    return tensors[0]


def alone(tensor: Tensor) -> list[Tensor]:
    """The reverse of `single`."""
    return [tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorMap:
    """One tensor of the model, whole (before any sharding), and the released tensors it is made of."""

    name: str
    """Name in the model; layers are numbered over the whole model."""
    keys: tuple[str, ...]
    shapes: tuple[Shape, ...]
    """Shape of each released tensor."""
    pack: Pack = single
    """Released tensors, in the order of `keys`, to the model's."""
    unpack: Unpack = alone
    """The reverse."""
    gated: bool = False
    """The two halves of dimension 0 are sharded each by itself (SwiGLU's gate and up)."""
    experts: bool = False
    """Dimension 0 counts experts, which groups of ranks of their own share."""


def pack_qkv(tensors: Sequence[Tensor], *, groups: int) -> Tensor:
    """[q rows, ...], [k rows, ...], [v rows, ...] -> one tensor, for each query group its q rows, then k, then v."""
    return torch.cat([t.reshape(groups, -1, *t.shape[1:]) for t in tensors], dim=1).flatten(0, 1)


def unpack_qkv(tensor: Tensor, *, groups: int, rows: Sequence[int]) -> list[Tensor]:
    """The reverse of `pack_qkv`; `rows` counts the rows of q, k and v."""
    grouped = tensor.reshape(groups, -1, *tensor.shape[1:])
    return [part.flatten(0, 1) for part in grouped.split([count // groups for count in rows], dim=1)]


def pack_rows(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of equal shape, one after the other along dimension 0."""
    return torch.cat(list(tensors))


def unpack_rows(tensor: Tensor, *, count: int) -> list[Tensor]:
    """The reverse of `pack_rows`."""
    return list(tensor.chunk(count))


def copied(name: str, key: str, *shape: int) -> TensorMap:
    """A tensor that is the same in both."""
    return TensorMap(name=name, keys=(key,), shapes=(shape,))


def reshaped(name: str, key: str, *shape: int, axes: int) -> TensorMap:
    """A tensor that has `axes` more leading axes of length 1 in the checkpoint."""
    released = (1,) * axes + shape
    return TensorMap(
        name=name,
        keys=(key,),
        shapes=(released,),
        pack=lambda tensors: tensors[0].reshape(shape),
        unpack=lambda tensor: [tensor.reshape(released)],
    )


def norm_maps(name: str, key: str, size: int) -> list[TensorMap]:
    """Weight and bias of a LayerNorm."""
    return [copied(f"{name}.{kind}", f"{key}.{kind}", size) for kind in ("weight", "bias")]


def qkv_map(
    name: str, projections: Sequence[str], kind: str, rows: Sequence[int], groups: int, *rest: int
) -> TensorMap:
    """The q, k and v projections of a layer (their released names), which Megatron keeps in one tensor."""
    return TensorMap(
        name=f"{name}.{kind}",
        keys=tuple(f"{projection}.{kind}" for projection in projections),
        shapes=tuple((count, *rest) for count in rows),
        pack=partial(pack_qkv, groups=groups),
        unpack=partial(unpack_qkv, groups=groups, rows=tuple(rows)),
    )


def check_tensors(maps: Iterable[TensorMap], found: Mapping[str, Shape], where: str) -> None:
    """Compare what the model needs with what a checkpoint holds.

    Raises:
        CheckpointError: lists every missing, unexpected and mis-shaped tensor by name.
    """
    wanted = {key: shape for entry in maps for key, shape in zip(entry.keys, entry.shapes, strict=True)}
    missing = [f"  {key} {list(wanted[key])}" for key in sorted(wanted.keys() - found.keys())]
    unexpected = [f"  {key} {list(found[key])}" for key in sorted(found.keys() - wanted.keys())]
    misshaped = [
        f"  {key}: wanted {list(wanted[key])}, got {list(found[key])}"
        for key in sorted(wanted.keys() & found.keys())
        if tuple(wanted[key]) != tuple(found[key])
    ]
    lists = (("missing", missing), ("unexpected", unexpected), ("with another shape", misshaped))
    if any(names for _, names in lists):
        report = "\n".join(f"{len(names)} {what}:\n" + "\n".join(names) for what, names in lists if names)
        raise CheckpointError(f"{where} does not fit the model that its config.json describes.\n{report}")

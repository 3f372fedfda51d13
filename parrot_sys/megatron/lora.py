"""LoRA on Megatron's tensor-parallel linear layers, whichever back end they come from.

A fused layer (query, key and value; gate and up) gets one update for each released projection that is a target. T rows,
r rank. The collectives move r-wide rows only:

* column-parallel: `a` is whole on each rank, `b` is cut along its rows. Under sequence parallelism each rank multiplies
  its own rows by `a`, and the r-wide results are gathered.
* row-parallel: `a` is cut along its columns, `b` is whole. The r-wide partial sums are reduced (or reduce-scattered)
  before `b`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, cast

import torch
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from parrot_sys.errors import ConfigError
from parrot_sys.modules.lora import LoRA, LoRAConfig, interleave

QKV = ("q_proj", "k_proj", "v_proj")


def with_lora(
    linear: type[nn.Module],
    lora: LoRAConfig | None,
    projections: Sequence[str],
    *,
    row_parallel: bool = False,
) -> type[nn.Module] | ModuleSpec:
    """The entry of a layer spec in place of `linear`: itself, or with LoRA where the configuration wants it.

    Args:
        linear: column- or row-parallel linear layer (Megatron-Core's or Transformer Engine's).
        lora: settings; None leaves the layer as it is.
        projections: released names of what the layer computes, in its order; `QKV` lie query group by query group.
        row_parallel: whether `linear` is.
    """
    if lora is None or not set(projections) & set(lora.targets):
        return linear
    settings = {"lora": lora, "projections": tuple(projections), "row_parallel": row_parallel}
    mixed: type[nn.Module] = _class_with_lora(linear)  # type: ignore[arg-type] # a class can be hashed
    return ModuleSpec(module=mixed, params=settings)


@cache
def _class_with_lora(linear: Any) -> type[nn.Module]:
    return type(f"{linear.__name__}WithLoRA", (_WithLoRA, linear), {})


class _WithLoRA(nn.Module):
    """Mixed into a tensor-parallel linear layer: the layer keeps its names, the update lies below `lora`."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        lora: LoRAConfig,
        projections: tuple[str, ...],
        row_parallel: bool,
        tp_group: ProcessGroup | None = None,
        **settings: Any,
    ) -> None:
        if settings.get("gather_output") or settings.get("is_expert"):
            raise ConfigError(f"LoRA is for linear layers without gathered output and outside experts, got {settings}")
        super().__init__(input_size, output_size, config=config, tp_group=tp_group, **settings)
        self.lora = ParallelLoRA(
            lora,
            input_size,
            _widths(projections, output_size, config),
            groups=config.num_query_groups if projections == QKV else 1,
            config=config,
            group=tp_group or get_tensor_model_parallel_group(),
            row_parallel=row_parallel,
        )

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rows -> (rows, bias that is not yet added), as the layer itself gives them."""
        output, bias = super().forward(input_)
        return (output if self.lora.merged else output + self.lora(input_)), bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The layer's own parameters and those of the update, each with its place in the whole."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc] # the linear layer's
        own = {name: value for name, value in state.items() if not name.startswith(f"{prefix}lora.")}
        return own | self.lora.sharded_state_dict(f"{prefix}lora.", sharded_offsets, metadata)


def _widths(projections: tuple[str, ...], output_size: int, config: TransformerConfig) -> dict[str, int]:
    """Projection -> width of its output."""
    if projections != QKV:
        return dict.fromkeys(projections, output_size // len(projections))
    key_value = config.num_query_groups * config.kv_channels
    return {"q_proj": output_size - 2 * key_value, "k_proj": key_value, "v_proj": key_value}


class ParallelLoRA(nn.Module):
    """The updates of one linear layer, cut over the tensor-parallel ranks as the layer is."""

    def __init__(
        self,
        lora: LoRAConfig,
        input_size: int,
        widths: dict[str, int],
        *,
        groups: int,
        config: TransformerConfig,
        group: ProcessGroup,
        row_parallel: bool,
    ) -> None:
        """
        Args:
            lora: settings.
            input_size: width of the layer's input over all ranks.
            widths: projection -> width of its output over all ranks.
            groups: see `interleave`, over all ranks.
            config: gives dtype and sequence parallelism.
            group: tensor-parallel ranks.
            row_parallel: whether the layer is.
        """
        super().__init__()
        self.lora, self.group = lora, group
        self.row_parallel = row_parallel
        self.sequence_parallel = config.sequence_parallel
        self.merged = False
        self.kept: Tensor | None = None
        """The layer's weight from before it was merged, in host memory."""
        parts = 1 if row_parallel else group.size()
        self.groups = groups if groups == 1 else groups // parts
        self.widths = {name: width // parts for name, width in widths.items()}
        self.projections = nn.ModuleDict()
        for name, width in widths.items():
            if name in lora.targets:
                self.projections[attribute_name(name)] = self._cut(
                    LoRA(lora, input_size, width, dtype=config.params_dtype)
                )

    def _cut(self, whole: LoRA) -> LoRA:
        """Keeps this rank's part of a new update, so that its first weights do not depend on the layout."""
        rank, size = self.group.rank(), self.group.size()
        if self.row_parallel:
            whole.a = nn.Parameter(whole.a.detach().chunk(size, 1)[rank].clone())
        else:
            whole.b = nn.Parameter(whole.b.detach().chunk(size)[rank].clone())
        cut: Any = whole.a if self.row_parallel else whole.b
        kept: Any = whole.b if self.row_parallel else whole.a
        # Megatron counts what is cut in full in the norm of the gradients, and adds up the gradients of what each rank
        # has seen a part of the rows for.
        cut.tensor_model_parallel, cut.partition_dim, cut.partition_stride = True, int(self.row_parallel), 1
        kept.sequence_parallel = self.sequence_parallel
        return whole

    def forward(self, rows: Tensor) -> Tensor:
        """This rank's part of the layer's input -> this rank's part of what is added to its output."""
        with self._random():
            hidden = torch.cat([adapter.down(rows) for adapter in self._adapters().values()], dim=-1)
        narrow = iter(self._between(hidden).split(self.lora.rank, dim=-1))
        return self._join(lambda adapter: adapter.up(next(narrow)), hidden.dim() - 1)

    def update(self) -> Tensor:
        """This rank's part of what merging adds to the layer's weight, float32 [out, in]."""
        return self._join(LoRA.update, 0)

    def _adapters(self) -> dict[str, LoRA]:
        return cast("dict[str, LoRA]", dict(self.projections.items()))

    def _join(self, value: Callable[[LoRA], Tensor], dim: int) -> Tensor:
        """`value` of each projection as the layer holds their outputs; zeros for those without an update."""
        parts = {name: value(adapter) for name, adapter in self._adapters().items()}
        like = next(iter(parts.values()))
        joined = []
        for name, width in self.widths.items():
            shape = (*like.shape[:dim], width, *like.shape[dim + 1 :])
            part = parts.get(attribute_name(name))
            joined.append(like.new_zeros(shape) if part is None else part)
        return interleave(joined, self.groups, dim)

    def _between(self, hidden: Tensor) -> Tensor:
        """The collective between `a` and `b`, on r-wide rows."""
        if self.group.size() == 1:
            return hidden
        if self.row_parallel:
            reduce = (
                reduce_scatter_to_sequence_parallel_region
                if self.sequence_parallel
                else reduce_from_tensor_model_parallel_region
            )
            return reduce(hidden, group=self.group)
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=self.group)
        return copy_to_tensor_model_parallel_region(hidden, group=self.group)

    def _random(self) -> contextlib.AbstractContextManager[None]:
        """Dropout must differ between ranks that see different inputs and agree between those that see the same."""
        same_inputs = not (self.row_parallel or self.sequence_parallel)
        if same_inputs or not (self.training and self.lora.dropout):
            return contextlib.nullcontext()
        return get_cuda_rng_tracker().fork()

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Each parameter with its place in the whole; none while they are merged into the layer's weight."""
        if self.merged:
            return {}
        tensors = self.state_dict(keep_vars=True)
        cut = ".a" if self.row_parallel else ".b"
        return make_sharded_tensors_for_checkpoint(  # type: ignore[no-any-return]
            tensors,
            prefix,
            {name: int(self.row_parallel) for name in tensors if name.endswith(cut)},
            sharded_offsets,
            tp_group=self.group,
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )


def attribute_name(projection: str) -> str:
    """Name of a projection's update below `lora.projections` (a module's name may not hold dots)."""
    return projection.replace(".", "_")


@torch.no_grad()
def merge_lora(model: nn.Module | Sequence[nn.Module]) -> None:
    """Adds every update to the weight it belongs to; the model then computes, exports and counts as one without LoRA.

    The weights as they were are kept in host memory: adding and subtracting does not give them back bit for bit.

    Args:
        model: the model, or all the parts that this rank holds. Nothing happens to one without LoRA or merged before.
    """
    chunk: Any
    for chunk in [model] if isinstance(model, nn.Module) else model:
        for layer in _layers(chunk):
            if not layer.lora.merged:
                layer.lora.kept = layer.weight.detach().to("cpu", copy=True)
                update = layer.lora.update()
                layer.weight.copy_(layer.weight.to(update.dtype) + update)
                layer.lora.merged = True


@torch.no_grad()
def unmerge_lora(model: nn.Module | Sequence[nn.Module]) -> None:
    """The reverse of `merge_lora`, bit for bit; gradients and changes of the merged weights since then are lost."""
    chunk: Any
    for chunk in [model] if isinstance(model, nn.Module) else model:
        for layer in _layers(chunk):
            if layer.lora.merged:
                layer.weight.copy_(layer.lora.kept)
                layer.lora.kept, layer.lora.merged = None, False


@contextlib.contextmanager
def merged_lora(model: nn.Module | Sequence[nn.Module]) -> Iterator[None]:
    """Within it, the updates are part of the weights."""
    merge_lora(model)
    try:
        yield
    finally:
        unmerge_lora(model)


def is_merged(model: nn.Module) -> bool:
    """Whether the updates of a model, or of one of its parts, are added to the weights."""
    return any(layer.lora.merged for layer in _layers(model))


def _layers(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if isinstance(module, _WithLoRA))

"""Share of each layer's attention that goes to the text before an image, to the image, and to the text after it.

The two sums of attention weights come out of `router_attention` as its two columns, so no matrix of weights is made.
It works on every decoder, as it watches what goes into the core attention of its layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from parrot_sys.data.batch import PackedBatch
from parrot_sys.errors import ConfigError, DataError
from parrot_sys.megatron.attention.context import AttentionContext
from parrot_sys.megatron.attention.core import CoreAttention
from parrot_sys.megatron.model import MultimodalModel
from parrot_sys.modules.rotary import rotate
from parrot_sys.ops.router_attention import router_attention_parts

BEFORE, IMAGE, AFTER = 0, 1, 2


def row_kinds(batch: PackedBatch) -> Tensor:
    """int64 [T] on the device of the batch: BEFORE, IMAGE or AFTER for each row, by the images of its own sample.

    Rows between two images are AFTER.

    Raises:
        DataError: a sample has no image.
    """
    image = torch.zeros(batch.num_rows, dtype=torch.int64, device=batch.input_ids.device)
    image[batch.visual_rows] = 1
    seen = torch.cat((image.new_zeros(1), image.cumsum(0)))
    starts = batch.cu_seqlens[:-1].long()
    lengths = batch.cu_seqlens.diff().long()
    if bool((seen[batch.cu_seqlens[1:].long()] == seen[starts]).any()):
        raise DataError("attention before and after an image needs samples with an image, got one of text alone")
    earlier = seen[:-1] - seen[starts].repeat_interleave(lengths)
    return torch.where(image == 1, IMAGE, torch.where(earlier > 0, AFTER, BEFORE))


@contextmanager
def attention_mass(model: MultimodalModel, kinds: Tensor) -> Iterator[list[Tensor]]:
    """Collects the attention of the rows AFTER during one forward pass of a pack without a cache.

    Args:
        model: the whole model in one process.
        kinds: from `row_kinds` of the pack; each sample with at least one row AFTER.

    Yields:
        A list that each layer appends to, in their order: float32 [S, 3] on the CPU, the mean over the sample's rows
        AFTER and over heads of the weights on BEFORE, IMAGE and AFTER. A row of it sums to one.

    Raises:
        ConfigError: the model is spread over several processes.
    """
    groups = model.pg_collection
    if groups.tp.size() * groups.pp.size() * groups.cp.size() > 1:
        raise ConfigError("attention is collected from a model in one process; load it without `parallel`")
    layers: list[Tensor] = []
    columns = torch.stack((kinds == BEFORE, kinds == AFTER), dim=-1).float()

    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(module, CoreAttention)
        context = kwargs["packed_seq_params"]
        query, key, value = args[:3]
        layers.append(_mass(query, key, value, context, columns, kinds, module.scale))

    with ExitStack() as hooks:
        for layer in model.decoder.layers:
            core: CoreAttention = layer.self_attention.core_attention  # type: ignore[assignment, union-attr]
            hooks.enter_context(_removed_at_exit(core.register_forward_pre_hook(watch, with_kwargs=True)))
        yield layers


@contextmanager
def _removed_at_exit(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _mass(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    context: AttentionContext,
    columns: Tensor,
    kinds: Tensor,
    scale: float,
) -> Tensor:
    query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)
    if context.rotary is not None:
        query, key = rotate(query, *context.rotary), rotate(key, *context.rotary)
    # Positions are those in the pack, so that the columns may differ from sample to sample.
    starts = context.cu_seqlens[:-1]
    _, extra, _ = router_attention_parts(
        query,
        key,
        value,
        columns,
        context.cu_seqlens,
        context.cu_seqlens,
        max_seqlen_q=context.max_seqlen,
        max_seqlen_kv=context.max_seqlen,
        scale=scale,
        positions=torch.stack((starts, starts), dim=-1),
    )
    before, after = extra.mean(0).float().unbind(-1)  # [T] each
    mass = torch.stack((before, 1 - before - after, after), dim=-1)
    samples = torch.arange(starts.numel(), device=kinds.device).repeat_interleave(context.cu_seqlens.diff().long())
    asking = kinds == AFTER
    sums = mass.new_zeros(starts.numel(), 3).index_add(0, samples[asking], mass[asking])
    return (sums / torch.bincount(samples[asking], minlength=starts.numel())[:, None]).cpu()

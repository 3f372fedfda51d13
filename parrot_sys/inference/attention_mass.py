"""Attention that text pays to the text before and behind an image, by layer (a diagnostic of arXiv 2406.03496)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from parrot_sys.data.constants import IMAGE_TOKEN_ID
from parrot_sys.data.packing import Sample, pack_samples
from parrot_sys.errors import ConfigError, DataError
from parrot_sys.megatron.column_attention import AttentionWatch
from parrot_sys.megatron.parrot_model import ParrotModel


@torch.no_grad()
def attention_mass(model: ParrotModel, sample: Sample) -> Tensor:
    """Mean attention, over heads and the text rows behind the first image, on text before and behind that image.

    The rest of the attention goes to images. No matrix of attention weights is built: each layer's attention is asked
    for its weights times two columns (`router_attention`). Works for every system and for a model without learners.

    Args:
        model: in evaluation mode, whole in this process.
        sample: one conversation with at least one image and text behind it; the mass is that of this sample alone.

    Returns:
        float32 [layers, 2] on the CPU: share on the text before the image, and on the text behind it.

    Raises:
        DataError: the sample has no image, or no text behind it.
        ConfigError: several processes share the model.
    """
    if dist.get_world_size() > 1:
        raise ConfigError(
            f"attention masses are those of a whole model, got one dealt over {dist.get_world_size()} processes: load "
            "it in one"
        )
    parrot = model.parrot
    device = next(model.parameters()).device
    batch = pack_samples([sample], num_visual_rows=parrot.rows_per_image, max_seq_len=parrot.max_seq_len).to(device)
    is_text = batch.input_ids != IMAGE_TOKEN_ID
    rows = torch.arange(batch.num_rows, device=device)
    first = int((~is_text).int().argmax())
    behind = is_text & (rows > first)
    if is_text.all() or not behind.any():
        raise DataError(
            f"the sample must have an image and text behind it, got {int((~is_text).sum())} rows of images and "
            f"{int(behind.sum())} rows of text behind the first"
        )
    watch = AttentionWatch(torch.stack((is_text & (rows < first), behind), dim=1).float())
    model(batch, mode="logits", logits_rows=rows[:0], watch=watch)
    heads = parrot.llm.num_attention_heads
    return torch.stack([watch.sums[layer][behind].mean(0) / heads for layer in sorted(watch.sums)]).cpu()

"""Megatron's own LLaVAModel at toy size, and batches for it."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.multimodal import llava_model
from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from parrot_sys.megatron.runtime.initialize import ParallelConfig
from tests.megatron.gpt_training import ON_CPU

VOCAB, IMAGE, SEQ = 64, -200, 9


def tiny_config(parallel: ParallelConfig, **fields: Any) -> TransformerConfig:
    """Sizes of decoder, tower and projection."""
    return TransformerConfig(
        **{"num_layers": 1, **fields},
        hidden_size=16,
        num_attention_heads=2,
        ffn_hidden_size=24,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        **ON_CPU,
        init_method_std=0.2,
    )


def make_llava(
    parallel: ParallelConfig | None = None,
    spec: ModuleSpec | None = None,
    *,
    layers: int = 1,
    vision_model_type: str = "clip",
    drop_vision_class_token: bool = False,
    **options: Any,
) -> torch.nn.Module:
    """Megatron's LLaVAModel with a CLIP tower of five rows an image.

    Args:
        parallel: layout; each pipeline stage also builds the tower, as some programs do.
        spec: of the decoder's layers; Megatron's own without.
        layers: of the decoder, over all stages.
        vision_model_type: of the tower.
        drop_vision_class_token: whether the CLS row is dropped before the projection.
        **options: further arguments of `LLaVAModel`.
    """
    parallel = parallel or ParallelConfig()
    torch.manual_seed(3)
    stages = {"pipeline_model_parallel_size": parallel.pipeline_model_parallel_size, "pipeline_dtype": torch.float32}
    language, vision = tiny_config(parallel, num_layers=layers, **stages), tiny_config(parallel)
    language.language_model_type, vision.vision_model_type = "tiny", vision_model_type
    tower_spec = get_vit_layer_with_local_spec()
    # Megatron-Core 0.16 has a causal mask there.
    tower_spec.submodules.self_attention.params = {"attn_mask_type": AttnMaskType.no_mask}
    tower = llava_model.CLIPViTModel
    try:
        # Its default norm does not build without Transformer Engine.
        llava_model.CLIPViTModel = lambda *a, **k: tower(
            *a, **{f"ln_{place}_impl": WrappedTorchNorm for place in ("pre", "post")}, **k
        )
        return llava_model.LLaVAModel(
            language,
            spec or get_gpt_layer_local_spec(),
            VOCAB,
            64,
            vision,
            tower_spec,
            drop_vision_class_token,
            tiny_config(parallel),
            MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            img_h=28,
            img_w=28,
            patch_dim=14,
            language_position_embedding_type="rope",
            image_token_index=IMAGE,
            **options,
        )
    finally:
        llava_model.CLIPViTModel = tower


def make_batch() -> dict[str, Tensor]:
    """Two samples: one image and two, three answer tokens each."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(0, VOCAB, (2, SEQ), generator=generator)
    ids[0, 2] = ids[1, 0] = ids[1, 4] = IMAGE
    loss_mask = torch.zeros(2, SEQ)
    loss_mask[:, 5:8] = 1
    return {
        "images": torch.randn(3, 3, 28, 28, generator=generator),
        "input_ids": ids,
        "position_ids": torch.arange(SEQ).repeat(2, 1),
        "attention_mask": None,
        "labels": torch.randint(0, VOCAB, (2, SEQ), generator=generator),
        "loss_mask": loss_mask,
    }

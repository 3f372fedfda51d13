"""DINOv2 (arXiv 2304.07193) at the resolution of its positions; the giant model, with SwiGLU, is not built here."""

from typing import Any

from parrot_sys.towers.tower import Pixels, TensorNames, Tower, Transformer

_SHARED: dict[str, Any] = {"image_size": 518, "patch_size": 14, "activation": "gelu", "layer_norm_eps": 1e-6}

TOWER = Tower(
    name="dinov2",
    pixels=Pixels(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), crop=True),
    transformer=Transformer(
        model_type="dinov2",
        names=TensorNames(
            patch="embeddings.patch_embeddings.projection",
            position="embeddings.position_embeddings",
            cls="embeddings.cls_token",
            final_norm="layernorm",
            layer="encoder.layer.{}",
            norm1="norm1",
            norm2="norm2",
            query="attention.attention.query",
            key="attention.attention.key",
            value="attention.attention.value",
            out="attention.output.dense",
            fc1="mlp.fc1",
            fc2="mlp.fc2",
            scales=("layer_scale1.lambda1", "layer_scale2.lambda1"),
            batched=True,
            passed_over=("embeddings.mask_token",),
        ),
        patch_bias=True,
        patch_size=14,
        activation="gelu",
        layer_norm_eps=1e-6,
        refused=("use_swiglu_ffn",),
    ),
    known={
        "dinov2-small": {
            **_SHARED,
            "hidden_size": 384,
            "num_layers": 12,
            "num_attention_heads": 6,
            "ffn_hidden_size": 1536,
        },
        "dinov2-base": {
            **_SHARED,
            "hidden_size": 768,
            "num_layers": 12,
            "num_attention_heads": 12,
            "ffn_hidden_size": 3072,
        },
        "dinov2-large": {
            **_SHARED,
            "hidden_size": 1024,
            "num_layers": 24,
            "num_attention_heads": 16,
            "ffn_hidden_size": 4096,
        },
    },
)

"""SigLIP (arXiv 2303.15343) and the fixed-resolution models of SigLIP 2 (arXiv 2502.14786), which are built alike."""

from dataclasses import replace
from typing import Any

from parrot_sys.towers.clip import ENCODER_NAMES
from parrot_sys.towers.tower import Pixels, Tower, Transformer

_HALF = (0.5, 0.5, 0.5)
_SHARED: dict[str, Any] = {"activation": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
_BASE = {**_SHARED, "hidden_size": 768, "num_layers": 12, "num_attention_heads": 12, "ffn_hidden_size": 3072}
_LARGE = {**_SHARED, "hidden_size": 1024, "num_layers": 24, "num_attention_heads": 16, "ffn_hidden_size": 4096}
_SO400M = {**_SHARED, "hidden_size": 1152, "num_layers": 27, "num_attention_heads": 16, "ffn_hidden_size": 4304}

TOWER = Tower(
    name="siglip",
    pixels=Pixels(mean=_HALF, std=_HALF),
    transformer=Transformer(
        model_type="siglip_vision_model",
        names=replace(ENCODER_NAMES, cls=None, pre_norm=None, passed_over=("embeddings.position_ids", "head.")),
        patch_bias=True,
        patch_size=16,
        activation="gelu_pytorch_tanh",
        layer_norm_eps=1e-6,
    ),
    known={
        "siglip-so400m-patch14-384": {**_SO400M, "image_size": 384, "patch_size": 14},
        "siglip2-base-patch16-224": {**_BASE, "image_size": 224, "patch_size": 16},
        "siglip2-base-patch16-256": {**_BASE, "image_size": 256, "patch_size": 16},
        "siglip2-base-patch16-384": {**_BASE, "image_size": 384, "patch_size": 16},
        "siglip2-base-patch16-512": {**_BASE, "image_size": 512, "patch_size": 16},
        "siglip2-large-patch16-256": {**_LARGE, "image_size": 256, "patch_size": 16},
        "siglip2-large-patch16-384": {**_LARGE, "image_size": 384, "patch_size": 16},
        "siglip2-large-patch16-512": {**_LARGE, "image_size": 512, "patch_size": 16},
        "siglip2-so400m-patch14-224": {**_SO400M, "image_size": 224, "patch_size": 14},
        "siglip2-so400m-patch14-384": {**_SO400M, "image_size": 384, "patch_size": 14},
        "siglip2-so400m-patch16-256": {**_SO400M, "image_size": 256, "patch_size": 16},
        "siglip2-so400m-patch16-384": {**_SO400M, "image_size": 384, "patch_size": 16},
        "siglip2-so400m-patch16-512": {**_SO400M, "image_size": 512, "patch_size": 16},
    },
)

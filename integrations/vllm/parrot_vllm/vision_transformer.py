"""The vision transformers of `parrot_sys.towers` in plain PyTorch, by the names of `tower_maps`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parrot_sys.towers import VisionConfig

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class _Scale(nn.Module):
    def __init__(self, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


class _Block(nn.Module):
    """A pre-norm block in which all rows see each other."""

    def __init__(self, config: VisionConfig, dtype: torch.dtype) -> None:
        super().__init__()
        size, inner, self.heads = config.hidden_size, config.ffn_hidden_size, config.num_attention_heads
        self.activation = _ACTIVATIONS[config.activation]
        self.input_layernorm = nn.LayerNorm(size, config.layer_norm_eps, dtype=dtype)
        self.pre_mlp_layernorm = nn.LayerNorm(size, config.layer_norm_eps, dtype=dtype)
        self.self_attention = nn.ModuleDict(
            {"linear_qkv": nn.Linear(size, 3 * size, dtype=dtype), "linear_proj": nn.Linear(size, size, dtype=dtype)}
        )
        self.mlp = nn.ModuleDict(
            {"linear_fc1": nn.Linear(size, inner, dtype=dtype), "linear_fc2": nn.Linear(inner, size, dtype=dtype)}
        )
        scaled = config.tower.has_layer_scale
        self.self_attn_bda = _Scale(size, dtype) if scaled else nn.Identity()
        self.mlp_bda = _Scale(size, dtype) if scaled else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        # (Rows of the packed weight: for each head those of q, k and v.)
        packed = self.self_attention["linear_qkv"](self.input_layernorm(x)).unflatten(-1, (self.heads, 3, -1))
        q, k, v = packed.transpose(1, 2).unbind(3)
        rows = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.self_attn_bda(self.self_attention["linear_proj"](rows))
        inner = self.activation(self.mlp["linear_fc1"](self.pre_mlp_layernorm(x)))
        return x + self.mlp_bda(self.mlp["linear_fc2"](inner))


class VisionTransformer(nn.Module):
    """[n, 3, h, w] -> hidden state `select_layer` [n, V, C], its first row as `select_feature` says."""

    def __init__(self, config: VisionConfig, dtype: torch.dtype) -> None:
        """
        Args:
            config: sizes; the tower must be a transformer.
            dtype: of the parameters.
        """
        super().__init__()
        size, patch, transformer = config.hidden_size, config.patch_size, config.tower.transformer
        assert transformer is not None
        self.vision = config
        self.patch_embedding = nn.Conv2d(3, size, patch, stride=patch, bias=transformer.patch_bias, dtype=dtype)
        self.position_embedding = nn.Parameter(torch.empty(config.num_tower_rows, size, dtype=dtype))
        self.class_embedding = nn.Parameter(torch.empty(size, dtype=dtype)) if config.tower.has_cls else None
        has_norm = config.tower.has_pre_norm
        self.pre_layernorm = nn.LayerNorm(size, config.layer_norm_eps, dtype=dtype) if has_norm else nn.Identity()
        blocks = [_Block(config, dtype) for _ in range(config.num_layers_run)]
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(blocks)})

    def forward(self, pixels: Tensor) -> Tensor:
        """See the class."""
        x = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        if self.class_embedding is not None:
            x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)
        x = self.pre_layernorm(x + self.position_embedding)
        for block in self.encoder["layers"]:
            x = block(x)
        has_cls = self.class_embedding is not None
        if has_cls == (self.vision.select_feature == "cls_patch"):
            return x
        return x[:, 1:] if has_cls else torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)

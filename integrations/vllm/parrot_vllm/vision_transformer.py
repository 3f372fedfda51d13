"""The vision transformers of `parrot_sys.towers` in vLLM's parallel layers, by the names of `tower_maps`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import MMEncoderAttention
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
from vllm.model_executor.models.vision import is_vit_use_data_parallel, run_dp_sharded_vision_model

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
    """A pre-norm block in which all rows see each other; tensor-parallel ranks share heads and inner columns."""

    def __init__(self, config: VisionConfig, dtype: torch.dtype, *, whole: bool, prefix: str) -> None:
        super().__init__()
        size, inner, heads = config.hidden_size, config.ffn_hidden_size, config.num_attention_heads
        self.activation = _ACTIVATIONS[config.activation]
        self.input_layernorm = nn.LayerNorm(size, config.layer_norm_eps, dtype=dtype)
        self.pre_mlp_layernorm = nn.LayerNorm(size, config.layer_norm_eps, dtype=dtype)

        def linear(kind: type[nn.Module], columns: int, rows: int, name: str) -> nn.Module:
            options = {"params_dtype": dtype, "return_bias": False, "disable_tp": whole}
            return kind(columns, rows, prefix=f"{prefix}.{name}", **options)

        # (Rows of the packed weight: for each head those of q, k and v. A rank's part of them is whole heads.)
        self.self_attention = nn.ModuleDict(
            {
                "linear_qkv": linear(ColumnParallelLinear, size, 3 * size, "self_attention.linear_qkv"),
                "linear_proj": linear(RowParallelLinear, size, size, "self_attention.linear_proj"),
            }
        )
        self.heads = heads // (1 if whole else get_tensor_model_parallel_world_size())
        self.attention = MMEncoderAttention(
            self.heads, size // heads, (size // heads) ** -0.5, prefix=f"{prefix}.attention"
        )
        self.mlp = nn.ModuleDict(
            {
                "linear_fc1": linear(ColumnParallelLinear, size, inner, "mlp.linear_fc1"),
                "linear_fc2": linear(RowParallelLinear, inner, size, "mlp.linear_fc2"),
            }
        )
        scaled = config.tower.has_layer_scale
        self.self_attn_bda = _Scale(size, dtype) if scaled else nn.Identity()
        self.mlp_bda = _Scale(size, dtype) if scaled else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        packed = self.self_attention["linear_qkv"](self.input_layernorm(x)).unflatten(-1, (self.heads, 3, -1))
        q, k, v = (part.flatten(2) for part in packed.unbind(3))
        x = x + self.self_attn_bda(self.self_attention["linear_proj"](self.attention(q, k, v)))
        inner = self.activation(self.mlp["linear_fc1"](self.pre_mlp_layernorm(x)))
        return x + self.mlp_bda(self.mlp["linear_fc2"](inner))


class VisionTransformer(nn.Module):
    """[n, 3, h, w] -> hidden state `select_layer` [n, V, C], its first row as `select_feature` says.

    Tensor-parallel ranks share each block. With `mm_encoder_tp_mode="data"`, or where they cannot share its heads, each
    holds the whole tower and runs it on its part of the pictures.
    """

    def __init__(self, config: VisionConfig, dtype: torch.dtype, prefix: str = "") -> None:
        """
        Args:
            config: sizes; the tower must be a transformer.
            dtype: of the parameters.
            prefix: of the names of its layers in the engine.
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
        self.by_pictures = is_vit_use_data_parallel(config.num_attention_heads)
        blocks = [
            _Block(config, dtype, whole=self.by_pictures, prefix=f"{prefix}.encoder.layers.{i}")
            for i in range(config.num_layers_run)
        ]
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(blocks)})

    def encode(self, pixels: Tensor) -> Tensor:
        """`forward`, shared out over the tensor-parallel ranks."""
        if self.by_pictures and get_tensor_model_parallel_world_size() > 1:
            return run_dp_sharded_vision_model(pixels, self)
        return self(pixels)

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

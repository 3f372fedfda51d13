"""Vision towers on Megatron layers: the vision transformers of `parrot_sys.towers`; other networks come from `models`.

n images, V visual rows an image, P patches an image, C width of the tower.

Only the blocks that `select_layer` needs are built and run. The checkpoint's other tensors (last block, final norm) are
kept as buffers: they see no optimizer and no gradient hook, and export writes them back unchanged.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from parrot_sys.errors import ConfigError
from parrot_sys.megatron.config import common_fields
from parrot_sys.megatron.decoder import layer_spec
from parrot_sys.megatron.norms import Norm
from parrot_sys.megatron.runtime.initialize import ParallelConfig
from parrot_sys.models.efficientnet import EfficientNetLite0
from parrot_sys.models.tower_maps import tower_maps
from parrot_sys.towers import VisionConfig


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), the activation of OpenAI's CLIP."""
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": quick_gelu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": functools.partial(F.gelu, approximate="tanh"),
}


def build_vision_tower(
    config: VisionConfig,
    parallel: ParallelConfig | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    initialize_weights: bool = True,
) -> nn.Module:
    """The tower that `config.type` names: pixel_values [n, 3, h, w] -> features [n, V, C].

    Row 0 is the CLS (or mean) row, unless `select_feature` is `patch`.

    Args:
        config: architecture; all weights are random (EfficientNet: whatever torch draws) until they are loaded.
        parallel: layout; heads and inner widths of transformers are cut over the tensor-parallel ranks, other networks
            are held whole by each.
        dtype: of parameters and features.
        initialize_weights: False leaves the weights of the blocks as they are (they are loaded afterwards).

    Raises:
        ConfigError: the tower cannot be cut as `parallel` asks.
    """
    if config.tower.transformer is None:
        return EfficientNetLite0(with_mean=config.select_feature == "cls_patch").to(dtype)
    return VisionTransformer(config, parallel or ParallelConfig(), dtype=dtype, initialize_weights=initialize_weights)


class LayerScale(nn.Module):
    """Adds what a block gives to its residual, each column times a weight of its own (arXiv 2103.17239)."""

    def __init__(self, hidden_size: int, dtype: torch.dtype = torch.float32) -> None:
        """
        Args:
            hidden_size: columns.
            dtype: of the weights.
        """
        super().__init__()
        self.scale = nn.Parameter(torch.ones(hidden_size, dtype=dtype))

    def forward(self, training: bool, fused: bool) -> Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]:
        """Function in the place of Megatron's bias-dropout-add; there is no dropout in a tower."""

        def add(output: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
            value, bias = output
            return residual + self.scale * (value if bias is None else value + bias)

        return add


class VisionTransformer(MegatronModule):
    """A vision transformer of `parrot_sys.towers`; gives hidden state `select_layer` of its encoder.

    `select_feature`: under `cls_patch` a CLS stays row 0; without one, as in SigLIP, the mean of the rows goes in
    front. Under `patch` neither comes out.
    """

    def __init__(
        self,
        config: VisionConfig,
        parallel: ParallelConfig,
        *,
        dtype: torch.dtype = torch.float32,
        initialize_weights: bool = True,
    ) -> None:
        num_layers = config.num_layers_run
        transformer = _transformer_config(config, parallel, num_layers, dtype, initialize_weights)
        super().__init__(config=transformer)
        self.vision = config
        tower, patch = config.tower, config.patch_size
        assert tower.transformer is not None
        bias, rows = tower.transformer.patch_bias, config.num_tower_rows
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, patch, stride=patch, bias=bias, dtype=dtype)
        self.position_embedding = nn.Parameter(torch.empty(rows, config.hidden_size, dtype=dtype).normal_(std=0.02))
        self.class_embedding = (
            nn.Parameter(torch.empty(config.hidden_size, dtype=dtype).normal_(std=0.02)) if tower.has_cls else None
        )
        self.pre_layernorm = (
            Norm(transformer, config.hidden_size, config.layer_norm_eps) if tower.has_pre_norm else None
        )
        self.encoder = None
        if num_layers:
            groups = ProcessGroupCollection(tp=parallel_state.get_tensor_model_parallel_group())
            groups.pp = groups.cp = None  # every pipeline and context-parallel rank runs the whole tower by itself
            # All rows see each other (Megatron's own ViT layers without Transformer Engine are causal by mistake).
            spec = layer_spec(AttnMaskType.no_mask)
            if tower.has_layer_scale:
                scale = ModuleSpec(module=LayerScale, params={"hidden_size": config.hidden_size, "dtype": dtype})
                spec.submodules.self_attn_bda = spec.submodules.mlp_bda = scale
            self.encoder = TransformerBlock(
                transformer,
                spec,
                pre_process=True,
                post_process=False,
                pg_collection=groups,
            )
        self.unused = nn.Module()
        for entry in tower_maps(config):
            module, _, name = entry.name.partition(".")
            if module == "unused":
                self.unused.register_buffer(name, torch.zeros(entry.shapes[0], dtype=dtype))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[n, 3, h, w] -> [n, V, C] in the tower's dtype; n may be 0.

        Raises:
            ConfigError: the images have another size than the tower was built for.
        """
        side = self.vision.image_size
        if pixel_values.shape[1:] != (3, side, side):
            raise ConfigError(f"the vision tower takes images [n, 3, {side}, {side}], got {list(pixel_values.shape)}")
        if pixel_values.shape[0] == 0:
            return self._no_features()
        x = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        if self.class_embedding is not None:
            x = torch.cat([self.class_embedding.expand(x.shape[0], 1, -1), x], dim=1)
        x = x + self.position_embedding
        if self.pre_layernorm is not None:
            x = self.pre_layernorm(x)
        if self.encoder is not None:
            rows_first = x.transpose(0, 1).clone(memory_format=torch.contiguous_format)  # [V, n, C], no view
            x = self.encoder(rows_first, attention_mask=None).transpose(0, 1)
        has_cls, wants_first = self.class_embedding is not None, self.vision.select_feature == "cls_patch"
        if has_cls == wants_first:
            return x
        return x[:, 1:] if has_cls else torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)

    def _no_features(self) -> Tensor:
        """[0, V, C] that hangs on every trainable parameter: a rank without images still runs their gradient hooks."""
        x = self.position_embedding.new_empty(0, self.vision.num_visual_rows, self.vision.hidden_size)
        for parameter in self.parameters():
            if parameter.requires_grad:
                x = x + parameter.flatten()[:0].sum()
        return x


def _transformer_config(
    config: VisionConfig, parallel: ParallelConfig, num_layers: int, dtype: torch.dtype, initialize_weights: bool
) -> TransformerConfig:
    parallel.check_tensor_sizes("vision", config.tensor_sizes())
    # Rows of an image are few and odd in number (577): the tower is cut by heads only.
    cut = ParallelConfig(tensor_model_parallel_size=parallel.tensor_model_parallel_size)
    return TransformerConfig(
        **common_fields(cut, dtype, initialize_weights=initialize_weights),
        num_layers=max(num_layers, 1),
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        ffn_hidden_size=config.ffn_hidden_size,
        normalization="LayerNorm",
        layernorm_epsilon=config.layer_norm_eps,
        add_bias_linear=True,
        add_qkv_bias=True,
        activation_func=_ACTIVATIONS[config.activation],
        init_method_std=0.02,
    )

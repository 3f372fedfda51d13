"""Configuration of the vision towers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from parrot_sys.errors import ConfigError
from parrot_sys.paths import INPUT_FOLDER
from parrot_sys.towers.registry import TOWERS
from parrot_sys.towers.tower import Tower

Feature = Literal["cls_patch", "patch"]
_ACTIVATIONS = ("quick_gelu", "gelu_pytorch_tanh", "gelu")
"""Of the MLP of a transformer's blocks."""
_SIZES = ("image_size", "patch_size", "hidden_size", "num_layers", "num_attention_heads", "ffn_hidden_size")


@dataclass(kw_only=True, frozen=True, slots=True)
class VisionConfig:
    """Sizes of a vision tower; the defaults are those of CLIP ViT-L/14 at 336 pixels."""

    type: str = "clip"
    """Architecture of the tower: clip, siglip (SigLIP 2 too), dinov2, efficientnet_lite0."""
    path: Annotated[str | None, INPUT_FOLDER] = None
    """Directory with the tower's Hugging Face weights, when the main checkpoint does not hold them."""
    image_size: int = 336
    """Side of the square input in pixels."""
    patch_size: int = 14
    """Side of a patch in pixels (vision transformers)."""
    hidden_size: int = 1024
    """C, width of the features that the projector reads."""
    num_layers: int = 24
    """Blocks in the checkpoint; fewer run when `select_layer` does not need the last ones."""
    num_attention_heads: int = 16
    """Attention heads of a block (vision transformers)."""
    ffn_hidden_size: int = 4096
    """Inner width of a block's MLP (vision transformers)."""
    activation: str = "quick_gelu"
    """Activation of a block's MLP (vision transformers; EfficientNet has relu6)."""
    layer_norm_eps: float = 1e-5
    """Epsilon of the layer norms (vision transformers)."""
    select_layer: int = -2
    """Which of the tower's hidden states is used (-2: output of the block before the last, before the final norm)."""
    select_feature: Feature = "cls_patch"
    """Rows of an image: `cls_patch` the CLS (or mean) row and the patches (Parrot); `patch` the patches alone."""

    @property
    def tower(self) -> Tower:
        """The kind with all that it brings."""
        return TOWERS[self.type]

    @property
    def num_patches(self) -> int:
        """Patches of one image."""
        if (network := self.tower.network) is not None:  # pads what is left at the border, the others leave it out
            return math.ceil(self.image_size / network.stride) ** 2
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_tower_rows(self) -> int:
        """Rows of one image inside the tower: patches, after the CLS row where there is one."""
        return self.num_patches + self.tower.has_cls

    @property
    def num_visual_rows(self) -> int:
        """V: patches, after the CLS row unless `select_feature` leaves it out.

        Where a tower has no CLS, the mean of its rows takes that place as row 0.
        """
        return self.num_patches + (self.select_feature == "cls_patch")

    @property
    def num_layers_run(self) -> int:
        """Blocks that the selected hidden state needs; the rest of the checkpoint is kept but never run."""
        return self.select_layer if self.select_layer >= 0 else self.num_layers + 1 + self.select_layer

    @property
    def flops(self) -> float:
        """Floating-point operations of the forward pass over one image."""
        if (network := self.tower.network) is not None:
            return network.flops * (self.image_size / 224) ** 2
        rows, size = self.num_tower_rows, self.hidden_size
        block = rows * (8 * size * size + 4 * size * self.ffn_hidden_size) + 4 * rows * rows * size
        return self.num_layers_run * block + 2 * rows * 3 * self.patch_size**2 * size

    def tensor_sizes(self) -> dict[str, int]:
        """Sizes that tensor-parallel ranks cut: name -> heads or columns; nothing of a tower that is no transformer."""
        if self.tower.transformer is None:
            return {}
        return {name: getattr(self, name) for name in ("num_attention_heads", "ffn_hidden_size")}

    def __post_init__(self) -> None:
        for name, choices in (("type", tuple(TOWERS)), ("select_feature", get_args(Feature))):
            if getattr(self, name) not in choices:
                raise ConfigError(f"vision.{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in _SIZES:
            if (size := getattr(self, name)) < 1:
                raise ConfigError(f"vision.{name} must be >= 1, got {size}")
        if not (self.layer_norm_eps > 0 and math.isfinite(self.layer_norm_eps)):
            raise ConfigError(f"vision.layer_norm_eps must be a finite number > 0, got {self.layer_norm_eps}")
        if (network := self.tower.network) is None:
            self._check_transformer()
        elif self.hidden_size != network.width:
            raise ConfigError(
                f"vision.hidden_size must be {network.width} with vision.type={self.type}, got {self.hidden_size}"
            )
        if not -self.num_layers - 1 <= self.select_layer <= self.num_layers:
            raise ConfigError(
                f"vision.select_layer must name one of {self.num_layers + 1} hidden states, got {self.select_layer}"
            )

    def _check_transformer(self) -> None:
        if self.activation not in _ACTIVATIONS:
            raise ConfigError(
                f"vision.activation must be one of {', '.join(_ACTIVATIONS)} with vision.type={self.type}, "
                f"got {self.activation!r}"
            )
        if self.patch_size > self.image_size:
            raise ConfigError(
                f"vision.patch_size must be <= vision.image_size={self.image_size}, got {self.patch_size}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"vision.hidden_size must be a multiple of vision.num_attention_heads={self.num_attention_heads}, "
                f"got {self.hidden_size}"
            )

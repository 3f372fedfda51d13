"""Configuration of the vision towers: CLIP ViT, SigLIP, and the small embedded EfficientNet-lite0."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from parrot_sys.errors import ConfigError
from parrot_sys.paths import INPUT_FOLDER

TowerType = Literal["clip", "siglip", "efficientnet_lite0"]
Feature = Literal["cls_patch", "patch"]
Activation = Literal["quick_gelu", "gelu_pytorch_tanh", "gelu", "relu6"]
_SIZES = ("image_size", "patch_size", "hidden_size", "num_layers", "num_attention_heads", "ffn_hidden_size")
_EFFICIENTNET_STRIDE = 32
_EFFICIENTNET_WIDTH = 1280


@dataclass(kw_only=True, frozen=True, slots=True)
class VisionConfig:
    """Sizes of a vision tower; the defaults are those of CLIP ViT-L/14 at 336 pixels."""

    type: TowerType = "clip"
    """Architecture of the tower."""
    path: Annotated[str | None, INPUT_FOLDER] = None
    """Directory with the tower's Hugging Face weights, when the main checkpoint does not hold them."""
    image_size: int = 336
    """Side of the square input in pixels."""
    patch_size: int = 14
    """Side of a patch in pixels (EfficientNet: always 32)."""
    hidden_size: int = 1024
    """C, width of the features that the projector reads."""
    num_layers: int = 24
    """Blocks in the checkpoint; fewer run when `select_layer` does not need the last ones."""
    num_attention_heads: int = 16
    """Attention heads of a block (CLIP and SigLIP)."""
    ffn_hidden_size: int = 4096
    """Inner width of a block's MLP (CLIP and SigLIP)."""
    activation: Activation = "quick_gelu"
    """Activation of a block's MLP (CLIP and SigLIP; EfficientNet always has relu6)."""
    layer_norm_eps: float = 1e-5
    """Epsilon of the layer norms (CLIP and SigLIP)."""
    select_layer: int = -2
    """Which of the tower's hidden states is used (-2: output of the block before the last, before the final norm)."""
    select_feature: Feature = "cls_patch"
    """Rows of an image: `cls_patch` the CLS (or mean) row and the patches (Parrot); `patch` the patches alone."""

    @property
    def num_patches(self) -> int:
        """Patches of one image."""
        if self.type == "efficientnet_lite0":  # pads what is left at the border, the others leave it out
            return math.ceil(self.image_size / _EFFICIENTNET_STRIDE) ** 2
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_visual_rows(self) -> int:
        """V: patches, behind the CLS row unless `select_feature` leaves it out.

        SigLIP and EfficientNet have no CLS: their mean row takes its place as row 0.
        """
        return self.num_patches + (self.select_feature == "cls_patch")

    def tensor_sizes(self) -> dict[str, int]:
        """What tensor-parallel ranks share: name -> heads or columns; nothing of a convolutional tower."""
        if self.type == "efficientnet_lite0":
            return {}
        return {name: getattr(self, name) for name in ("num_attention_heads", "ffn_hidden_size")}

    def __post_init__(self) -> None:
        for name, choices in (
            ("type", get_args(TowerType)),
            ("activation", get_args(Activation)),
            ("select_feature", get_args(Feature)),
        ):
            if getattr(self, name) not in choices:
                raise ConfigError(f"vision.{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in _SIZES:
            if (size := getattr(self, name)) < 1:
                raise ConfigError(f"vision.{name} must be >= 1, got {size}")
        if not (self.layer_norm_eps > 0 and math.isfinite(self.layer_norm_eps)):
            raise ConfigError(f"vision.layer_norm_eps must be a finite number > 0, got {self.layer_norm_eps}")
        if self.type == "efficientnet_lite0":
            if self.hidden_size != _EFFICIENTNET_WIDTH:
                raise ConfigError(
                    f"vision.hidden_size must be {_EFFICIENTNET_WIDTH} with vision.type=efficientnet_lite0, "
                    f"got {self.hidden_size}"
                )
        else:
            self._check_transformer()
        if not -self.num_layers - 1 <= self.select_layer <= self.num_layers:
            raise ConfigError(
                f"vision.select_layer must name one of {self.num_layers + 1} hidden states, got {self.select_layer}"
            )

    def _check_transformer(self) -> None:
        if self.activation == "relu6":
            raise ConfigError(f"vision.activation relu6 needs vision.type=efficientnet_lite0, got type {self.type}")
        if self.patch_size > self.image_size:
            raise ConfigError(
                f"vision.patch_size must be <= vision.image_size={self.image_size}, got {self.patch_size}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"vision.hidden_size must be a multiple of vision.num_attention_heads={self.num_attention_heads}, "
                f"got {self.hidden_size}"
            )

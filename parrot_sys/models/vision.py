"""Configuration of the vision towers: CLIP ViT, SigLIP, and the small embedded EfficientNet-lite0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from parrot_sys.errors import ConfigError


@dataclass(kw_only=True, frozen=True, slots=True)
class VisionConfig:
    """Sizes of a vision tower; the defaults are those of CLIP ViT-L/14 at 336 pixels."""

    type: Literal["clip", "siglip", "efficientnet_lite0"] = "clip"
    """Architecture of the tower."""
    path: str | None = None
    """Directory with the tower's Hugging Face weights, when the main checkpoint does not hold them."""
    image_size: int = 336
    """Side of the square input in pixels."""
    patch_size: int = 14
    hidden_size: int = 1024
    """C, width of the features that the projector reads."""
    num_layers: int = 24
    """Blocks in the checkpoint; fewer run when `select_layer` does not need the last ones."""
    num_attention_heads: int = 16
    ffn_hidden_size: int = 4096
    activation: Literal["quick_gelu", "gelu_pytorch_tanh", "gelu", "relu6"] = "quick_gelu"
    layer_norm_eps: float = 1e-5
    select_layer: int = -2
    """Which of the tower's hidden states is used (-2: output of the block before the last, before the final norm)."""

    @property
    def num_patches(self) -> int:
        """Patches of one image."""
        side = self.image_size // (32 if self.type == "efficientnet_lite0" else self.patch_size)
        return side * side

    @property
    def num_visual_rows(self) -> int:
        """V: patches plus the CLS row. SigLIP and EfficientNet have no CLS: their mean row takes its place as row 0."""
        return self.num_patches + 1

    def __post_init__(self) -> None:
        if self.type != "efficientnet_lite0" and self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"vision.hidden_size must be a multiple of vision.num_attention_heads={self.num_attention_heads}, "
                f"got {self.hidden_size}"
            )
        if not -self.num_layers - 1 <= self.select_layer <= self.num_layers:
            raise ConfigError(
                f"vision.select_layer must name one of {self.num_layers + 1} hidden states, got {self.select_layer}"
            )

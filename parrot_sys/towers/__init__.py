"""Vision towers: one configuration for all kinds, a file for each kind. No layer of it; those are built above."""

from parrot_sys.towers.config import Feature, VisionConfig
from parrot_sys.towers.hf import KNOWN_TOWERS, vision_config_from_hf, vision_fields
from parrot_sys.towers.registry import TOWERS
from parrot_sys.towers.tiles import NEWLINE, RESOLUTIONS, PictureRows, Tiling, resolutions_from_hf
from parrot_sys.towers.tower import Network, Pixels, TensorNames, Tower, Transformer

__all__ = [
    "KNOWN_TOWERS",
    "NEWLINE",
    "RESOLUTIONS",
    "TOWERS",
    "Feature",
    "Network",
    "PictureRows",
    "Pixels",
    "TensorNames",
    "Tiling",
    "Tower",
    "Transformer",
    "VisionConfig",
    "resolutions_from_hf",
    "vision_config_from_hf",
    "vision_fields",
]

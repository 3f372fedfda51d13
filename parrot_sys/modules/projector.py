"""Projector from the vision tower's width to the LLM's: `mlpNx_gelu` (LLaVA / Parrot naming)."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from parrot_sys.errors import ConfigError
from parrot_sys.parallel import copy_to_group, reduce_from_group


@dataclass(kw_only=True, frozen=True, slots=True)
class ProjectorConfig:
    """Shape of the projector."""

    type: str = "mlp2x_gelu"
    """`linear` or `mlpNx_gelu` with N linear layers (N >= 1)."""

    @property
    def depth(self) -> int:
        """Number of linear layers."""
        match = re.fullmatch(r"mlp([1-9]\d*)x_gelu", self.type)
        return int(match[1]) if match else 1

    def __post_init__(self) -> None:
        if self.type != "linear" and not re.fullmatch(r"mlp([1-9]\d*)x_gelu", self.type):
            raise ConfigError(f"projector.type must be 'linear' or 'mlpNx_gelu' with N >= 1, got {self.type!r}")


class Projector(nn.Sequential):
    """Linear(input_size, hidden_size) then (GELU(erf), Linear(hidden_size, hidden_size)) * (N - 1), all with biases.

    Children are numbered as in the released checkpoints (`mm_projector.0`, `.2`, ...). With `group` two layers are cut
    over its ranks at a time, the first by its outputs and the second by its inputs; a last layer without a partner is
    held whole. All ranks are given the same features and get the same rows.
    """

    def __init__(
        self,
        config: ProjectorConfig,
        input_size: int,
        hidden_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        """
        Args:
            config: number of layers.
            input_size: width of the features.
            hidden_size: width of all layers' outputs.
            device: where the parameters are made.
            dtype: of the parameters.
            group: ranks that share the layers; None holds them whole.

        Raises:
            ConfigError: `hidden_size` cannot be cut.
        """
        layers: list[nn.Module] = [nn.Linear(input_size, hidden_size, device=device, dtype=dtype)]
        for _ in range(config.depth - 1):
            layers += [nn.GELU(), nn.Linear(hidden_size, hidden_size, device=device, dtype=dtype)]
        super().__init__(*layers)
        self.group = group
        if group is not None and config.depth > 1:
            if hidden_size % group.size():
                raise ConfigError(
                    f"the projector's hidden_size must be a multiple of the {group.size()} ranks that share it, "
                    f"got {hidden_size}"
                )
            self._cut(group)

    def cut_dims(self) -> dict[str, int]:
        """Name of each parameter that is cut over `group` -> the dimension that is cut."""
        dims: dict[str, int] = {}
        for first, second in self._pairs():
            dims |= {f"{first}.weight": 0, f"{first}.bias": 0, f"{second}.weight": 1}
        return dims

    def forward(self, features: Tensor) -> Tensor:
        """[..., input_size] -> [..., hidden_size]."""
        if self.group is None:
            return super().forward(features)
        pairs = dict(self._pairs())
        for index, layer in enumerate(self):
            if index in pairs:
                features = copy_to_group(features, self.group)
            if index in pairs.values():
                assert isinstance(layer, nn.Linear), "a pair is two linear layers with an activation between them"
                # The bias is added once, to the sum.
                features = reduce_from_group(F.linear(features, layer.weight), self.group) + layer.bias
            else:
                features = layer(features)
        return features

    def _pairs(self) -> list[tuple[int, int]]:
        """Children of which the first is cut by outputs and the second by inputs."""
        return [(index, index + 2) for index in range(0, len(self) - 2, 4)] if self.group is not None else []

    @torch.no_grad()
    def _cut(self, group: ProcessGroup) -> None:
        """Keeps this rank's part of the layers, which were drawn whole so that they do not depend on the layout."""
        for name, dim in self.cut_dims().items():
            index, _, kind = name.partition(".")
            whole = getattr(self[int(index)], kind)
            part = whole.chunk(group.size(), dim)[group.rank()].clone(memory_format=torch.contiguous_format)
            setattr(self[int(index)], kind, nn.Parameter(part))

"""Parts of a built model: which parameters belong to each, and which of them learn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from parrot_sys.errors import ConfigError
from parrot_sys.megatron.model import MultimodalModel
from parrot_sys.systems.base import OTHERS
from parrot_sys.systems.build import config_of
from parrot_sys.systems.registry import all_parts, part_of


def part_parameters(model: MultimodalModel | Sequence[MultimodalModel]) -> dict[str, list[nn.Parameter]]:
    """Parameters of each part that this rank holds; parts that the model does not have are empty."""
    chunks = [model] if isinstance(model, nn.Module) else model
    config = config_of(chunks[0])
    parts: dict[str, list[nn.Parameter]] = {name: [] for name in all_parts()}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            parts[part_of(name, config)].append(parameter)
    return parts


def set_trainable(model: MultimodalModel | Sequence[MultimodalModel], trainable: Mapping[str, bool]) -> None:
    """Freeze and unfreeze parts by name, OTHERS being those that are not named; without it, they stay as they are.

    Raises:
        ConfigError: for an unknown name.
    """
    parameters = part_parameters(model)
    if unknown := set(trainable) - {*parameters, OTHERS}:
        raise ConfigError(f"parts of the model are {', '.join(parameters)}, got {', '.join(sorted(unknown))}")
    for name, own in parameters.items():
        if (value := trainable.get(name, trainable.get(OTHERS))) is not None:
            for parameter in own:
                parameter.requires_grad_(value)

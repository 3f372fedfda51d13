"""Arguments of transformers' interface that do not exist here: each is refused by its name, none is ignored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from parrot_sys.errors import ConfigError

_OF_A_HUB = frozenset(
    {"code_revision", "token", "revision", "cache_dir", "force_download", "local_files_only", "trust_remote_code"}
)
"""Arguments that the Auto classes hand on, and that say nothing of a local directory."""


def besides_hub(arguments: Mapping[str, Any], *others: str) -> dict[str, Any]:
    """Arguments of `from_pretrained` without those that only a hub needs, and without `others`."""
    return {
        name: value
        for name, value in arguments.items()
        if name not in _OF_A_HUB and name not in others and not name.startswith("_")
    }


def asked_of_adapters(arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    """`adapter_kwargs` of `from_pretrained`, if it asks for anything; where peft is installed it always comes."""
    asked = {name: value for name, value in (arguments or {}).items() if name not in _OF_A_HUB and value is not None}
    return {"adapter_kwargs": asked} if asked else {}


def refuse(arguments: Mapping[str, Any], instead: str = "") -> None:
    """Refuses arguments that ask for something; None and False ask for nothing.

    Args:
        arguments: name -> value.
        instead: what to do in their place.

    Raises:
        ConfigError: names them.
    """
    asked = [f"{name}={value!r:.80}" for name, value in arguments.items() if value is not None and value is not False]
    if asked:
        raise ConfigError(
            f"{', '.join(asked)}: not supported by models of parrot_sys; {instead or 'leave the argument out'}"
        )

"""Configuration of Wings (arXiv 2406.03496): learners and routers in the layers, and whose rule they follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from parrot_sys.errors import ConfigError
from parrot_sys.modules.learners import LearnersConfig
from parrot_sys.systems.section import Compat, ModelSettings, Section


@dataclass(kw_only=True, frozen=True, slots=True)
class WingsConfig(LearnersConfig, Section):
    """Learners and routers of Wings; the defaults are those of the released training scripts."""

    key: ClassVar[str] = "wings"

    def check(self, model: ModelSettings) -> None:
        """Checks the learners against the decoder.

        Raises:
            ConfigError: its heads do not fill its rows, it lacks a layer, or samples may be longer than the router.
        """
        llm = model.llm
        if llm.kv_channels * llm.num_attention_heads != llm.hidden_size:
            raise ConfigError(
                "model.wings needs heads that fill the hidden size: model.llm.head_dim must be "
                f"{llm.hidden_size / llm.num_attention_heads:g}, got {llm.kv_channels}"
            )
        if self.layers is not None and not 0 <= self.layers[0] <= self.layers[-1] < llm.num_layers:
            raise ConfigError(
                f"model.wings.layers must be in 0 .. {llm.num_layers - 1} (model.llm.num_layers={llm.num_layers}), "
                f"got {list(self.layers)}"
            )
        if model.max_seq_len > self.router_positions:
            raise ConfigError(
                f"model.max_seq_len must be <= model.wings.router_positions={self.router_positions}, "
                f"got {model.max_seq_len}"
            )

    @property
    def limits(self) -> Mapping[str, int]:
        """Positions for which the routers have weights."""
        return {"model.wings.router_positions": self.router_positions}

    @property
    def most_images(self) -> int | None:
        """One under the rule of the public code."""
        return 1 if self.rule == "released" else None

    def with_compat(self, compat: Compat) -> WingsConfig:
        """The same settings with what the learners see in the public code or in the paper."""
        return replace(self, rule=compat)

"""Costs of LLaVA: the projector, and a newline row where pictures are cut into tiles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from parrot_sys.systems.config import ParrotConfig
from parrot_sys.systems.cost import Weight
from parrot_sys.systems.image_rows_costs import ImageRowsCosts

if TYPE_CHECKING:
    from parrot_sys.systems.layout import Layout


class LlavaCosts(ImageRowsCosts):
    """Projector and newline row."""

    def weights(self, model: ParrotConfig, layout: Layout) -> Iterator[Weight]:
        """Projector and newline row."""
        yield from super().weights(model, layout)
        if model.tiling is not None:
            yield Weight("projector", model.llm.hidden_size)

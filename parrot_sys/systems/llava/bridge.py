"""LLaVA on Megatron: projected rows of images in the places that their markers have among the text."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from parrot_sys.modules.newline import Newline
from parrot_sys.systems.bridge import ImageRowsBridge


class LlavaBridge(ImageRowsBridge):
    """Tower -> projector -> rows of the decoder; the newline row of tiles comes after those of all images."""

    newline: Newline | None = None

    def build(self) -> None:
        """Makes the projector, and the newline row where there are tiles."""
        super().build()
        if self.model.tiling is not None:
            self.newline = Newline(self.model.llm.hidden_size, dtype=self.config.params_dtype)

    def modules(self) -> Mapping[str, nn.Module | None]:
        """The projector, and the newline row where there are tiles."""
        return {**super().modules(), "newline": self.newline}

    def image_rows(self, features: Tensor) -> Tensor:
        """Rows of all images, and the newline row after them."""
        rows = super().image_rows(features)
        return rows if self.newline is None else self.newline(rows)

"""LLaVA on Megatron: projected rows of images in the places that their markers have among the text."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from parrot_sys.modules.newline import Newline
from parrot_sys.systems.bridge import ImageRowsBridge
from parrot_sys.systems.config import ParrotConfig


class LlavaBridge(ImageRowsBridge):
    """Tower -> projector -> rows of the decoder; the newline row of tiles comes after those of all images."""

    def __init__(
        self,
        model: ParrotConfig,
        config: TransformerConfig,
        groups: ProcessGroupCollection,
        *,
        pre_process: bool,
        bypass: Collection[str] = (),
    ) -> None:
        """See `SystemBridge`."""
        super().__init__(model, config, groups, pre_process=pre_process, bypass=bypass)
        self.newline: Newline | None = None
        if pre_process and model.tiling is not None:
            self.newline = Newline(model.llm.hidden_size, dtype=config.params_dtype)

    def modules(self) -> Mapping[str, nn.Module | None]:
        """The projector, and the newline row where there are tiles."""
        return {**super().modules(), "newline": self.newline}

    def image_rows(self, features: Tensor) -> Tensor:
        """Rows of all images, and the newline row after them."""
        rows = super().image_rows(features)
        return rows if self.newline is None else self.newline(rows)

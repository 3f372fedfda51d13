"""Model provider and training step with which Megatron-Bridge's recipes train models of parrot_sys.

    from parrot_sys.integrations.megatron_bridge.provider import ParrotProvider, forward_step

    config.model = ParrotProvider.from_checkpoint("runs/demo/hf")      # of a ConfigContainer
    config.dataset = ...         # a DatasetProvider whose dataloader_type is "external": iterators of PackedBatch
    pretrain(config, forward_step)

The provider holds the decoder's configuration as Megatron-Bridge knows it (layout, dtype, overrides); the rest of the
model is in `parrot`. Losses are means over all labels of a step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.bridge.models.model_provider import ModelProviderMixin
from megatron.bridge.models.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_config import TransformerConfig as CoreConfig
from torch import Tensor

from parrot_sys import platform
from parrot_sys.data.batch import PackedBatch
from parrot_sys.errors import ConfigError
from parrot_sys.inference.pretrained import released_config
from parrot_sys.megatron.config import to_transformer_config
from parrot_sys.megatron.image_gather import gather_images
from parrot_sys.megatron.model import MultimodalModel
from parrot_sys.megatron.runtime.initialize import ParallelConfig
from parrot_sys.systems.build import build_model
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.systems.load import load_released

_FUNCTIONS = ("finalize_model_grads_func", "grad_scale_func", "grad_sync_func", "no_sync_func", "param_sync_func")
"""Functions that Megatron-Bridge puts into the provider once the model is there; schedules read them from the model."""
_LAYOUT = tuple(each.name for each in dataclasses.fields(ParallelConfig) if each.name != "pipeline_layers")


@dataclasses.dataclass
class ParrotProvider(TransformerConfig, ModelProviderMixin[MultimodalModel]):  # type: ignore[misc]
    """Provider of a model; make one with `from_config` or `from_checkpoint`."""

    parrot: ParrotConfig | None = None
    """Sizes and options of the model."""
    checkpoint: str | None = None
    """Directory in the released layout with the weights to start from; None starts from new ones."""
    freeze_vision_tower: bool = True
    """Train everything but the tower; other parts are chosen by a hook (`register_pre_wrap_hook`)."""
    vocab_size: int | None = None
    should_pad_vocab: bool = False
    make_vocab_size_divisible_by: int = 1
    seq_length: int = 0
    share_embeddings_and_output_weights: bool = False

    @classmethod
    def from_config(
        cls, parrot: ParrotConfig, *, checkpoint: str | Path | None = None, **layout: Any
    ) -> ParrotProvider:
        """The provider of a model.

        Args:
            parrot: sizes and options.
            checkpoint: weights to start from.
            layout: fields of `ParallelConfig`.
        """
        core = to_transformer_config(parrot.llm, ParallelConfig(**layout))
        fields = {each.name: getattr(core, each.name) for each in dataclasses.fields(CoreConfig) if each.init}
        fields["calculate_per_token_loss"] = True
        return cls(
            **fields,
            parrot=parrot,
            checkpoint=None if checkpoint is None else str(checkpoint),
            vocab_size=parrot.llm.vocab_size,
            seq_length=parrot.max_rows,
            share_embeddings_and_output_weights=parrot.llm.tie_word_embeddings,
        )

    @classmethod
    def from_checkpoint(cls, directory: str | Path, **layout: Any) -> ParrotProvider:
        """The provider of an exported directory, which starts from its weights; see `from_config`."""
        return cls.from_config(released_config(Path(directory))[0], checkpoint=directory, **layout)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in _FUNCTIONS:
            for config in vars(self).get("_configs", ()):
                setattr(config, name, value)

    def provide(
        self, pre_process: bool | None = None, post_process: bool | None = None, vp_stage: int | None = None
    ) -> MultimodalModel:
        """This rank's part of the model.

        Args:
            pre_process: not needed: the process groups say it.
            post_process: the same.
            vp_stage: chunk number under the interleaved pipeline schedule.

        Raises:
            ConfigError: the provider was made without a configuration, or its sizes were changed since.
        """
        if self.parrot is None:
            raise ConfigError("ParrotProvider has no model: make it with from_config or from_checkpoint")
        if (self.num_layers, self.hidden_size) != (self.parrot.llm.num_layers, self.parrot.llm.hidden_size):
            raise ConfigError("num_layers and hidden_size are those of `parrot`: change them there")
        model = build_model(
            self.parrot,
            ParallelConfig(**{name: getattr(self, name) for name in _LAYOUT}),
            dtype=self.params_dtype,
            device=platform.device(),
            initialize_weights=self.checkpoint is None,
            pg_collection=getattr(self, "_pg_collection", None),
            vp_stage=vp_stage,
        )
        if self.checkpoint is not None:
            load_released(model, self.checkpoint)
        if model.vision_tower is not None:
            model.vision_tower.requires_grad_(not self.freeze_vision_tower)
        model.config.calculate_per_token_loss = True
        self._configs = (*vars(self).get("_configs", ()), model.config)
        return model


def forward_step(
    state: Any, data_iterator: Iterator[PackedBatch], model: Any, return_schedule_plan: bool = False
) -> tuple[Tensor | None, Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]]:
    """Losses of a micro-batch and what reduces them, for `pretrain` of Megatron-Bridge.

    Args:
        state: of the run.
        data_iterator: micro-batches of this rank, on any device.
        model: this rank's part, wrapped.
        return_schedule_plan: not supported.

    Raises:
        ConfigError: a schedule plan is asked for.
    """
    if return_schedule_plan:
        raise ConfigError(
            "overlap_moe_expert_parallel_comm: models of parrot_sys give no schedule plan; set it to False"
        )
    own = model
    while not isinstance(own, MultimodalModel):
        own = own.module
    device = next(own.parameters()).device
    batch = gather_images(own.share_of_rank(next(data_iterator)).to(device, non_blocking=True), own.pg_collection.tp)
    output = model(batch, mode="loss")

    def reduce(losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        total = losses.sum()
        count = torch.tensor(losses.numel(), dtype=torch.int, device=losses.device)
        return total, count, {"lm loss": torch.stack([total.detach(), count.to(total.dtype)])}

    return (output.hidden if output.losses is None else output.losses), reduce

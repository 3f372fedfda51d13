"""Several processes serve one model: rank 0 runs the program, the others repeat its model calls.

Programs (chat, evaluation, anything on `load_pretrained`) stay as they are for one process. What they ask of the model
goes through `Lockstep`, which tells the other ranks first. Steps of answers are sent as tensors, all else as objects.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parrot_sys.data.batch import PackedBatch
from parrot_sys.data.packing import Sample, pack_samples
from parrot_sys.engine.inputs import StepInputs
from parrot_sys.engine.messages import receive, send_end, send_object, send_step
from parrot_sys.engine.runner import RankModel
from parrot_sys.errors import ConfigError
from parrot_sys.megatron.model import MultimodalModel, ParrotOutput
from parrot_sys.megatron.runtime.initialize import ParallelConfig
from parrot_sys.megatron.runtime.pipeline import forward_logits
from parrot_sys.modules.text_guided_moe import RoutingOutput, RoutingOverride

_CPU = torch.device("cpu")


class Lockstep(RankModel):
    """Calls of one model, repeated by all ranks. Without `lead`, every rank makes the same calls by itself."""

    def __init__(self, model: MultimodalModel) -> None:
        super().__init__(model)
        self._leads = False

    def pack(self, samples: Sequence[Sample], *, max_seq_len: int | None = None) -> PackedBatch:
        """The samples as one micro-batch on the model's device.

        Args:
            samples: with their images.
            max_seq_len: longer samples are cut.
        """
        config = self.config
        batch = pack_samples(
            samples, num_visual_rows=config.rows_per_image, guidance=config.moe.guidance, max_seq_len=max_seq_len
        )
        return batch.to(self.device)

    def forward(
        self,
        batch: PackedBatch,
        *,
        logits_rows: Tensor | None = None,
        routing_override: RoutingOverride | None = None,
        output_router_weights: bool = False,
    ) -> ParrotOutput:
        """Logits and routes of a micro-batch; see `MultimodalModel.forward`.

        Raises:
            ConfigError: router weights are asked of several processes.
        """
        if output_router_weights and dist.get_world_size() > 1:
            raise ConfigError("router weights are given by one process only: load the model without a layout")
        if self._leads:
            rows = None if logits_rows is None else logits_rows.to(_CPU)
            self._repeat("forward", batch=batch.to(_CPU), logits_rows=rows, routing_override=_on_cpu(routing_override))
        return forward_logits(
            self.model,
            batch.to(self.device),
            logits_rows=None if logits_rows is None else logits_rows.to(self.device),
            routing_override=routing_override,
            output_router_weights=output_router_weights,
        )

    def open_cache(self, num_blocks: int, block_size: int) -> None:
        """See `RankModel`; on every rank."""
        self._repeat("open_cache", num_blocks=num_blocks, block_size=block_size)
        super().open_cache(num_blocks, block_size)

    def keep_alive(self) -> None:
        """See `RankModel`; on every rank, as a wait of minutes ends with an error."""
        self._repeat("keep_alive")

    def encode(self, pixels: Tensor) -> Tensor | None:
        """See `RankModel`; on every rank."""
        self._repeat("encode", pixels=pixels.to(_CPU))
        return super().encode(pixels)

    def image_rows(
        self,
        features: Tensor | None,
        sources: Sequence[Tensor],
        guidance_ids: Tensor,
        lengths: Sequence[int],
        override: RoutingOverride | None,
    ) -> tuple[list[Tensor] | None, RoutingOutput | None]:
        """See `RankModel`; on every rank."""
        if self._leads:
            assert features is not None, "the leader is on the first stage"
            self._repeat(
                "image_rows",
                features=features.to(_CPU),
                sources=list(sources),
                guidance_ids=guidance_ids.to(_CPU),
                lengths=list(lengths),
                override=_on_cpu(override),
            )
        return super().image_rows(features, sources, guidance_ids, lengths, override)

    def guidance_weights(self, features: Tensor | None, guidance_ids: Tensor) -> Tensor | None:
        """See `RankModel`; on every rank."""
        if self._leads:
            assert features is not None, "the leader is on the first stage"
            self._repeat("guidance_weights", features=features.to(_CPU), guidance_ids=guidance_ids.to(_CPU))
        return super().guidance_weights(features, guidance_ids)

    def run_step(self, inputs: StepInputs) -> Tensor:
        """See `RankModel`; on every rank. Tensors alone are sent, no objects."""
        if self._leads:
            send_step(inputs, self.device)
        return super().run_step(inputs)

    def run_whole(self, inputs: StepInputs) -> Tensor:
        """See `RankModel`; on every rank."""
        rows = None if inputs.image_rows is None else inputs.image_rows.to(_CPU)
        self._repeat("run_whole", inputs=dataclasses.replace(inputs, image_rows=rows))
        return super().run_whole(inputs)

    def run(self, program: Callable[[], int]) -> int:
        """Runs `program` on rank 0 while the other ranks follow it.

        Returns:
            What the program returned; 0 on the other ranks.
        """
        if dist.get_world_size() == 1:
            return program()
        if dist.get_rank() > 0:
            self._follow()
            return 0
        self._leads = True
        try:
            return program()
        finally:
            send_end(self.device)
            self._leads = False

    def _repeat(self, name: str, **arguments: Any) -> None:
        """Has the other ranks make the same call."""
        if self._leads:
            send_object((name, arguments), self.device)

    @torch.inference_mode()
    def _follow(self) -> None:
        while (message := receive(self.device)) is not None:
            if isinstance(message, StepInputs):
                self.run_step(message)
            else:
                name, arguments = message
                getattr(self, name)(**arguments)


def _on_cpu(override: RoutingOverride | None) -> RoutingOverride | None:
    if override is None or override.probs is None:
        return override
    return RoutingOverride(probs=override.probs.to(_CPU))


def inference_layout(parallel: ParallelConfig | None) -> ParallelConfig:
    """The layout for inference: sequence parallelism only saves memory in training and is switched off.

    Raises:
        ConfigError: the layout has what inference lacks.
    """
    parallel = parallel or ParallelConfig()
    for name in ("context_parallel_size", "virtual_pipeline_model_parallel_size"):
        if (size := getattr(parallel, name)) not in (None, 1):
            raise ConfigError(f"parallel.{name} is for training only, got {size}: leave it unset")
    return dataclasses.replace(parallel, sequence_parallel=False)


def check_processes(parallel: ParallelConfig, world_size: int) -> None:
    """Raise ConfigError unless `world_size` processes serve exactly one model."""
    tensor = parallel.tensor_model_parallel_size
    experts = (parallel.expert_tensor_parallel_size or tensor) * parallel.expert_model_parallel_size
    needed = max(tensor, experts) * parallel.pipeline_model_parallel_size
    if world_size != needed:
        raise ConfigError(
            f"this layout serves one model with {needed} processes, got {world_size}: start {needed}, or set "
            "parallel.tensor_model_parallel_size or parallel.pipeline_model_parallel_size"
        )

"""MultimodalModel on Megatron-Core: rows and memory that a system's bridge makes of a batch, then the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.pipeline_parallel.utils import is_pp_last_stage, is_vp_last_stage
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from parrot_sys.data.batch import PackedBatch
from parrot_sys.data.context_share import share_of_rank
from parrot_sys.errors import DataError
from parrot_sys.megatron.attention.paged import PagedRows
from parrot_sys.megatron.bridge import Bridge, Embedded, PreparedStep
from parrot_sys.megatron.decoder import Decoder, layer_spec
from parrot_sys.megatron.experts import mark_token_experts
from parrot_sys.megatron.runtime import backends
from parrot_sys.modules.lora import LoRAConfig
from parrot_sys.modules.losses import attach_loss
from parrot_sys.modules.text_guided_moe import RoutingOutput, RoutingOverride


@dataclass(frozen=True, kw_only=True, slots=True)
class ParrotOutput:
    """Output of a forward pass; on the last pipeline stage one of `losses` and `logits`."""

    losses: Tensor | None = None  # [L] float32, one per label row
    logits: Tensor | None = None  # [rows, vocabulary]
    hidden: Tensor | None = None  # [T, 1, H], for the next pipeline stage
    routing: RoutingOutput | None = None  # None without images in inference, without experts, and after the first stage
    router_weights: dict[int, Tensor] | None = None
    """When asked for: what the routers inside this rank's layers decided, number of the layer, from 1 -> float32
    [T, 2] (of this rank's rows, where they are dealt); None where the layers have no routers."""


class MultimodalModel(MegatronModule):
    """The whole model for packed micro-batches, or the part of it that one pipeline stage has.

    Under `mode="loss"` the backward pass includes the auxiliary losses; `ParrotOutput.routing` holds their values, to
    be reported only.
    """

    def __init__(
        self,
        bridge: Bridge,
        config: TransformerConfig,
        *,
        pg_collection: ProcessGroupCollection,
        vision_tower: nn.Module | None,
        lora: LoRAConfig | None = None,
        vp_stage: int | None = None,
    ) -> None:
        """
        Args:
            bridge: of the system; its modules become this model's.
            config: of the decoder.
            pg_collection: process groups.
            vision_tower: on the first stage, unless all batches bring cached features.
            lora: low-rank updates of the decoder's linear layers.
            vp_stage: chunk number under the interleaved pipeline schedule.
        """
        super().__init__(config=config)
        self.model_type = ModelType.encoder_or_decoder
        self.bridge = bridge
        self.lora = lora
        self.pg_collection = pg_collection
        self.tp_group = pg_collection.tp
        self.vp_stage = vp_stage
        virtual = config.virtual_pipeline_model_parallel_size
        self.pre_process = bridge.pre_process
        self.post_process = is_vp_last_stage(vp_stage, virtual) and is_pp_last_stage(pg_collection.pp)
        self.vision_tower = vision_tower
        bridge.tower = vision_tower
        for name, module in bridge.modules().items():
            self.register_module(name, module)
        self.decoder = Decoder(
            bridge.llm,
            config,
            pg_collection=pg_collection,
            pre_process=self.pre_process,
            post_process=self.post_process,
            vp_stage=vp_stage,
            spec_of_layer=self._spec_of_layer,
        )
        mark_token_experts(self.decoder, pg_collection)
        self.share_embeddings_and_output_weights = bridge.llm.tie_word_embeddings
        self.register_load_state_dict_post_hook(backends.ignore_extra_state)

    def _spec_of_layer(self, number: int) -> ModuleSpec:
        llm = self.bridge.llm
        spec = layer_spec(lora=self.lora, qk_norm=llm.qk_norm, token_experts=llm.has_experts(number - 1))
        return self.bridge.layer_spec(spec, number)

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None] | None) -> None:
        """Hidden states of the previous pipeline stage (called by Megatron's schedules)."""
        self.decoder.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """Weight that the first and the last pipeline stage share when embeddings are tied."""
        return self.decoder.shared_embedding_or_output_weight()

    def share_of_rank(self, batch: PackedBatch) -> PackedBatch:
        """The share of a micro-batch that `forward` takes, made on the CPU: under context parallelism the labels and
        images of this rank, else the batch itself."""
        size = self.pg_collection.cp.size()
        if size == 1:
            return batch
        multiple = self.pg_collection.tp.size() if self.config.sequence_parallel else 1
        return share_of_rank(batch, self.pg_collection.cp.rank(), size, multiple_of=multiple)

    def prepare_step(self, batches: list[PackedBatch], group: torch.distributed.ProcessGroup) -> PreparedStep | None:
        """Statistics over the micro-batches of a training step on this rank; see `Bridge.prepare_step`."""
        return self.bridge.prepare_step(self.decoder, batches, group)

    def start_step(self, step: int) -> None:
        """Sets what depends on the number of the training step, counted from 0; see `Bridge.start_step`."""
        self.bridge.start_step(step)

    def finish_step(self, *, updated: bool) -> None:
        """Changes what a training step changes besides the parameters; see `Bridge.finish_step`."""
        self.bridge.finish_step(updated=updated)

    def sharded_state_dict(self, prefix: str = "", *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Every tensor with its place in the whole model, for distributed checkpoints that load on any layout.

        It is the same whichever back end the layers are built of.
        """
        state: dict[str, Any] = backends.without_extra_state(super().sharded_state_dict(prefix, *args, **kwargs))
        return state | self.bridge.sharded_state(prefix)

    def forward(
        self,
        batch: PackedBatch,
        *,
        mode: Literal["loss", "logits"] = "loss",
        logits_rows: Tensor | None = None,
        routing_override: RoutingOverride | None = None,
        paged: PagedRows | None = None,
        output_router_weights: bool = False,
    ) -> ParrotOutput:
        """
        Args:
            batch: packed micro-batch on the device of the model; may be empty or without images. Under context
                parallelism from `share_of_rank`; losses and routes are then those of this rank's rows and images.
            mode: `loss` gives one loss per label row, `logits` the logits of `logits_rows`.
            logits_rows: int64 rows of the pack; all rows when None.
            routing_override: replaces the routes of the images (evaluation only).
            paged: places of the rows in a paged cache; images then come as `image_rows` of the batch.
            output_router_weights: also return what the routers inside the layers decide.

        Raises:
            ConfigError, DataError: if batch and model do not fit together.
        """
        self._check_share(batch)
        plan = self.bridge.plan(batch, paged, output_router_weights=output_router_weights)
        embedded: Embedded | None = None
        if self.pre_process:
            embedded = self.bridge.embed(self.decoder, batch, plan, routing_override, paged=paged is not None)
        routing = None if embedded is None else embedded.routing
        rows = None if embedded is None else embedded.rows
        if rows is not None and routing is not None and mode == "loss":
            for loss in (routing.aux_loss, routing.z_loss):
                if loss is not None:
                    rows = attach_loss(rows, loss)
        output = self.decoder(
            rows,
            batch.position_ids,
            batch.cu_seqlens,
            batch.max_seqlen,
            label_rows=batch.label_rows,
            targets=batch.labels.index_select(0, batch.label_rows) if mode == "loss" else None,
            logits_rows=logits_rows,
            paged=paged,
            split=None if batch.context is None else batch.context.rows,
            memory=None if embedded is None else embedded.memory,
            memory_plan=plan,
        )
        name = "hidden" if not self.post_process else "losses" if mode == "loss" else "logits"
        return ParrotOutput(
            routing=routing,
            router_weights=self.bridge.router_weights(plan),
            **{name: output},
        )

    def _check_share(self, batch: PackedBatch) -> None:
        group, share = self.pg_collection.cp, batch.context
        if (group.rank(), group.size()) != ((0, 1) if share is None else (share.rank, share.rows.size)):
            got = "a whole micro-batch" if share is None else f"that of rank {share.rank} of {share.rows.size}"
            raise DataError(
                f"the model wants the share of context-parallel rank {group.rank()} of {group.size()}, got {got}: "
                "pass model.share_of_rank(batch)"
            )

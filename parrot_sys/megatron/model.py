"""MultimodalModel on Megatron-Core: vision tower -> projector -> text-guided MoE -> decoder (arXiv 2406.02539)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.pipeline_parallel.utils import (
    is_pp_first_stage,
    is_pp_last_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from parrot_sys.data.batch import PackedBatch
from parrot_sys.data.context_share import share_of_rank
from parrot_sys.errors import DataError
from parrot_sys.megatron.attention.kv_cache import KVCache
from parrot_sys.megatron.attention.memory import MemoryPlan
from parrot_sys.megatron.config import Recompute, to_transformer_config
from parrot_sys.megatron.decoder import Decoder, layer_spec
from parrot_sys.megatron.experts import (
    expert_groups,
    mark_experts,
    mark_projector,
    mark_token_experts,
    multi_rank_group,
    sharded_experts,
    sharded_projector,
)
from parrot_sys.megatron.flamingo import flamingo_layer_spec, media_plan
from parrot_sys.megatron.runtime import backends
from parrot_sys.megatron.runtime.initialize import ParallelConfig
from parrot_sys.megatron.wings import with_learners
from parrot_sys.megatron.wings_memory import WingsPlan, gather_memory, plan_memory
from parrot_sys.models.parrot import ParrotConfig
from parrot_sys.modules.lora import LoRAConfig
from parrot_sys.modules.losses import attach_loss
from parrot_sys.modules.perceiver import PerceiverResampler
from parrot_sys.modules.projector import Projector
from parrot_sys.modules.text_guided_moe import RoutingOutput, RoutingOverride, TextGuidedMoE
from parrot_sys.parallel import all_gather_rows


@dataclass(frozen=True, kw_only=True, slots=True)
class ParrotOutput:
    """Output of a forward pass; on the last pipeline stage one of `losses` and `logits`."""

    losses: Tensor | None = None  # [L] float32, one per label row
    logits: Tensor | None = None  # [rows, vocabulary]
    hidden: Tensor | None = None  # [T, 1, H], for the next pipeline stage
    routing: RoutingOutput | None = None  # None without images in inference, without MoE, and after the first stage


class MultimodalModel(MegatronModule):
    """The whole model for packed micro-batches.

    `use_moe` switches the MoE off (stage 1: the projected rows go to the decoder as they are), `use_router` routers and
    textual learners of Wings (stage 1: the visual learners alone, added as they are). Under `mode="loss"` the
    backward pass includes the auxiliary losses; `ParrotOutput.routing` holds their values, to be reported only.
    """

    merged_lora: LoRAConfig | None = None
    """Value of `parrot.lora` before `merge_lora`."""

    def __init__(
        self,
        parrot: ParrotConfig,
        config: TransformerConfig,
        *,
        pg_collection: ProcessGroupCollection,
        vision_tower: nn.Module | None,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config=config)
        self.model_type = ModelType.encoder_or_decoder
        self.parrot = parrot
        self.pg_collection = pg_collection
        self.tp_group = pg_collection.tp
        self.vp_stage = vp_stage
        virtual = config.virtual_pipeline_model_parallel_size
        self.pre_process = is_vp_first_stage(vp_stage, virtual) and is_pp_first_stage(pg_collection.pp)
        self.post_process = is_vp_last_stage(vp_stage, virtual) and is_pp_last_stage(pg_collection.pp)
        self.use_moe = parrot.moe.num_experts > 0
        self.use_router = True
        self.vision_tower = vision_tower
        self.resampler: PerceiverResampler | None = None
        self.projector: Projector | None = None
        self.moe: TextGuidedMoE | None = None
        hidden_size, dtype = parrot.llm.hidden_size, config.params_dtype
        if self.pre_process and parrot.flamingo is not None:
            self.resampler = PerceiverResampler(parrot.flamingo.resampler, parrot.vision.hidden_size, dtype=dtype)
        elif self.pre_process:
            self.projector = Projector(
                parrot.projector,
                parrot.vision.hidden_size,
                hidden_size,
                dtype=dtype,
                group=multi_rank_group(self.tp_group),
            )
            mark_projector(self.projector)
            if parrot.moe.num_experts:
                self.moe = TextGuidedMoE(
                    parrot.moe,
                    hidden_size,
                    dtype=dtype,
                    statistics_group=pg_collection.dp_cp,
                    groups=expert_groups(pg_collection),
                )
                mark_experts(self.moe, pg_collection)
        self.decoder = Decoder(
            parrot.llm,
            config,
            pg_collection=pg_collection,
            pre_process=self.pre_process,
            post_process=self.post_process,
            vp_stage=vp_stage,
            spec_of_layer=self._spec_of_layer,
        )
        mark_token_experts(self.decoder, pg_collection)
        self.share_embeddings_and_output_weights = parrot.llm.tie_word_embeddings
        self.register_load_state_dict_post_hook(backends.ignore_extra_state)

    def _spec_of_layer(self, number: int) -> ModuleSpec:
        parrot, llm = self.parrot, self.parrot.llm
        spec = layer_spec(lora=parrot.lora, qk_norm=llm.qk_norm, token_experts=llm.has_experts(number - 1))
        if parrot.wings is not None:
            return with_learners(spec, parrot.wings, rope_base=llm.rope_base)
        if parrot.flamingo is not None:
            return flamingo_layer_spec(spec, parrot.flamingo, parrot.vision.hidden_size, number, parrot.lora)
        return spec

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

    def sharded_state_dict(self, prefix: str = "", *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Every tensor with its place in the whole model, for distributed checkpoints that load on any layout.

        It is the same whichever back end the layers are built of.
        """
        state: dict[str, Any] = backends.without_extra_state(super().sharded_state_dict(prefix, *args, **kwargs))
        if self.projector is not None:
            state |= sharded_projector(self.projector, f"{prefix}projector.", self.pg_collection)
        if self.moe is not None:
            state |= sharded_experts(self.moe, f"{prefix}moe.", self.pg_collection)
        return state

    def forward(
        self,
        batch: PackedBatch,
        *,
        mode: Literal["loss", "logits"] = "loss",
        logits_rows: Tensor | None = None,
        routing_override: RoutingOverride | None = None,
        kv_cache: KVCache | None = None,
        router_weights: dict[int, Tensor] | None = None,
    ) -> ParrotOutput:
        """
        Args:
            batch: packed micro-batch on the device of the model; may be empty or without images. Under context
                parallelism from `share_of_rank`; losses and routes are then those of this rank's rows and images.
            mode: `loss` gives one loss per label row, `logits` the logits of `logits_rows`.
            logits_rows: int64 rows of the pack; all rows when None.
            routing_override: replaces the routes of the images (evaluation only).
            kv_cache: cache of the samples of this batch; its first use is the prefill, then one row a sample.
            router_weights: filled with what the routers of Wings weigh the learners by: number of each layer of this
                rank, from 1 -> float32 [T, 2], visual and textual (of this rank's rows, where they are dealt).

        Raises:
            ConfigError, DataError: if batch and model or cache do not fit together.
        """
        self._check_share(batch)
        if kv_cache is not None:
            kv_cache.check(batch.num_samples, batch.num_rows, batch.max_seqlen)
        plan = self.memory_plan(batch, kv_cache, router_weights)
        embeddings, memory, routing = None, None, None
        if self.pre_process and self.resampler is not None and plan is not None:
            embeddings, memory = self._embed_media(batch, plan)
        elif self.pre_process:
            # (Rows after the prefill are text, on every rank.)
            decoding = kv_cache is not None and kv_cache.max_length > 0
            embeddings, routing = self._embed(batch, routing_override, decoding=decoding)
        if embeddings is not None and routing is not None and mode == "loss":
            for loss in (routing.aux_loss, routing.z_loss):
                if loss is not None:
                    embeddings = attach_loss(embeddings, loss)
        if embeddings is not None and isinstance(plan, WingsPlan):
            memory = gather_memory(embeddings, plan, self._blank_rows() if plan.needs_blank else None)
        output = self.decoder(
            embeddings,
            batch.position_ids,
            batch.cu_seqlens,
            batch.max_seqlen,
            label_rows=batch.label_rows,
            targets=batch.labels.index_select(0, batch.label_rows) if mode == "loss" else None,
            logits_rows=logits_rows,
            cache=kv_cache,
            split=None if batch.context is None else batch.context.rows,
            memory=memory,
            memory_plan=plan,
        )
        if not self.post_process:
            return ParrotOutput(hidden=output, routing=routing)
        if mode == "loss":
            return ParrotOutput(losses=output, routing=routing)
        return ParrotOutput(logits=output, routing=routing)

    @property
    def takes_cache(self) -> bool:
        """Whether a KV cache can be used: the released rule of Wings lets earlier rows read later ones."""
        return self.parrot.wings is None or self.parrot.wings.rule == "paper"

    def memory_plan(
        self, batch: PackedBatch, kv_cache: KVCache | None = None, router_weights: dict[int, Tensor] | None = None
    ) -> MemoryPlan | None:
        """Plan of what the layers read besides their rows, and who sees what of it; None where they read nothing else.

        Args:
            batch, kv_cache, router_weights: as for `forward`, before its call.

        Raises:
            ConfigError, DataError: see `plan_memory` of `wings_memory`.
        """
        if self.parrot.wings is None:
            return media_plan(self.parrot, batch, kv_cache)
        return plan_memory(
            batch,
            self.parrot.wings,
            width=self.parrot.llm.hidden_size,
            rows_per_image=self.parrot.rows_per_image,
            routed=self.use_router,
            cache=kv_cache,
            weights=router_weights,
        )

    def _blank_rows(self) -> Tensor:
        """[V, H], projected rows of an all-zero image."""
        if self.vision_tower is None:
            raise DataError("the released rule of Wings needs the vision tower for text among images, got none")
        assert self.projector is not None, "the first stage holds the projector"
        side, dtype = self.parrot.vision.image_size, self.config.params_dtype
        device = next(self.projector.parameters()).device
        pixels = torch.zeros(1, 3, side, side, dtype=dtype, device=device)
        rows: Tensor = self.projector(self.vision_tower(pixels).to(dtype))
        return rows[0]

    def _check_share(self, batch: PackedBatch) -> None:
        group, share = self.pg_collection.cp, batch.context
        if (group.rank(), group.size()) != ((0, 1) if share is None else (share.rank, share.rows.size)):
            got = "a whole micro-batch" if share is None else f"that of rank {share.rank} of {share.rows.size}"
            raise DataError(
                f"the model wants the share of context-parallel rank {group.rank()} of {group.size()}, got {got}: "
                "pass model.share_of_rank(batch)"
            )

    def _embed(
        self, batch: PackedBatch, override: RoutingOverride | None, *, decoding: bool
    ) -> tuple[Tensor, RoutingOutput | None]:
        """Embeddings [T, H] with the visual rows in place, and the routes of the images."""
        embeddings = self.decoder.embed(batch.input_ids)
        all_images = batch.num_images if batch.context is None else sum(batch.context.image_counts)
        awaited = self.moe is not None and self.use_moe and self.moe.needs_other_ranks and not decoding
        if all_images == 0 and not torch.is_grad_enabled() and not awaited:
            return embeddings, None
        # In training the same modules run with zero rows when there is no image: every parameter hook fires everywhere.
        # So they do whenever the experts of this rank may be wanted by another.
        assert self.projector is not None, "the first stage holds the projector"
        features = self.projector(self.image_features(batch))  # [n, V, H]
        routing = None
        if self.moe is not None and self.use_moe:
            text = embeddings.index_select(0, batch.guidance_rows)
            features, routing = self.moe(features, text, batch.guidance_start, batch.guidance_end, override=override)
        if batch.context is not None:
            # Each rank has routed its own images; any rank may hold rows of any image.
            features = all_gather_rows(features, batch.context.image_counts, self.pg_collection.cp)
        visual = features.flatten(0, 1).index_select(0, batch.visual_source)
        return embeddings.index_copy(0, batch.visual_rows, visual), routing

    def _embed_media(self, batch: PackedBatch, plan: MemoryPlan) -> tuple[Tensor, Tensor | None]:
        """Embeddings [T, H], with that of the image token for images, and their latents [M, C]; None when none are
        read."""
        flamingo, ids = self.parrot.flamingo, batch.input_ids
        assert flamingo is not None, "the plan is that of a model with cross-attention"
        assert self.resampler is not None, "the first stage has the resampler"
        embeddings = self.decoder.embed(torch.where(ids < 0, flamingo.image_token_id, ids))
        if plan.rows == 0 and not torch.is_grad_enabled():
            return embeddings, None
        latents = self.resampler(self.image_features(batch))  # [n, L, C]
        if batch.context is not None:
            latents = all_gather_rows(latents, batch.context.image_counts, self.pg_collection.cp)
        if plan.rows == 0:
            # Nobody reads them, but the hooks of every parameter must fire: in training they hang on the text.
            embeddings = embeddings + latents.sum().to(embeddings.dtype)
        return embeddings, latents.flatten(0, 1)

    def image_features(self, batch: PackedBatch) -> Tensor:
        """[n, V, C] from the tower, or as cached; the first pipeline stage has them."""
        vision, dtype = self.parrot.vision, self.config.params_dtype
        trainable = self.vision_tower is not None and any(p.requires_grad for p in self.vision_tower.parameters())
        if batch.image_features is not None:
            if trainable:
                raise DataError(
                    "the batch holds cached image features, which cannot train the vision tower: give pixel values"
                )
            return batch.image_features.to(dtype)
        if batch.num_images == 0 and not trainable:
            return batch.input_ids.new_empty((0, vision.num_visual_rows, vision.hidden_size), dtype=dtype)
        if self.vision_tower is None:
            raise DataError("the batch holds pixel values, but the model was built without its vision tower")
        pixels = batch.pixel_values
        if pixels is None:
            pixels = batch.input_ids.new_empty((0, 3, vision.image_size, vision.image_size), dtype=dtype)
        with torch.set_grad_enabled(torch.is_grad_enabled() and trainable):
            return self.vision_tower(pixels.to(dtype)).to(dtype)


def build_model(
    parrot: ParrotConfig,
    parallel: ParallelConfig | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    recompute: Recompute = "none",
    with_vision_tower: bool = True,
    initialize_weights: bool = True,
    pg_collection: ProcessGroupCollection | None = None,
    vp_stage: int | None = None,
) -> MultimodalModel:
    """Build the part of the model that this rank holds; `initialize` must have been called.

    Args:
        parrot: sizes and options.
        parallel: layout, as given to `initialize`.
        dtype: of parameters and activations.
        device: where the parameters are; `meta` gives shapes only, in no time and no memory.
        recompute: `full` computes the activations of each decoder layer again in the backward pass.
        with_vision_tower: False when all batches bring cached features.
        initialize_weights: False leaves the decoder's weights uninitialised, for checkpoints.
        pg_collection: process groups; those of `initialize` when not given.
        vp_stage: chunk number under the interleaved pipeline schedule.
    """
    parallel = parallel or ParallelConfig()
    device = torch.device(device)
    groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
    config = to_transformer_config(
        parrot.llm,
        parallel,
        dtype=dtype,
        recompute=recompute,
        initialize_weights=initialize_weights and device.type != "meta",
    )
    # (Megatron's spelling.) Layers with and without a gated block, or experts, differ.
    some_layers = parrot.wings is not None and parrot.wings.layers is not None
    some_experts = len({parrot.llm.has_experts(layer) for layer in range(parrot.llm.num_layers)}) > 1
    config.hetereogenous_dist_checkpoint = parrot.flamingo is not None or some_layers or some_experts
    first = is_vp_first_stage(vp_stage, parallel.virtual_pipeline_model_parallel_size) and is_pp_first_stage(groups.pp)
    with torch.device("meta" if device.type == "meta" else "cpu"), backends.building_for(device):
        tower = None
        if with_vision_tower and first:
            from parrot_sys.megatron.vision import build_vision_tower

            tower = build_vision_tower(
                parrot.vision, parallel, dtype=dtype, initialize_weights=config.perform_initialization
            )
        model = MultimodalModel(parrot, config, pg_collection=groups, vision_tower=tower, vp_stage=vp_stage)
    return model if device.type == "meta" else model.to(device)


def build_chunks(parrot: ParrotConfig, parallel: ParallelConfig, **settings: Any) -> list[MultimodalModel]:
    """All parts of the model that this rank holds: several under the interleaved pipeline schedule, else one.

    Args:
        parrot: sizes and options.
        parallel: layout, as given to `initialize`.
        **settings: see `build_model`.
    """
    virtual = parallel.virtual_pipeline_model_parallel_size
    stages = [None] if virtual is None else range(virtual)
    return [build_model(parrot, parallel, vp_stage=stage, **settings) for stage in stages]

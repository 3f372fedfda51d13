"""Parrot in vLLM, and what it shares with Wings: vLLM's own decoder behind `Visual`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import CompilationMode, VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.models.interfaces import SupportsMultiModal, SupportsPP
from vllm.model_executor.models.utils import AutoWeightsLoader, init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.platforms import current_platform

from parrot_sys.errors import ConfigError
from parrot_sys.files import read_json
from parrot_sys.models.llm import FAMILIES
from parrot_sys.systems.hf_config import CONFIG, find_tower_directory
from parrot_vllm.checkpoint import MARKER_TEXT, open_checkpoint
from parrot_vllm.processing import DummyInputs, ProcessingInfo, Processor
from parrot_vllm.visual import Visual

CACHE_OPTION = "parrot_feature_cache_mb"
"""In `--additional-config`: megabytes of features of pictures that are kept."""
_CACHE_MB = 256
_VISUAL_KEYS = ("model.mm_projector.", "model.moe_model.", "model.vision_tower.")


def _check_stages(config: VllmConfig) -> None:
    """
    Raises:
        ConfigError: no stage but the first would have room for what it receives.
    """
    stages, eager = config.parallel_config.pipeline_parallel_size, CompilationMode.NONE
    if stages > 1 and current_platform.is_cpu() and config.compilation_config.mode == eager:
        raise ConfigError(
            f"pipeline_parallel_size={stages}: vLLM's CPU engine makes room for what a stage receives in a trial run, "
            "which it leaves out under enforce_eager. Start without it, or with --compilation-config "
            """'{"mode": 2, "backend": "eager"}'"""
        )


class ImageRowsForVllm(nn.Module, SupportsMultiModal, SupportsPP):
    """The decoder is cut by vLLM's parallelism; the ranks of the first stage share the rest, see `Visual`."""

    supports_encoder_tp_data = True

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """Text of a picture in a chat's prompt."""
        return MARKER_TEXT if modality == "image" else None

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """
        Args:
            vllm_config: of the engine.
            prefix: of parameters' names.

        Raises:
            ConfigError: pipeline stages without a trial run.
        """
        super().__init__()
        _check_stages(vllm_config)
        self.checkpoint = open_checkpoint(vllm_config.model_config.model)
        config, text = self.checkpoint.config, vllm_config.model_config.hf_config.text_config
        self.configure_mm_token_handling(config.llm.vocab_size, [self.checkpoint.marker])
        megabytes = (vllm_config.additional_config or {}).get(CACHE_OPTION, _CACHE_MB)
        self.visual: Visual | None = None
        with self._mark_tower_model(vllm_config, "image"):
            if get_pp_group().is_first_rank:
                dtype, name = vllm_config.model_config.dtype, maybe_prefix(prefix, "visual")
                self.visual = Visual(config, dtype, int(megabytes) << 20, name)
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=text,
                prefix=maybe_prefix(prefix, "language_model"),
                architectures=[f"{FAMILIES[config.llm.family].architecture}ForCausalLM"],
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    def embed_multimodal(
        self, pixel_values: Sequence[Tensor] | None = None, guidance_ids: Sequence[Tensor] | None = None, **others: Any
    ) -> list[Tensor]:
        """Rows [V, H] of each picture, routed by the text of its prompt."""
        if pixel_values is None or guidance_ids is None:
            return []
        if self.visual is None:  # (later stages are asked in the engine's trial run, for the size of the rows)
            config, dtype = self.checkpoint.config, pixel_values[0].dtype
            shape = (config.vision.num_visual_rows, config.llm.hidden_size)
            return [torch.zeros(shape, dtype=dtype, device=picture.device) for picture in pixel_values]
        routed = self.visual.moe is not None
        texts = [self.language_model.embed_input_ids(ids.flatten()) for ids in guidance_ids] if routed else []
        return self.visual(list(pixel_values), texts)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **others: Any,
    ) -> Any:
        """The decoder's."""
        if intermediate_tensors is not None:
            inputs_embeds = None
        return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """The decoder's."""
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Released tensors: the decoder has vLLM's loader, `Visual` one for the rest."""
        own: dict[str, Tensor] = {}

        def decoder() -> Iterable[tuple[str, Tensor]]:
            for name, tensor in weights:
                if name.startswith(_VISUAL_KEYS):
                    if self.visual is not None:
                        own[name] = tensor
                elif not (name == "lm_head.weight" and self.checkpoint.config.llm.tie_word_embeddings):
                    yield name, tensor

        loaded = {f"language_model.{name}" for name in AutoWeightsLoader(self.language_model).load_weights(decoder())}
        if self.visual is not None:
            directory = self.checkpoint.directory
            beside = find_tower_directory(read_json(directory / CONFIG), directory)
            loaded |= {f"visual.{name}" for name in self.visual.load(own, beside, str(directory))}
        return loaded


@MULTIMODAL_REGISTRY.register_processor(Processor, info=ProcessingInfo, dummy_inputs=DummyInputs)
class ParrotForVllm(ImageRowsForVllm):
    """Rows of pictures are turned by experts that the prompt chooses."""

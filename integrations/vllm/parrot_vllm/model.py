"""Parrot in vLLM: vLLM's own decoder behind tower, projector and text-guided experts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.models.interfaces import SupportsMultiModal, SupportsPP
from vllm.model_executor.models.utils import AutoWeightsLoader, init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY

from parrot_sys.files import read_json
from parrot_sys.models.llm import FAMILIES
from parrot_sys.systems.hf_config import CONFIG, find_tower_directory
from parrot_vllm.checkpoint import MARKER_TEXT, open_checkpoint
from parrot_vllm.processing import GUIDANCE, DummyInputs, ProcessingInfo, Processor
from parrot_vllm.visual import Visual

CACHE_OPTION = "parrot_feature_cache_mb"
"""In `--additional-config`: megabytes of features of pictures that are kept."""
_CACHE_MB = 256
_VISUAL_KEYS = ("model.mm_projector.", "model.moe_model.", "model.vision_tower.")


@MULTIMODAL_REGISTRY.register_processor(Processor, info=ProcessingInfo, dummy_inputs=DummyInputs)
class ParrotForVllm(nn.Module, SupportsMultiModal, SupportsPP):
    """The decoder is cut by vLLM's parallelism; each rank of the first stage holds the rest whole."""

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """Text of a picture in a chat's prompt."""
        return MARKER_TEXT if modality == "image" else None

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """
        Args:
            vllm_config: of the engine.
            prefix: of parameters' names.
        """
        super().__init__()
        self.checkpoint = open_checkpoint(vllm_config.model_config.model)
        config, text = self.checkpoint.config, vllm_config.model_config.hf_config.text_config
        self.configure_mm_token_handling(config.llm.vocab_size, [self.checkpoint.marker])
        megabytes = (vllm_config.additional_config or {}).get(CACHE_OPTION, _CACHE_MB)
        self.visual: Visual | None = None
        with self._mark_tower_model(vllm_config, "image"):
            if get_pp_group().is_first_rank:
                self.visual = Visual(config, vllm_config.model_config.dtype, int(megabytes) << 20)
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
        assert self.visual is not None, f"{GUIDANCE} reach the first stage alone"
        texts = [self.language_model.embed_input_ids(ids.flatten()) for ids in guidance_ids]
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

"""Prompts and pictures for vLLM; the text that guides a picture's route is a part of the picture's identity."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import BatchFeature
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
)

from parrot_vllm.checkpoint import MARKER_TEXT, Checkpoint, open_checkpoint

GUIDANCE = "guidance_ids"
"""Argument of the processor, and so a part of the hash of each picture."""


class ProcessingInfo(BaseProcessingInfo):
    """Sizes of the checkpoint."""

    @property
    def checkpoint(self) -> Checkpoint:
        """The exported directory."""
        return open_checkpoint(self.ctx.model_config.model)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Any number of pictures in a prompt."""
        return {"image": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """Every picture has as many rows."""
        return {"image": self.checkpoint.config.vision.num_visual_rows}


class DummyInputs(BaseDummyInputsBuilder[ProcessingInfo]):
    """Inputs of vLLM's trial run."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """A prompt of pictures alone."""
        return MARKER_TEXT * mm_counts.get("image", 0)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> dict[str, Any]:
        """Pictures of the tower's size."""
        side = self.info.checkpoint.config.vision.image_size
        return {"image": self._get_dummy_images(width=side, height=side, num_images=mm_counts.get("image", 0))}


class Processor(BaseMultiModalProcessor[ProcessingInfo]):
    """Ids and pixels exactly as `parrot_sys` makes them."""

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Adds the prompt's text to the processor's arguments.

        vLLM hashes the arguments with the picture. Its caches of processed pictures and of encoder outputs and its KV
        blocks all use that hash, so none takes the rows that another prompt had routed.
        """
        checkpoint = self.info.checkpoint
        ids = checkpoint.prompt_ids(inputs.prompt, inputs.mm_data_items.get_count("image", strict=False))
        arguments = {**inputs.hf_processor_mm_kwargs, GUIDANCE: checkpoint.guidance(ids)}
        return super().apply(dataclasses.replace(inputs, prompt=ids, hf_processor_mm_kwargs=arguments), timing_ctx)

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, Any]) -> BatchFeature:
        pictures = hf_data.get("images", [])
        if not pictures:
            return BatchFeature({})
        text = torch.tensor(hf_kwargs[GUIDANCE], dtype=torch.int64)
        pixels = self.info.checkpoint.processor.images(pictures)
        return BatchFeature({"pixel_values": pixels, GUIDANCE: [text.clone() for _ in pictures]})

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Any) -> Mapping[str, MultiModalFieldConfig]:
        return {name: MultiModalFieldConfig.batched("image") for name in ("pixel_values", GUIDANCE)}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any
    ) -> Sequence[PromptReplacement]:
        marker, rows = self.info.checkpoint.marker, self.info.checkpoint.config.vision.num_visual_rows
        return [PromptReplacement(modality="image", target=[marker], replacement=[marker] * rows)]

"""A loaded checkpoint as the `Predictor` of the runner: batches, cached image features, routing overrides."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parrot_sys.data.packing import Sample
from parrot_sys.data.processor import ParrotProcessor
from parrot_sys.errors import ConfigError
from parrot_sys.evaluation.runner import Item, Mode, Prediction, Routing
from parrot_sys.inference.generation import continuation_log_probs, generate_tokens, prefill
from parrot_sys.inference.sampling import SamplingConfig
from parrot_sys.megatron.parrot_model import ParrotModel
from parrot_sys.modules.text_guided_moe import RoutingOutput, RoutingOverride

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".json")


class ModelPredictor:
    """Answers with a model in this process. Every picture is decoded and encoded once, and its features are kept."""

    def __init__(
        self,
        model: ParrotModel,
        processor: ParrotProcessor,
        *,
        checkpoint: Path,
        mode: Mode = "generate",
        max_new_tokens: int = 512,
    ) -> None:
        """
        Args:
            model: on its device, in evaluation mode.
            processor: of the same checkpoint.
            checkpoint: its folder; the digest of its files ties predictions to it.
            mode: `generate` answers greedily, `likelihood` takes the most likely option letter.
            max_new_tokens: longest answer in tokens (`generate`).
        """
        self.model = model
        self.processor = processor
        self.mode = mode
        self.max_new_tokens = max_new_tokens
        self.has_experts = model.moe is not None and model.use_moe
        self.settings: Mapping[str, Any] = {
            "checkpoint": checkpoint_digest(checkpoint),
            "mode": mode,
            "dtype": str(model.config.params_dtype).removeprefix("torch."),
            **({"max_new_tokens": max_new_tokens} if mode == "generate" else {}),
        }
        self._features: dict[tuple[str, str], Tensor] = {}

    @torch.inference_mode()
    def predict(self, items: Sequence[Item], routing: Routing) -> list[Prediction]:
        """One prediction per item."""
        samples = self._samples(items)
        override = self._override(items, routing)
        if self.mode == "likelihood":
            return self._by_likelihood(items, samples, override)
        tokenizer = self.processor.tokenizer
        tokens, routes = generate_tokens(
            self.model,
            samples,
            SamplingConfig(),
            max_new_tokens=self.max_new_tokens,
            eos_token_ids=frozenset({tokenizer.eos_token_id}),
            pad_token_id=tokenizer.pad_token_id,
        )  if override is None else generate_tokens(
            self.model,
            samples,
            SamplingConfig(),
            max_new_tokens=self.max_new_tokens,
            eos_token_ids=frozenset({tokenizer.eos_token_id}),
            pad_token_id=tokenizer.pad_token_id,
            override=override,
        )
        responses = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        experts = self._experts(routes, len(items))
        return [
            Prediction(response=response.strip(), experts=weights)
            for response, weights in zip(responses, experts, strict=True)
        ]

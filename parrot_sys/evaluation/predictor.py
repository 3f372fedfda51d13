"""A loaded checkpoint as the `Predictor` of the runner: batches, cached image features, routing overrides."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parrot_sys import platform
from parrot_sys.data.decoding import PictureNotes
from parrot_sys.data.packing import Sample
from parrot_sys.data.processor import ParrotProcessor
from parrot_sys.engine.requests import EngineRequest
from parrot_sys.errors import CheckpointError, ConfigError, DataError
from parrot_sys.evaluation.digest import checkpoint_digest
from parrot_sys.evaluation.items import Item, Mode, Prediction, Routing
from parrot_sys.evaluation.scoring import most_likely
from parrot_sys.inference.generation import generate_tokens, next_logits, score_continuations
from parrot_sys.inference.model import ParrotForConditionalGeneration
from parrot_sys.inference.requests import check_rows, free_rows
from parrot_sys.modules.text_guided_moe import RoutingOutput, RoutingOverride
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.towers import PictureRows

logger = logging.getLogger(__name__)


class ModelPredictor:
    """Answers with a model in this process. Every picture is decoded and encoded once; its features stay in memory."""

    def __init__(
        self,
        model: ParrotForConditionalGeneration,
        processor: ParrotProcessor,
        *,
        checkpoint: Path,
        mode: Mode = "generate",
        max_new_tokens: int = 512,
    ) -> None:
        """
        Args:
            model: from `load_pretrained`.
            processor: of the same checkpoint.
            checkpoint: its folder; the digest of its files ties predictions to it.
            mode: `generate` answers greedily, `likelihood` takes the most likely option letter, `text-likelihood` the
                option whose text is the most likely answer.
            max_new_tokens: longest answer in tokens (`generate` only).
        """
        self.lockstep = model.lockstep
        self.model = model.model
        self.eos_token_ids = frozenset(model.eos_token_ids)
        self.processor = processor
        self.mode = mode
        self.max_new_tokens = max_new_tokens
        self.config = model.config
        self.has_experts = self.model.bridge.num_routed_experts > 0
        self.has_choice = self.model.bridge.num_routed_experts > 1
        self.notes: Sequence[str] = ()
        if bypassed := sorted(self.model.bridge.bypass):
            self.notes = (
                f"The checkpoint holds {', '.join(bypassed)}, but they are not used: a stage of training made it that "
                "passes them by (bypass).",
            )
            logger.warning(self.notes[0])
        self.settings: Mapping[str, Any] = {
            "checkpoint": checkpoint_digest(checkpoint),
            "mode": mode,
            "dtype": platform.dtype_name(model.dtype),
            **({"max_new_tokens": max_new_tokens} if mode == "generate" else {}),
            **_rule(self.config),
        }
        self._features: dict[str, Tensor] = {}  # sha256 of the base64 cell -> [tiles, V, C]
        self._rows: dict[str, PictureRows] = {}  # the same key -> rows of a picture that is cut into tiles
        self._picture_problems: dict[str, str] = {}  # the same key -> why it cannot be read, empty where it can

    def run(self, program: Callable[[], int]) -> int:
        """Runs a program of these predictions on rank 0 while the others repeat its model calls; its exit status."""
        status = self.lockstep.run(program)
        self.processor.image_processor.notes.log_counts()
        return status

    def problem(self, item: Item) -> str:
        """Why a question cannot be asked: its texts, its length with the answer, its picture. Empty where it can."""
        try:
            rooms = [(item.prompt, self._least_room(item)), (item.guidance_prompt, 0)]
            for prompt, room in rooms:
                if prompt is not None:
                    sample = replace(self._sample(item, prompt), record_id="")
                    check_rows(self.config, [sample], [room])
        except DataError as error:
            return str(error).removeprefix("request 0 ")
        return self._picture_problem(item)

    def _least_room(self, item: Item) -> int:
        """Rows that the answer to a question takes at least."""
        if self.mode == "text-likelihood":
            return max(map(len, self._answers(item).values()))
        return 1 if self.mode == "generate" else 0

    def _picture_problem(self, item: Item) -> str:
        if item.question.image_key is None:
            return ""
        key = _picture_key(item, item.question.image_key)
        if key not in self._picture_problems:
            try:
                replace(self.processor.image_processor, notes=_Uncounted())(item.table.image(item.question.image_key))
                self._picture_problems[key] = ""
            except DataError as error:
                self._picture_problems[key] = str(error)
        return self._picture_problems[key]

    @torch.inference_mode()
    def predict(self, items: Sequence[Item], routing: Routing) -> list[Prediction]:
        """One prediction per item."""
        override = self._override(items, routing)
        if self.mode == "likelihood":
            return self._by_letter(items, override)
        if self.mode == "text-likelihood":
            return self._by_text(items, override)
        tokenizer = self.processor.tokenizer
        tokens, routes = generate_tokens(
            self.lockstep,
            [self._request(sample) for sample in self.samples(items)],
            pad_token_id=tokenizer.pad_token_id,
            routing_override=override,
        )
        responses = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [
            Prediction(response=response.strip(), experts=experts)
            for response, experts in zip(responses, self._experts(routes, items), strict=True)
        ]

    @torch.inference_mode()
    def logit_change(self, items: Sequence[Item], routing: Routing) -> float:
        """Largest change of any next-token logit when the images are routed by `routing` and not by the model."""
        samples = self.samples(items)
        own, _ = next_logits(self.lockstep, samples)
        changed, _ = next_logits(self.lockstep, samples, self._override(items, routing))
        return (own - changed).abs().max().item()

    def _request(self, sample: Sample) -> EngineRequest:
        """A greedy answer, as long as asked for or as the prompt leaves room for."""
        room = max(1, free_rows(self.config, sample))
        return EngineRequest(sample=sample, max_new_tokens=min(self.max_new_tokens, room), stop_ids=self.eos_token_ids)

    def _by_letter(self, items: Sequence[Item], override: RoutingOverride | None) -> list[Prediction]:
        logits, routes = next_logits(self.lockstep, self.samples(items), override)
        log_probs = logits.log_softmax(-1).cpu()
        predictions = []
        for item, row, experts in zip(items, log_probs, self._experts(routes, items), strict=True):
            predictions.append(
                _most_likely({letter: row[self._letter_id(letter)].item() for letter in item.question.options}, experts)
            )
        return predictions

    def _by_text(self, items: Sequence[Item], override: RoutingOverride | None) -> list[Prediction]:
        """Summed log-probability of each option's text and of the end of the turn after it."""
        answers = [list(self._answers(item).values()) for item in items]
        found, routes = score_continuations(self.lockstep, self.samples(items), answers, override)
        sums = [[sum(token.logprob for token in text) for text in own] for own in found]
        return [
            replace(
                _most_likely(dict(zip(item.question.options, scores, strict=True)), experts),
                option_tokens=dict(zip(item.question.options, map(len, texts), strict=True)),
            )
            for item, texts, scores, experts in zip(items, answers, sums, self._experts(routes, items), strict=True)
        ]

    def _answers(self, item: Item) -> dict[str, list[int]]:
        """Letter -> ids of the option's text and of the end of the turn."""
        end = self.processor.tokenizer.eos_token_id
        return {letter: [*self.processor.encode_text(text), end] for letter, text in item.question.options.items()}

    def _letter_id(self, letter: str) -> int:
        ids = self.processor.encode_text(letter)
        if len(ids) != 1:
            raise ConfigError(
                f"--mode likelihood needs option letters of one token, got {len(ids)} for {letter!r}; use generate"
            )
        return ids[0]

    def _override(self, items: Sequence[Item], routing: Routing) -> RoutingOverride | None:
        if routing == "model":
            return None
        assert self.has_experts, "main.evaluate asks for other routes with experts only"
        if routing == "off":
            return RoutingOverride(mode="off")
        _, routes = next_logits(self.lockstep, self.samples(items, guidance=True))
        return None if routes is None else RoutingOverride(probs=routes.probs)  # None: no item has a picture

    def samples(self, items: Sequence[Item], *, guidance: bool = False) -> list[Sample]:
        """Prompts with their pictures' features; with `guidance` those whose text guides the routing instead."""
        features = self._image_features(items)
        samples = []
        for item, feature in zip(items, features, strict=True):
            prompt = item.guidance_prompt if guidance else item.prompt
            assert prompt is not None, "runner.make_items gives guiding prompts for other-language"
            samples.append(self._sample(item, prompt, feature))
        return samples

    def _sample(self, item: Item, prompt: str, feature: Tensor | None = None) -> Sample:
        ids = self.processor.format_conversation(item.turns(prompt), add_generation_prompt=True)["input_ids"]
        return Sample(
            input_ids=torch.tensor(ids),
            image_features=feature,
            pictures=self._picture_rows(item),
            language=item.table.language,
            record_id=f"{item.table.path.name}, index {item.question.index}",
        )

    def _image_features(self, items: Sequence[Item]) -> list[Tensor | None]:
        """[tiles, V, C] of each item's picture; its key is its content, as a benchmark's languages share pictures."""
        cells = [(item, item.question.image_key) for item in items]
        keys = [None if cell is None else _picture_key(item, cell) for item, cell in cells]
        new = {
            key: item.table.image(cell)
            for key, (item, cell) in zip(keys, cells, strict=True)
            if key is not None and cell is not None and key not in self._features
        }
        if new:
            pictures = self.processor.pictures(new.values())
            features = self.lockstep.encode(torch.cat([picture.pixel_values for picture in pictures]))
            if features is None:
                raise CheckpointError(
                    "the checkpoint was loaded without its vision tower, so it cannot see the questions' images"
                )
            tiles = [len(picture.pixel_values) for picture in pictures]
            self._features.update(zip(new, features.cpu().split(tiles), strict=True))
        return [None if key is None else self._features[key] for key in keys]

    def _picture_rows(self, item: Item) -> tuple[PictureRows, ...] | None:
        """Rows of an item's picture, where pictures are cut into tiles."""
        cell = item.question.image_key
        if cell is None or self.processor.tiling is None:
            return None
        key = _picture_key(item, cell)
        if key not in self._rows:
            self._rows[key] = self.processor.rows_of(item.table.image(cell), self.config.rows_per_image)
        return (self._rows[key],)

    def _experts(self, routes: RoutingOutput | None, items: Sequence[Item]) -> list[list[float]]:
        """Weights of each item's picture; none for items without one."""
        if routes is None or not self.has_experts:
            return [[]] * len(items)
        weights = iter(routes.probs.float().cpu().tolist())
        return [[] if item.question.image_key is None else next(weights) for item in items]


class _Uncounted(PictureNotes):
    """For pictures that are only tried."""

    def add(self, kind: str, name: str, *, level: int = logging.INFO) -> None:
        """Counts nothing: the picture is counted when its question is asked."""


def _picture_key(item: Item, image_key: str) -> str:
    """A key that equal pictures share, in whichever table they are."""
    return hashlib.sha256(item.table.images[image_key].encode()).hexdigest()


def _rule(parrot: ParrotConfig) -> dict[str, str]:
    """The settings that `compat` changes, see `ParrotConfig.with_compat`."""
    rule = None if parrot.section is None else parrot.section.rule
    return {} if rule is None else {"rule": rule}


def _most_likely(scores: Mapping[str, float], experts: list[float]) -> Prediction:
    return Prediction(response=most_likely(scores), experts=experts, option_scores=dict(scores))

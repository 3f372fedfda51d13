"""Contenders of `bench_inference.py`: the engine, and the decoder of the same checkpoint in transformers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import parrot_sys
from parrot_sys.data.constants import IMAGE_TOKEN_ID
from parrot_sys.data.packing import Sample
from parrot_sys.engine.config import EngineConfig
from parrot_sys.engine.core import Engine
from parrot_sys.engine.requests import EngineRequest
from parrot_sys.inference.model import ParrotForConditionalGeneration
from parrot_sys.models.llm.hf import llm_fields

_FIRST_ID = 100
"""Ids below are of special tokens."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, and how many tokens are wanted after them."""

    ids: list[int]
    new: int


def plain_prompts(count: int, *, length: int = 24, new: int = 64) -> list[Prompt]:
    """Different prompts of one length."""
    generator = torch.Generator().manual_seed(length)
    return [Prompt(torch.randint(_FIRST_ID, 6000, (length,), generator=generator).tolist(), new) for _ in range(count)]


def mixed_prompts(count: int) -> list[Prompt]:
    """Prompts of 8 to 128 tokens with answers of 16 to 128."""
    generator = torch.Generator().manual_seed(1)
    sizes = [(int(torch.randint(8, 129, (), generator=generator)), 16 << place % 4) for place in range(count)]
    return [Prompt(torch.randint(_FIRST_ID, 6000, (size,), generator=generator).tolist(), new) for size, new in sizes]


class Ours:
    """A model of the demo, and an engine on it."""

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.model: ParrotForConditionalGeneration
        self.model, _ = parrot_sys.load_pretrained(checkpoint)
        self.engine = self._engine()

    def _engine(self) -> Engine:
        return Engine(self.model.lockstep, EngineConfig(num_blocks=512))

    def described(self) -> dict[str, Any]:
        """What was measured, for the JSON."""
        llm = self.model.config.llm
        sizes = {name: getattr(llm, name) for name in ("hidden_size", "num_layers", "vocab_size")}
        return {"checkpoint": str(self.checkpoint), "decoder": sizes, "dtype": str(self.model.dtype)}

    def streams(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Answers of all prompts, which arrive together; no prefix of an earlier call is used again."""
        engine = self.engine
        engine.pool.forget_all()
        numbers = [
            engine.submit(EngineRequest(sample=Sample(input_ids=own.ids), max_new_tokens=own.new)) for own in prompts
        ]
        answers: dict[int, list[int]] = {number: [] for number in numbers}
        while engine.has_requests:
            for delta in engine.step():
                answers[delta.number] += delta.tokens
        return [answers[number] for number in numbers]

    def generate(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """By the method that programs call."""
        ids = torch.tensor([own.ids for own in prompts])
        found = self.model.generate(ids, torch.ones_like(ids), max_new_tokens=prompts[0].new, eos_token_id=[])
        self.engine = self._engine()  # `generate` has taken the cache for its own
        return found[:, ids.shape[1] :].tolist()

    def score(self, prompt: list[int], options: list[list[int]]) -> list[float]:
        """Log-probability of each option."""
        ids = torch.tensor([prompt])
        found: Any = self.model.score(ids, [options], torch.ones_like(ids))
        self.engine = self._engine()
        return found[0].tolist()

    def picture(self, number: int) -> Tensor:
        """Pixels of a picture that nobody has seen."""
        side = self.model.config.vision.image_size
        return torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(number))

    def first_token(self, pixels: Tensor, question: int) -> float:
        """Seconds of processor time until the first token of the answer to a question about a picture is there."""
        (words,) = plain_prompts(1, length=24 + question)
        sample = Sample(input_ids=[*words.ids[:4], IMAGE_TOKEN_ID, *words.ids[4:]], pixel_values=pixels)
        start, passed = time.process_time(), 0.0
        self.engine.submit(EngineRequest(sample=sample, max_new_tokens=2))
        while self.engine.has_requests:
            if any(delta.tokens for delta in self.engine.step()) and not passed:
                passed = time.process_time() - start
        return passed


class Transformers:
    """The decoder alone."""

    def __init__(self, model: ParrotForConditionalGeneration, checkpoint: Path) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        llm = model.config.llm
        config = AutoConfig.for_model(llm.family, **llm_fields(llm))
        self.model: Any = AutoModelForCausalLM.from_config(config, dtype=model.dtype).eval()
        tensors = {key: value for file in checkpoint.glob("*.safetensors") for key, value in load_file(file).items()}
        missing = set(self.model.load_state_dict(tensors, strict=False).missing_keys)
        if missing - ({"lm_head.weight"} if llm.tie_word_embeddings else set()):
            raise SystemExit(f"{checkpoint} lacks {', '.join(sorted(missing))} of the decoder: give a released layout")
        self.model.generation_config.eos_token_id = None

    def save(self, folder: Path) -> None:
        """The decoder as a folder that other programs load."""
        self.model.save_pretrained(folder)

    @torch.inference_mode()
    def padded(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """One batch, padded on the left, until the longest answer is complete."""
        longest, new = max(len(own.ids) for own in prompts), max(own.new for own in prompts)
        ids = torch.tensor([[0] * (longest - len(own.ids)) + own.ids for own in prompts])
        mask = torch.tensor([[0] * (longest - len(own.ids)) + [1] * len(own.ids) for own in prompts])
        found = self.model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0)
        return [row[: own.new] for row, own in zip(found[:, longest:].tolist(), prompts, strict=True)]

    def one_by_one(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Each prompt by itself."""
        return [self.padded([own])[0] for own in prompts]

    @torch.inference_mode()
    def score(self, prompt: list[int], options: list[list[int]]) -> list[float]:
        """Log-probability of each option: the prompt in one pass, then a token of all options with each step."""
        texts = torch.tensor(options)
        step = self.model(torch.tensor([prompt] * len(options)), use_cache=True)
        sums = torch.zeros(len(options))
        for column in texts.T:
            sums += step.logits[:, -1].log_softmax(-1).gather(1, column[:, None]).squeeze(1)
            step = self.model(column[:, None], past_key_values=step.past_key_values, use_cache=True)
        return sums.tolist()


@contextmanager
def _timed(layers: Sequence[nn.Module], found: list[float]) -> Iterator[None]:
    """Within it, processor seconds of each call of a layer are appended to `found`."""
    begun = [0.0]

    def before(*_: Any) -> None:
        begun[0] = time.process_time()

    def after(*_: Any) -> None:
        found.append(time.process_time() - begun[0])

    hooks = [
        hook
        for layer in layers
        for hook in (layer.register_forward_pre_hook(before), layer.register_forward_hook(after))
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def layer_milliseconds(ours: Ours, theirs: Transformers, repeats: int) -> tuple[float, float]:
    """Milliseconds of a layer in a step of one answer: ours, theirs. The products in it are equal."""
    prompt = plain_prompts(1)
    medians: tuple[list[float], list[float]] = [], []
    for _ in range(repeats + 1):
        for own, layers, run in (
            (medians[0], ours.model.model.decoder.layers, ours.streams),
            (medians[1], theirs.model.model.layers, theirs.padded),
        ):
            found: list[float] = []
            with _timed(list(layers), found):
                run(prompt)
            own.append(1e3 * statistics.median(found))
    return statistics.median(medians[0][1:]), statistics.median(medians[1][1:])

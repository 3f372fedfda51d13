"""Generation settings of evaluation kits' tasks -> requests of the engine; what it does not do is refused by name."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch

from parrot_sys.data.decoding import ImageInput
from parrot_sys.data.packing import Sample
from parrot_sys.data.parts import human_turn
from parrot_sys.data.picture import join_pictures
from parrot_sys.data.processor import ParrotProcessor
from parrot_sys.engine.requests import EngineRequest
from parrot_sys.engine.sampler import SamplingParams
from parrot_sys.errors import ConfigError

_DRAWN_BY = ("top_k", "top_p", "min_p", "repetition_penalty")
_TAKEN = {"until", "max_gen_toks", "max_new_tokens", "do_sample", "temperature", *_DRAWN_BY}


def new_tokens(settings: Mapping[str, Any], usual: int) -> int:
    """Longest answer that a task asks for; `usual` where it does not say."""
    asked = (settings.get(name) for name in ("max_gen_toks", "max_new_tokens"))
    return next((int(number) for number in asked if number is not None), usual)


def question_sample(processor: ParrotProcessor, text: str, images: Sequence[ImageInput]) -> Sample:
    """The prompt of a question, its pictures before the text."""
    pictures = processor.pictures(images)
    turns = [human_turn(text, images=len(pictures))]
    ids = processor.format_conversation(turns, add_generation_prompt=True)["input_ids"]
    pixels, rows = join_pictures(pictures)
    return Sample(input_ids=torch.tensor(ids), pixel_values=pixels, pictures=rows)


def task_request(
    sample: Sample, settings: Mapping[str, Any], *, max_new_tokens: int, stop_ids: Collection[int]
) -> EngineRequest:
    """The request of a task.

    Args:
        sample: prompt with its pictures.
        settings: `generation_kwargs` of the task.
        max_new_tokens: longest answer.
        stop_ids: ids that end an answer.

    Raises:
        ConfigError: the task asks for what the engine does not do.
    """
    beams = settings.get("num_beams")
    unknown = sorted(name for name, value in settings.items() if name not in _TAKEN | {"num_beams"} and value)
    if unknown or beams not in (None, 1):
        named = [*unknown, *([f"num_beams={beams}"] if beams not in (None, 1) else [])]
        raise ConfigError(f"generation_kwargs: {', '.join(named)} not supported by models of parrot_sys")
    draws = bool(settings.get("do_sample"))
    given = {name: settings[name] for name in _DRAWN_BY if settings.get(name) is not None}
    until = settings.get("until") or []
    return EngineRequest(
        sample=sample,
        max_new_tokens=max_new_tokens,
        sampling=SamplingParams(temperature=float(settings.get("temperature") or 1.0) if draws else 0.0, **given),
        stop_ids=frozenset(stop_ids),
        stop_strings=tuple(text for text in ([until] if isinstance(until, str) else until) if text),
    )


def batches(places: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Stretches of at most `size` of them."""
    for start in range(0, len(places), size):
        yield places[start : start + size]

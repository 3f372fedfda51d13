"""Generation settings of evaluation kits' tasks -> requests of the engine; what it does not do is refused by name."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
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

_TOP_K = 50
"""Draw among so many tokens where nothing is said, as transformers does for the models of these kits."""
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of the longest answer; the first that is given holds, as in lm-eval."""
_OF_DRAWS = ("top_k", "top_p", "min_p", "seed")
_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
_TAKEN = frozenset({"until", "stop_sequences", "do_sample", "temperature", *_LENGTHS, *_OF_DRAWS, *_PENALTIES})
_CHANGE_NO_ANSWER = frozenset({"use_cache"})
_NEUTRAL: Mapping[str, Any] = {
    "n": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "length_penalty": 1.0,
    "typical_p": 1.0,
}
"""Settings that ask for nothing by these values."""


def requests_together(batch_size: int | str | None, usual: int) -> int:
    """Requests that run together, by a kit's `--batch_size`.

    Args:
        batch_size: a number; `auto`, `auto:N` and None are the usual one.
        usual: how many then.

    Raises:
        ConfigError: it is neither.
    """
    if batch_size is None or str(batch_size).startswith("auto"):
        return usual
    try:
        number = int(batch_size)
    except ValueError:
        number = 0
    if number < 1:
        raise ConfigError(f"batch_size must be >= 1 or auto, got {batch_size}")
    return number


def refuse_arguments(others: Mapping[str, Any]) -> None:
    """Refuses `--model_args` that a model does not have and that ask for something.

    Raises:
        ConfigError: names them.
    """
    if asked := sorted(name for name, value in others.items() if value):
        raise ConfigError(f"model_args: {', '.join(asked)} not supported by --model parrot; leave them out")


def new_tokens(settings: Mapping[str, Any], usual: int) -> int:
    """Longest answer that a task asks for; `usual` where it does not say."""
    asked = (_number(settings, name) for name in _LENGTHS)
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
        ConfigError: the task asks for what the engine does not do, or a setting is out of range.
    """
    _refuse_others(settings)
    stops = [text for name in ("until", "stop_sequences") for text in stop_texts(settings.get(name))]
    return EngineRequest(
        sample=sample,
        max_new_tokens=max_new_tokens,
        sampling=sampling_params(settings),
        stop_ids=frozenset(stop_ids),
        stop_strings=tuple(dict.fromkeys(stops)),
    )


def sampling_params(settings: Mapping[str, Any]) -> SamplingParams:
    """How a task wants its tokens chosen.

    It draws where `do_sample` says so or, without `do_sample`, where it gives a temperature other than 0. A temperature
    of 0 is greedy all the same, and so is a top_p of 0, which leaves one token to draw. What restricts draws says
    nothing of a greedy answer.

    Args:
        settings: `generation_kwargs` of the task.

    Raises:
        ConfigError: a setting is out of range.
    """
    do_sample, temperature = settings.get("do_sample"), _number(settings, "temperature")
    if do_sample not in (None, True, False):
        raise ConfigError(f"generation_kwargs: do_sample must be true or false, got {do_sample!r}")
    greedy = SamplingParams(
        repetition_penalty=_number_or(settings, "repetition_penalty", 1.0),
        presence_penalty=_number_or(settings, "presence_penalty", 0.0),
        frequency_penalty=_number_or(settings, "frequency_penalty", 0.0),
    )
    draws = temperature is not None if do_sample is None else bool(do_sample)
    top_p = _number_or(settings, "top_p", 1.0)
    if not draws or temperature == 0 or top_p == 0:
        return greedy
    top_k, seed = int(_number_or(settings, "top_k", _TOP_K)), _number(settings, "seed")
    return replace(
        greedy,
        temperature=1.0 if temperature is None else temperature,
        top_k=0 if top_k == -1 else top_k,
        top_p=top_p,
        min_p=_number_or(settings, "min_p", 0.0),
        seed=None if seed is None else int(seed),
    )


def _refuse_others(settings: Mapping[str, Any]) -> None:
    known = _TAKEN | _CHANGE_NO_ANSWER
    asked = {name: value for name, value in settings.items() if name not in known and value}
    others = sorted(f"{name}={value!r:.80}" for name, value in asked.items() if value != _NEUTRAL.get(name))
    if others:
        raise ConfigError(
            f"generation_kwargs: {', '.join(others)} not supported by models of parrot_sys: the engine draws, or takes "
            "the most likely token, by do_sample, temperature, top_k, top_p, min_p, seed and penalties; choose other "
            "tasks, or set the value otherwise (--gen_kwargs)"
        )


def _number(settings: Mapping[str, Any], name: str) -> float | None:
    value = settings.get(name)
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"generation_kwargs: {name} must be a number, got {value!r}") from error


def _number_or(settings: Mapping[str, Any], name: str, usual: float) -> float:
    value = _number(settings, name)
    return usual if value is None else value


def stop_texts(value: str | Sequence[str | None] | None) -> list[str]:
    """Stop strings of a setting: one, several or none."""
    return [text for text in ([value] if isinstance(value, str) else value or ()) if text]


def batches(places: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Stretches of at most `size` of them."""
    for start in range(0, len(places), size):
        yield places[start : start + size]

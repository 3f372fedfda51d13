"""Generation settings of the tasks of lm-eval 0.4.13 and lmms-eval 0.7.3, and what the engine is asked for them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from parrot_sys.data.packing import Sample
from parrot_sys.engine.requests import EngineRequest
from parrot_sys.engine.sampler import SamplingParams
from parrot_sys.integrations.task_requests import task_request

GREEDY = SamplingParams()


def drawn(temperature: float, **others: Any) -> SamplingParams:
    return SamplingParams(temperature=temperature, **{"top_k": 50, **others})


def request(settings: dict[str, Any]) -> EngineRequest:
    return task_request(Sample(input_ids=torch.tensor([1])), settings, max_new_tokens=4, stop_ids=[2])


OF_TASKS: list[tuple[dict[str, Any], SamplingParams]] = [
    ({}, GREEDY),
    ({"do_sample": False}, GREEDY),
    ({"do_sample": False, "num_beams": 1}, GREEDY),
    ({"do_sample": False, "num_beams": 1, "temperature": 0}, GREEDY),
    ({"do_sample": False, "temperature": 0}, GREEDY),
    ({"do_sample": False, "temperature": 0.0}, GREEDY),
    ({"do_sample": False, "temperature": 1}, GREEDY),
    ({"do_sample": False, "temperature": 0, "top_p": 1.0}, GREEDY),
    ({"do_sample": False, "temperature": 0.0, "top_p": 1.0, "repetition_penalty": 1.0}, GREEDY),
    ({"do_sample": False, "temperature": 0, "stop_sequences": ["\n"]}, GREEDY),
    ({"do_sample": False, "num_beams": 1, "temperature": 0, "top_k": 1, "top_p": 1.0}, GREEDY),
    ({"do_sample": False, "num_beams": 1, "temperature": 0, "top_p": 0}, GREEDY),
    ({"do_sample": False, "num_beams": 1, "temperature": 0, "top_p": 0.7}, GREEDY),
    ({"do_sample": False, "num_beams": 1, "temperature": 0, "top_p": 0.95}, GREEDY),
    ({"do_sample": False, "num_beams": 1, "temperature": 0, "top_p": 1.0}, GREEDY),
    ({"do_sample": False, "num_beams": 1, "temperature": 0.2, "top_p": 1.0}, GREEDY),
    ({"do_sample": False, "num_beams": 1, "temperature": 0.5, "top_p": 1.0}, GREEDY),
    ({"do_sample": False, "num_beams": 1, "temperature": 0.7, "top_p": 1.0}, GREEDY),
    ({"temperature": 0}, GREEDY),
    ({"temperature": 0.0}, GREEDY),
    ({"top_p": 0.95}, GREEDY),
    ({"temperature": 0, "num_beams": 1, "top_p": 1.0}, GREEDY),
    ({"temperature": 0.7}, drawn(0.7)),
    ({"temperature": 0.7, "top_k": 1, "top_p": 0.001}, drawn(0.7, top_k=1, top_p=0.001)),
    ({"num_beams": 1, "temperature": 0.2, "top_p": 1.0}, drawn(0.2)),
    ({"do_sample": True, "temperature": 0.2}, drawn(0.2)),
    ({"do_sample": True, "temperature": 0.5}, drawn(0.5)),
    ({"do_sample": True, "temperature": 0.7}, drawn(0.7)),
    ({"do_sample": True, "temperature": 0.8}, drawn(0.8)),
    ({"do_sample": True, "temperature": 1}, drawn(1.0)),
    ({"do_sample": True, "temperature": 0.2, "top_p": 0.95}, drawn(0.2, top_p=0.95)),
    ({"do_sample": True, "temperature": 0.7, "top_p": 0.9}, drawn(0.7, top_p=0.9)),
    ({"do_sample": True, "temperature": 1.0, "top_p": 1.0, "seed": 0}, drawn(1.0, seed=0)),
    ({"do_sample": True, "num_beams": 1, "temperature": 0.2}, drawn(0.2)),
    ({"do_sample": True, "num_beams": 1, "temperature": 0.2, "top_p": 0}, GREEDY),
    ({"do_sample": True, "num_beams": 1, "temperature": 0.6, "top_p": 0.95}, drawn(0.6, top_p=0.95)),
    ({"do_sample": True, "num_beams": 1, "temperature": 0.7, "top_p": 1.0}, drawn(0.7)),
    ({"do_sample": True, "num_beams": 1, "temperature": 1.0, "top_p": 1.0}, drawn(1.0)),
    (
        {"do_sample": True, "num_beams": 1, "repetition_penalty": 1.2, "temperature": 1, "top_p": 0.95},
        drawn(1.0, top_p=0.95, repetition_penalty=1.2),
    ),
]
"""Every combination in a file below `tasks` of one of the two, without lengths and stop strings."""
REFUSED: list[dict[str, Any]] = [
    {"num_beams": 10},
    {"visual_cot": True},
    {"max_agentic_steps": 8},
    {"max_agentic_steps": 10},
]
"""Settings of which one is enough."""


class _Loader(yaml.SafeLoader):
    """Reads what tags such as `!function` stand before as nothing."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: None)


def settings_of_tasks(folder: Path) -> dict[str, dict[str, Any]]:
    """File -> `generation_kwargs`, of every YAML file that has some; templates of tasks have no suffix."""
    found = {}
    for file in sorted(folder.rglob("*yaml")):
        text = file.read_text(encoding="utf-8")
        if "generation_kwargs:" not in text:
            continue
        for number, settings in enumerate(_found(yaml.load(text, _Loader))):
            found[f"{file.relative_to(folder)} {number}"] = settings
    return found


def expected_sampling(settings: dict[str, Any]) -> SamplingParams | None:
    """What a task with these settings gets; None where it is refused.

    Raises:
        KeyError: no case is like them.
    """
    if any(own.items() <= settings.items() for own in REFUSED):
        return None
    say_nothing = ("max_new_tokens", "max_gen_toks", "until", "image_aspect_ratio", "skip_special_tokens")
    own = {name: value for name, value in settings.items() if name not in say_nothing}
    for case, sampling in OF_TASKS:
        if case == own:
            return sampling
    raise KeyError(f"{own} is no case of {__name__}")


def _found(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        own = node.get("generation_kwargs")
        if isinstance(own, dict):
            yield own
        for value in node.values():
            yield from _found(value)
    elif isinstance(node, list):
        for value in node:
            yield from _found(value)

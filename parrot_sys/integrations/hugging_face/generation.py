"""Settings of transformers' `generate` -> arguments of ours; what the engine does not do is refused by name."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from transformers.generation.configuration_utils import GenerationConfig

from parrot_sys.integrations.hugging_face.refusals import refuse

_TOP_K = 50
"""Draw among so many tokens where nothing is said, as transformers does."""
_TAKEN = frozenset({"do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "use_cache"})
_LENGTHS = frozenset({"max_new_tokens", "max_length"})
_IDS = frozenset({"eos_token_id", "pad_token_id"})
_SAY_NOTHING = frozenset({"bos_token_id", "transformers_version", "cache_implementation", "stop_strings"})
_NEUTRAL: Mapping[str, Any] = {
    "assistant_confidence_threshold": 0.4,
    "assistant_lookbehind": 10,
    "diversity_penalty": 0.0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "length_penalty": 1.0,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "num_assistant_tokens": 20,
    "num_assistant_tokens_schedule": "constant",
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "target_lookbehind": 10,
    "typical_p": 1.0,
}
"""Settings that ask for nothing by these values. (transformers 5.12 writes those of assistants into every one.)"""


def merged(own: GenerationConfig, given: GenerationConfig | None, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that hold, by name: arguments before those of `given` before the model's own."""
    config = copy.deepcopy(own if given is None else given)
    left = config.update(**arguments)
    refuse(left)
    settings = {name: value for name, value in vars(config).items() if not name.startswith("_") and value is not None}
    if given is not None:
        for name in _IDS:
            settings.setdefault(name, getattr(own, name))
    return settings


def generate_arguments(settings: Mapping[str, Any], prompt_length: int) -> dict[str, Any]:
    """Arguments of `ParrotForConditionalGeneration.generate`.

    Args:
        settings: of `merged`.
        prompt_length: N, the columns of the prompts.

    Raises:
        ConfigError: names the settings that ask for what the engine does not do.
    """
    usual = GenerationConfig()
    known = _TAKEN | _LENGTHS | _IDS | _SAY_NOTHING
    others = {
        name: value
        for name, value in settings.items()
        if name not in known and value != getattr(usual, name, None) and value != _NEUTRAL.get(name)
    }
    refuse(others, "the engine draws or takes the most likely token, by temperature, top_k, top_p, min_p")
    arguments = {name: settings.get(name) for name in _TAKEN | _IDS}
    arguments["do_sample"] = bool(arguments["do_sample"])
    if arguments["use_cache"] is None:
        arguments["use_cache"] = True
    if not arguments["do_sample"]:
        for name in ("temperature", "top_k", "top_p", "min_p"):
            arguments[name] = None
    elif arguments["top_k"] is None:
        arguments["top_k"] = _TOP_K
    new_tokens, longest = settings.get("max_new_tokens"), settings.get("max_length")
    if new_tokens is None and longest is not None:
        new_tokens = max(1, longest - prompt_length)
    stops = settings.get("stop_strings") or ()
    return {
        **arguments,
        "max_new_tokens": new_tokens,
        "stop_strings": (stops,) if isinstance(stops, str) else tuple(stops),
    }

"""Decoders: one configuration and one key map for all families, a file for each family."""

from parrot_sys.models.llm.config import LLMConfig
from parrot_sys.models.llm.families import FAMILIES
from parrot_sys.models.llm.family import DecoderFamily
from parrot_sys.models.llm.hf import llm_config_from_hf, llm_fields
from parrot_sys.models.llm.keys import llm_maps
from parrot_sys.models.llm.token_experts import TokenExpertsConfig

__all__ = [
    "FAMILIES",
    "DecoderFamily",
    "LLMConfig",
    "TokenExpertsConfig",
    "llm_config_from_hf",
    "llm_fields",
    "llm_maps",
]

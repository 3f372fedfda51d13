"""The decoder families: a new one is a file beside this one and a line here."""

from __future__ import annotations

from parrot_sys.models.llm import llama, qwen2, qwen3, qwen3_moe
from parrot_sys.models.llm.family import DecoderFamily

FAMILIES: dict[str, DecoderFamily] = {
    family.name: family
    for family in (
        qwen2.FAMILY,
        qwen3.FAMILY,
        qwen3_moe.FAMILY,
        llama.FAMILY,
    )
}
"""Name -> family."""

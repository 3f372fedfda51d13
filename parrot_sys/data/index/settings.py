"""IndexSettings: everything beside the records that the numbers of an index depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from parrot_sys.data.tokenization import tokenizer_fingerprint

if TYPE_CHECKING:  # (processes that index import no torch)
    from parrot_sys.data.processor import ParrotProcessor

_WORDS: Mapping[str, str] = {
    "template": "the template",
    "tokenizer": "the tokenizer",
    "image_position": "data.image_position",
    "control_tokens": "data.control_tokens",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexSettings:
    """Rules by which texts become ids and labels. (Rows of pictures and the longest sample are no part of an index.)"""

    template: str
    """Version of the format of conversations."""
    tokenizer: str
    """Fingerprint."""
    image_position: str
    control_tokens: str

    @classmethod
    def of(cls, processor: ParrotProcessor) -> IndexSettings:
        """The rules of a model."""
        return cls(
            template=processor.template.version,
            tokenizer=tokenizer_fingerprint(processor.tokenizer),
            image_position=processor.image_position,
            control_tokens=processor.control_tokens,
        )

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @property
    def key(self) -> str:
        """Short name of these settings, for a folder."""
        return hashlib.sha256(json.dumps(self.plain(), sort_keys=True).encode()).hexdigest()[:12]

    def differences(self, other: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
        """Settings of an index that differ from these, in words.

        Args:
            other: `plain` of the index's settings.
            names: tokenizer's folder, of the `index` and of the `model`.
        """
        found = []
        for field, wanted in self.plain().items():
            if (got := other.get(field)) == wanted:
                continue
            if field == "tokenizer":
                got, wanted = (
                    f"{name or 'unknown'} (fingerprint {str(value)[:12]})"
                    for name, value in ((names.get("index"), got), (names.get("model"), wanted))
                )
            found.append(f"{_WORDS[field]} was {got}, is {wanted}")
        return found

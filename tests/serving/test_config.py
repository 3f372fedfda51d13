"""Settings of `parrot serve` that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from parrot_sys.errors import ConfigError
from parrot_sys.serving.config import ServeConfig


@pytest.mark.parametrize(
    ("languages", "message"), [((), "at least one language"), (("en", "no code"), "BCP 47 code.*got 'no code'")]
)
def test_languages_that_the_page_could_not_offer(languages: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServeConfig(checkpoint=Path("model"), languages=languages)

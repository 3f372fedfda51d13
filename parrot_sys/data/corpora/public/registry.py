"""The public sets that can be imported: a file for each form, and a line here."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from parrot_sys.data.corpora.public.base import Example, Question, Source, lack
from parrot_sys.data.corpora.public.cvqa import CVQA
from parrot_sys.data.corpora.public.instructions import INSTRUCTIONS
from parrot_sys.data.corpora.public.kaleidoscope import KALEIDOSCOPE
from parrot_sys.data.corpora.public.m3exam import M3EXAM
from parrot_sys.data.corpora.public.marvl import MARVL
from parrot_sys.data.corpora.public.maxm import MAXM
from parrot_sys.data.corpora.public.xgqa import XGQA
from parrot_sys.data.corpora.public.xmmmu import XMMMU
from parrot_sys.errors import DataError

SOURCES: Mapping[str, Source] = {
    **INSTRUCTIONS,
    "xgqa": XGQA,
    "maxm": MAXM,
    "cvqa": CVQA,
    "m3exam": M3EXAM,
    "kaleidoscope": KALEIDOSCOPE,
    "xmmmu": XMMMU,
    "marvl": MARVL,
}
if TYPE_CHECKING:
    SourceName: TypeAlias = str
else:
    SourceName = Literal[tuple(SOURCES)]


def examples(
    source: Source, rows: Iterable[Any], name: str, seed: int
) -> Iterator[tuple[int, Example | Question | DataError]]:
    """(place in the file, example or what is wrong with the row). What is drawn depends on seed, set and place only."""
    for index, row in enumerate(rows):
        try:
            if isinstance(row, DataError):
                raise row
            if not isinstance(row, Mapping):
                raise DataError(f"must be a JSON object, got {type(row).__name__}")
            yield index, source.convert(row, random.Random(f"{seed}:{name}:{index}"))
        except DataError as error:
            yield index, error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            yield index, DataError(f"must look like {source.wanted}; {lack(error)}")

"""Results of one study that were made at different commits, put together variant by variant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from parrot_sys.errors import DataError

_OF_ALL = ("title", "unit", "chance", "scale")
"""Fields that have to be the same in both."""
_BY_VARIANT, _BY_COMPARISON = ("variants", "intervals"), ("differences", "tests", "paired_intervals")
"""Parts of the summary by what their keys name."""


def join_results(
    kept: Mapping[str, Any], new: Mapping[str, Any], comparisons: Mapping[str, tuple[str, str]]
) -> dict[str, Any]:
    """The new result, and of the kept one all variants that the new one lacks.

    A comparison stays if both of its variants come from one result: answers of different commits are not paired.
    `commits` says for each variant that has results where it comes from.

    Args:
        kept: result that is kept so far; may be joined itself.
        new: result to be added; its variants replace those of the same name.
        comparisons: name -> the two variants, of the study.

    Raises:
        DataError: they are not results of one study.
    """
    for name in _OF_ALL:
        if kept.get(name) != new.get(name):
            raise DataError(f"results of one study have the same {name}, got {kept.get(name)!r} and {new.get(name)!r}")
    sources: dict[str, Mapping[str, Any]] = {
        **dict.fromkeys(kept["results"], kept),
        **dict.fromkeys(new["results"], new),
    }
    order = [name for name in new["variants"] if name in sources]
    order += [name for name in sources if name not in order]
    joined = {**new, "results": {name: sources[name]["results"][name] for name in order}}
    for section in ("variants", "at"):
        joined[section] = {**kept.get(section, {}), **new.get(section, {})}
    joined["commits"] = {name: _commit(sources[name], name) for name in order}
    joined["summary"] = summary = {}
    for section in _BY_VARIANT:
        summary[section] = {
            name: found for name in order if (found := sources[name]["summary"].get(section, {}).get(name)) is not None
        }
    for section in _BY_COMPARISON:
        summary[section] = {
            name: found
            for name, (first, second) in comparisons.items()
            if sources.get(first) is sources.get(second) is not None
            and (found := sources[first]["summary"].get(section, {}).get(name)) is not None
        }
    return joined


def _commit(source: Mapping[str, Any], variant: str) -> str:
    commit: str = source.get("commits", {}).get(variant, source["commit"])
    return commit

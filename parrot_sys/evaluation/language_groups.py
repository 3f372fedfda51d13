"""Languages of a part together: the mean, the language that fares worst, and the means by script."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from parrot_sys.data.languages import by_script, script_name
from parrot_sys.evaluation.headlines import Scores, average_interval, headlines, metric_of
from parrot_sys.markdown_tables import language_table, percent


def group_languages(scores: Scores) -> dict[str, dict[str, Any]]:
    """Part -> `n_languages`, `n`, `mean`, `worst` and `scripts` of the accuracies that it is known by, with intervals.

    Every language counts alike, however many questions it has. Parts in one language are left out.
    """
    found = {}
    for suite, routings in scores.items():
        own = routings.get("model", {})
        if len(own) > 1:
            found[suite] = _groups(own, metric_of(routings))
    return found


def group_table(groups: Mapping[str, Mapping[str, Any]], short: str) -> list[str]:
    """Markdown table of the result of `group_languages`.

    Args:
        groups: the result.
        short: what the answers are.
    """
    scripts = list(dict.fromkeys(script for group in groups.values() for script in group["scripts"]))
    rows = []
    for suite, group in groups.items():
        worst, held = group["worst"], group["scripts"]
        rows.append(
            [
                suite,
                str(group["n_languages"]),
                str(group["n"]),
                percent(group["mean"], group["interval"]),
                f"{worst['language']} {percent(worst['accuracy'], worst['interval'])}",
                *(_script(held[script]) if script in held else "-" for script in scripts),
            ]
        )
    header = [
        f"accuracy (%), {short}",
        "languages",
        "n, all languages",
        "mean",
        "worst language",
        *map(script_name, scripts),
    ]
    return language_table(header, rows)


def _groups(languages: Mapping[str, Mapping[str, Any]], metric: str) -> dict[str, Any]:
    accuracies = headlines(languages)
    worst = min(accuracies, key=lambda language: accuracies[language])
    return {
        "n_languages": len(accuracies),
        "n": sum(result["scores"]["n_questions" if metric == "circular" else "n"] for result in languages.values()),
        "mean": fmean(accuracies.values()),
        "interval": average_interval(languages, metric),
        "worst": {
            "language": worst,
            "accuracy": accuracies[worst],
            "interval": languages[worst].get("intervals", {}).get(metric),
        },
        "scripts": {
            script: {
                "languages": codes,
                "mean": fmean(accuracies[code] for code in codes),
                "interval": average_interval({code: languages[code] for code in codes}, metric),
            }
            for script, codes in by_script(accuracies).items()
        },
    }


def _script(group: Mapping[str, Any]) -> str:
    codes = group["languages"]
    which = " ".join(codes) if len(codes) <= _NAMED else f"{len(codes)} languages"
    return f"{percent(group['mean'], group['interval'])} ({which})"


_NAMED = 4
"""Languages of a script that a cell names."""

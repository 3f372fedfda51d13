"""Routes of an evaluation: what they tell of the language and of the picture's category, and how experts are used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from parrot_sys.evaluation.tsv import Question
from parrot_sys.markdown_tables import fixed, p_value, table
from parrot_sys.routes import Array, RouteSums, as_shares, permutation_p

KINDS = {"language": "language", "category": "category of the picture"}
"""Kind of label -> its name in reports."""
EXPLAINED = (
    "*I* is the mutual information in bits between the expert that a picture's weights would draw and a label: 0 when "
    "routes say nothing of it, at most the entropy of the labels. *By chance* is its mean over permutations of the "
    "labels, and p the share of 1,000 permutations with at least as much. Answers about one picture with one label "
    "count once. *H(expert)* is the entropy of the mean weights (all experts alike have the most), that of a picture "
    "the mean entropy of its own weights (0: one expert; the most: uniform). An expert with less than a tenth of an "
    "equal share is called dead."
)


def route_rows(
    questions: Sequence[Question], records: Mapping[int, Mapping[str, Any]], pictures: Sequence[str | None]
) -> dict[str, list[Any]]:
    """Columns of the answers with routes.

    Args:
        questions: rows of a part.
        records: index -> record of its answer, with `experts`.
        pictures: of each question, digest of its picture.

    Returns:
        `picture`, `category`, and `experts`, the weights of the picture; empty without routes.
    """
    routed = [
        (question, picture, experts)
        for question, picture in zip(questions, pictures, strict=True)
        if (experts := records[question.index]["experts"])
    ]
    if not routed:
        return {}
    return {
        "picture": [picture for _, picture, _ in routed],
        "category": [question.category for question, _, _ in routed],
        "experts": [[round(weight, 6) for weight in experts] for _, _, experts in routed],
    }


def measure_routes(languages: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Information in the routes of a part, and how its experts are used.

    Args:
        languages: language -> its result, with the `routes` of `route_rows`.

    Returns:
        `shares`, `entropy`, `picture_entropy`, `most` and `dead` of the experts, and for each kind of label with at
        least two values `bits`, `by_chance`, `most`, `n` and `p`. Empty without routes.
    """
    pictures: list[str] = []
    labels: dict[str, list[str]] = {kind: [] for kind in KINDS}
    weights: list[list[float]] = []
    for language, result in languages.items():
        if columns := result.get("routes"):
            pictures += columns["picture"]
            labels["language"] += [language] * len(columns["picture"])
            labels["category"] += columns["category"]
            weights += columns["experts"]
    used = [row for row, each in enumerate(weights) if sum(each) > 0]  # an override may weigh all by 0
    if not used:
        return {}
    shares = as_shares([weights[row] for row in used])
    sums = RouteSums()
    sums.add(shares, {})
    usage = sums.usage()
    assert usage is not None, "there are images"
    found: dict[str, Any] = {
        "shares": list(usage.shares),
        "entropy": usage.entropy,
        "picture_entropy": usage.image_entropy,
        "most": usage.most,
        "dead": list(usage.dead),
    }
    for kind, each in labels.items():
        if information := _information(shares, [pictures[row] for row in used], [each[row] for row in used], kind):
            found[kind] = information
    return found


def _information(shares: Array, pictures: Sequence[str], labels: Sequence[str], kind: str) -> dict[str, Any] | None:
    """I(expert; label) of observations: the mean route of a picture with a label. None with fewer than two labels."""
    rows: dict[tuple[str, str], list[int]] = {}
    for row, key in enumerate(zip(pictures, labels, strict=True)):
        if key[1]:
            rows.setdefault(key, []).append(row)
    if len({label for _, label in rows}) < 2:
        return None
    means = np.stack([shares[each].mean(axis=0) for each in rows.values()])
    names = [label for _, label in rows]
    sums = RouteSums()
    sums.add(means, {kind: names})
    found = sums.information(kind)
    assert found is not None, "there are two labels"
    return {
        "bits": found.bits,
        "by_chance": found.by_chance,
        "most": found.most,
        "n": found.n,
        "p": permutation_p(means, names),
    }


def routes_section(routes: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Markdown of the routes of all parts.

    Args:
        routes: part -> what `measure_routes` found; parts without routes may be absent.
    """
    rows = [_row(part, found) for part, found in routes.items() if found]
    if not rows:
        return []
    header = ["part", *(f"I(expert; {name}), by chance, p" for name in KINDS.values())]
    return ["## Routes", "", EXPLAINED, "", *table([*header, "H(expert)", "H of a picture", "dead experts"], rows), ""]


def _row(part: str, found: Mapping[str, Any]) -> list[str]:
    most = fixed(found["most"], 2)
    return [
        part,
        *(_cell(found[kind]) if kind in found else "-" for kind in KINDS),
        f"{fixed(found['entropy'], 2)} of {most}",
        f"{fixed(found['picture_entropy'], 2)} of {most}",
        ", ".join(map(str, found["dead"])) or "none",
    ]


def _cell(found: Mapping[str, Any]) -> str:
    bits = f"{fixed(found['bits'], 3)} of {fixed(found['most'], 2)}"
    return f"{bits}, {fixed(found['by_chance'], 3)}, {p_value(found['p'])} (n = {found['n']})"

"""Folders like those that evaluations leave."""

from __future__ import annotations

import json
from pathlib import Path


def evaluations_of(root: Path, right: dict[str, dict[str, str]]) -> dict[str, dict[str, Path]]:
    """Variant -> seed -> evaluation whose questions are right (1) or wrong (0), alike in English and Turkish."""
    found: dict[str, dict[str, Path]] = {}
    for variant, seeds in right.items():
        for seed, marks in seeds.items():
            folder = root / variant / seed / "mmmb" / "model"
            folder.mkdir(parents=True)
            n = len(marks)
            rows = {
                "index": list(range(n)), "group": list(range(n)),
                "picture": [f"p{i}" for i in range(n)], "right": [int(mark) for mark in marks],
            }  # fmt: skip
            scores = {"plain": 100 * marks.count("1") / n, "circular": 0.0, "n": n, "n_questions": n}
            for language in ("en", "tr"):
                result = {
                    "suite": "mmmb", "language": language, "dataset": f"MMMB_{language}", "routing": "model",
                    "rules": "current", "settings": {"checkpoint": "abc", "table": language},
                    "parts": {"style": {"scores": scores, "experts": [], "rows": rows}},
                }  # fmt: skip
                (folder / f"m_MMMB_{language}.scores.json").write_text(json.dumps(result))
            found.setdefault(variant, {})[seed] = root / variant / seed
    return found

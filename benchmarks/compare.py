"""Two results files side by side, with the ratio of their times.

    python -m benchmarks.compare A.json B.json [--limit 1.15]

Takes files of `benchmarks.gpu_suite`. A ratio above one says that B is faster. With --limit, the exit code is 1 when
one of our own contenders takes more than that many times as long in B as in A, or passed in A and failed in B.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_suite.analysis import rows, timings
from benchmarks.gpu_suite.store import load


def compare(a: Mapping[str, Any], b: Mapping[str, Any], limit: float | None) -> tuple[str, list[str]]:
    """The report, and what is worse in `b` (slower than `limit` times, or failed)."""
    left, right = ({timing.key: timing for timing in timings(content)} for content in (a, b))
    lines: list[Sequence[object]] = [("workload", "pass", "contender", "A ms", "B ms", "A / B")]
    worse = []
    for key, first in left.items():
        second = right.get(key)
        if second is None:
            lines.append((*key, f"{first.ms:.4f}", "-", "-"))
            continue
        lines.append((*key, f"{first.ms:.4f}", f"{second.ms:.4f}", f"{first.ms / second.ms:.2f}"))
        if limit is not None and first.ours and not second.ms <= limit * first.ms:  # also when one is no number
            worse.append(f"{' '.join(key)}: {second.ms / first.ms:.2f} times as long")
    lines += [(*key, "-", f"{timing.ms:.4f}", "-") for key, timing in right.items() if key not in left]
    changed = _changed(a, b)
    worse += [
        f"{stage} {name}: passed, then failed"
        for stage, name, one, two in changed
        if (one, two) == ("passed", "failed")
    ]
    parts = [_align([("", "A", "B"), *_machines(a, b)]), _align(lines)]
    if changed:
        parts.append(_align([("stage", "row", "A", "B"), *changed]))
    return "\n\n".join(parts), worse


def _machines(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Sequence[object]]:
    names = ("device", "driver", "torch", "triton", "commit", "sources", "time")
    return [(name, a["machine"].get(name), b["machine"].get(name)) for name in names]


def _changed(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows whose status is another one; "-" where a file lacks it."""
    found = []
    for stage in dict.fromkeys([*a["stages"], *b["stages"]]):
        left, right = rows(a, stage), rows(b, stage)
        for name in dict.fromkeys([*left, *right]):
            one, two = (content.get(name, {}).get("status", "-") for content in (left, right))
            if one != two:
                found.append((stage, name, one, two))
    return found


def _align(lines: Sequence[Sequence[object]]) -> str:
    cells = [[str(cell) for cell in line] for line in lines]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def main(argv: list[str] | None = None) -> int:
    """Prints the comparison; see the module for the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("a", type=Path)
    parser.add_argument("b", type=Path)
    parser.add_argument("--limit", type=float, help="how many times as long ours may take in B")
    args = parser.parse_args(argv)
    report, worse = compare(load(args.a), load(args.b), args.limit)
    print(report)
    if args.limit is None:
        return 0
    print("\n".join(["", *worse]) if worse else "\nnothing of ours is worse")
    return int(bool(worse))


if __name__ == "__main__":
    sys.exit(main())

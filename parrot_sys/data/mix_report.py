"""The realised mix: what an epoch takes of each data set and language, as a table and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from parrot_sys.data.config import DataConfig
from parrot_sys.data.datasets import RecordDataset
from parrot_sys.data.mixture import SampleOrder
from parrot_sys.markdown_tables import table

_INCH = 0.45
"""Height of a bar."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MixRow:
    """One language of one data set in one stage of the mix."""

    from_step: int
    data_set: str
    language: str
    records: int
    """Usable records that there are."""
    samples: int
    """Records that one round of the stage takes, with repetitions."""
    tokens: int
    """Rows of these samples, of text and images, after truncation."""
    pictures: int


def realised_mix(config: DataConfig, datasets: Sequence[RecordDataset], order: SampleOrder) -> list[MixRow]:
    """Counts over the samples that the first round of each stage really takes.

    Args:
        config: names the stages.
        datasets: in the order of `config.sources()`.
        order: of their samples.
    """
    rows = np.concatenate([dataset.rows for dataset in datasets])
    pictures = np.concatenate([dataset.picture_counts for dataset in datasets])
    found = []
    for stage, (step, _) in enumerate(config.mixes()):
        taken = np.bincount(order.first_round(stage), minlength=len(rows))
        start = 0
        for dataset in datasets:
            own = slice(start, start + len(dataset))
            start += len(dataset)
            for language in dataset.known_languages:
                spoken = dataset.speaks(language)
                times = taken[own] * spoken
                found.append(
                    MixRow(
                        from_step=step,
                        data_set=dataset.source.name,
                        language=language,
                        records=int(spoken.sum()),
                        samples=int(times.sum()),
                        tokens=_total(times, rows[own]),
                        pictures=_total(times, pictures[own]),
                    )
                )
    return found


def render_mix(rows: Sequence[MixRow]) -> str:
    """Tables in Markdown, one for each stage."""
    lines: list[str] = []
    for step in sorted({row.from_step for row in rows}):
        own = [row for row in rows if row.from_step == step]
        samples, tokens, pictures = (sum(getattr(row, name) for row in own) for name in _COUNTS)
        cells = [
            [
                row.data_set,
                row.language or "(unknown)",
                f"{row.records:,}",
                f"{row.samples:,}",
                _share(row.samples, samples),
                f"{row.tokens:,}",
                _share(row.tokens, tokens),
                f"{row.pictures:,}",
            ]
            for row in own
        ]
        records = sum(row.records for row in own)
        cells.append(["all", "", f"{records:,}", f"{samples:,}", "", f"{tokens:,}", "", f"{pictures:,}"])
        if lines or step:
            lines += [*([""] if lines else []), f"From step {step:,} on:"]
        header = ("data set", "language", "records", "samples", "share", "tokens", "share", "pictures")
        lines += table(header, cells)
    return "\n".join(lines)


def plain_mix(rows: Sequence[MixRow]) -> list[dict[str, Any]]:
    """For JSON."""
    return [asdict(row) for row in rows]


def plot_mix(rows: Sequence[MixRow], path: Path) -> None:
    """Shares of samples, tokens and pictures: a bar for each stage and count, a colour for each set and language."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    steps = sorted({row.from_step for row in rows})
    names = sorted({(row.data_set, row.language) for row in rows})
    colours = colormaps["tab20"].resampled(max(len(names), 1))
    bars = [(step, name) for step in steps for name in _COUNTS]
    figure = Figure(figsize=(9, 1.6 + _INCH * max(len(bars), len(names) * 0.55)), layout="constrained")
    axes = figure.subplots()
    left = np.zeros(len(bars))
    for number, (data_set, language) in enumerate(names):
        widths = []
        for step, count in bars:
            own = [row for row in rows if row.from_step == step]
            total = sum(getattr(row, count) for row in own)
            part = sum(getattr(row, count) for row in own if (row.data_set, row.language) == (data_set, language))
            widths.append(100 * part / total if total else 0.0)
        label = f"{data_set}, {language or 'unknown'}"
        axes.barh(range(len(bars)), widths, left=left, color=colours(number), label=label)
        left += np.array(widths)
    labels = [f"{name}, from step {step:,}" if len(steps) > 1 else name for step, name in bars]
    axes.set_yticks(range(len(bars)), labels)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of an epoch in %")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.savefig(path)


_COUNTS = ("samples", "tokens", "pictures")


def _total(times: npt.NDArray[np.int64], each: npt.NDArray[Any]) -> int:
    return int((times * each.astype(np.int64)).sum())


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"

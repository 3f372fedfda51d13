"""Plots of the report, as PNG files. Figures are made without pyplot, so that nothing global is touched.

Each function returns what it drew as a number in brackets because no font has its characters: number -> text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from parrot_sys.fonts import Lettering
from parrot_sys.markdown_tables import fixed

Intervals = Mapping[str, tuple[float, float] | None]
_PANELS_IN_A_ROW = 3
_LANGUAGES_IN_A_PANEL = 8
_COLORS = 10
"""Colours that Matplotlib gives lines before it begins anew."""
_ROUTING_COLORS = {"model": "#2b6cb0", "off": "#a0aec0", "other-language": "#dd6b20"}


def loss_curves(curves: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]], path: Path) -> Mapping[str, str]:
    """One panel a stage. `curves`: stage -> line (`training`, `validation`) -> (step, loss) points."""
    letters = Lettering([name for stage, lines in curves.items() for name in (stage, *lines)])
    figure = Figure(figsize=(4.2 * len(curves), 3.2), layout="constrained")
    axes = figure.subplots(1, len(curves), squeeze=False)[0]
    for ax, (stage, lines) in zip(axes, curves.items(), strict=True):
        for name, points in lines.items():
            if points:
                marker = "o" if len(points) < 12 else None
                ax.plot(*zip(*points, strict=True), label=letters.draw(name), marker=marker, markersize=3)
        ax.set_title(letters.draw(stage))
        ax.set_xlabel("step")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    axes[0].set_ylabel("mean loss of a label (nats)")
    return letters.save(figure, path)


def accuracy_by_language(
    accuracy: Mapping[str, Mapping[str, Mapping[str, float]]],
    intervals: Mapping[str, Mapping[str, Intervals]],
    random: Mapping[str, float],
    title: Mapping[str, str],
    path: Path,
) -> Mapping[str, str]:
    """Bars per language and routing, one panel a suite.

    Args:
        accuracy: suite -> routing -> language -> percent.
        intervals: the same with the ends of each accuracy's interval.
        random: suite -> mean accuracy of guessing, drawn as a line.
        title: suite -> text after its name above its panel.
        path: PNG file.
    """
    most = max(len(next(iter(routings.values()))) for routings in accuracy.values())
    wide = max(1.0, most / _LANGUAGES_IN_A_PANEL)  # times the width of a panel
    columns = min(len(accuracy), max(1, int(_PANELS_IN_A_ROW / wide)))
    rows = math.ceil(len(accuracy) / columns)
    figure = Figure(figsize=(1.2 + 4.6 * wide * columns, 0.4 + 3.0 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    letters = Lettering(accuracy)
    for ax in axes[len(accuracy) :]:
        ax.set_axis_off()
    for ax, (suite, routings) in zip(axes, accuracy.items(), strict=False):
        languages = list(next(iter(routings.values())))
        width = 0.8 / len(routings)
        for number, (routing, values) in enumerate(routings.items()):
            at = np.arange(len(languages)) + (number - (len(routings) - 1) / 2) * width
            heights = [values.get(language, np.nan) for language in languages]
            ends = [intervals[suite][routing].get(language) for language in languages]
            ax.bar(at, heights, width, label=f"routing: {routing}", color=_ROUTING_COLORS[routing])
            _draw_intervals(ax, at.tolist(), heights, ends)
            _draw_numbers(ax, at.tolist(), heights, ends, digits=0)
        ax.axhline(random[suite], color="black", linewidth=1, linestyle="--", label="guessing")
        ax.set_xticks(np.arange(len(languages)), languages)
        ax.set_title(f"{letters.draw(suite)} {title[suite]}", fontsize=10)
        ax.set_ylim(0, 110)
        if wide > 1:
            ax.margins(x=0.01)
    axes[0].set_ylabel("accuracy (%); lines: 95% interval")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return letters.save(figure, path)


def _draw_intervals(
    ax: Axes, at: Sequence[float], heights: Sequence[float], ends: Sequence[tuple[float, float] | None]
) -> None:
    """Vertical lines from end to end of the intervals that there are."""
    for x, height, interval in zip(at, heights, ends, strict=True):
        if interval is not None and not math.isnan(height):
            ax.errorbar(x, height, [[height - interval[0]], [interval[1] - height]], color="#4a5568", linewidth=0.9)


def _draw_numbers(
    ax: Axes,
    at: Sequence[float],
    heights: Sequence[float],
    ends: Sequence[tuple[float, float] | None],
    *,
    digits: int,
) -> None:
    """The values above their bars and intervals."""
    for x, height, interval in zip(at, heights, ends, strict=True):
        if not math.isnan(height):
            top = height if interval is None else interval[1]
            ax.text(x, top + 1, fixed(height, digits), fontsize=7, ha="center", va="bottom")


def accuracy_by_part(
    values: Mapping[str, Mapping[str, float]],
    intervals: Intervals,
    guessing: Mapping[str, float],
    *,
    title: str,
    path: Path,
) -> Mapping[str, str]:
    """A bar for the mean over languages of each part, a dot for each language (in its colour, if there are enough).

    Args:
        values: part -> language -> percent.
        intervals: part -> ends of the interval of its mean.
        guessing: part -> accuracy of guessing, drawn as a line.
        title: of the plot.
        path: PNG file.
    """
    figure = Figure(figsize=(2.4 + 0.9 * len(values), 3.4), layout="constrained")
    ax = figure.subplots()
    letters = Lettering(values)
    at = np.arange(len(values))
    means = [float(np.mean(list(row.values()))) for row in values.values()]
    ax.bar(at, means, 0.6, color="#90cdf4")
    ends = [intervals.get(part) for part in values]
    _draw_intervals(ax, at.tolist(), means, ends)
    _draw_numbers(ax, at.tolist(), means, ends, digits=1)
    languages = list(dict.fromkeys(language for row in values.values() for language in row))
    alike = len(languages) > _COLORS  # then no colour could name one
    for number, language in enumerate(languages):
        dots = [row.get(language, np.nan) for row in values.values()]
        style = {"color": "#4a5568", "label": "a language" if number == 0 else None} if alike else {"label": language}
        ax.plot(at + 0.18, dots, linestyle="none", marker="o", markersize=4, **style)
    for x, part in enumerate(values):
        ax.plot([x - 0.3, x + 0.3], [guessing[part]] * 2, color="black", linewidth=1, linestyle="--")
    ax.set_xticks(at, [letters.draw(part) for part in values])
    ax.set_ylim(0, 110)
    ax.set_ylabel("accuracy (%); dashed: guessing")
    ax.set_title(title, fontsize=10)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return letters.save(figure, path)


def curves_over_layers(
    curves: Mapping[str, Mapping[str, Sequence[float]]], *, y_label: str, path: Path
) -> Mapping[str, str]:
    """One panel a part. `curves`: panel -> line -> value of each layer."""
    letters = Lettering([name for panel, lines in curves.items() for name in (panel, *lines)])
    figure = Figure(figsize=(1.2 + 3.6 * len(curves), 3.2), layout="constrained")
    axes = figure.subplots(1, len(curves), squeeze=False, sharey=True)[0]
    for ax, (title, lines) in zip(axes, curves.items(), strict=True):
        for name, values in lines.items():
            ax.plot(range(1, len(values) + 1), values, label=letters.draw(name), marker="o", markersize=3)
        ax.set_title(letters.draw(title))
        ax.set_xlabel("layer")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set_ylim(bottom=0)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel(y_label)
    axes[0].legend(fontsize=8)
    return letters.save(figure, path)


def means_with_spread(
    values: Mapping[str, Mapping[str, Sequence[float]]],
    *,
    chance: float | None,
    title: str,
    path: Path,
    y_label: str = "accuracy (%)",
    dots: str = "seeds",
) -> Mapping[str, str]:
    """Means as bars with what they are the mean of as dots.

    Args:
        values: variant -> language (or another group) -> value of each seed.
        chance: what guessing gives, drawn as a line; None draws none.
        title: of the plot.
        path: PNG file.
        y_label: what the values are.
        dots: what the means are over.
    """
    languages = list(dict.fromkeys(language for rows in values.values() for language in rows))
    letters = Lettering([*values, *languages, title])
    figure = Figure(figsize=(3 + 1.3 * len(languages), 3.8), layout="constrained")
    ax = figure.subplots()
    width = 0.8 / len(values)
    for number, (variant, rows) in enumerate(values.items()):
        at = np.arange(len(languages)) + (number - (len(values) - 1) / 2) * width
        means = [float(np.mean(rows[language])) for language in languages]
        ax.bar(at, means, width, label=letters.draw(variant), alpha=0.75)
        for x, language in zip(at, languages, strict=True):
            seeds = rows[language]
            ax.plot([x] * len(seeds), seeds, linestyle="none", marker="o", markersize=2.5, color="black")
    if chance is not None:
        ax.axhline(chance, color="black", linewidth=1, linestyle="--", label="guessing")
    ax.set_xticks(np.arange(len(languages)), [letters.draw(language) for language in languages])
    ax.set_ylabel(f"{y_label}; dots: {dots}")
    ax.set_title(letters.draw(title))
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return letters.save(figure, path)

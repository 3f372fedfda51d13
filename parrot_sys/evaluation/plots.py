"""Plots of the report, as PNG files. Figures are made without pyplot, so that nothing global is touched."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

_PANELS_IN_A_ROW = 3
_ROUTING_COLORS = {"model": "#2b6cb0", "off": "#a0aec0", "other-language": "#dd6b20"}


def loss_curves(curves: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]], path: Path) -> None:
    """One panel a stage. `curves`: stage -> line (`training`, `validation`) -> (step, loss) points."""
    figure = Figure(figsize=(4.2 * len(curves), 3.2), layout="constrained")
    axes = figure.subplots(1, len(curves), squeeze=False)[0]
    for ax, (stage, lines) in zip(axes, curves.items(), strict=True):
        for name, points in lines.items():
            if points:
                ax.plot(*zip(*points, strict=True), label=name, marker="o" if len(points) < 12 else None, markersize=3)
        ax.set_title(stage)
        ax.set_xlabel("step")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    axes[0].set_ylabel("loss per label (nats)")
    _save(figure, path)


def accuracy_by_language(
    accuracy: Mapping[str, Mapping[str, Mapping[str, float]]],
    random: Mapping[str, float],
    title: Mapping[str, str],
    path: Path,
) -> None:
    """Bars per language and routing, one panel a suite.

    Args:
        accuracy: suite -> routing -> language -> percent.
        random: suite -> mean accuracy of guessing, drawn as a line.
        title: suite -> title of its panel.
        path: PNG file.
    """
    columns = min(len(accuracy), _PANELS_IN_A_ROW)
    rows = math.ceil(len(accuracy) / columns)
    figure = Figure(figsize=(1.2 + 4.6 * columns, 0.4 + 3.0 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for ax in axes[len(accuracy) :]:
        ax.set_axis_off()
    for ax, (suite, routings) in zip(axes, accuracy.items(), strict=False):
        languages = list(next(iter(routings.values())))
        width = 0.8 / len(routings)
        for number, (routing, values) in enumerate(routings.items()):
            at = np.arange(len(languages)) + (number - (len(routings) - 1) / 2) * width
            heights = [values.get(language, np.nan) for language in languages]
            bars = ax.bar(at, heights, width, label=f"routing: {routing}", color=_ROUTING_COLORS[routing])
            ax.bar_label(bars, fmt="%.0f", fontsize=7)
        ax.axhline(random[suite], color="black", linewidth=1, linestyle="--", label="guessing")
        ax.set_xticks(np.arange(len(languages)), languages)
        ax.set_title(title[suite])
        ax.set_ylim(0, 105)
    axes[0].set_ylabel("accuracy (%)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    _save(figure, path)


def accuracy_by_part(
    values: Mapping[str, Mapping[str, float]], guessing: Mapping[str, float], *, title: str, path: Path
) -> None:
    """A bar for the mean over languages of each part, a dot for each language.

    Args:
        values: part -> language -> percent.
        guessing: part -> accuracy of guessing, drawn as a line.
        title: of the plot.
        path: PNG file.
    """
    figure = Figure(figsize=(2.4 + 0.9 * len(values), 3.4), layout="constrained")
    ax = figure.subplots()
    at = np.arange(len(values))
    bars = ax.bar(at, [float(np.mean(list(row.values()))) for row in values.values()], 0.6, color="#90cdf4")
    ax.bar_label(bars, fmt="%.1f", fontsize=8, padding=8)
    for language in dict.fromkeys(language for row in values.values() for language in row):
        dots = [row.get(language, np.nan) for row in values.values()]
        ax.plot(at, dots, linestyle="none", marker="o", markersize=4, label=language)
    for x, part in enumerate(values):
        ax.plot([x - 0.3, x + 0.3], [guessing[part]] * 2, color="black", linewidth=1, linestyle="--")
    ax.set_xticks(at, list(values))
    ax.set_ylim(0, 105)
    ax.set_ylabel("accuracy (%); dashed: guessing")
    ax.set_title(title)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    _save(figure, path)


def curves_over_layers(curves: Mapping[str, Mapping[str, Sequence[float]]], *, y_label: str, path: Path) -> None:
    """One panel a part. `curves`: panel -> line -> value of each layer."""
    figure = Figure(figsize=(1.2 + 3.6 * len(curves), 3.2), layout="constrained")
    axes = figure.subplots(1, len(curves), squeeze=False, sharey=True)[0]
    for ax, (title, lines) in zip(axes, curves.items(), strict=True):
        for name, values in lines.items():
            ax.plot(range(1, len(values) + 1), values, label=name, marker="o", markersize=3)
        ax.set_title(title)
        ax.set_xlabel("layer")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set_ylim(bottom=0)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel(y_label)
    axes[0].legend(fontsize=8)
    _save(figure, path)


def heat_map(
    values: Mapping[str, Mapping[str, float]],
    *,
    title: str,
    x_label: str,
    color_label: str,
    limits: tuple[float, float],
    text_format: str,
    path: Path,
    counts: Mapping[str, Mapping[str, int]] | None = None,
) -> None:
    """Table of coloured cells with their numbers.

    Args:
        values: row -> column -> value; a missing column is an empty cell.
        title: of the plot.
        x_label: what the columns are.
        color_label: what the values are.
        limits: values of the first and last colour.
        text_format: of the number in a cell, such as `.0f`.
        path: PNG file.
        counts: row -> column -> n, written below the value.
    """
    rows = list(values)
    columns = list(dict.fromkeys(column for row in values.values() for column in row))
    matrix = np.array([[values[row].get(column, np.nan) for column in columns] for row in rows])
    height = 0.42 if counts else 0.34
    figure = Figure(figsize=(2.4 + 0.75 * len(columns), 1.3 + height * len(rows)), layout="constrained")
    ax = figure.subplots()
    image = ax.imshow(matrix, cmap="viridis", vmin=limits[0], vmax=limits[1], aspect="auto")
    middle = sum(limits) / 2
    for y, row in enumerate(rows):
        for x, column in enumerate(columns):
            if not np.isnan(matrix[y, x]):
                text = format(matrix[y, x], text_format)
                text += f"\nn={counts[row][column]}" if counts else ""
                color = "white" if matrix[y, x] < middle else "black"
                ax.text(x, y, text, ha="center", va="center", fontsize=7, color=color)
    ax.set_xticks(range(len(columns)), columns)
    ax.set_yticks(range(len(rows)), rows)
    ax.set_xlabel(x_label)
    ax.set_title(title)
    figure.colorbar(image, ax=ax, label=color_label)
    _save(figure, path)


def means_with_spread(
    values: Mapping[str, Mapping[str, Sequence[float]]],
    *,
    chance: float | None,
    title: str,
    path: Path,
    y_label: str = "accuracy (%)",
    dots: str = "seeds",
) -> None:
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
    figure = Figure(figsize=(3 + 1.3 * len(languages), 3.8), layout="constrained")
    ax = figure.subplots()
    width = 0.8 / len(values)
    for number, (variant, rows) in enumerate(values.items()):
        at = np.arange(len(languages)) + (number - (len(values) - 1) / 2) * width
        means = [float(np.mean(rows[language])) for language in languages]
        ax.bar(at, means, width, label=variant, alpha=0.75)
        for x, language in zip(at, languages, strict=True):
            seeds = rows[language]
            ax.plot([x] * len(seeds), seeds, linestyle="none", marker="o", markersize=2.5, color="black")
    if chance is not None:
        ax.axhline(chance, color="black", linewidth=1, linestyle="--", label="guessing")
    ax.set_xticks(np.arange(len(languages)), languages)
    ax.set_ylabel(f"{y_label}; dots: {dots}")
    ax.set_title(title)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)

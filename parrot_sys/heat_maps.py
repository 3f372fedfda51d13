"""Heat maps as PNG files, such as the routing weights of experts per language; without pyplot, as all plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from parrot_sys.fonts import Lettering
from parrot_sys.markdown_tables import fixed


def routing_weights(
    weights: Mapping[str, Sequence[float]], *, name: str, title: str, path: Path | BinaryIO
) -> Mapping[str, str]:
    """Mean routing weight of each expert per language; white is an equal share, red more, blue less.

    Args:
        weights: language -> weight of each of the E experts.
        name: of the part, above the plot.
        title: text after it.
        path: PNG file, by name or opened.

    Returns:
        What was drawn as a number in brackets: number -> text.
    """
    uniform = 1 / max(map(len, weights.values()))
    return heat_map(
        {language: {f"{e + 1}": weight for e, weight in enumerate(row)} for language, row in weights.items()},
        name=name,
        title=title,
        x_label="expert",
        color_label="weight",
        limits=(0.0, max(2 * uniform, max(max(row) for row in weights.values()))),
        mark=("uniform", uniform),
        around_mark=True,
        digits=2,
        path=path,
    )


def heat_map(
    values: Mapping[str, Mapping[str, float]],
    *,
    name: str,
    title: str,
    x_label: str,
    color_label: str,
    limits: tuple[float, float],
    mark: tuple[str, float],
    digits: int,
    path: Path | BinaryIO,
    counts: Mapping[str, Mapping[str, int]] | None = None,
    around_mark: bool = False,
) -> Mapping[str, str]:
    """Table of coloured cells with their numbers, and the scale of the colours.

    Args:
        values: row -> column -> value; a missing column is an empty cell.
        name: of the part, above the plot.
        title: text after it.
        x_label: what the columns are.
        color_label: what the values are.
        limits: values of the first and last colour.
        mark: name and value of what cells are to be compared with, marked on the scale: guessing, or equal weights.
        digits: of the number in a cell.
        path: PNG file, by name or opened.
        counts: row -> column -> n, written below the value.
        around_mark: white is the value of `mark`, and colours differ below and above it, each to its end of `limits`.
    """
    rows = list(values)
    columns = list(dict.fromkeys(column for row in values.values() for column in row))
    letters = Lettering([name, *rows, *columns])
    matrix = np.array([[values[row].get(column, np.nan) for column in columns] for row in rows])
    height = 0.42 if counts else 0.34
    figure = Figure(figsize=(3.4 + 0.75 * len(columns), 1.5 + height * max(len(rows), 4)), layout="constrained")
    ax = figure.subplots()
    norm = TwoSlopeNorm(mark[1], *limits) if around_mark else Normalize(*limits)
    image = ax.imshow(matrix, cmap="RdBu_r" if around_mark else "viridis", norm=norm, aspect="auto")
    for y, row in enumerate(rows):
        for x, column in enumerate(columns):
            if not np.isnan(matrix[y, x]):
                text = fixed(matrix[y, x], digits)
                text += f"\nn={counts[row][column]}" if counts else ""
                red, green, blue, _ = image.cmap(norm(matrix[y, x]))
                color = "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black"
                ax.text(x, y, text, ha="center", va="center", fontsize=7, color=color)
    ax.set_xticks(range(len(columns)), [letters.draw(column) for column in columns])
    ax.set_yticks(range(len(rows)), [letters.draw(row) for row in rows])
    ax.set_xlabel(x_label)
    ax.set_title(f"{letters.draw(name)}: {title}", fontsize=10)
    _draw_scale(figure, image, ax, color_label, limits, mark, digits)
    return letters.save(figure, path)


def _draw_scale(
    figure: Figure,
    image: AxesImage,
    ax: Axes,
    label: str,
    limits: tuple[float, float],
    mark: tuple[str, float],
    digits: int,
) -> None:
    """The colours with both ends of the scale in numbers, and a line at the value to compare with."""
    scale = figure.colorbar(image, ax=ax, label=label)
    ticks = [*np.linspace(*limits, 5)]
    scale.set_ticks(ticks, labels=[fixed(tick, digits) for tick in ticks])
    name, value = mark
    scale.ax.axhline(value, color="red", linewidth=1.5)
    shown = f"{name}\n{fixed(value, digits)}"
    scale.ax.text(
        -0.2, value, shown, transform=scale.ax.get_yaxis_transform(), color="red", fontsize=7, ha="right", va="center"
    )

"""Draws the architectures of docs/models.md: `python docs/figures/draw_architectures.py` writes the SVGs beside it.

A figure is a list of boxes on a grid and of arrows between them; the text is in the boxes, the mathematics in the page.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path

CELL_WIDTH, CELL_HEIGHT, MARGIN = 196, 74, 18
BOX_WIDTH, BOX_HEIGHT, LINE = 172, 50, 15
FROZEN, TRAINED, OWN, DATA = "#e2e8f0", "#dbeafe", "#fde68a", "#ffffff"
LEGEND = (("frozen", FROZEN), ("trained", TRAINED), ("the system's own part", OWN))


@dataclass(frozen=True, kw_only=True)
class Box:
    """A box in column `x`, row `y` of the grid (halves allowed)."""

    name: str
    x: float
    y: float
    text: str
    fill: str = TRAINED

    @property
    def middle(self) -> tuple[float, float]:
        """Centre in pixels."""
        return MARGIN + self.x * CELL_WIDTH + BOX_WIDTH / 2, MARGIN + self.y * CELL_HEIGHT + BOX_HEIGHT / 2


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Boxes and arrows (from, to, label) between them."""

    title: str
    boxes: tuple[Box, ...]
    arrows: tuple[tuple[str, str, str], ...]


PARROT = Figure(
    title="Parrot: the prompt routes the image through experts in front of the decoder",
    boxes=(
        Box(name="image", x=0, y=0, text="image", fill=DATA),
        Box(name="tower", x=0, y=1, text="vision tower\nCLS + patches", fill=FROZEN),
        Box(name="projector", x=0, y=2, text="projector\nLinear, GELU, Linear"),
        Box(name="attend", x=1, y=2, text="CLS row attends over\nthe prompt's embeddings", fill=OWN),
        Box(name="router", x=2, y=2, text="router: softmax over\nE experts, one per image", fill=OWN),
        Box(name="experts", x=1, y=3, text="SwiGLU experts,\nweighted sum + residual", fill=OWN),
        Box(name="prompt", x=2, y=0, text="prompt", fill=DATA),
        Box(name="embedding", x=2, y=1, text="word embeddings"),
        Box(name="splice", x=1, y=4, text="visual rows in place of\n<image> among the words", fill=DATA),
        Box(name="decoder", x=1, y=5, text="decoder\n(Qwen, LLaMA)"),
        Box(name="answer", x=2, y=5, text="answer", fill=DATA),
    ),
    arrows=(
        ("image", "tower", ""),
        ("tower", "projector", ""),
        ("projector", "attend", ""),
        ("prompt", "embedding", ""),
        ("embedding", "attend", ""),
        ("attend", "router", ""),
        ("router", "experts", "p"),
        ("projector", "experts", "rows"),
        ("experts", "splice", ""),
        ("splice", "decoder", ""),
        ("decoder", "answer", ""),
    ),
)
WINGS = Figure(
    title="Wings: two learners and a router beside the attention of every decoder layer",
    boxes=(
        Box(name="image", x=0, y=0, text="image", fill=DATA),
        Box(name="tower", x=0, y=1, text="vision tower\npatches", fill=FROZEN),
        Box(name="projector", x=0, y=2, text="projector\nLinear, GELU, Linear"),
        Box(name="words", x=2, y=1, text="word embeddings"),
        Box(name="prompt", x=2, y=0, text="prompt and answer", fill=DATA),
        Box(name="splice", x=1, y=2, text="rows of the layer, x", fill=DATA),
        Box(name="attention", x=1, y=3, text="u = x + attention(norm x)"),
        Box(name="visual", x=0, y=4, text="visual learner (LoRRA)\nreads visual rows", fill=OWN),
        Box(name="router", x=1, y=4, text="router: two weights a row\nfrom the layer's attention", fill=OWN),
        Box(name="textual", x=2, y=4, text="textual learner (LoRRA)\nreads earlier words", fill=OWN),
        Box(name="sum", x=1, y=5, text="u' = u + w_v y_v + w_t y_t", fill=OWN),
        Box(name="mlp", x=1, y=6, text="u' + MLP(norm u')\nto the next layer"),
    ),
    arrows=(
        ("image", "tower", ""),
        ("tower", "projector", ""),
        ("prompt", "words", ""),
        ("projector", "splice", ""),
        ("words", "splice", ""),
        ("projector", "visual", "memory"),
        ("words", "textual", "memory"),
        ("splice", "attention", ""),
        ("attention", "router", "weights"),
        ("attention", "visual", "u"),
        ("attention", "textual", "u"),
        ("router", "sum", ""),
        ("visual", "sum", ""),
        ("textual", "sum", ""),
        ("sum", "mlp", ""),
    ),
)
MULTIMODAL_GPT = Figure(
    title="MultiModal-GPT: gated cross-attention in front of every n-th layer, LoRA inside",
    boxes=(
        Box(name="image", x=0, y=0, text="image", fill=DATA),
        Box(name="tower", x=0, y=1, text="vision tower\npatches", fill=FROZEN),
        Box(name="resampler", x=0, y=2, text="perceiver resampler\n64 latents an image", fill=FROZEN),
        Box(name="prompt", x=1, y=0, text="instruction with <image>", fill=DATA),
        Box(name="words", x=1, y=1, text="word embeddings", fill=FROZEN),
        Box(name="lora", x=2, y=3, text="LoRA: W + (alpha / r) B A\nthe only trained part", fill=OWN),
        Box(name="gated", x=1, y=3, text="gated cross-attention\ntanh gates, start at 0", fill=FROZEN),
        Box(name="layers", x=1, y=4, text="n decoder layers\n(LLaMA)", fill=FROZEN),
        Box(name="answer", x=1, y=5, text="next block, ..., answer", fill=DATA),
    ),
    arrows=(
        ("image", "tower", ""),
        ("tower", "resampler", ""),
        ("prompt", "words", ""),
        ("words", "gated", ""),
        ("resampler", "gated", "latents"),
        ("gated", "layers", ""),
        ("layers", "answer", ""),
        ("lora", "gated", ""),
        ("lora", "layers", ""),
    ),
)
FIGURES = {"parrot": PARROT, "wings": WINGS, "multimodal_gpt": MULTIMODAL_GPT}


def draw(figure: Figure) -> str:
    """The SVG."""
    boxes = {box.name: box for box in figure.boxes}
    width = MARGIN * 2 + max(box.x for box in figure.boxes) * CELL_WIDTH + BOX_WIDTH
    bottom = MARGIN * 2 + max(box.y for box in figure.boxes) * CELL_HEIGHT + BOX_HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{bottom + 24:g}" '
        f'viewBox="0 0 {width:g} {bottom + 24:g}" font-family="sans-serif" font-size="12">',
        f"<title>{escape(figure.title)}</title>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z" fill="#475569"/></marker></defs>',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
    ]
    parts += [_arrow(boxes[start], boxes[end], label) for start, end, label in figure.arrows]
    parts += [_box(box) for box in figure.boxes]
    for number, (text, fill) in enumerate(LEGEND):
        left = MARGIN + number * 150
        parts.append(f'<rect x="{left}" y="{bottom:g}" width="12" height="12" fill="{fill}" stroke="#475569"/>')
        parts.append(f'<text x="{left + 18}" y="{bottom + 10:g}">{escape(text)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _box(box: Box) -> str:
    x, y = box.middle
    lines = box.text.split("\n")
    top = y - LINE * (len(lines) - 1) / 2 + 4
    texts = [
        f'<text x="{x:g}" y="{top + LINE * number:g}" text-anchor="middle">{escape(line)}</text>'
        for number, line in enumerate(lines)
    ]
    frame = (
        f'<rect x="{x - BOX_WIDTH / 2:g}" y="{y - BOX_HEIGHT / 2:g}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" '
        f'rx="6" fill="{box.fill}" stroke="#475569"/>'
    )
    return "\n".join([frame, *texts])


def _arrow(start: Box, end: Box, label: str) -> str:
    """From edge to edge along the line between the centres."""
    (x1, y1), (x2, y2) = start.middle, end.middle
    first, last = _edge(x1, y1, x2, y2), _edge(x2, y2, x1, y1)
    line = (
        f'<line x1="{first[0]:g}" y1="{first[1]:g}" x2="{last[0]:g}" y2="{last[1]:g}" '
        'stroke="#475569" marker-end="url(#head)"/>'
    )
    if not label:
        return line
    x, y = (first[0] + last[0]) / 2 + 5, (first[1] + last[1]) / 2 - 4
    return f'{line}\n<text x="{x:g}" y="{y:g}" font-size="11" fill="#475569">{escape(label)}</text>'


def _edge(x: float, y: float, towards_x: float, towards_y: float) -> tuple[float, float]:
    """Where the line to another centre leaves the box around (x, y)."""
    dx, dy = towards_x - x, towards_y - y
    scales = [half / abs(delta) for half, delta in ((BOX_WIDTH / 2, dx), (BOX_HEIGHT / 2, dy)) if delta]
    scale = min(scales)
    return round(x + dx * scale, 1), round(y + dy * scale, 1)


if __name__ == "__main__":
    for name, figure in FIGURES.items():
        (Path(__file__).parent / f"{name}.svg").write_text(draw(figure), encoding="utf-8")

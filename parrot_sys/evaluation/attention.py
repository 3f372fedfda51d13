"""`parrot attention`: how much of each layer's attention goes to the text before an image and to that after it.

Wings (arXiv 2406.03496) sees text-only forgetting in it: visual tuning moves attention from the text before the image
to that after it, and in models that forgot more, the two curves over layers go less together (Pearson correlation).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import StatisticsError, correlation, fmean
from typing import Annotated, Any

import torch
from torch import Tensor
from tqdm import tqdm

from parrot_sys.cli import parse_config
from parrot_sys.data.languages import language_codes
from parrot_sys.errors import ConfigError, DataError
from parrot_sys.evaluation import plots
from parrot_sys.evaluation.items import Item, Options
from parrot_sys.evaluation.predictor import ModelPredictor
from parrot_sys.evaluation.runner import load_tables, make_items
from parrot_sys.fonts import explain_numbers
from parrot_sys.inference.generation import check_finite
from parrot_sys.inference.pretrained import load_pretrained
from parrot_sys.inference.requests import check_rows, request_name
from parrot_sys.logging import setup_logging
from parrot_sys.markdown_tables import fixed, table
from parrot_sys.megatron.attention_mass import attention_mass, row_kinds
from parrot_sys.paths import INPUT, INPUT_FOLDER, OUTPUT_FOLDER
from parrot_sys.platform import DtypeName

WHERE = ("before", "image", "after")
DEFINITION = (
    "share of attention that the text rows after the image give to the text before it (system prompt and earlier "
    "turns), to the image, and to the text after it (their own row included); mean over heads, rows and dialogues"
)


@dataclass(kw_only=True, frozen=True, slots=True)
class AttentionConfig:
    """Measures, layer by layer, the attention on text before and after the image; writes attention.json and a plot."""

    checkpoint: Annotated[Path, INPUT_FOLDER]
    """Folder of the model: released layout, training checkpoint, or training run (its newest checkpoint)."""
    data: Annotated[tuple[Path, ...], INPUT]
    """Tables, such as the DIR/iit of `parrot data build --output DIR`; questions without a picture are left out."""
    output: Annotated[Path, OUTPUT_FOLDER]
    """Folder for attention.json, attention.md and attention.png."""
    languages: tuple[str, ...] = ()
    """Only tables of these languages (BCP 47 codes such as en, pt-BR); all when not given."""
    options: Options = "shown"
    """Whether a question's prompt contains its options."""
    limit: int | None = 20
    """Questions per split of a table, spread evenly over it."""
    batch_size: int = 16
    """Questions that run together; changes speed and memory only."""
    device: str | None = None
    """Where the model runs; the GPU if there is one, else the CPU."""
    dtype: DtypeName | None = None
    """Type of parameters and activations; that of the checkpoint when not given."""
    allow_non_finite: bool = False
    """Load NaN and infinite weights with a warning; otherwise they are an error that names their tensors."""

    def __post_init__(self) -> None:
        for name in ("limit", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} must be >= 1, got {value}")
        language_codes(self.languages)
        if not self.data:
            raise ConfigError("data must name at least one TSV file or folder, got nothing")


def main(argv: Sequence[str]) -> int:
    """Runs `parrot attention`."""
    config = parse_config(AttentionConfig, argv, prog="parrot attention")
    setup_logging()
    parts = questions_with_pictures(config)
    model, processor = load_pretrained(
        config.checkpoint, device=config.device, dtype=config.dtype, allow_non_finite=config.allow_non_finite
    )
    predictor = ModelPredictor(model, processor, checkpoint=config.checkpoint)
    content = {
        "definition": DEFINITION,
        "settings": {"checkpoint": predictor.settings["checkpoint"], "options": config.options},
        "parts": {name: measure(predictor, items, config.batch_size, name) for name, items in parts.items()},
    }
    write(content, config.output)
    print((config.output / "attention.md").read_text(encoding="utf-8"))
    return 0


def questions_with_pictures(config: AttentionConfig) -> dict[str, list[Item]]:
    """Part -> its questions about pictures, in all languages.

    Raises:
        DataError: there are none.
    """
    parts: dict[str, list[Item]] = {}
    for each in load_tables(config.data, config.languages, config.limit):
        part_of = {question.index: name for name, questions in each.parts().items() for question in questions}
        for item in make_items(each, "model", {}, show_options=config.options == "shown"):
            if item.question.image_key is not None:
                parts.setdefault(part_of[item.question.index], []).append(item)
    if not parts:
        raise DataError(f"no question in {', '.join(map(str, config.data))} has a picture; name tables with pictures")
    return parts


@torch.inference_mode()
def measure(predictor: ModelPredictor, items: Sequence[Item], batch_size: int, name: str) -> dict[str, Any]:
    """Attention of one part.

    Args:
        predictor: the model, in one process.
        items: questions about pictures.
        batch_size: questions that run together.
        name: for the progress bar.

    Returns:
        `n` dialogues; `layers`, for each layer the mean share `before`, `image` and `after` and under `std` the spread
        over dialogues; `pearson`, the correlation over layers of `before` and `after`, None for fewer than three layers
        or a share that is the same in all.

    Raises:
        DataError: a question is too long for the model.
        CheckpointError: a logit is not finite.
    """
    batches: list[Tensor] = []
    for start in tqdm(range(0, len(items), batch_size), desc=f"attention {name}", unit="batch"):
        samples = predictor.samples(items[start : start + batch_size])
        check_rows(predictor.config, samples, [0] * len(samples))
        batch = predictor.lockstep.pack(samples)
        last_rows = batch.cu_seqlens[1:].long() - 1
        with attention_mass(predictor.model, row_kinds(batch)) as layers:
            output = predictor.lockstep.forward(batch, logits_rows=last_rows)
        assert output.logits is not None, "logits come back to every rank"
        check_finite(output.logits, [request_name(start + place, sample) for place, sample in enumerate(samples)])
        batches.append(torch.stack(layers, dim=1))  # [S, layers, 3]
    mass = torch.cat(batches).double()
    means, spreads = mass.mean(0).tolist(), mass.std(0, correction=0).tolist()
    return {
        "n": len(items),
        "layers": [
            {**dict(zip(WHERE, mean, strict=True)), "std": dict(zip(WHERE, spread, strict=True))}
            for mean, spread in zip(means, spreads, strict=True)
        ],
        "pearson": pearson([layer[0] for layer in means], [layer[2] for layer in means]),
    }


def pearson(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Correlation of two curves over layers; None where it says nothing (fewer than three layers, a flat curve)."""
    if len(first) < 3:
        return None
    try:
        return correlation(first, second)
    except StatisticsError:
        return None


def write(content: Mapping[str, Any], output: Path) -> None:
    """Writes attention.json, attention.md and attention.png."""
    output.mkdir(parents=True, exist_ok=True)
    parts: Mapping[str, Any] = content["parts"]
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    (output / "attention.json").write_text(text, encoding="utf-8")
    curves = {
        f"{name} (n = {part['n']})": {where: [layer[where] for layer in part["layers"]] for where in WHERE}
        for name, part in parts.items()
    }
    legend = plots.curves_over_layers(curves, y_label="share of attention", path=output / "attention.png")
    lines = ["# Attention on text before and after the image", "", f"{content['definition'].capitalize()}.", ""]
    for name, part in parts.items():
        rows = [
            [str(number), *(fixed(layer[where], 3) for where in WHERE)]
            for number, layer in enumerate(part["layers"], 1)
        ]
        means = [fmean(layer[where] for layer in part["layers"]) for where in WHERE]
        rows.append(["mean", *(fixed(mean, 3) for mean in means)])
        together = "not defined" if part["pearson"] is None else fixed(part["pearson"], 2)
        lines += [f"## {name} (n = {part['n']})", "", *table(["layer", *WHERE], rows), ""]
        lines += [f"Correlation of before and after over layers: {together}.", ""]
    lines += ["![Share of attention over layers](attention.png)", ""]
    if legend:
        lines += [explain_numbers(legend), ""]
    (output / "attention.md").write_text("\n".join(lines), encoding="utf-8")

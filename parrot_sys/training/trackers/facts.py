"""Contents for trackers: the facts of a run, the numbers of a record, and its routes as a heat map."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from PIL import Image

from parrot_sys import heat_maps, info
from parrot_sys.config_values import config_to_dict
from parrot_sys.routes import dead_experts, usage_text
from parrot_sys.training.config import TrainConfig
from parrot_sys.training.metrics import describe
from parrot_sys.training.trackers.base import CaptionedImage, Number, RunFacts


def run_facts(config: TrainConfig, start_step: int) -> RunFacts:
    """Settings and environment of a run that begins or goes on after `start_step`."""
    output = Path(config.output)
    return RunFacts(
        output=output,
        project=config.logging.project,
        name=config.logging.name or output.resolve().name,
        config=config_to_dict(config),
        environment={**info.collect(), "processes": dist.get_world_size()},
        start_step=start_step,
    )


def numbers_of(kind: str, record: Mapping[str, Any]) -> list[Number]:
    """Numbers of a record, lists one by one.

    Args:
        kind: of the record: `train`, `validation` or `summary`.
        record: plain values.
    """
    return [
        Number(
            f"{kind}/{name}/{index}" if isinstance(value, list) else f"{kind}/{name}",
            float(number),
            describe(kind, name),
        )
        for name, value in record.items()
        for index, number in enumerate(value if isinstance(value, list) else [value])
        if isinstance(number, int | float)
    ]


def routing_image(kind: str, step: int, record: Mapping[str, Any]) -> CaptionedImage | None:
    """Mean routing weight of each expert per language; None where a record has no routes."""
    parts = {name: name.split("/") for name in record}
    weights = {part[1]: record[name] for name, part in parts.items() if part[::2] == ["experts", "probability"]}
    if not weights:
        return None
    file = io.BytesIO()
    usage = ""
    if shares := record.get("routes/shares"):  # steps of a checkpoint of earlier versions have none
        usage = usage_text(record["routes/entropy_bits"], math.log2(len(shares)), dead_experts(shares))
    title = f"mean routing weight, step {step}" + (f"\n{usage}" if usage else "")
    legend = heat_maps.routing_weights(weights, name=kind, title=title, path=file)
    caption = "Mean routing weight of each expert per language; white is an equal share, red more, blue less"
    names = "".join(f"; {number} {text}" for number, text in legend.items())
    told = f"; {usage}" if usage else ""
    return CaptionedImage(Image.open(file).convert("RGB"), caption + told + names)

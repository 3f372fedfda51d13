"""TensorBoard: event files in OUTPUT/tensorboard."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence

import yaml
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard.summary import scalar
from torch.utils.tensorboard.writer import SummaryWriter

from parrot_sys.training.trackers.base import CaptionedImage, Number, RunFacts

FOLDER = "tensorboard"


class TensorBoardTracker:
    """Writes event files. A run that goes on takes back what came after the step it goes on from."""

    def __init__(self, run: RunFacts) -> None:
        self._board = SummaryWriter(str(run.output / FOLDER), purge_step=run.start_step + 1)
        texts = {
            "config": yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True),
            "environment": json.dumps(run.environment, indent=2, ensure_ascii=False),
        }
        for name, text in texts.items():
            self._board.add_text(name, _verbatim(text), run.start_step)

    def write_numbers(self, step: int, numbers: Sequence[Number]) -> None:
        """Scalars with their descriptions, which TensorBoard shows beside each chart (`add_scalar` takes none)."""
        for number in numbers:
            summary = scalar(number.name, number.value)
            summary.value[0].metadata.plugin_data.plugin_name = "scalars"
            summary.value[0].metadata.summary_description = number.description
            self._add(summary, step)

    def write_images(self, step: int, name: str, images: Sequence[CaptionedImage]) -> None:
        """Images, and their captions as a text of the same name."""
        for index, each in enumerate(images):
            data = io.BytesIO()
            each.image.save(data, "PNG")
            size = {"height": each.image.height, "width": each.image.width, "colorspace": 3}
            image = Summary.Image(encoded_image_string=data.getvalue(), **size)
            self._add(Summary(value=[Summary.Value(tag=f"{name}/{index}", image=image)]), step)
            self._board.add_text(f"{name}/{index}", _verbatim(each.caption), step)

    def close(self, *, failed: bool = False) -> None:
        """Writes what is left."""
        self._board.close()

    def _add(self, summary: Summary, step: int) -> None:
        self._board._get_file_writer().add_summary(summary, step)


def _verbatim(text: str) -> str:
    """Markdown that shows the text as it is."""
    return "\n".join(f"    {line}" for line in text.splitlines())

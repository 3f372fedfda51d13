"""Sample answers of a run: some held-out records, answered by the model as it is, with their pictures."""

from __future__ import annotations

import io
import itertools
import logging
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch.distributed as dist
from PIL import Image

from parrot_sys.data.constants import IMAGE_TOKEN_ID
from parrot_sys.data.datasets import RecordDataset
from parrot_sys.data.decoding import load_image
from parrot_sys.data.loader import ParrotDataLoader
from parrot_sys.data.packing import Sample, expanded_lengths, rows_of_pictures
from parrot_sys.data.parts import join, turn_parts
from parrot_sys.data.picture import join_pictures
from parrot_sys.data.processor import ParrotProcessor
from parrot_sys.engine.config import EngineConfig
from parrot_sys.engine.core import Engine
from parrot_sys.engine.lockstep import Lockstep
from parrot_sys.engine.requests import EngineRequest
from parrot_sys.errors import DataError
from parrot_sys.megatron.model import MultimodalModel
from parrot_sys.parallel.agreement import on_first_rank
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.training.config import TrainConfig
from parrot_sys.training.step import evaluation_mode
from parrot_sys.training.trackers.base import CaptionedImage

logger = logging.getLogger(__name__)
_CARD_WIDTH = 60
"""Characters in a line below a picture."""
_SHOWN_SIZE = (448, 448)


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """The first question of a record."""

    sample: Sample
    """The prompt and its pictures, as the model takes them."""
    max_new_tokens: int
    shown: tuple[Image.Image, ...]
    """The pictures, small, as a reader sees them."""
    prompt: str
    wanted: str
    """The answer in the record."""
    record: str
    """Its name."""


class SampleAnswers:
    """Answers to `logging.samples` of the validation records, always the same ones; all ranks call it alike."""

    def __init__(
        self,
        config: TrainConfig,
        processor: ParrotProcessor,
        chunks: Sequence[MultimodalModel],
        loader: ParrotDataLoader | None,
    ) -> None:
        """
        Args:
            config: of the run.
            processor: of the model.
            chunks: this rank's part of the model.
            loader: of the validation records; None where there are none.
        """
        self._settings, self._model = config.logging, config.model
        self._processor, self._chunks = processor, chunks
        self._datasets = () if loader is None else loader.datasets
        self._questions: list[Question] | None = None

    def answer(self) -> list[CaptionedImage]:
        """Greedy answers of the model as it is: cards with pictures, question, answer and the record's answer."""
        if not self._settings.samples:
            return []
        if self._questions is None:
            self._questions = on_first_rank(self._read)
        with evaluation_mode(self._chunks):
            texts = _answers(self._chunks[0], self._processor, self._questions)
        if dist.get_rank() > 0:
            return []
        return _alike([_card(question, text) for question, text in zip(self._questions, texts, strict=True)])

    def _read(self) -> list[Question]:
        """Records at equal distances; those whose pictures cannot be read, or that are too long, are left out."""
        datasets, found = self._datasets, []
        ends = np.cumsum([len(dataset) for dataset in datasets])
        for number in np.unique(np.linspace(0, ends[-1] - 1, self._settings.samples).astype(int)).tolist():
            place = int(np.searchsorted(ends, number, side="right"))
            dataset, index = datasets[place], number - int(ends[place]) + len(datasets[place])
            try:
                found.append(_read(dataset, index, self._processor, self._model, self._settings.sample_tokens))
            except DataError as error:
                logger.warning("no sample answer to %s: %s", dataset.describe(index), error)
        return found


def _read(
    dataset: RecordDataset, index: int, processor: ParrotProcessor, config: ParrotConfig, new_tokens: int
) -> Question:
    (record,) = dataset.read([index])
    asked = list(itertools.takewhile(lambda turn: turn["from"] != "gpt", record.turns))
    answered = record.turns[len(asked) : len(asked) + 1]
    formatted = processor.format_conversation(asked, add_generation_prompt=True)
    files = dataset.pictures(index)[: formatted["input_ids"].count(IMAGE_TOKEN_ID)]
    pixels, rows = join_pictures(processor.pictures(files))
    sample = Sample(input_ids=formatted["input_ids"], pixel_values=pixels, pictures=rows)
    room = config.max_rows - _num_rows(sample, config)
    if room < 1:
        raise DataError(f"its question leaves no room for an answer in {config.max_rows} rows")
    shown = [load_image(file) for file in files]
    for picture in shown:
        picture.thumbnail(_SHOWN_SIZE)
    return Question(
        sample=sample,
        max_new_tokens=min(new_tokens, room),
        shown=tuple(shown),
        prompt="\n".join(join(turn_parts(turn, "in_place")) for turn in asked if turn["from"] == "human"),
        wanted="".join(join(turn_parts(turn, "in_place")) for turn in answered),
        record=record.record_id,
    )


def _num_rows(sample: Sample, config: ParrotConfig) -> int:
    rows = rows_of_pictures(sample, config.rows_per_image)
    return expanded_lengths(np.asarray(sample.input_ids), rows, config.max_rows)[1]


def _answers(model: MultimodalModel, processor: ParrotProcessor, questions: Sequence[Question]) -> list[str]:
    """Greedy answers, all at once."""
    if not questions:
        return []
    lockstep, size = Lockstep(model), EngineConfig().block_size
    rows = [_num_rows(each.sample, lockstep.config) + each.max_new_tokens for each in questions]
    # (One block more for each: requests are admitted only while all running ones may grow.)
    engine = Engine(lockstep, EngineConfig(num_blocks=sum(-(-count // size) + 1 for count in rows) + 1))
    end = processor.tokenizer.eos_token_id
    tokens: dict[int, list[int]] = {}
    for each in questions:
        request = EngineRequest(
            sample=each.sample,
            max_new_tokens=each.max_new_tokens,
            stop_ids=frozenset() if end is None else frozenset([end]),
        )
        tokens[engine.submit(request)] = []
    while engine.has_requests:
        for delta in engine.step():
            tokens[delta.number] += delta.tokens
    return [processor.tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens.values()]


def _card(question: Question, text: str) -> CaptionedImage:
    """The pictures side by side above the texts."""
    # Imported late: Matplotlib takes a second, and not every rank or run needs it.
    from matplotlib.figure import Figure

    from parrot_sys.fonts import Lettering

    lines = [
        line
        for name, words in (("question", question.prompt), ("answer", text), ("wanted", question.wanted))
        for line in textwrap.wrap(f"{name}: {' '.join(words.split())}", _CARD_WIDTH)
    ]
    letters = Lettering(lines)
    height = 0.2 + 0.2 * len(lines)
    figure = Figure(figsize=(5, height + (3.2 if question.shown else 0)), layout="constrained")
    if question.shown:
        axes = figure.subplots(1, len(question.shown), squeeze=False)[0]
        for ax, picture in zip(axes, question.shown, strict=True):
            ax.imshow(picture)
            ax.set_axis_off()
    figure.supxlabel("\n".join(map(letters.draw, lines)), x=0.02, ha="left", fontsize=8)
    data = io.BytesIO()
    letters.save(figure, data)
    image = Image.open(data).convert("RGB")
    caption = f"record: {question.record}\nquestion: {question.prompt}\nanswer: {text}\nwanted: {question.wanted}"
    return CaptionedImage(image, caption)


def _alike(cards: Sequence[CaptionedImage]) -> list[CaptionedImage]:
    """The cards on paper of one size, as some trackers want images that they show together."""
    size = tuple(max(sides, default=0) for sides in zip(*(card.image.size for card in cards), strict=True))
    same = []
    for card in cards:
        paper = Image.new("RGB", (size[0], size[1]), "white")
        paper.paste(card.image)
        same.append(CaptionedImage(paper, card.caption))
    return same

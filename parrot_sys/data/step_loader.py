"""StepLoader: what all loaders of training data do: prepare steps ahead, read pictures, leave bad samples out."""

from __future__ import annotations

import copy
import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from parrot_sys.data.batch import PackedBatch, pinned_cat
from parrot_sys.data.config import DataConfig
from parrot_sys.data.feature_store import FeatureStore
from parrot_sys.data.image_files import ImageFile
from parrot_sys.data.image_share import ImageShare
from parrot_sys.data.packing import Guidance, Sample, pack_samples
from parrot_sys.data.processor import ParrotProcessor
from parrot_sys.data.records import Record
from parrot_sys.data.skipped import SkippedRecords
from parrot_sys.data.step_images import ImageReader, StepDraft
from parrot_sys.towers import PictureRows

logger = logging.getLogger(__name__)
Map = Callable[..., Any]
"""`map` of a pool of threads."""
_Joined = tuple[list[PackedBatch], dict[int, str]]


@dataclass(slots=True)
class LoaderStatistics:
    """Counts since the start of training; a resumed loader goes on counting."""

    samples: int = 0
    """Samples of all ranks that were due."""
    truncated: int = 0
    """Samples that were longer than max_seq_len rows and were cut."""
    skipped: list[str] = field(default_factory=list)
    """This rank's samples that were left out while training: where and why, once for each record."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepItem:
    """A sample of a step, before it is encoded."""

    record: Record
    data_set: str
    """Its name."""
    pictures: list[ImageFile]
    where: str
    """Place of the record, for messages."""
    keeps: object = None
    """Whatever must live as long as its pictures are read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPlan:
    """A step whose bad samples the ranks that have it have not agreed on yet."""

    reader: ImageReader
    draft: StepDraft
    items: Sequence[StepItem]
    size: int
    """Samples of all ranks."""
    truncated: int = 0
    skipped: Sequence[tuple[str, str]] = ()
    """Data set and reason of each record that was left out before."""
    after: Any = None
    """State of the loader after this step, where it does not follow from `size`."""


class StepLoader(ABC):
    """Iterating gives, for each step, this rank's list of micro-batches, which is equally long on every rank.

    Micro-batches may be empty. Steps are prepared ahead by a thread, their pictures read by others.
    """

    def __init__(
        self,
        config: DataConfig,
        processor: ParrotProcessor,
        *,
        num_visual_rows: int,
        max_seq_len: int,
        guidance: Guidance = "prompt",
        global_batch_size: int,
        images: ImageShare | None = None,
        pin_memory: bool = False,
    ) -> None:
        """
        Args:
            config: data sets, mix and policies.
            processor: of the model to be trained.
            num_visual_rows: V of the vision tower, rows of an image (or of a tile).
            max_seq_len: most rows of a sample.
            guidance: `moe.guidance` of the model.
            global_batch_size: samples in a step, over all ranks.
            images: images that this process reads, where others have the same samples; all when not given.
            pin_memory: give batches in page-locked memory, for a GPU.
        """
        self.config = config
        self.statistics = LoaderStatistics()
        # Threads of the loader tokenise while the caller may use the same tokenizer, which is not safe to share.
        self._processor = processor.with_data_config(config)
        self._processor.tokenizer = copy.deepcopy(processor.tokenizer)
        self._num_visual_rows, self._max_seq_len, self._guidance = num_visual_rows, max_seq_len, guidance
        self._global_batch_size = global_batch_size
        self._images, self._pins = images or ImageShare(), pin_memory
        self._feature_store: FeatureStore | None = None
        self._skipped_file: SkippedRecords | None = None

    @property
    @abstractmethod
    def languages(self) -> set[str]:
        """Languages that the records state, as far as they are known before training."""

    @property
    @abstractmethod
    def samples_per_epoch(self) -> int:
        """Samples of a whole epoch, over all ranks."""

    @property
    @abstractmethod
    def place(self) -> tuple[int, int]:
        """Whole epochs, and samples of the next one, that were consumed up to the last step taken."""

    @property
    def epoch(self) -> int:
        """Epoch of the next step, from 0."""
        return self.place[0]

    @abstractmethod
    def pictures(self) -> dict[str, ImageFile]:
        """Name -> file of all images of all data sets, each once, sorted: what a feature store has to hold."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """State that `load_state_dict` needs to go on after the last step taken: plain values."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where the loader was that gave `state`.

        Raises:
            DataError: the data or their order are not those of `state`; names both.
        """

    @abstractmethod
    def _plans(self) -> Iterator[Callable[[Map], StepPlan]]:
        """Makers of the steps that come next; a thread calls one after the other."""

    @abstractmethod
    def _advance(self, plan: StepPlan) -> None:
        """Moves the state past a step."""

    def use_features(self, store: FeatureStore) -> None:
        """From the next iteration on, batches hold `image_features` from `store` instead of `pixel_values`.

        Args:
            store: must hold the features of `pictures()`; a sample that lacks some is a bad sample.
        """
        self._feature_store = store

    def list_skipped(self, file: SkippedRecords) -> None:
        """Writes from now on each record that is left out."""
        self._skipped_file = file

    def __iter__(self) -> Iterator[list[PackedBatch]]:
        waiting = self._plans()
        pending: deque[Future[tuple[StepPlan, _Joined | None]]] = deque()
        with (
            ThreadPoolExecutor(self.config.num_workers, "parrot-images") as images,
            ThreadPoolExecutor(1, "parrot-loader") as background,
            ThreadPoolExecutor(1, "parrot-join") as joining,
        ):
            try:
                while True:
                    while len(pending) < self.config.prefetch_steps and (make := next(waiting, None)) is not None:
                        plan = background.submit(make, images.map)
                        pending.append(joining.submit(self._made, plan, images.map))
                    if not pending:
                        return
                    yield self._finish(*pending.popleft().result(), images.map)
            finally:
                # (A cancelled plan ends the wait of the thread that would join it.)
                joining.shutdown(wait=False, cancel_futures=True)
                background.shutdown(cancel_futures=True)

    def _plan(
        self,
        items: Sequence[StepItem],
        samples: Sequence[Sample],
        micro_batches: Sequence[Sequence[int]],
        run: Map,
        **facts: Any,
    ) -> StepPlan:
        """Packs the samples of this rank, and reads the images that are its own to read.

        Args:
            items: of this rank.
            samples: the same, encoded, without images.
            micro_batches: places of the samples of each.
            run: `map` of a pool of threads.
            facts: other fields of the plan.
        """
        draft, reader = StepDraft(list(map(list, micro_batches))), self._reader(items)
        for place, (item, sample) in enumerate(zip(items, samples, strict=True)):
            draft.add(reader, place, sample, item.pictures)
        reader.read_own(draft, run)
        return StepPlan(reader=reader, draft=draft, items=items, **facts)

    def _made(self, planned: Future[StepPlan], run: Map) -> tuple[StepPlan, _Joined | None]:
        """A step, with its micro-batches where no other rank has a say in them; the caller then waits for nothing.

        A thread of its own joins them while the next step is read.
        """
        plan = planned.result()
        return plan, self._join(plan, run) if self._images.is_alone else None

    def _join(self, plan: StepPlan, run: Map) -> _Joined:
        """The micro-batches, once all ranks that have the samples have said which of them are bad; these, and why."""
        batches, bad = plan.reader.finish(plan.draft, run)
        return [batch.pinned() for batch in batches] if self._pins else batches, bad

    def _finish(self, plan: StepPlan, joined: _Joined | None, run: Map) -> list[PackedBatch]:
        """The micro-batches of a step; counts it."""
        batches, bad = joined or self._join(plan, run)
        # The state moves before the caller sees the step: a checkpoint made after training on it is right.
        self._advance(plan)
        self.statistics.samples += plan.size
        self.statistics.truncated += plan.truncated
        for data_set, reason in (*plan.skipped, *((plan.items[i].data_set, reason) for i, reason in bad.items())):
            if reason not in self.statistics.skipped:
                self.statistics.skipped.append(reason)
                logger.warning("sample left out (%d so far): %s", len(self.statistics.skipped), reason)
            if self._skipped_file is not None:
                self._skipped_file.add(data_set, [reason])
        return batches

    def _encode(self, items: Sequence[StepItem]) -> list[Sample]:
        """The samples without their images."""
        encoded = self._processor.encode([self._processor.render(item.record.turns) for item in items])
        return [
            Sample(
                input_ids=input_ids,
                labels=labels,
                language=item.record.language,
                category=item.record.category,
                record_id=f"{item.data_set}:{item.record.record_id}",
            )
            for item, (input_ids, labels) in zip(items, encoded, strict=True)
        ]

    def _reader(self, items: Sequence[StepItem]) -> ImageReader:
        store, processor = self._feature_store, self._processor

        def features(picture: ImageFile, rows: PictureRows | None) -> Tensor:
            assert store is not None, "the name says so"
            return store.features_of([picture], None if rows is None else [rows.tiles])

        return ImageReader(
            share=self._images,
            name="pixel_values" if store is None else "image_features",
            read=features if store is not None else lambda picture, _: processor.pictures([picture])[0].pixel_values,
            empty=processor.no_pixels if store is None else store.no_features,
            tiles=None
            if processor.tiling is None
            else partial(processor.rows_of, num_visual_rows=self._num_visual_rows),
            describe=lambda place: items[place].where,
            pack=partial(
                pack_samples,
                num_visual_rows=self._num_visual_rows,
                guidance=self._guidance,
                max_seq_len=self._max_seq_len,
            ),
            join=pinned_cat if self._pins else torch.cat,
            skips_bad=self.config.on_bad_sample == "skip",
        )

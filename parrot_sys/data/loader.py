"""ParrotDataLoader: from data sets on disk to the packed micro-batches of one data-parallel rank."""

from __future__ import annotations

import copy
import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from parrot_sys.data.batch import PackedBatch
from parrot_sys.data.config import DataConfig
from parrot_sys.data.datasets import RecordDataset, load_dataset
from parrot_sys.data.feature_store import FeatureStore
from parrot_sys.data.image_files import ImageFile
from parrot_sys.data.image_share import ImageShare
from parrot_sys.data.index.access import IndexPlace
from parrot_sys.data.mix_report import MixRow, realised_mix
from parrot_sys.data.mixture import IntArray
from parrot_sys.data.packing import Guidance, Sample, pack_samples, plan_micro_batches
from parrot_sys.data.processor import ParrotProcessor
from parrot_sys.data.records import Record
from parrot_sys.data.sample_order import mix_identity, sample_order
from parrot_sys.data.skipped import SkippedRecords
from parrot_sys.data.step_images import ImageReader, StepDraft
from parrot_sys.errors import ConfigError, DataError
from parrot_sys.towers import PictureRows

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class LoaderStatistics:
    """Counts since the start of training; a resumed loader goes on counting."""

    samples: int = 0
    """Samples of all ranks that were due."""
    truncated: int = 0
    """Samples that were longer than max_seq_len rows and were cut."""
    skipped: list[str] = field(default_factory=list)
    """This rank's samples that were left out since an image could not be read: where and why, once for each record."""


@dataclass(frozen=True, slots=True)
class _Draft:
    """A step whose bad samples the ranks that have it have not agreed on yet."""

    reader: ImageReader
    draft: StepDraft
    numbers: list[int]
    """Number of each of its samples."""
    size: int
    truncated: int


@dataclass(frozen=True, slots=True)
class _Step:
    """One prepared step of this rank."""

    batches: list[PackedBatch]
    size: int
    truncated: int
    skipped: list[tuple[str, str]]
    """Data set and reason of each sample that was left out."""


class ParrotDataLoader:
    """Iterating gives, for each step to the end of the epoch, this rank's list of micro-batches.

    The list is equally long on every rank; micro-batches may be empty. An epoch takes each record as often as the
    weight of its data set times the weight of its language says, in an order that depends on seed, epoch and mix only;
    its last step may have fewer samples. The samples of a step do not depend on the number of ranks. Iterating again
    goes on after the last step taken, so the next epoch follows by itself.
    """

    def __init__(
        self,
        config: DataConfig,
        processor: ParrotProcessor,
        *,
        num_visual_rows: int,
        max_seq_len: int,
        guidance: Guidance = "prompt",
        needs_labels: bool = True,
        global_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        index_dir: str | Path | None = None,
        on_progress: Callable[[], None] = lambda: None,
        images: ImageShare | None = None,
    ) -> None:
        """Opens all data sets through their indexes, and checks them.

        Args:
            config: data sets, mix and policies.
            processor: of the model to be trained.
            num_visual_rows: V of the vision tower, rows of an image (or of a tile).
            max_seq_len: most rows of a sample.
            guidance: `moe.guidance` of the model.
            needs_labels: whether a sample without a label is a bad one; False names it in the log and keeps it.
            global_batch_size: samples in a step, over all ranks.
            dp_rank: this process's place among the data-parallel ranks.
            dp_size: number of data-parallel ranks.
            index_dir: where indexes are kept when neither `data.index_dir` nor `data.cache_dir` says so; None keeps
                none, and every process builds its own.
            on_progress: called now and then while an index is built or waited for.
            images: images that this process reads, where others have the same samples; all when not given.

        Raises:
            ConfigError: settings contradict each other.
            DataError: a data set, record or image is wrong; names file, record and reason.
        """
        if global_batch_size < 1 or not 0 <= dp_rank < dp_size:
            raise ConfigError(
                "global_batch_size must be >= 1 and dp_rank in [0, dp_size), "
                f"got {global_batch_size} and rank {dp_rank} of {dp_size}"
            )
        if not config.paths:
            raise ConfigError("data.paths must name at least one data set, got none")
        capacity = max_seq_len if config.max_tokens_per_micro_batch is None else config.max_tokens_per_micro_batch
        self.config = config
        self.statistics = LoaderStatistics()
        # Threads of the loader tokenise while the caller may use the same tokenizer, which is not safe to share.
        self._processor = processor.with_data_config(config)
        self._processor.tokenizer = copy.deepcopy(processor.tokenizer)
        self._num_visual_rows, self._max_seq_len, self._guidance = num_visual_rows, max_seq_len, guidance
        self._global_batch_size, self._dp_rank, self._dp_size = global_batch_size, dp_rank, dp_size
        self._images = images or ImageShare()
        self._feature_store: FeatureStore | None = None
        self._skipped_file: SkippedRecords | None = None
        self.datasets = [
            load_dataset(
                source,
                config,
                self._processor,
                num_visual_rows=num_visual_rows,
                max_seq_len=max_seq_len,
                needs_labels=needs_labels,
                place=_index_place(config, index_dir),
                on_progress=on_progress,
            )
            for source in config.sources()
        ]
        self._starts = np.cumsum([0, *map(len, self.datasets)])
        self._rows = np.concatenate([dataset.rows for dataset in self.datasets])
        self._is_long = np.concatenate([dataset.is_long for dataset in self.datasets])
        self._capacity = _check_capacity(capacity, int(self._rows.max()))
        self._curriculum_batch = global_batch_size
        self._order = sample_order(config, self.datasets, global_batch_size)
        self._epoch_length = len(self._order)
        self._epoch, self._samples = 0, 0

    @property
    def languages(self) -> set[str]:
        """Languages that the records state."""
        return set().union(*(dataset.known_languages for dataset in self.datasets))

    @property
    def steps_per_epoch(self) -> int:
        """Steps of a whole epoch, the last of which may be smaller."""
        return -(-self._epoch_length // self._global_batch_size)

    @property
    def samples_per_epoch(self) -> int:
        """Samples of a whole epoch, over all ranks."""
        return self._epoch_length

    @property
    def epoch(self) -> int:
        """Epoch of the next step, from 0."""
        return self._epoch

    @property
    def place(self) -> tuple[int, int]:
        """Whole epochs, and samples of the next one, that were consumed up to the last step taken."""
        return self._epoch, self._samples

    def pictures(self) -> dict[str, ImageFile]:
        """Name -> file of all images of all data sets, each once, sorted: what a feature store has to hold."""
        pictures = (picture for dataset in self.datasets for picture in dataset.all_pictures())
        return dict(sorted({str(picture): picture for picture in pictures}.items()))

    def mix(self) -> list[MixRow]:
        """Samples, tokens and pictures that each data set and language really gives."""
        return realised_mix(self.config, self.datasets, self._order)

    def use_features(self, store: FeatureStore) -> None:
        """From the next iteration on, batches hold `image_features` from `store` instead of `pixel_values`.

        Args:
            store: must hold the features of `pictures()`; a sample that lacks some is a bad sample.
        """
        self._feature_store = store

    def list_skipped(self, file: SkippedRecords) -> None:
        """Writes the records that were left out so far, and from now on each that will be."""
        for dataset in self.datasets if file.holds_all else ():
            file.add(dataset.source.name, dataset.skipped)
        self._skipped_file = file

    def state_dict(self) -> dict[str, Any]:
        """State that `load_state_dict` needs to go on after the last step taken: plain values.

        Equal on all ranks but for the list of samples that a rank left out.
        """
        return {
            "epoch": self._epoch,
            "samples": self._samples,
            "identity": self._identity(),
            "statistics": asdict(self.statistics),
            "curriculum_batch": self._curriculum_batch,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where the loader was that gave `state`. The number of ranks and the batch size may differ.

        Raises:
            DataError: seed, data or mix are not those of `state`; names both.
        """
        then, now = state["identity"], self._identity()
        differences = [
            f"{name} was {then.get(name, 'absent')}, is {now.get(name, 'absent')}"
            for name in sorted(then.keys() | now.keys())
            if then.get(name) != now.get(name)
        ]
        if differences:
            raise DataError(
                "the data are not those of the checkpoint, so the order of samples cannot go on: "
                + "; ".join(differences)
                + "; use the same data and settings, or start without the loader's state"
            )
        if (batch := state.get("curriculum_batch", self._curriculum_batch)) != self._curriculum_batch:
            # Steps of the curriculum are those of the batch size that the run began with.
            self._curriculum_batch = batch
            self._order = sample_order(self.config, self.datasets, batch)
        self._epoch, self._samples = state["epoch"], state["samples"]
        self.statistics = LoaderStatistics(**copy.deepcopy(state["statistics"]))

    def __iter__(self) -> Iterator[list[PackedBatch]]:
        order = self._order.epoch(self._epoch)[self._samples :]
        size = self._global_batch_size
        waiting = iter([order[i : i + size] for i in range(0, len(order), size)])
        pending: deque[Future[_Draft]] = deque()
        with (
            ThreadPoolExecutor(self.config.num_workers, "parrot-images") as images,
            ThreadPoolExecutor(1, "parrot-loader") as background,
        ):
            try:
                while True:
                    while len(pending) < self.config.prefetch_steps and (samples := next(waiting, None)) is not None:
                        pending.append(background.submit(self._prepare, samples, images))
                    if not pending:
                        return
                    step = self._finish(pending.popleft().result(), images)
                    self._count(step)
                    yield step.batches
            finally:
                background.shutdown(cancel_futures=True)

    def _count(self, step: _Step) -> None:
        """Moves the state past a step, before the caller sees it: a checkpoint made after training on it is right."""
        self._samples += step.size
        if self._samples == self._epoch_length:
            self._epoch, self._samples = self._epoch + 1, 0
        self.statistics.samples += step.size
        self.statistics.truncated += step.truncated
        for data_set, reason in step.skipped:
            if reason not in self.statistics.skipped:
                self.statistics.skipped.append(reason)
                logger.warning("sample left out (%d so far): %s", len(self.statistics.skipped), reason)
            if self._skipped_file is not None:
                self._skipped_file.add(data_set, [reason])

    def _prepare(self, samples: IntArray, images: ThreadPoolExecutor) -> _Draft:
        """Packs this rank's part of a global batch, and reads the images that are its own to read."""
        plan = plan_micro_batches(self._rows[samples], self._capacity, self._dp_size)[self._dp_rank]
        numbers = [int(samples[i]) for each in plan for i in each]
        ends = np.cumsum([0, *map(len, plan)]).tolist()
        draft = StepDraft([list(range(a, b)) for a, b in itertools.pairwise(ends)])
        reader = self._reader(numbers)
        for place, (number, sample) in enumerate(self._tokenize(numbers)):
            dataset, index = self._locate(number)
            draft.add(reader, place, sample, dataset.pictures(index))
        reader.read_own(draft, images.map)
        return _Draft(reader, draft, numbers, len(samples), int(self._is_long[samples].sum()))

    def _finish(self, made: _Draft, images: ThreadPoolExecutor) -> _Step:
        """The step, once all ranks that have its samples have said which of them are bad."""
        batches, bad = made.reader.finish(made.draft, images.map)
        skipped = [(self._locate(made.numbers[i])[0].source.name, reason) for i, reason in bad.items()]
        return _Step(batches, made.size, made.truncated, skipped)

    def _reader(self, numbers: Sequence[int]) -> ImageReader:
        store, processor = self._feature_store, self._processor

        def features(picture: ImageFile, rows: PictureRows | None) -> Tensor:
            assert store is not None, "the name says so"
            return store.features_of([picture], None if rows is None else [rows.tiles])

        def describe(place: int) -> str:
            dataset, index = self._locate(numbers[place])
            return dataset.describe(index)

        return ImageReader(
            share=self._images,
            name="pixel_values" if store is None else "image_features",
            read=features if store is not None else lambda picture, _: processor.pictures([picture])[0].pixel_values,
            empty=processor.no_pixels if store is None else store.no_features,
            tiles=None
            if processor.tiling is None
            else partial(processor.rows_of, num_visual_rows=self._num_visual_rows),
            describe=describe,
            pack=partial(
                pack_samples,
                num_visual_rows=self._num_visual_rows,
                guidance=self._guidance,
                max_seq_len=self._max_seq_len,
            ),
            skips_bad=self.config.on_bad_sample == "skip",
        )

    def _locate(self, number: int) -> tuple[RecordDataset, int]:
        """Data set and place in it of a sample number."""
        at = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self.datasets[at], number - int(self._starts[at])

    def _tokenize(self, numbers: Sequence[int]) -> list[tuple[int, Sample]]:
        """The samples without their images."""
        places = [self._locate(number) for number in numbers]
        records: dict[int, Record] = {}
        for dataset in self.datasets:  # (each data set reads its records at once)
            own = [(number, i) for number, (owner, i) in zip(numbers, places, strict=True) if owner is dataset]
            read = dataset.read([i for _, i in own])
            records |= {number: record for (number, _), record in zip(own, read, strict=True)}
        encoded = self._processor.encode([self._processor.render(records[number].turns) for number in numbers])
        return [
            (
                number,
                Sample(
                    input_ids=input_ids,
                    labels=labels,
                    language=records[number].language,
                    category=records[number].category,
                    record_id=f"{dataset.source.name}:{records[number].record_id}",
                ),
            )
            for number, (dataset, _), (input_ids, labels) in zip(numbers, places, encoded, strict=True)
        ]

    def _identity(self) -> dict[str, Any]:
        """Everything that decides the order of samples."""
        identity: dict[str, Any] = {"data.seed": self.config.seed}
        for dataset in self.datasets:
            name = dataset.source.name
            identity[f"{name}.file"] = dataset.digest[:16]
            identity[f"{name}.records"] = f"{len(dataset)} ({dataset.usable_digest()[:16]})"
            identity[f"{name}.weight"] = dataset.source.weight
            identity[f"{name}.language"] = dataset.source.language
        identity |= mix_identity(self.config)
        identity["data.names"] = [dataset.source.name for dataset in self.datasets]
        return identity


def _index_place(config: DataConfig, folder: str | Path | None) -> IndexPlace:
    """The folder that was chosen for indexes, that of all caches, or the one of the run."""
    if config.index_dir is not None:
        return IndexPlace(folder=Path(config.index_dir), is_chosen=True)
    kept = config.cache_dir if config.cache_dir is not None else folder
    return IndexPlace(folder=None if kept is None else Path(kept))


def _check_capacity(capacity: int, longest: int) -> int:
    if capacity < longest:
        raise ConfigError(
            f"data.max_tokens_per_micro_batch must hold the longest sample of {longest} rows, got {capacity}; "
            "raise it, or lower max_seq_len"
        )
    return capacity

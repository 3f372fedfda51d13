"""ParrotDataLoader: from data sets on disk to the packed micro-batches of one data-parallel rank."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from parrot_sys.data.config import DataConfig
from parrot_sys.data.datasets import RecordDataset, load_dataset
from parrot_sys.data.image_files import ImageFile
from parrot_sys.data.image_share import ImageShare
from parrot_sys.data.index.access import IndexPlace
from parrot_sys.data.mix_report import MixRow, realised_mix
from parrot_sys.data.mixture import IntArray
from parrot_sys.data.packing import Guidance, plan_micro_batches
from parrot_sys.data.processor import ParrotProcessor
from parrot_sys.data.records import Record
from parrot_sys.data.sample_order import mix_identity, sample_order
from parrot_sys.data.skipped import SkippedRecords
from parrot_sys.data.step_loader import LoaderStatistics, Map, StepItem, StepLoader, StepPlan
from parrot_sys.errors import ConfigError, DataError


class ParrotDataLoader(StepLoader):
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
        pin_memory: bool = False,
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
            dp_rank, dp_size: this process's place among the data-parallel ranks, and their number.
            index_dir: where indexes are kept when neither `data.index_dir` nor `data.cache_dir` says so; None keeps
                none, and every process builds its own.
            on_progress: called now and then while an index is built or waited for.
            images: images that this process reads, where others have the same samples; all when not given.
            pin_memory: give batches in page-locked memory, for a GPU.

        Raises:
            ConfigError: settings contradict each other.
            DataError: a data set, record or image is wrong; names file, record and reason.
        """
        _check_settings(config, global_batch_size, dp_rank, dp_size)
        super().__init__(
            config,
            processor,
            num_visual_rows=num_visual_rows,
            max_seq_len=max_seq_len,
            guidance=guidance,
            global_batch_size=global_batch_size,
            images=images,
            pin_memory=pin_memory,
        )
        self._dp_rank, self._dp_size = dp_rank, dp_size
        opened = partial(
            load_dataset,
            num_visual_rows=num_visual_rows,
            max_seq_len=max_seq_len,
            needs_labels=needs_labels,
            place=_index_place(config, index_dir),
            on_progress=on_progress,
        )
        self.datasets = [opened(source, config, self._processor) for source in config.sources()]
        self._open(config, max_seq_len, global_batch_size)

    def _open(self, config: DataConfig, max_seq_len: int, global_batch_size: int) -> None:
        """Sums up the data sets, and puts the loader before the first sample of the first epoch."""
        self._starts = np.cumsum([0, *map(len, self.datasets)])
        self._rows = np.concatenate([dataset.rows for dataset in self.datasets])
        self._is_long = np.concatenate([dataset.is_long for dataset in self.datasets])
        capacity = max_seq_len if config.max_tokens_per_micro_batch is None else config.max_tokens_per_micro_batch
        self._capacity = check_capacity(capacity, int(self._rows.max()))
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

    def list_skipped(self, file: SkippedRecords) -> None:
        """Writes the records that were left out so far, and from now on each that will be."""
        for dataset in self.datasets if file.holds_all else ():
            file.add(dataset.source.name, dataset.skipped)
        super().list_skipped(file)

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
        refuse_other_data(state["identity"], self._identity())
        if (batch := state.get("curriculum_batch", self._curriculum_batch)) != self._curriculum_batch:
            # Steps of the curriculum are those of the batch size that the run began with.
            self._curriculum_batch = batch
            self._order = sample_order(self.config, self.datasets, batch)
        self._epoch, self._samples = state["epoch"], state["samples"]
        self.statistics = LoaderStatistics(**copy.deepcopy(state["statistics"]))

    def _plans(self) -> Iterator[Callable[[Map], StepPlan]]:
        order = self._order.epoch(self._epoch)[self._samples :]
        size = self._global_batch_size
        return (partial(self._prepare, order[i : i + size]) for i in range(0, len(order), size))

    def _advance(self, plan: StepPlan) -> None:
        self._samples += plan.size
        if self._samples == self._epoch_length:
            self._epoch, self._samples = self._epoch + 1, 0

    def _prepare(self, samples: IntArray, run: Map) -> StepPlan:
        """This rank's part of a global batch."""
        plan = plan_micro_batches(self._rows[samples], self._capacity, self._dp_size)[self._dp_rank]
        items = self._items([int(samples[i]) for each in plan for i in each])
        ends = np.cumsum([0, *map(len, plan)]).tolist()
        micro_batches = [range(a, b) for a, b in itertools.pairwise(ends)]
        truncated = int(self._is_long[samples].sum())
        return self._plan(items, self._encode(items), micro_batches, run, size=len(samples), truncated=truncated)

    def _locate(self, number: int) -> tuple[RecordDataset, int]:
        """Data set and place in it of a sample number."""
        at = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self.datasets[at], number - int(self._starts[at])

    def _items(self, numbers: Sequence[int]) -> list[StepItem]:
        """Samples by their numbers."""
        places = [self._locate(number) for number in numbers]
        records: dict[int, Record] = {}
        for dataset in self.datasets:  # (each data set reads its records at once)
            own = [(number, i) for number, (owner, i) in zip(numbers, places, strict=True) if owner is dataset]
            read = dataset.read([i for _, i in own])
            records |= {number: record for (number, _), record in zip(own, read, strict=True)}
        return [
            StepItem(
                record=records[number],
                data_set=dataset.source.name,
                pictures=dataset.pictures(i),
                where=dataset.describe(i),
            )
            for number, (dataset, i) in zip(numbers, places, strict=True)
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


def _check_settings(config: DataConfig, global_batch_size: int, dp_rank: int, dp_size: int) -> None:
    """
    Raises:
        ConfigError: no data sets, an empty batch, or a rank that cannot be.
    """
    if global_batch_size < 1 or not 0 <= dp_rank < dp_size:
        raise ConfigError(
            "global_batch_size must be >= 1 and dp_rank in [0, dp_size), "
            f"got {global_batch_size} and rank {dp_rank} of {dp_size}"
        )
    if not config.paths:
        raise ConfigError("data.paths must name at least one data set, got none")


def _index_place(config: DataConfig, folder: str | Path | None) -> IndexPlace:
    """The folder that was chosen for indexes, that of all caches, or the one of the run."""
    if config.index_dir is not None:
        return IndexPlace(folder=Path(config.index_dir), is_chosen=True)
    kept = config.cache_dir if config.cache_dir is not None else folder
    return IndexPlace(folder=None if kept is None else Path(kept))


def refuse_other_data(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """
    Args:
        then: what decided the order of samples when a checkpoint was saved.
        now: what decides it.

    Raises:
        DataError: they differ; names both.
    """
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


def check_capacity(capacity: int, longest: int) -> int:
    """
    Raises:
        ConfigError: a micro-batch of so many rows does not hold the longest sample.
    """
    if capacity < longest:
        raise ConfigError(
            f"data.max_tokens_per_micro_batch must hold the longest sample of {longest} rows, got {capacity}; "
            "raise it, or lower max_seq_len"
        )
    return capacity

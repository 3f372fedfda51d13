"""StreamLoader: from data sets that are not indexed first to the packed micro-batches of one data-parallel rank."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from parrot_sys.data.batch import PackedBatch
from parrot_sys.data.config import DataConfig, DataSource
from parrot_sys.data.datasets import without_label
from parrot_sys.data.image_files import ImageFile
from parrot_sys.data.image_share import ImageShare
from parrot_sys.data.image_sources.root import ImageRoot
from parrot_sys.data.languages import canonical
from parrot_sys.data.loader import check_capacity, refuse_other_data
from parrot_sys.data.packing import Guidance, Sample, expanded_lengths, plan_micro_batches, remaining_labels
from parrot_sys.data.processor import ParrotProcessor
from parrot_sys.data.records import describe_record, parse_record
from parrot_sys.data.remote.storage import RemoteStorage
from parrot_sys.data.step_loader import LoaderStatistics, Map, StepItem, StepLoader, StepPlan
from parrot_sys.data.stream.shard_stream import Entry, ShardStream
from parrot_sys.data.stream.shards import Shard, shards_of
from parrot_sys.errors import ConfigError, DataError, StorageError
from parrot_sys.parallel import split_counts

ENDLESS = 1 << 60
"""Samples of the only epoch of a stream."""


def _alone(value: Any) -> list[Any]:
    return [value]


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamRanks:
    """The data-parallel ranks that share the records, and what they have to agree on."""

    rank: int = 0
    size: int = 1
    most: Callable[[int], int] = int
    """The largest of a number of all ranks; every rank calls it in every step."""
    gather: Callable[[Any], list[Any]] = _alone
    """A value of each data-parallel rank, in their order; every rank calls it."""


@dataclass(frozen=True, slots=True)
class _StreamSet:
    """One data set."""

    source: DataSource
    shards: list[Shard]
    images: ImageRoot

    def item(self, entry: Entry, raw: Any) -> StepItem:
        """The sample of a record.

        Raises:
            DataError: it is wrong, or a picture cannot be used.
        """
        shard = self.shards[entry.shard].name  # (an address is no path)
        record = parse_record(raw, entry.number, shard, language=self.source.language)
        where = describe_record(shard, entry.number, record.record_id)
        with _named(where):
            pictures = [self._picture(entry, image) for image in record.images]
        return StepItem(record=record, data_set=self.source.name, pictures=pictures, where=where, keeps=entry)

    def _picture(self, entry: Entry, name: str) -> ImageFile:
        own = entry.source.pictures()
        if own is not None and own.problem(name) is None:
            return own.picture(name)
        if (problem := self.images.problem(name)) is not None:
            raise DataError(problem)
        return self.images.picture(name)


@dataclass(frozen=True, slots=True)
class _Drawn:
    """A sample that was read and found good."""

    item: StepItem
    sample: Sample
    rows: int
    is_cut: bool


class _Streams:
    """The streams of all data sets, from which samples are taken as often as their weights say."""

    def __init__(self, sets: Sequence[_StreamSet], config: DataConfig, ranks: StreamRanks, state: Any) -> None:
        self._weights = [each.source.weight for each in sets]
        self._drawn = list(state["drawn"]) if state else [0] * len(sets)
        self.streams = [
            ShardStream(
                each.shards,
                seed=(config.seed, number),
                rank=ranks.rank,
                ranks=ranks.size,
                window=config.stream.buffer,
                open_shards=config.stream.open_shards,
                state=state["streams"][number] if state else None,
            )
            for number, each in enumerate(sets)
        ]

    def draw(self) -> tuple[int, Entry]:
        """Number of the data set that is furthest behind its share, and its next record."""
        count, total = sum(self._drawn) + 1, sum(self._weights)
        behind = [weight / total * count - drawn for weight, drawn in zip(self._weights, self._drawn, strict=True)]
        number = max(range(len(behind)), key=lambda i: (self._weights[i] > 0, behind[i]))
        self._drawn[number] += 1
        return number, self.streams[number].draw()

    @property
    def state(self) -> dict[str, Any]:
        """Plain values."""
        return {"drawn": list(self._drawn), "streams": [stream.state for stream in self.streams]}


class StreamLoader(StepLoader):
    """A `StepLoader` without an end. Its samples depend on the number of data-parallel ranks; see docs/data.md."""

    def __init__(
        self,
        config: DataConfig,
        processor: ParrotProcessor,
        *,
        num_visual_rows: int,
        max_seq_len: int,
        guidance: Guidance = "prompt",
        global_batch_size: int,
        ranks: StreamRanks | None = None,
        images: ImageShare | None = None,
        pin_memory: bool = False,
    ) -> None:
        """Lists the shards; no record is read yet.

        Args:
            config: data sets, weights and policies.
            processor: of the model to be trained.
            num_visual_rows: V of the vision tower.
            max_seq_len: most rows of a sample.
            guidance: `moe.guidance` of the model.
            global_batch_size: samples in a step, over all ranks.
            ranks: those that share the records; this process alone when not given.
            images: images that this process reads, where others have the same samples.
            pin_memory: give batches in page-locked memory, for a GPU.

        Raises:
            ConfigError: settings contradict each other.
            DataError: a data set is missing.
        """
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
        self._ranks = ranks or StreamRanks()
        if global_batch_size < self._ranks.size:
            raise ConfigError(
                f"global_batch_size must give each of the {self._ranks.size} data-parallel ranks a sample of a stream, "
                f"got {global_batch_size}"
            )
        if not any(source.weight > 0 for source in config.sources()):
            raise ConfigError("data.weights must leave a data set with a weight > 0")
        self._capacity = check_capacity(config.max_tokens_per_micro_batch or max_seq_len, max_seq_len)
        storage = RemoteStorage(config.remote, config.cache_dir)
        self._sets = [
            _StreamSet(source, shards_of(source, storage, config.cache_dir), _image_root(source, config))
            for source in config.sources()
        ]
        self._samples = 0
        self._state: dict[str, Any] | None = None  # of the streams, after the last step taken

    @property
    def languages(self) -> set[str]:
        """Languages of `data.languages`; others are not known before they are met."""
        return {canonical(name) or name for name in self.config.languages}

    @property
    def samples_per_epoch(self) -> int:
        """More than any run takes."""
        return ENDLESS

    @property
    def place(self) -> tuple[int, int]:
        """0, and the samples that were consumed."""
        return 0, self._samples

    def pictures(self) -> dict[str, ImageFile]:
        """
        Raises:
            ConfigError: always, since they are not known.
        """
        raise ConfigError("the pictures of a stream are not known before training: unset cache_image_features")

    def state_dict(self) -> dict[str, Any]:
        """State of all ranks, so every rank calls it."""
        return {
            "samples": self._samples,
            "identity": self._identity(),
            "statistics": asdict(self.statistics),
            "ranks": self._ranks.gather(self._state),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where the loader was that gave `state`; the batch size may differ.

        Raises:
            DataError: shards, settings or the number of data-parallel ranks are not those of `state`; names both.
        """
        refuse_other_data(state["identity"], self._identity())
        self._samples, self._state = state["samples"], state["ranks"][self._ranks.rank]
        self.statistics = LoaderStatistics(**copy.deepcopy(state["statistics"]))

    def _identity(self) -> dict[str, Any]:
        """Everything that decides the order of samples, as far as it is known."""
        stream = self.config.stream
        identity: dict[str, Any] = {
            "data.seed": self.config.seed,
            "data.stream.enabled": True,
            "data.stream.buffer": stream.buffer,
            "data.stream.open_shards": stream.open_shards,
            "the number of data-parallel ranks": self._ranks.size,
            "data.names": [each.source.name for each in self._sets],
        }
        for each in self._sets:
            identity[f"{each.source.name}.shards"] = [Path(shard.name).name for shard in each.shards]
            identity[f"{each.source.name}.weight"] = each.source.weight
            identity[f"{each.source.name}.language"] = each.source.language
        return identity

    def _plans(self) -> Iterator[Callable[[Map], StepPlan]]:
        streams = _Streams(self._sets, self.config, self._ranks, self._state)
        while True:
            yield partial(self._prepare, streams)

    def _advance(self, plan: StepPlan) -> None:
        self._samples += plan.size
        self._state = plan.after

    def _finish(self, plan: StepPlan, *rest: Any) -> list[PackedBatch]:
        """As many micro-batches as the rank with most of them has."""
        batches = super()._finish(plan, *rest)
        return batches + [PackedBatch.empty()] * (self._ranks.most(len(batches)) - len(batches))

    def _prepare(self, streams: _Streams, run: Map) -> StepPlan:
        size = self._global_batch_size
        skipped: list[tuple[str, str]] = []
        drawn = self._draw(streams, split_counts(size, self._ranks.size)[self._ranks.rank], skipped)
        (plan,) = plan_micro_batches([each.rows for each in drawn], self._capacity, 1)
        return self._plan(
            [each.item for each in drawn],
            [each.sample for each in drawn],
            plan,
            run,
            size=size,
            truncated=sum(each.is_cut for each in drawn),
            skipped=skipped,
            after=streams.state,
        )

    def _draw(self, streams: _Streams, count: int, skipped: list[tuple[str, str]]) -> list[_Drawn]:
        """The next good samples of this rank; bad ones stop the run, or go to `skipped`."""
        drawn: list[_Drawn] = []
        begun = [stream.passes for stream in streams.streams]
        while len(drawn) < count:
            items = self._read([streams.draw() for _ in range(count - len(drawn))], skipped)
            for item, sample in zip(items, self._encode(items), strict=True):
                with self._leaving_out(item.data_set, skipped):
                    drawn.append(self._judge(item, sample))
            if not drawn and any(now.passes > then + 1 for now, then in zip(streams.streams, begun, strict=True)):
                raise DataError(f"no record of a whole pass can be used; the first: {skipped[0][1]}")
        return drawn

    def _read(self, entries: Sequence[tuple[int, Entry]], skipped: list[tuple[str, str]]) -> list[StepItem]:
        """Samples with their pictures, without those that are bad."""
        raws: dict[int, Any] = {}
        for source in {id(entry.source): entry.source for _, entry in entries}.values():
            own = [i for i, (_, entry) in enumerate(entries) if entry.source is source]
            raws |= dict(zip(own, source.read([entries[i][1].place for i in own]), strict=True))
        items = []
        for i, (number, entry) in enumerate(entries):
            with self._leaving_out(self._sets[number].source.name, skipped):
                items.append(self._sets[number].item(entry, raws[i]))
        return items

    def _judge(self, item: StepItem, sample: Sample) -> _Drawn:
        """
        Raises:
            DataError: a picture has no size, or the sample no label.
            _TooLongError: it is too long.
        """
        ids, limit, rows = sample.input_ids, self._max_seq_len, self._num_visual_rows
        counts: Any = rows
        if self._processor.tiling is not None:
            with _named(item.where):
                counts = np.array([len(self._processor.rows_of(each, rows).source) for each in item.pictures], int)
        length, full = expanded_lengths(ids, counts, limit)
        if full > limit and self.config.on_long_sample != "truncate":
            raise _TooLongError(f"{item.where}: takes {full} rows, more than max_seq_len={limit}")
        if not remaining_labels(ids, sample.labels, counts, limit):
            raise DataError(f"{item.where}: {without_label(full, limit)}")
        return _Drawn(item, sample, length, full > limit)

    @contextmanager
    def _leaving_out(self, data_set: str, skipped: list[tuple[str, str]]) -> Iterator[None]:
        """Stops at a sample that cannot be used, or notes it, as the policies want."""
        try:
            yield
        except StorageError:
            raise
        except DataError as error:
            kind = "long" if isinstance(error, _TooLongError) else "bad"
            if getattr(self.config, f"on_{kind}_sample") == "error":
                fix = f"fix it, or leave such records out with data.on_{kind}_sample=skip"
                raise DataError(f"{error}; {fix}") from None
            skipped.append((data_set, str(error)))


class _TooLongError(DataError):
    """A sample has more rows than the model takes."""


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Puts the place of a record before what is wrong with it."""
    try:
        yield
    except StorageError:
        raise
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def _image_root(source: DataSource, config: DataConfig) -> ImageRoot:
    return ImageRoot(
        source.image_root,
        allow_outside=config.allow_outside_root,
        cache_dir=config.cache_dir,
        remote=config.remote,
    )

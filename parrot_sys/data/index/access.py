"""The index of a data set for training: found, or built by the first process that wants it."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parrot_sys.data.index.block import Indexer
from parrot_sys.data.index.build import BuildJob, build_index
from parrot_sys.data.index.record_index import RecordIndex, open_index, read_header
from parrot_sys.data.index.settings import IndexSettings
from parrot_sys.data.index.waiting import only_builder
from parrot_sys.data.processor import ParrotProcessor
from parrot_sys.data.sources.base import RecordSource
from parrot_sys.errors import ConfigError, DataError, printable


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexPlace:
    """Where indexes are kept, and what happens to one of other settings."""

    folder: Path | None = None
    """None keeps none: every process builds its own in a folder for temporary files."""
    is_chosen: bool = False
    """Whether somebody chose the folder for its index: then one of other settings is refused. In a folder of caches
    there is one for each settings."""

    def of(self, source: RecordSource, settings: IndexSettings) -> Path | None:
        """Folder of the index of one data set."""
        if self.folder is None:
            return None
        real = os.path.realpath(source.path)
        plain = re.sub(r"[^A-Za-z0-9._-]", "_", source.path.name)
        name = f"{plain}-{hashlib.sha256(os.fsencode(real)).hexdigest()[:8]}"
        return self.folder / name if self.is_chosen else self.folder / f"index-{settings.key}" / name


def load_index(
    source: RecordSource,
    processor: ParrotProcessor,
    place: IndexPlace,
    *,
    on_progress: Callable[[], None] = lambda: None,
    workers: int | None = None,
) -> RecordIndex:
    """The index of a data set. One process at a time builds it, the others wait.

    Args:
        source: the data set.
        processor: of the model.
        place: where it is kept.
        on_progress: called now and then while it is built or waited for.
        workers: processes that build it; None takes one a core.

    Raises:
        ConfigError: the folder that was chosen holds one of another tokenizer or template; names both.
        DataError: the data set cannot be read, or the folder cannot be written.
    """
    source.state()  # (a missing file is told before anything else)
    names = {"tokenizer": str(processor.tokenizer.name_or_path), "data_set": str(source.path)}
    settings = IndexSettings.of(processor)
    indexer = Indexer(source=source, encoder=processor.conversation_encoder(), settings=settings)
    folder = place.of(source, settings)
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="parrot-index-") as temporary:
            job = BuildJob(indexer=indexer, folder=Path(temporary) / "index", names=names, workers=workers)
            build_index(job, on_progress)
            return _opened(job, source)  # (what is mapped stays when the folder goes)
    _refuse_other(folder, source, settings, names)
    if (found := open_index(folder, source, settings.plain())) is not None:
        return found
    job = BuildJob(indexer=indexer, folder=folder, names=names, workers=workers)
    try:
        with only_builder(folder, job.parts, on_progress):
            if (found := open_index(folder, source, settings.plain())) is None:  # (another process may have built it)
                _refuse_other(folder, source, settings, names)
                build_index(job, on_progress)
                found = _opened(job, source)
    except OSError as error:
        raise DataError(
            f"the index of {printable(source.path)} cannot be written to {folder}: {error.strerror}; name a folder "
            "with room for it in data.index_dir"
        ) from error
    return found


def _opened(job: BuildJob, source: RecordSource) -> RecordIndex:
    index = open_index(job.folder, source, job.indexer.settings.plain())
    if index is None:
        raise DataError(f"the index {job.folder} was built but cannot be read: start again")
    return index


def _refuse_other(folder: Path, source: RecordSource, settings: IndexSettings, names: dict[str, str]) -> None:
    header: dict[str, Any] | None = read_header(folder)
    if header is None:
        return
    tokenizers = {"index": header.get("names", {}).get("tokenizer", ""), "model": names["tokenizer"]}
    if differences := settings.differences(header["settings"], tokenizers):
        raise ConfigError(
            f"the index {folder} of {printable(source.path)} is not of this model: {'; '.join(differences)}. Name "
            "another folder for the index (data.index_dir; --output of `parrot data index`), or remove this one"
        )

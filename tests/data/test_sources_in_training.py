"""Order, packing and resume are the same whatever kind of data set holds the records, and wherever it is stored."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parrot_sys.data import image_sources, index, sources
from parrot_sys.data.check import CheckSetup, check_files
from parrot_sys.data.config import DataConfig
from parrot_sys.data.image_sources.archive import Archive
from parrot_sys.data.image_sources.base import ImageSource
from parrot_sys.data.image_sources.data_urls import DataUrls
from parrot_sys.data.image_sources.root import ARCHIVES, ImageRoot
from parrot_sys.data.loader import ParrotDataLoader
from parrot_sys.data.sources.base import RecordSource
from parrot_sys.data.sources.registry import SOURCES, open_source
from tests.data.comparing import PICTURES, ROWS, assert_same, record
from tests.data.picture_archives import data_url
from tests.data.record_sets import KINDS, PLACES, WRITERS
from tests.data.remote_pictures import GS, QUICK, STORES, Place, served, stored

FILES = {f"{i}.{ending}": PICTURES[i] for i, ending in enumerate(("png", "jpg", "png", "webp", "bmp"))}
ONE_FILE = ("json", "jsonl", "arrow", "mapped", "data urls")


def contents(kind):
    return ("pictures", "text") if kind in WRITERS else ("pictures",)


CASES = [
    (kind, content, store)
    for kind in KINDS
    for content in contents(kind)
    for store in STORES
    if store != "http" or kind in ONE_FILE  # (web servers list no files)
    if (kind, content, store) != ("json", "pictures", "disk")  # (what the others are compared with)
]


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    with served(tmp_path_factory.mktemp("remote")) as found:
        yield found


def write(kind, records, place):
    """Writes a data set; its path as it is read."""
    return place.name(KINDS[kind](place.folder / "set", records, FILES))


@st.composite
def record_lists(draw, content):
    names = st.lists(st.sampled_from(sorted(FILES)), max_size=2, unique=True).map(sorted)
    languages = st.sampled_from(["en", "zh"])
    records = []
    for number in range(draw(st.integers(2, 7))):
        made = record(number, draw(names) if content == "pictures" else []) | {"lang": draw(languages)}
        if content == "text":
            del made["image"]
        records.append(made)
    return records


def flat(lists):
    return [each for own in lists for each in own]


def make_loader(processor, base, path, rank=0, ranks=1, **values):
    config = DataConfig(paths=(path,), names=("set",), cache_dir=str(base / "cache"), remote=QUICK, **values)
    return ParrotDataLoader(
        config, processor, num_visual_rows=ROWS, max_seq_len=512, global_batch_size=2, dp_rank=rank, dp_size=ranks
    )


@settings(max_examples=2, deadline=None, derandomize=True)
@given(data=st.data(), seed=st.integers(0, 99), alpha=st.sampled_from([None, 0.5]), at=st.integers(0, 9))
@pytest.mark.parametrize(
    ("kind", "content", "store"),
    # (Beside s3, which takes the same way, gs is for make test-all.)
    [pytest.param(*case, marks=(*GS.marks, pytest.mark.slow) if case[2] == "gs" else ()) for case in CASES],
)
def test_batches_and_resume_are_those_of_json(processor, bucket, kind, content, store, data, seed, alpha, at):
    records = data.draw(record_lists(content))
    with stored(bucket, store) as place, tempfile.TemporaryDirectory() as here:
        path = write(kind, records, place)
        values = {"seed": seed, "language_alpha": alpha}
        plain = write("json", records, Place(Path(here)))
        wanted = list(make_loader(processor, Path(here), plain, **values))
        loader = make_loader(processor, Path(here), path, **values)
        assert_same(list(loader), wanted)
        steps, stopped = at % len(wanted), make_loader(processor, Path(here), path, **values)
        running = iter(stopped)
        first = [next(running) for _ in range(steps)]
        state = stopped.state_dict()
        running.close()
        again = make_loader(processor, Path(here), path, **values)
        again.load_state_dict(state)
        assert_same([*first, *again], wanted)
        parts = [list(make_loader(processor, Path(here), path, rank, 2, **values)) for rank in range(2)]
        for one, *both in zip(wanted, *parts, strict=True):
            ids = [sorted(name for batch in step for name in batch.record_ids) for step in (one, flat(both))]
            assert ids[0] == ids[1]


def classes_in(package):
    """Classes that the modules of a package define."""
    names = [f"{package.__name__}.{module.name}" for module in pkgutil.iter_modules(package.__path__)]
    found = flat([inspect.getmembers(importlib.import_module(name), inspect.isclass) for name in names])
    return {each for _, each in found if each.__module__ in names and not inspect.isabstract(each)}


def test_every_kind_of_records_has_its_cases(tmp_path):
    """A new kind of data set needs a line in `WRITERS`, which brings it into all properties of this folder."""
    records = [record(i, sorted(FILES)[: i % 3]) for i in range(5)]
    kinds = {kind for kind, _, _ in CASES}
    opened = {type(open_source(KINDS[kind](tmp_path / kind, records, FILES))) for kind in kinds}
    wanted = {each for each in classes_in(sources) if issubclass(each, RecordSource)}
    assert wanted >= set(SOURCES)
    assert opened == wanted


def test_every_place_of_pictures_has_its_cases(processor, bucket, tmp_path, monkeypatch):
    """A new kind of archive or source of pictures needs a line in `PLACES` or `STORES`."""
    used = set()
    wanted = set().union(*map(classes_in, (image_sources, sources, index)))
    archives = {each for each in wanted if issubclass(each, Archive)}
    methods = vars(ImageSource).keys() & {"problem", "picture", "forget"}
    wanted = {each for each in wanted - {ImageRoot, ImageSource} if all(hasattr(each, name) for name in methods)}
    assert len(methods) == 3
    assert archives >= set(ARCHIVES)

    def watch(kind, method):
        original = getattr(kind, method)

        def watched(self, *arguments):
            used.add(type(self))
            return original(self, *arguments)

        monkeypatch.setattr(kind, method, watched)

    for kinds, method in ((wanted, "picture"), (archives, "open")):
        for kind in kinds:
            watch(kind, method)
    records = [record(i, sorted(FILES)[: 1 + i % 2]) for i in range(3)]
    for kind in ("json", *PLACES, "parquet", "webdataset"):
        for store in ("disk", "s3"):
            with stored(bucket, store) as place:
                list(make_loader(processor, tmp_path / place.folder.name, write(kind, records, place)))
    ImageRoot(tmp_path).picture(data_url(PICTURES[0]))  # (an index has the bytes in place of the address)
    assert used == wanted | archives
    assert DataUrls in used


@pytest.mark.parametrize("kind", KINDS)
def test_the_check_reads_them_too(processor, tmp_path, kind):
    records = [record(i, sorted(FILES)[: i % 3]) for i in range(5)]
    path = KINDS[kind](tmp_path / "set", records, FILES)
    config = DataConfig(paths=(str(path),), image_roots=(str(path if path.is_dir() else path.parent),))
    setup = CheckSetup(
        data=config, processor=processor, num_visual_rows=ROWS, max_seq_len=512, vocab_size=10**6, pictures="decode"
    )
    report = check_files(setup, lambda read: None)
    (file,) = report.files
    assert (file.records, file.usable, file.bad.total) == (5, 5, 0)

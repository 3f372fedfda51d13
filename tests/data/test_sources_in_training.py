"""Order, packing and resume are the same whatever kind of data set holds the records."""

from __future__ import annotations

import base64
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parrot_sys.data.check import CheckSetup, check_files
from parrot_sys.data.config import DataConfig
from parrot_sys.data.loader import ParrotDataLoader
from tests.data.comparing import PICTURES, ROWS, assert_same, record
from tests.data.picture_archives import write_tar
from tests.data.record_sets import WRITERS, write_json

FILES = {f"{i}.{ending}": PICTURES[i] for i, ending in enumerate(("png", "jpg", "png", "webp", "bmp"))}


def write_urls(base, records, pictures):
    """Pictures that stand in the records themselves; the files beside them are not read."""
    shown = {
        name: f"data:image/{name[-3:]};base64,{base64.b64encode(data).decode()}" for name, data in pictures.items()
    }
    return write_json(base, [{**each, "image": [shown[name] for name in each["image"]]} for each in records], pictures)


def write_archive(base, records, pictures):
    """Pictures in a tar that lies in the image root."""
    path = write_json(base, records, {name: pictures[name] for name in sorted(pictures)[:1]})
    write_tar(base / "rest.tar", pictures)
    return path


KINDS = {**WRITERS, "data urls": write_urls, "pictures in a tar": write_archive}


@st.composite
def record_lists(draw):
    names = st.lists(st.sampled_from(sorted(FILES)), max_size=2, unique=True).map(sorted)
    languages = st.sampled_from(["en", "zh"])
    return [{**record(i, draw(names)), "lang": draw(languages)} for i in range(draw(st.integers(2, 7)))]


def flat(lists):
    return [each for own in lists for each in own]


def make_loader(processor, base, path, rank=0, ranks=1, **values):
    root = str(path if path.is_dir() else path.parent)
    return ParrotDataLoader(
        DataConfig(paths=(str(path),), image_roots=(root,), names=("set",), cache_dir=str(base / "cache"), **values),
        processor,
        num_visual_rows=ROWS,
        max_seq_len=512,
        global_batch_size=2,
        dp_rank=rank,
        dp_size=ranks,
    )


@settings(max_examples=2, deadline=None, derandomize=True)
@given(records=record_lists(), seed=st.integers(0, 99), alpha=st.sampled_from([None, 0.5]), at=st.integers(0, 9))
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "json"])
def test_batches_and_resume_are_those_of_json(processor, kind, records, seed, alpha, at):
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        path = KINDS[kind](base / "set", records, FILES)
        values = {"seed": seed, "language_alpha": alpha}
        wanted = list(make_loader(processor, base, WRITERS["json"](base / "json", records, FILES), **values))
        loader = make_loader(processor, base, path, **values)
        assert_same(list(loader), wanted)
        steps, stopped = at % len(wanted), make_loader(processor, base, path, **values)
        running = iter(stopped)
        first = [next(running) for _ in range(steps)]
        state = stopped.state_dict()
        running.close()
        again = make_loader(processor, base, path, **values)
        again.load_state_dict(state)
        assert_same([*first, *again], wanted)
        parts = [list(make_loader(processor, base, path, rank, 2, **values)) for rank in range(2)]
        for one, *both in zip(wanted, *parts, strict=True):
            ids = [sorted(name for batch in step for name in batch.record_ids) for step in (one, flat(both))]
            assert ids[0] == ids[1]


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

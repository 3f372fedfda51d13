"""Pictures from tars, Parquet files and data URLs: the same batches as from files, whatever their names are."""

from __future__ import annotations

import json
import re
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from parrot_sys.data.config import DataConfig
from parrot_sys.data.decoding import inspect_image, load_image
from parrot_sys.data.feature_store import FeatureStore
from parrot_sys.data.image_sources.root import ImageRoot
from parrot_sys.data.loader import ParrotDataLoader
from parrot_sys.errors import DataError, StorageError
from tests.data.comparing import PICTURES, ROWS, assert_same, record
from tests.data.picture_archives import (
    as_data_urls,
    data_url,
    shards,
    write_files,
    write_parquet,
    write_tar,
)
from tests.data.picture_files import encoded, noise

LETTERS = st.text(st.sampled_from("abz09_-. äß猫🐱\u0301'\"%\\"), min_size=1, max_size=12)
PART = st.one_of(LETTERS, st.integers(90, 220).map("n".__mul__)).filter(
    lambda part: part.strip(".") and len(part.encode()) < 250
)
NAME = st.lists(PART, min_size=1, max_size=3).map("/".join)


@st.composite
def data_sets(draw):
    """(name -> picture, records)."""
    names = draw(st.lists(NAME, min_size=2, max_size=7, unique=True))
    folders = {"/".join(name.split("/")[:i]) for name in names for i in range(1, name.count("/") + 1)}
    names = [name for name in names if name not in folders]
    pictures = {name: PICTURES[draw(st.integers(0, len(PICTURES) - 1))] for name in names}
    pictures[names[0]] = PICTURES[0]
    chosen = draw(st.lists(st.lists(st.sampled_from(names), max_size=2), min_size=3, max_size=9))
    return pictures, [record(i, images) for i, images in enumerate([[names[0]], *chosen])]


def make_loader(processor, folder, records, root, **settings):
    path, text = folder / "set.json", json.dumps(records)
    if not path.exists() or path.read_text(encoding="utf-8") != text:  # (a file that changes stops its readers)
        path.write_text(text, encoding="utf-8")
    config = DataConfig(paths=(str(path),), image_roots=(str(root),), on_bad_sample="skip", num_workers=3, **settings)
    return ParrotDataLoader(config, processor, num_visual_rows=ROWS, max_seq_len=512, global_batch_size=2)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    data=data_sets(),
    form=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
    count=st.integers(1, 3),
    rows=st.integers(1, 4),
    struct=st.booleans(),
    at=st.integers(0, 4),
    layout=st.sampled_from(["folder", "pattern", "beside"]),
)
def test_batches_are_those_from_files(processor, data, form, count, rows, struct, at, layout):
    pictures, records = data
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        parts = shards(pictures, count)
        roots = {"files": write_files(base / "files", pictures)}
        for kind in ("tar", "parquet"):
            for i, part in enumerate(parts):
                if kind == "tar":
                    path = write_tar(base / kind / f"shard-{i}.tar", part, form)
                else:
                    path = write_parquet(base / kind / f"p-{i}.parquet", part, rows=rows, struct=struct, large=i == 1)
            roots[kind] = {"folder": base / kind, "pattern": base / kind / f"*.{kind}", "beside": base / kind}[layout]
            if layout == "beside":  # a part of the pictures lies unpacked beside the archives
                path.unlink()
                write_files(base / kind, parts[-1])
            elif count == 1:
                roots[kind] = path
        loaders = {kind: make_loader(processor, base, records, root) for kind, root in roots.items()}
        (base / "urls").mkdir()
        loaders["urls"] = make_loader(processor, base / "urls", as_data_urls(records, pictures), base / "nowhere")
        wanted = list(loaders["files"])
        middle = make_loader(processor, base, records, roots["files"])
        state = None
        for number, _ in enumerate(middle):
            if number == min(at, len(wanted) - 1):
                state = middle.state_dict()
                break
        for kind, loader in loaders.items():
            if kind != "files":
                assert_same(list(loader), wanted)
            assert len(loader.statistics.skipped) == len(loaders["files"].statistics.skipped), kind
            if kind != "urls":  # (other records: another file)
                again = make_loader(processor, base, records, roots[kind])
                again.load_state_dict(state)
                rest = [] if again.place[0] else list(again)  # (at the end of the epoch the next one follows)
                assert_same(rest, wanted[len(wanted) - len(rest) :])
                assert again.place == (1, 0)


def test_a_name_may_stand_with_or_without_its_archive(tmp_path):
    one, two = PICTURES[0], PICTURES[3]
    write_tar(tmp_path / "a/x-0.tar", {"1.png": one, "./deep/2.png": one, "both.png": one, "y/z.png": one})
    write_tar(tmp_path / "a/x-1.tar", {"both.png": two})
    write_tar(tmp_path / "b/x-0.tar", {"other.png": two})
    root = ImageRoot(tmp_path / "*" / "*.tar")
    for name in ("1.png", "./1.png", "a/x-0.tar/1.png", "a/x-0/1.png", "x-0/1.png", "deep/2.png", "deep/../1.png"):
        assert root.problem(name) is None, name
        assert load_image(root.picture(name)).size == (9, 7)
    assert load_image(root.picture("x-1/both.png")).size == (30, 30)
    assert load_image(root.picture("a/x-0.tar/both.png")).size == (9, 7)
    assert "is in 2 archives" in root.problem("both.png")
    assert "x-1.tar among them: put the name of the archive and a / before it" in root.problem("both.png")
    for name in ("x-1/1.png", "x-2/1.png", "2.png", "deep", "", ".", "x-0.tar", "\ud800.png", "a\0b"):
        assert "is missing in" in root.problem(name), name
    for name in ("../1.png", "/1.png", "deep/../../1.png", ".."):
        assert "leads out of the image root" in root.problem(name), name


def test_the_later_of_two_members_with_one_name_counts(tmp_path, caplog):
    path = write_tar(tmp_path / "a.tar", {"1.png": PICTURES[0], "2.png": PICTURES[0]})
    with tarfile.open(path, "a") as tar, tempfile.NamedTemporaryFile() as file:
        file.write(PICTURES[3])
        file.flush()
        tar.add(file.name, "1.png")
    root = ImageRoot(path)
    assert load_image(root.picture("1.png")).size == (30, 30)
    assert load_image(root.picture("2.png")).size == (9, 7)
    assert "1 members of" in caplog.text
    assert "have the name of a later one, which counts" in caplog.text


def test_files_of_a_folder_come_before_its_archives(tmp_path):
    write_files(tmp_path, {"1.png": PICTURES[0]})
    write_tar(tmp_path / "a.tar", {"1.png": PICTURES[3], "2.png": PICTURES[3]})
    root = ImageRoot(tmp_path)
    assert root.problem("1.png") is None
    assert [path.name for path in tmp_path.iterdir() if "index" in path.name] == []  # nobody asked for the archive
    assert load_image(root.picture("1.png")).size == (9, 7)
    assert root.problem("2.png") is None
    assert load_image(root.picture("2.png")).size == (30, 30)
    assert root.problem("3.png") == f"image {tmp_path}/3.png is missing"
    assert "leads out of the image root" in root.problem("../3.png") or "is missing" in root.problem("../3.png")


def test_archives_that_are_links_out_of_the_folder_are_not_read(tmp_path):
    write_tar(tmp_path / "secret/a.tar", {"1.png": PICTURES[0]})
    (tmp_path / "root").mkdir()
    (tmp_path / "root/a.tar").symlink_to("../secret/a.tar")
    assert "1.png is missing" in ImageRoot(tmp_path / "root").problem("1.png")
    assert ImageRoot(tmp_path / "root", allow_outside=True).problem("1.png") is None
    assert ImageRoot(tmp_path / "root/a.tar").problem("1.png") is None  # named by the user


def test_unusable_archives_in_a_folder_are_named_where_a_picture_is_missing(tmp_path, caplog):
    write_files(tmp_path, {"1.png": PICTURES[0], "other.tar": b"no tar"})
    root = ImageRoot(tmp_path)
    assert root.problem("1.png") is None
    assert "other.tar" not in caplog.text
    assert "2.png is missing; image archive " in root.problem("2.png")
    assert "other.tar is damaged" in root.problem("2.png")


@pytest.mark.parametrize(
    ("root", "reason"),
    [
        ("*.tar", r"image root .*\*\.tar matches no archive; wanted files that end in \.tar, \.parquet"),
        ("none.tar", r"image archive .*none\.tar cannot be read: No such file"),
        ("none.parquet", r"image archive .*none\.parquet cannot be read: No such file"),
        (
            "file.json",
            r"image root .*file\.json must be a folder, or a file that ends in \.tar, \.parquet; got another",
        ),
        ("no.parquet", r"image archive .*no\.parquet cannot be read: .*"),
    ],
)
def test_roots_that_are_none(tmp_path, root, reason):
    write_files(tmp_path, {"file.json": b"[]", "no.parquet": b"no parquet"})
    with pytest.raises(DataError, match=reason):
        ImageRoot(tmp_path / root)
    assert "1.png is missing" in ImageRoot(tmp_path / "nowhere").problem("1.png")


def test_limits_are_checked_before_a_member_is_read(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"thin.png": PICTURES[6]})
    picture = ImageRoot(path).picture("thin.png")
    with pytest.raises(DataError, match=r"image .*a\.tar/thin\.png has 1 x 999 pixels, an aspect ratio of 999, more"):
        inspect_image(picture)


def test_features_are_found_again_wherever_the_picture_is(tmp_path):
    pictures = {"1.png": PICTURES[0], "2.webp": PICTURES[3]}
    roots = [write_files(tmp_path / "files", pictures), write_tar(tmp_path / "a.tar", pictures)]
    roots.append(write_parquet(tmp_path / "a.parquet", pictures))
    store = FeatureStore(tmp_path / "features", "tower")
    files = [[ImageRoot(root).picture(name) for name in pictures] for root in roots]
    files.append([ImageRoot(tmp_path).picture(data_url(data)) for data in pictures.values()])
    store.write(store.keys(files[0]), torch.arange(2.0).view(2, 1, 1).expand(2, 3, 4))
    for own in files:
        assert store.missing(own) == []
        assert torch.equal(store.features_of(own)[:, 0, 0], torch.arange(2.0))
    assert len({str(picture) for own in files for picture in own}) == 8


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_changed_archive_stops_the_run_even_when_bad_samples_are_skipped(processor, tmp_path, kind):
    write = write_tar if kind == "tar" else write_parquet
    path = write(tmp_path / f"a.{kind}", {"1.png": PICTURES[0]})
    loader = make_loader(processor, tmp_path, [record(0, ["1.png"])], path)
    write(path, {"1.png": PICTURES[3]})
    with pytest.raises(StorageError, match=rf"image archive .*a\.{kind} has changed since its index was read: start"):
        list(loader)
    loader = make_loader(processor, tmp_path, [record(0, ["1.png"])], path)
    assert list(loader)


def test_pictures_in_records_take_no_memory(processor, tmp_path):
    big = encoded(Image.fromarray(noise(300, 300)), "BMP")
    other = encoded(Image.fromarray(noise(300, 300, 9)), "BMP")
    records = [record(i, [data_url(other if i == 7 else big, "image/bmp")]) for i in range(9)]
    loader = make_loader(processor, tmp_path, records, tmp_path, cache_dir=str(tmp_path / "cache"))
    (dataset,) = loader.datasets
    assert max(len(name) for each in dataset.read(range(9)) for name in each.images) < 100
    assert len({name for each in dataset.read(range(9)) for name in each.images}) == 2  # each content once
    (kept,) = (tmp_path / "cache").glob("*/*/pictures.bin")
    assert kept.stat().st_size == len(big) + len(other)
    for i in range(9):
        (picture,) = dataset.pictures(i)
        assert np.array_equal(load_image(picture), noise(300, 300, 9 if i == 7 else 0))


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("data:image/png,abc", r"image data:image/png,abc is no data URL in base64: wanted data:TYPE;base64,\.\.\."),
        ("data:image/png;base64,ab!c", "is no data URL in base64: "),
        ("data:image/png;base64," + "A" * 9999, r"AAA\.\.\. is no data URL in base64: "),
        ("data:sha256:" + "a" * 64, "is no data URL in base64: wanted data:TYPE"),
    ],
)
def test_wrong_data_urls_are_bad_records(processor, tmp_path, url, reason):
    loader = make_loader(processor, tmp_path, [record(0, [url]), record(1, [data_url(PICTURES[0])])], tmp_path)
    assert [each.record_id for each in loader.datasets[0].read([0])] == ["r1"]
    assert len(loader.datasets[0]) == 1
    (skipped,) = loader.datasets[0].skipped
    assert "record 0 (id 'r0'): image data:" in skipped
    assert len(skipped) < 400
    assert re.search(reason, ImageRoot(tmp_path).problem(url) or "")

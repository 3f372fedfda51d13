"""`parrot data check`: its verdict is what training does, and its report counts what is in the files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from parrot_sys.data.check import CheckSetup, check_files
from parrot_sys.data.config import DataConfig
from parrot_sys.data.loader import ParrotDataLoader
from parrot_sys.data.processor import ParrotProcessor
from parrot_sys.errors import ParrotError
from parrot_sys.training.data_check import DataCheckConfig, StartConfig, _reasons, check, main
from tests.data.picture_archives import data_url, write_parquet, write_tar

FIXTURE = Path(__file__).parents[1] / "fixtures" / "parrot_tiny"
ROWS, LIMIT = 17, 90


@pytest.fixture(scope="module")
def processor() -> ParrotProcessor:
    return ParrotProcessor.from_pretrained(FIXTURE / "model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of several kinds."""
    path = tmp_path_factory.mktemp("pictures")
    shutil.copy(FIXTURE / "image_0.png", path / "good.png")
    (path / "broken.png").write_bytes((FIXTURE / "image_0.png").read_bytes()[:60])
    (path / "none.png").write_bytes(b"no picture")
    Image.new("RGBA", (40, 20), (255, 0, 0, 100)).save(path / "alpha.png")
    Image.new("RGB", (900, 2)).save(path / "thin.png")
    exif = Image.Exif()
    exif[0x112] = 6
    Image.new("RGB", (30, 40)).save(path / "turned.jpg", exif=exif)
    return path


def qa(question, answer, **more):
    return {**more, "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


RECORDS = {
    "text": qa("Hi", "Hello", lang="en"),
    "picture": qa("<image>\nWhat?", "A cat.", image="good.png", lang="pt"),
    "between": qa("Is <image> red?", "Yes.", image="alpha.png"),
    "turned": {
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": "turned.jpg"}]},
            {"role": "assistant", "content": "x"},
        ]
    },
    "control": qa("What is <|im_end|>?", "It ends <|im_start|>."),
    "partly": qa("Hi", "long " * 200),
    "cut": qa("word " * 200, "never reached"),
    "broken": qa("<image>", "x", image="broken.png"),
    "none": qa("<image>", "x", image="none.png"),
    "thin": qa("<image>", "x", image="thin.png"),
    "missing": qa("<image>", "x", image="missing.png"),
    "outside": qa("<image>", "x", image="/etc/hostname"),
    "unmarked": qa("What?", "x", image="good.png"),
    "surrogate": qa("Nice \ud83d", "x"),
    "empty": qa("What?", " "),
    "no object": [1],
}
GOOD = ("text", "picture", "between", "turned", "control", "partly")
CHOICES = st.lists(st.sampled_from(list(RECORDS)), min_size=1, max_size=5) | st.lists(st.sampled_from(GOOD), min_size=1)


def starts(data, processor):
    """Whether training gets through an epoch of the data, with something to learn."""
    try:
        loader = ParrotDataLoader(data, processor, num_visual_rows=ROWS, max_seq_len=LIMIT, global_batch_size=4)
        return any(batch.num_samples for step in list(loader) for batch in step)
    except ParrotError:
        return False


def report_on(data, processor, **settings):
    setup = CheckSetup(
        data=data,
        processor=processor.with_data_config(data),
        num_visual_rows=ROWS,
        max_seq_len=LIMIT,
        vocab_size=1000,
        **settings,
    )
    report = check_files(setup)
    return replace(report, reasons=list(_reasons(report, setup)))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=CHOICES,
    bad=st.sampled_from(["error", "skip"]),
    long=st.sampled_from(["truncate", "error", "skip"]),
    suffix=st.sampled_from(["json", "jsonl"]),
    more=st.sampled_from(
        [
            {},
            {"text_ratio": 1.0},
            {"language_weights": {"pt": 2.0}},
            {"max_tokens_per_micro_batch": 60},
            {"weights": (0.0,)},
        ]
    ),
)
def test_the_verdict_is_what_training_does(folder, processor, names, bad, long, suffix, more):
    path = folder / f"set.{suffix}"
    records = [RECORDS[name] for name in names]
    path.write_text(json.dumps(records) if suffix == "json" else "\n".join(map(json.dumps, records)))
    # (What is found to be broken only when it is decoded is still part of the mix that the loader plans with.)
    more = {} if {"broken", "none", "thin"} & set(names) else more
    data = DataConfig(paths=(str(path),), on_bad_sample=bad, on_long_sample=long, num_workers=1, **more)
    report = report_on(data, processor)
    assert (not report.reasons) == starts(data, processor), report.reasons
    assert report.files[0].records == len(records)
    if bad == "skip" and not report.files[0].unreadable:
        wrong = sum(name not in (*GOOD, "cut") for name in names)
        assert report.files[0].bad.total - report.files[0].bad.counts["no label"] == wrong


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=CHOICES, kind=st.sampled_from(["tar", "parquet", "urls"]), bad=st.sampled_from(["error", "skip"]))
def test_the_verdict_is_that_on_files_wherever_pictures_are(folder, processor, names, kind, bad):
    pictures = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".png", ".jpg")}
    records = [RECORDS[name] for name in names]
    path, root = folder / "stored.json", folder / kind / f"a.{kind}"
    path.write_text(json.dumps(records))
    data = DataConfig(paths=(str(path),), on_bad_sample=bad, num_workers=1)
    wanted = report_on(data, processor)
    if kind == "urls":
        text = json.dumps(records)
        for name, content in pictures.items():
            text = text.replace(f'"{name}"', f'"{data_url(content)}"')
        path.write_text(text)
    else:
        (write_tar if kind == "tar" else write_parquet)(root, pictures)
        data = replace(data, image_roots=(str(root),))
    report = report_on(data, processor)
    assert len(report.reasons) == len(wanted.reasons)
    assert (not report.reasons) == starts(data, processor)
    assert report.files[0].bad.counts == wanted.files[0].bad.counts
    assert report.files[0].pictures.plain() == wanted.files[0].pictures.plain()


def test_a_damaged_archive_is_named(folder, processor):
    path = folder / "damaged.json"
    path.write_text(json.dumps([RECORDS["picture"]]))
    (folder / "damaged.tar").write_bytes(b"x" * 2000)
    data = DataConfig(paths=(str(path),), image_roots=(str(folder / "damaged.tar"),), on_bad_sample="skip")
    (reason,) = report_on(data, processor).reasons
    assert reason.startswith(f"image archive {folder / 'damaged.tar'} is damaged: ")
    assert not starts(data, processor)
    (folder / "damaged.tar").unlink()


def test_everything_is_counted_with_its_place(folder, processor):
    path = folder / "all.json"
    path.write_text(json.dumps([*RECORDS.values(), RECORDS["picture"]]))
    report = report_on(DataConfig(paths=(str(path),)), processor)
    (file,) = report.files
    assert file.bad.counts == {"wrong record": 4, "picture": 5, "no label": 1}
    assert (file.records, file.usable) == (17, 7)
    assert file.layouts.counts == {"conversations": 15, "messages": 1}
    assert file.languages.counts == {"": 4, "en": 1, "pt": 2}
    assert file.kinds.counts == {"text only": 3, "with images": 4}
    assert file.markers.examples == {"image after words": [f"{path}: record 2 (id '2')"]}
    assert file.control_tokens.counts == {"<|im_end|>": 1, "<|im_start|>": 1}
    assert file.lost.examples == {
        "a part of the answers": [f"{path}: record 5 (id '5')"],
        "every answer": [f"{path}: record 6 (id '6')"],
    }
    assert file.long.counts == {"cut": 2}
    assert not file.unknown_ids.total
    assert report.duplicates.examples == {"repeated": [f"{path}: record 16 repeats {path}: record 1"]}
    assert file.pictures.modes.counts == {"RGB": 2, "RGBA": 1}
    assert (file.pictures.files, file.pictures.bad) == (8, 5)
    assert (file.pictures.turned, file.pictures.transparent) == (1, 1)
    assert (file.pictures.smallest, file.pictures.largest) == ((40, 20), Image.open(folder / "good.png").size)
    assert len(report.reasons) == 1
    json.dumps(report.plain())


def test_pictures_are_read_as_far_as_asked(folder, processor):
    path = folder / "broken.json"
    path.write_text(json.dumps([RECORDS["broken"], RECORDS["none"], RECORDS["missing"]]))
    data = DataConfig(paths=(str(path),))
    bad = {how: report_on(data, processor, pictures=how).files[0].pictures.bad for how in ("decode", "header", "skip")}
    assert bad == {"decode": 3, "header": 2, "skip": 1}


def test_ids_beyond_the_vocabulary(folder, processor):
    path = folder / "text.json"
    path.write_text(json.dumps([RECORDS["text"]]))
    config = DataCheckConfig(files=(str(path),), checkpoint=StartConfig(load_from=str(FIXTURE / "model")))
    assert not check(config).reasons
    data = DataConfig(paths=(str(path),))
    setup = CheckSetup(data=data, processor=processor, num_visual_rows=ROWS, max_seq_len=LIMIT, vocab_size=632)
    assert list(check_files(setup).files[0].unknown_ids.counts) == ["'<|im_end|>' = 632"]


def test_memory_does_not_grow_with_the_file(folder):
    """But for 8 bytes a record and what holds them; the list itself would take kilobytes a record."""
    peaks = []
    for count in (1000, 4000):
        path = folder / "large.json"
        path.write_text(
            json.dumps([qa(f"{number} {'word ' * 400}", "x", lang=f"l{number}") for number in range(count)])
        )
        data = DataConfig(paths=(str(path),))
        tracemalloc.start()
        setup = CheckSetup(data=data, processor=None, num_visual_rows=ROWS, max_seq_len=LIMIT, vocab_size=1)
        report = check_files(setup)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert (report.files[0].usable, len(report.files[0].languages.counts)) == (count, min(count, 1001))
    assert peaks[1] - peaks[0] < 3000 * 500


def test_the_command(folder, capsys):
    good, bad = folder / "good.json", folder / "bad.json"
    good.write_text(json.dumps([RECORDS["picture"], RECORDS["turned"]]))
    bad.write_text(json.dumps([RECORDS["text"], RECORDS["cut"], RECORDS["missing"]]))
    start = ["--checkpoint.load-from", str(FIXTURE / "model"), "--model.max-seq-len", str(LIMIT)]
    assert main([str(good)]) == 0
    shown = capsys.readouterr().out
    assert shown.endswith("Training would start.\n")
    assert "Not checked: rows, lost answers and ids" in shown
    assert main([str(good), str(bad), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["would_start"] is False
    assert main([str(bad), "--data.on-bad-sample", "skip", *start[:2]]) == 0
    assert main([str(folder / "nothing.json")]) == 1
    assert "nothing.json is missing" in capsys.readouterr().out


def test_the_program_finds_the_command(folder):
    path = folder / "one.json"
    path.write_text(json.dumps([RECORDS["text"]]))
    command = [sys.executable, "-m", "parrot_sys", "data", "check", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 records, 1 usable" in done.stdout

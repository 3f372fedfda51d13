"""Public sets: small files in the form they were published in -> records, and what happens to rows that are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from parrot_sys.data.corpora.public.importing import DataImportConfig, ImportReport, import_set
from parrot_sys.data.corpora.public.instructions import CAPTION_PROMPTS, DETAIL_PROMPTS, INSTRUCTIONS, WHY
from parrot_sys.data.main import main
from parrot_sys.data.records import parse_record
from parrot_sys.data.templates import render_instruction
from parrot_sys.errors import ConfigError, DataError
from tests.data.instruction_rows import (
    ALPACA,
    AOKVQA,
    BAIZE,
    DOLLY,
    KARPATHY,
    LAVIS,
    LLAVA,
    MINIGPT4,
    OCR_VQA,
    VQA_V2,
    VQA_V2_QUESTIONS,
)
from tests.data.picture_archives import write_parquet, write_tar


def write_images(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(folder / name)
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(
        tmp_path / "images",
        "COCO_train2014_000000033471.jpg",
        "train2017/000000052846.jpg",
        "train2017/000000299207.jpg",
        "2.jpg",
        "val2014/COCO_val2014_000000391895.jpg",
        "COCO_val2014_000000522418.jpg",
        "761183272.jpg",
        "train2014/COCO_train2014_000000458752.jpg",
    )


def run(
    source: str, content: Any, folder: Path, images: Path | None = None, **settings: Any
) -> tuple[list[dict[str, Any]], ImportReport]:
    """The records of an import, each checked as the loader checks them, and the report."""
    path = folder / ("rows.jsonl" if source == "dolly" else "rows.json")
    lines = [json.dumps(row) for row in content] if source == "dolly" else [json.dumps(content)]
    path.write_text("\n".join(lines), encoding="utf-8")
    output = folder / "out" / "records.json"
    config = DataImportConfig(source=source, input=path, images=images, output=output, overwrite=True, **settings)
    report = import_set(config)
    records = json.loads(output.read_text(encoding="utf-8"))
    for index, record in enumerate(records):
        parsed = parse_record(record, index, output)
        render_instruction(parsed.turns)
        assert all((config.images / name).is_file() for name in parsed.images)
    assert [entry.name for entry in output.parent.iterdir()] == ["records.json"]
    return records, report


def pairs(record: dict[str, Any]) -> list[tuple[str, str]]:
    turns = [turn["value"].replace("<image>\n", "") for turn in record["conversations"]]
    return list(zip(turns[::2], turns[1::2], strict=True))


def test_llava_keeps_its_dialogues(tmp_path: Path, images: Path) -> None:
    records, report = run("llava", LLAVA, tmp_path, images)
    assert [record["conversations"] for record in records] == [row["conversations"] for row in LLAVA]
    assert [record["image"] for record in records] == [
        "COCO_train2014_000000033471.jpg",
        "train2017/000000052846.jpg",
    ]
    assert [record["id"] for record in records] == ["llava-000000033471", "llava-000000052846"]
    assert report == ImportReport(2, 2, ())


def test_aokvqa_asks_why_and_answers_with_reasons(tmp_path: Path, images: Path) -> None:
    rows = [{**AOKVQA[0], "question_id": str(i)} for i in range(40)]
    records, _ = run("aokvqa", rows, tmp_path, images)
    reasons = " ".join(AOKVQA[0]["rationales"])
    options = 0
    for record in records:
        human, answer = record["conversations"]
        question, _, why = human["value"].removeprefix("<image>\n").partition("? ")
        assert question == "What is the man by the bags awaiting"
        assert why in WHY
        assert answer == {"from": "gpt", "value": f"The answer is cab. Because {reasons}"}
        assert record["image"] == "train2017/000000299207.jpg"
        assert human.get("input", "skateboarder, train, delivery, cab") == "skateboarder, train, delivery, cab"
        options += "input" in human
    assert 8 <= options <= 32  # drawn for every second row
    with_options = next(record for record in records if "input" in record["conversations"][0])
    text = "".join(segment.text for segment in render_instruction(with_options["conversations"]))
    assert "\n\n### Input:\nskateboarder, train, delivery, cab\n\n### Response:\nThe answer is cab." in text


def test_minigpt4(tmp_path: Path, images: Path) -> None:
    ((record,), _) = run("minigpt4", MINIGPT4, tmp_path, images)
    ((question, answer),) = pairs(record)
    assert question in DETAIL_PROMPTS
    assert answer == MINIGPT4["annotations"][0]["caption"]
    assert record["image"] == "2.jpg"
    write_images(tmp_path / "whole", "image/2.jpg")
    ((record,), _) = run("minigpt4", MINIGPT4, tmp_path, tmp_path / "whole")
    assert record["image"] == "image/2.jpg"


@pytest.mark.parametrize(
    ("content", "captions", "image"),
    [
        (
            KARPATHY,
            ["A man with a red helmet.", "A man rides a dirt bike."],
            "val2014/COCO_val2014_000000391895.jpg",
        ),
        (LAVIS, ["A woman wearing a net on her head cutting a cake."], "COCO_val2014_000000522418.jpg"),
    ],
)
def test_coco_captions(content: Any, captions: list[str], image: str, tmp_path: Path, images: Path) -> None:
    records, _ = run("coco_caption", content, tmp_path, images)
    assert [pairs(record)[0][1] for record in records] == captions
    assert all(pairs(record)[0][0] in CAPTION_PROMPTS for record in records)
    assert {record["image"] for record in records} == {image}


def test_ocr_vqa_takes_one_question_of_each_training_book(tmp_path: Path, images: Path) -> None:
    ((record,), _) = run("ocr_vqa", OCR_VQA, tmp_path, images)
    book = OCR_VQA["761183272"]
    assert pairs(record)[0] in list(zip(book["questions"], book["answers"], strict=True))
    assert record["image"] == "761183272.jpg"


def test_vqa_v2_joins_questions_and_answers(tmp_path: Path, images: Path) -> None:
    (tmp_path / "questions.json").write_text(json.dumps(VQA_V2_QUESTIONS))
    ((record,), _) = run("vqa_v2", VQA_V2, tmp_path, images, questions=tmp_path / "questions.json")
    assert pairs(record) == [("What is this photo taken looking through?", "net")]
    assert record["image"] == "train2014/COCO_train2014_000000458752.jpg"


def test_dolly_and_alpaca_have_inputs(tmp_path: Path) -> None:
    records, _ = run("dolly", DOLLY, tmp_path)
    assert records[0]["conversations"] == [
        {"from": "human", "value": DOLLY[0]["instruction"], "input": DOLLY[0]["context"]},
        {"from": "gpt", "value": "On 31 August 2000."},
    ]
    assert "input" not in records[1]["conversations"][0]
    records, _ = run("alpaca", ALPACA, tmp_path)
    assert [record["conversations"][0].get("input") for record in records] == [None, "He finnished his meal"]
    assert [pairs(record)[0][1] for record in records] == [row["output"] for row in ALPACA]
    assert all("image" not in record for record in records)


def test_baize_pairs_every_question_with_its_own_answer(tmp_path: Path) -> None:
    ((record,), _) = run("baize", BAIZE, tmp_path)
    assert pairs(record) == [("Which is the best way?", "By train."), ("Why?", "It is quick.")]


def test_every_set_has_a_test_here() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    assert all(f'run("{source}"' in text for source in INSTRUCTIONS)


BAD: list[Any] = [
    {**ALPACA[0], "output": " "},
    {"instruction": "x", "input": ""},
    "text",
    {"instruction": 3, "input": "", "output": "x"},
]


def test_bad_rows_stop_the_import_or_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match=r"rows\.json: record 1: `output` must be a text that is not empty.*skip"):
        run("alpaca", [ALPACA[0], *BAD], tmp_path)
    assert not (tmp_path / "out").exists()
    records, report = run("alpaca", [ALPACA[0], *BAD, ALPACA[1]], tmp_path, on_bad_row="skip")
    assert [record["id"] for record in records] == ["alpaca-0", "alpaca-5"]
    assert (report.read, report.written, len(report.bad)) == (6, 2, 4)
    assert "record 2: must look like" in report.bad[1]
    assert "lacks 'output'" in report.bad[1]
    assert "record 3: must be a JSON object, got str" in report.bad[2]
    arguments = ["import", "--source", "alpaca", "--input", str(tmp_path / "rows.json"), "--on-bad-row", "skip"]
    assert main([*arguments, "--output", str(tmp_path / "again.json"), "--limit", "1"]) == 0
    out, err = capsys.readouterr()
    assert "1 records of 6 rows; 4 left out as bad, 1 not drawn (--limit)" in out
    assert err.count("left out: ") == 4


def test_missing_images_are_named(tmp_path: Path, images: Path) -> None:
    rows = [{**AOKVQA[0], "image_id": 7}, AOKVQA[0]]
    with pytest.raises(DataError, match=r"record 0 .*image is not in .*images \(looked for 000000000007\.jpg, train"):
        run("aokvqa", rows, tmp_path, images)
    records, report = run("aokvqa", rows, tmp_path, images, on_bad_row="skip")
    assert (len(records), len(report.bad)) == (1, 1)
    with pytest.raises(DataError, match="no usable row"):
        run("aokvqa", rows[:1], tmp_path, images, on_bad_row="skip")
    with pytest.raises(DataError, match="must be the directory of the images"):
        run("aokvqa", rows, tmp_path, tmp_path / "nowhere")


@pytest.mark.parametrize("write", [write_tar, write_parquet])
def test_images_may_be_in_an_archive(tmp_path: Path, images: Path, write: Any) -> None:
    pictures = {path.relative_to(images).as_posix(): path.read_bytes() for path in images.rglob("*") if path.is_file()}
    archive = write(tmp_path / f"shards/a.{'tar' if write is write_tar else 'parquet'}", pictures)
    wanted, _ = run("llava", LLAVA, tmp_path, images)
    for root in (archive, archive.parent, archive.parent / f"*{archive.suffix}"):
        config = DataImportConfig(
            source="llava", input=tmp_path / "rows.json", images=root, output=tmp_path / "new.json", overwrite=True
        )
        import_set(config)
        assert json.loads(config.output.read_text(encoding="utf-8")) == wanted
    archive.write_bytes(archive.read_bytes()[:100])
    with pytest.raises(DataError, match=r"image archive .* (is damaged|cannot be read)"):
        import_set(config)


def test_dialogues_that_do_not_pair_are_named(tmp_path: Path, images: Path) -> None:
    rows = [{**LLAVA[0], "conversations": LLAVA[0]["conversations"][:3]}]
    with pytest.raises(DataError, match="turns must be human and gpt in turn"):
        run("llava", rows, tmp_path, images)
    text = "[|Human|] a\n[|AI|] b\n[|AI|] c"
    with pytest.raises(DataError, match="turns must be human and gpt in turn"):
        run("baize", [{"input": text}], tmp_path)


def test_fields_that_are_no_texts_are_named(tmp_path: Path, images: Path) -> None:
    book = OCR_VQA["761183272"]
    with pytest.raises(DataError, match=r"`questions` must be a text that is not empty, got None"):
        run("ocr_vqa", {"761183272": {**book, "questions": [None, ""]}}, tmp_path, images)
    with pytest.raises(DataError, match=r"`rationales` must be a list of texts, got 'Because'"):
        run("aokvqa", [{**AOKVQA[0], "rationales": "Because"}], tmp_path, images)
    with pytest.raises(DataError, match="a turn before the last has no text"):
        run("baize", [{"input": "x\n[|Human|] \n[|AI|] b\n[|Human|] "}], tmp_path)


def test_one_bad_part_of_a_file_can_be_left_out(tmp_path: Path, images: Path) -> None:
    records, report = run("ocr_vqa", {"1": {"questions": []}, **OCR_VQA}, tmp_path, images, on_bad_row="skip")
    assert [record["id"] for record in records] == ["ocr_vqa-761183272"]
    assert "book 1 must be an object with a split" in report.bad[0]
    broken = {**KARPATHY, "images": [{"split": "train"}, *KARPATHY["images"]]}
    records, report = run("coco_caption", broken, tmp_path, images, on_bad_row="skip")
    assert len(records) == 2
    assert "image 0 of the file is none of Karpathy's: it lacks 'sentences'" in report.bad[0]


def test_no_picture_of_another_set_is_taken(tmp_path: Path, images: Path) -> None:
    """Visual Genome numbers its pictures too; this number is one of COCO's."""
    row = {**LLAVA[0], "image": "vg/VG_100K/33471.jpg"}
    with pytest.raises(DataError, match=r"looked for vg/VG_100K/33471\.jpg\)"):
        run("llava", [row], tmp_path, images)


def test_a_limit_draws_the_same_rows_again(tmp_path: Path) -> None:
    rows = [{"instruction": f"Say {i}.", "input": "", "output": str(i)} for i in range(50)]
    first, second = (run("alpaca", rows, tmp_path, limit=7)[0] for _ in range(2))
    other = run("alpaca", rows, tmp_path, limit=7, seed=1)[0]
    assert first == second != other
    numbers = [int(record["id"].split("-")[1]) for record in first]
    assert numbers == sorted(set(numbers))
    assert len(numbers) == 7


def test_files_of_another_kind(tmp_path: Path, images: Path) -> None:
    with pytest.raises(DataError, match=r"must hold a JSON object with a list 'annotations', got list"):
        run("minigpt4", [1], tmp_path, images)
    with pytest.raises(DataError, match=r"must hold a JSON object of books, got list"):
        run("ocr_vqa", [1], tmp_path, images)
    (tmp_path / "broken.json").write_text("[")
    settings: dict[str, Any] = {"output": tmp_path / "x.json"}
    with pytest.raises(DataError, match="no valid JSON"):
        import_set(DataImportConfig(source="alpaca", input=tmp_path / "broken.json", **settings))
    with pytest.raises(DataError, match=r"nowhere\.json is missing"):
        import_set(DataImportConfig(source="alpaca", input=tmp_path / "nowhere.json", **settings))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "aokvqa"}, "has images: pass their directory as --images DIR"),
        ({"images": Path("x")}, "source alpaca has no images"),
        ({"source": "vqa_v2", "images": Path("x")}, "needs --questions FILE"),
        ({"questions": Path("x")}, "belongs to source vqa_v2, got source alpaca"),
        ({"limit": 0}, "limit must be >= 1, got 0"),
        ({"output": Path("x.jsonl")}, "must end in .json"),
    ],
)
def test_settings_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataImportConfig(**{"source": "alpaca", "input": Path("a.json"), "output": Path("o.json"), **changes})


def test_an_output_is_replaced_only_when_asked(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(ALPACA))
    config = DataImportConfig(source="alpaca", input=tmp_path / "rows.json", output=tmp_path / "o.json")
    import_set(config)
    with pytest.raises(ConfigError, match="--overwrite"):
        import_set(config)

"""Multilingual public sets: tiny files in their published forms -> records, and tables that `parrot eval` reads."""
# ruff: noqa: RUF001 - signs of other scripts

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parrot_sys.data.corpora.public.importing import DataImportConfig
from parrot_sys.data.corpora.public.instructions import INSTRUCTIONS
from parrot_sys.data.corpora.public.m3exam import _options
from parrot_sys.data.corpora.public.registry import SOURCES
from parrot_sys.data.languages import code_of_name
from parrot_sys.data.main import main
from parrot_sys.errors import ConfigError, DataError
from parrot_sys.evaluation.prompts import question_prompt
from tests.data.public_rows import hub, png, records_of, tables_of, turns, write_json, write_rows

XGQA = {
    "202158849": {
        "semantic": [],
        "question": "Ist der Bus in der Nähe der Menschen schwarz und klein?",
        "imageId": "n406334",
        "isBalanced": True,
        "answer": "no",
        "fullAnswer": "No, the bus is black but large.",
    },
    "202158779": {"question": "Woraus besteht der Bürgersteig?", "imageId": "n406334", "answer": "concrete"},
}
MAXM = {
    "dataset": "maxm_v1",
    "version": "1",
    "split": "iw",
    "annotations": [
        {
            "image_id": "000411001ff7dd4f",
            "image_url": "https://x/y.jpg",
            "qa_pairs": [
                {
                    "question_id": "7",
                    "question": "מה צבע הבית?",
                    "answers": ["לבן", "אפור"],
                    "processed_answers": ["לבן"],
                    "is_collection": "false",
                },
                {"question_id": "8", "question": "כמה?", "answers": ["3"], "is_collection": True},
            ],
        }
    ],
}


def test_xgqa(tmp_path: Path) -> None:
    path = write_json(tmp_path / "testdev_balanced_questions_de.json", XGQA)
    images = tmp_path / "gqa"
    (images / "images").mkdir(parents=True)
    (images / "images" / "n406334.jpg").write_bytes(png())
    records, report = records_of("xgqa", path, images=images)
    assert (report.read, report.written, report.bad) == (2, 2, ())
    assert {(record["lang"], record["image"]) for record in records} == {("de", "images/n406334.jpg")}
    assert records[0]["id"] == "xgqa-202158849"
    # answers are GQA's, in English
    assert turns(records[0]) == ["<image>\nIst der Bus in der Nähe der Menschen schwarz und klein?", "no"]
    # few-shot files have the language as their folder, PangeaBench the pictures inside
    records, _ = records_of("xgqa", write_json(tmp_path / "few_shot" / "bn" / "train_1.json", XGQA), images=images)
    assert {record["lang"] for record in records} == {"bn"}
    rows = [{"question": "무엇?", "answer": "bus", "image": hub(png())}]
    ((record,), _) = records_of("xgqa", write_rows(tmp_path / "rows.parquet", rows), language="ko")
    assert record["lang"] == "ko"
    assert record["image"].startswith("data:image/png;base64,")
    with pytest.raises(ConfigError, match=r"rows\.parquet does not say its language: pass it as --language"):
        records_of("xgqa", tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="is an open question, and a table takes multiple choice"):
        tables_of("xgqa", path, images=images)
    with pytest.raises(DataError, match=r"needs the image n406334\.jpg: pass the directory as --images DIR"):
        records_of("xgqa", path)


def test_maxm(tmp_path: Path) -> None:
    path = write_json(tmp_path / "maxm_v1_iw.json", MAXM)
    (tmp_path / "xm3600").mkdir()
    (tmp_path / "xm3600" / "000411001ff7dd4f.jpg").write_bytes(png())
    records, _ = records_of("maxm", path, images=tmp_path / "xm3600")
    assert [record["lang"] for record in records] == ["he", "he"]
    assert turns(records[0]) == ["<image>\nמה צבע הבית?", "לבן"]  # the first of several answers
    assert [record.get("category") for record in records] == [None, "collection"]
    rows = [{"question": "Q?", "answers": ["a", "b"], "image": hub(png()), "image_id": "0", "question_id": "q1"}]
    ((record,), _) = records_of("maxm", write_rows(tmp_path / "maxm_th.parquet", rows))
    assert (record["lang"], record["id"]) == ("th", "maxm-q1")
    broken = {**MAXM, "annotations": [*MAXM["annotations"], {"image_id": "x"}]}
    records, report = records_of(
        "maxm", write_json(tmp_path / "b_iw.json", broken), images=tmp_path / "xm3600", on_bad_row="skip"
    )
    assert len(records) == 2
    assert "picture 1 of the file is none of MaXM's: it lacks 'qa_pairs'" in report.bad[0]


def cvqa_row(number: int, subset: str = "('Japanese', 'Japan')", **more: Any) -> dict[str, Any]:
    return {
        "image": hub(png(number)),
        "ID": f"{number}_0",
        "Subset": subset,
        "Question": f"質問{number}?",
        "Translated Question": "?",
        "Options": ["赤", "青", "白", "黒"],
        "Translated Options": ["red", "blue", "white", "black"],
        "Label": number % 4,
        "Category": "Cooking and food",
        **more,
    }


def test_cvqa(tmp_path: Path) -> None:
    subsets = ["('Japanese', 'Japan')", "('Minangkabau', 'Indonesia')", "('Egyptian_Arabic', 'Egypt')"]
    rows = [cvqa_row(number, subsets[number % 3]) for number in range(6)]
    path = write_rows(tmp_path / "test-00000-of-00005.parquet", rows)
    tables = tables_of("cvqa", path)
    assert list(tables) == ["ar-EG", "ja", "min"]
    assert sorted(entry.name for entry in (tmp_path / "tables").iterdir()) == [
        "exam_ar-EG.tsv", "exam_ja.tsv", "exam_min.tsv",
    ]  # fmt: skip
    first, second = tables["ja"].questions
    assert first.options == {"A": "赤", "B": "青", "C": "白", "D": "黒"}
    assert (first.answer, second.answer) == ("A", "D")
    assert (first.category, first.l2_category) == ("Cooking and food", "Japan")
    assert question_prompt(first, "ja").endswith("質問0?\nA. 赤\nB. 青\nC. 白\nD. 黒\nA、B、C、またはD?")
    records, _ = records_of("cvqa", path)
    assert [record["lang"] for record in records] == ["ja", "min", "ar-EG"] * 2
    assert turns(records[3])[1] == "D"
    # the public test split keeps its answers secret
    secret = write_rows(tmp_path / "secret.parquet", [cvqa_row(0, Label=-1), cvqa_row(1, Label=-1)])
    assert not tables_of("cvqa", secret)["ja"].has_answers
    with pytest.raises(DataError, match=r"record 0 \(id '0_0'\): its answer is secret"):
        records_of("cvqa", secret)
    mixed = write_rows(tmp_path / "mixed.parquet", [cvqa_row(0, Label=-1), cvqa_row(1)])
    with pytest.raises(DataError, match="some questions in ja have an answer and others have none"):
        tables_of("cvqa", mixed)
    bad = [cvqa_row(0, Subset="('Klingon', 'x')"), cvqa_row(1, Label=9), cvqa_row(2, image=None), cvqa_row(3)]
    _, report = records_of("cvqa", write_rows(tmp_path / "bad.parquet", bad), on_bad_row="skip")
    assert [text.split("): ")[-1].split("record")[-1] for text in report.bad] == [
        " 0: `Subset` names the language 'Klingon', which has no code here",
        " 1: `Label` must be in [0, 4), got 9",
        " 2: holds no picture",
    ]


M3EXAM = [
    {
        "question_text": "ภาพนี้คืออะไร (image)[image-1.png] ?",
        "background_description": ["อ่านข้อความ"],
        "answer_text": "2",
        "options": ["1. แมว", "2. หมา", "3. นก", "4. ปลา", "5. ม้า"],
        "need_image": "yes",
        "language": "thai",
        "level": "mid",
        "subject": "science",
        "subject_category": "natural-science",
        "year": "2006",
    },
    {
        "question_text": "Which event occurred first?",
        "background_description": [],
        "answer_text": "(3)",
        "options": ["(1) Gettysburg", "(2) Fort Sumter", "(3) assassination", "(4) Emancipation"],
        "need_image": "no",
        "language": "english",
        "level": "mid",
        "subject_category": "social-science",
    },
    {
        "question_text": "Watter prent?",
        "background_description": [],
        "answer_text": "B",
        "options": ["A. (image)[a.png]", "B. (image)[b.png]"],
        "language": "afrikaans",
        "level": "low",
        "subject_category": "math",
    },
]


def test_m3exam(tmp_path: Path) -> None:
    path = write_json(tmp_path / "all-questions-image.json", M3EXAM)
    images = tmp_path / "multimodal-questions"
    (images / "images-thai").mkdir(parents=True)
    (images / "images-thai" / "image-1.png").write_bytes(png())
    for name in ("a.png", "b.png"):
        (images / name).write_bytes(png(7))
    records, _ = records_of("m3exam", path, images=images)
    assert [record["lang"] for record in records] == ["th", "en", "af"]
    assert turns(records[0]) == [
        "อ่านข้อความ\nภาพนี้คืออะไร <image> ?\nA. แมว\nB. หมา\nC. นก\nD. ปลา\nE. ม้า\nA, B, C, D หรือ E?", "B",
    ]  # fmt: skip
    assert records[0]["image"] == "images-thai/image-1.png"
    assert "image" not in records[1]
    assert turns(records[1])[1] == "C"
    assert records[2]["image"] == ["a.png", "b.png"]
    assert "A. <image>\nB. <image>" in turns(records[2])[0]
    with pytest.raises(DataError, match="record 2: has 2 pictures, and a question of a table takes one"):
        tables_of("m3exam", path, images=images)
    tables = tables_of("m3exam", path, images=images, on_bad_row="skip")
    assert list(tables) == ["en", "th"]
    (thai,) = tables["th"].questions
    assert (thai.hint, thai.question, thai.answer) == ("อ่านข้อความ", "ภาพนี้คืออะไร  ?", "B")
    assert (thai.category, thai.l2_category) == ("natural-science", "mid")
    (english,) = tables["en"].questions
    assert (english.image_key, english.answer) == (None, "C")  # a question about text alone
    # PangeaBench: the pictures inside, as base64 in columns
    row = {**M3EXAM[0], "image_ids": ["image-1.png"], "image_0": base64.b64encode(png()).decode(), "image_1": "None"}
    (question,) = tables_of("m3exam", write_rows(tmp_path / "thai.parquet", [row]))["th"].questions
    assert question.image_key is not None
    _, report = records_of(
        "m3exam", write_json(tmp_path / "b.json", [M3EXAM[1], {**M3EXAM[1], "answer_text": "9"}]), on_bad_row="skip"
    )
    assert "`answer_text` must name one of the options 1, 2, 3, 4, got '9'" in report.bad[0]


def test_m3exam_with_a_list_of_pictures(tmp_path: Path) -> None:
    """The set on Hugging Face that lmms-eval reads: structs of bytes and path, in the order of `image_ids`."""
    pictures = [{"bytes": png(7), "path": None}, {"bytes": png(), "path": "image-1.png"}]
    row = {**M3EXAM[0], "image_ids": ["unused.png", "image-1.png"], "images": pictures}
    text_alone = {**M3EXAM[1], "image_ids": [], "images": [], "subject": "history", "year": "2006"}
    tables = tables_of("m3exam", write_rows(tmp_path / "test.parquet", [row, text_alone]))
    (thai,), (english,) = tables["th"].questions, tables["en"].questions
    assert tables["th"].images[thai.image_key] == base64.b64encode(png()).decode()
    assert english.image_key is None

    path = write_rows(tmp_path / "bad.parquet", [{**row, "image_ids": ["image-1.png"]}])
    with pytest.raises(DataError, match="`images` must have one picture for each of the 1 `image_ids`, got 2"):
        tables_of("m3exam", path)


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text("abc5.) ", min_size=1).map(str.strip).filter(bool), min_size=1, max_size=5, unique=True),
    form=st.sampled_from(["{}. {}", "({}) {}", "{}) {}", "（{}）{}", "{}、{}"]),
    first=st.sampled_from("A1"),
)
def test_labels_of_options_come_off_if_all_have_one(texts: list[str], form: str, first: str) -> None:
    labels = [chr(ord(first) + place) for place in range(len(texts))]
    assert _options([form.format(*pair) for pair in zip(labels, texts, strict=True)]) == (labels, texts)
    unlabelled = [f"x{text}" for text in texts]
    assert _options(unlabelled) == ([str(place + 1) for place in range(len(texts))], unlabelled)


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text("abc5", min_size=1), min_size=2, max_size=5, unique=True),
    spaces=st.lists(st.sampled_from([" ", "  ", "\u3000", "\t", ". "]), min_size=5, max_size=5),
    first=st.sampled_from("Aa1"),
    wrong=st.integers(0, 4),
)
def test_labels_without_punctuation_come_off_if_all_follow_each_other(
    texts: list[str], spaces: list[str], first: str, wrong: int
) -> None:
    labels = [chr(ord(first) + place) for place in range(len(texts))]
    whole = [label + space + text for label, space, text in zip(labels, spaces, texts, strict=False)]
    assert _options(whole) == ([label.upper() for label in labels], texts)
    whole[wrong % len(texts)] = f"x {texts[0]}"
    assert _options(whole)[1] == whole


def test_a_number_at_the_start_is_no_label() -> None:
    for texts in (["5. Mai", "7. Juli", "5. August"], ["1 hour", "2 hours", "3 hours"], ["A lion"], ["A ", "B "]):
        assert _options(texts)[1] == texts


def kaleidoscope_row(**more: Any) -> dict[str, Any]:
    return {
        "language": "uk",
        "country": "Ukraine",
        "file_name": "x.pdf",
        "level": "university",
        "category_en": "Biology",
        "category_original_lang": "Біологія",
        "general_category_en": "STEM",
        "original_question_num": "11",
        "question": "Що позначено X?",
        "options": ["Ядро", "Рибосома", "Гольджі", "Вакуоль"],
        "answer": 1,
        "image_png": "q1.png",
        "image_information": "essential",
        "image_type": "diagram",
        "image": "data/exam/images/q1.png",
        **more,
    }


@pytest.mark.parametrize("write", [write_json, write_rows])
def test_kaleidoscope(tmp_path: Path, write: Callable[[Path, Any], Path]) -> None:
    rows = [
        kaleidoscope_row(),
        kaleidoscope_row(image=None, language="ne", answer=3),
        kaleidoscope_row(options=str(["1", "2"]) if write is write_json else ["1", "2"], answer=0),
    ]
    images = tmp_path / "unpacked"
    picture = images / "final_data" / "data" / "exam" / "images" / "q1.png"
    picture.parent.mkdir(parents=True)
    picture.write_bytes(png())
    path = write(tmp_path / f"rows.{'json' if write is write_json else 'parquet'}", rows)
    tables = tables_of("kaleidoscope", path, images=images)
    assert list(tables) == ["ne", "uk"]
    first, second = tables["uk"].questions
    assert (first.answer, first.category, first.l2_category) == ("B", "Biology", "STEM")
    assert second.options == {"A": "1", "B": "2"}
    assert first.image_key == second.image_key  # one picture, stored once
    assert tables["ne"].questions[0].image_key is None
    records, _ = records_of("kaleidoscope", path, images=images)
    assert [record.get("image") for record in records] == [
        "final_data/data/exam/images/q1.png", None, "final_data/data/exam/images/q1.png",
    ]  # fmt: skip
    bad = [kaleidoscope_row(options=["a.png", "b.png"]), kaleidoscope_row(answer=4), kaleidoscope_row()]
    _, report = records_of("kaleidoscope", write_rows(tmp_path / "b.parquet", bad), images=images, on_bad_row="skip")
    assert "its options are pictures" in report.bad[0]
    assert "`answer` must be in [0, 4), got 4" in report.bad[1]


def test_xmmmu(tmp_path: Path) -> None:
    row = {
        "id": "validation_Art_Theory_7",
        "question": "<image 1> は何ですか?",
        "options": str(["絵画", "彫刻's"]),
        "answer": "B",
        "question_type": "multiple-choice",
        "image_1": hub(png()),
        "image_2": hub(None),
    }
    rows = [row, {**row, "id": "validation_Math_1", "question_type": "open", "answer": "7"}]
    path = write_rows(tmp_path / "ja-00000-of-00001.parquet", rows)
    with pytest.raises(ConfigError, match="does not say its language"):
        tables_of("xmmmu", path)
    (question,) = tables_of("xmmmu", path, language="ja")["ja"].questions
    assert (question.question, question.options, question.answer) == ("は何ですか?", {"A": "絵画", "B": "彫刻's"}, "B")
    assert question.category == "Art_Theory"
    (records, report) = records_of("xmmmu", path, language="ja")
    assert report.read == 1  # the open one is passed over
    assert turns(records[0])[0].startswith("<image> は何ですか?\nA. 絵画")
    bad = [{**row, "answer": "C"}, {**row, "options": "["}, {**row, "question": "<image 2>?"}]
    _, report = records_of("xmmmu", write_rows(tmp_path / "b.parquet", [*bad, row]), language="ja", on_bad_row="skip")
    assert [text.rpartition(": ")[2] for text in report.bad] == [
        "`answer` must be one of A, B, got 'C'",
        "`options` must be a list of texts, got '['",
        "holds no picture image_2",
    ]


def test_marvl(tmp_path: Path) -> None:
    said = [{"from": "human", "value": "<image>\nபடத்தில் இரண்டு நாய்கள் உள்ளன"}, {"from": "gpt", "value": "False"}]
    rows = [{"id": "ta-1", "image": hub(png()), "conversations": said}]
    rows.append({**rows[0], "conversations": [said[0], {"from": "gpt", "value": "maybe"}]})
    path = write_rows(tmp_path / "rows.parquet", rows)
    (question,) = tables_of("marvl", path, language="ta", on_bad_row="skip")["ta"].questions
    assert (question.question, question.answer) == ("படத்தில் இரண்டு நாய்கள் உள்ளன", "B")
    assert question.options == {"A": "True", "B": "False"}
    (records, report) = records_of("marvl", path, language="ta", on_bad_row="skip")
    assert turns(records[0])[1] == "B"
    assert "record 1: its answer must be true or false, got 'maybe'" in report.bad[0]


def test_every_set_has_a_test_here() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    assert all(f'"{source}", ' in text for source in set(SOURCES) - set(INSTRUCTIONS))


def test_names_of_languages_of_the_sets_have_codes() -> None:
    m3exam = "english chinese afrikaans italian javanese portuguese swahili thai vietnamese"
    cvqa = (
        "Amharic Bengali Breton Bulgarian Chinese Egyptian_Arabic Filipino French Hindi Igbo Indonesian Irish Japanese "
        "Javanese Kinyarwanda Korean Malay Marathi Minangkabau Mongolian Norwegian Oromo Portuguese Romanian Russian "
        "Sinhala Spanish Sundanese Swahili Tamil Telugu Urdu"
    )
    names = [*m3exam.split(), *cvqa.split()]
    assert all(code_of_name(name) for name in names), [name for name in names if not code_of_name(name)]


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_rows(tmp_path / "rows.parquet", [cvqa_row(0), cvqa_row(1, "('Bulgarian', 'Bulgaria')")])
    arguments = ["import", "--source", "cvqa", "--input", str(path), "--output", str(tmp_path / "cvqa.tsv")]
    assert main(arguments) == 0
    assert "2 tables with 2 questions of 2 rows; 0 left out as bad" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"cvqa_bg\.tsv exists: choose another --output, or pass --overwrite"):
        main(arguments)
    assert main([*arguments, "--overwrite"]) == 0
    with pytest.raises(ConfigError, match=r"output must end in \.json \(records\) or \.tsv \(tables\)"):
        DataImportConfig(source="cvqa", input=path, output=tmp_path / "x.csv")
    with pytest.raises(ConfigError, match="language must be a BCP 47 code"):
        DataImportConfig(source="cvqa", input=path, output=tmp_path / "x.tsv", language="german")

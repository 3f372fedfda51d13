"""A model whose pictures are cut into tiles: saved, loaded, and asked by evaluation, chat and Python alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import parrot_sys
from parrot_sys.data.processor import ParrotProcessor
from parrot_sys.errors import CheckpointError
from parrot_sys.evaluation.items import Item
from parrot_sys.evaluation.predictor import ModelPredictor
from parrot_sys.evaluation.runner import load_tables, make_items
from parrot_sys.inference.chat import ChatSession
from parrot_sys.megatron.runtime.initialize import shutdown
from tests.evaluation.tables import picture, write_table
from tests.megatron.tiled_models import write_tiled_model


@pytest.fixture(scope="module", autouse=True)
def _groups() -> Iterator[None]:
    yield
    shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiled_model(tmp_path_factory.mktemp("model") / "llava")


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[Any, ParrotProcessor]:
    return parrot_sys.load_pretrained(folder)


@pytest.fixture
def items(tmp_path: Path) -> list[Item]:
    """Questions about pictures of several proportions."""
    rows = [
        {"index": i, "question": "What is it?", "A": "cat", "B": "dog", "answer": "A", "split": "style",
         "image": picture((40 * i, 20, 90), size)}
        for i, size in enumerate([(30, 30), (20, 90), (90, 20), (70, 75)])
    ]  # fmt: skip
    write_table(tmp_path / "data" / "mmmb_en.tsv", rows)
    (table,) = load_tables([tmp_path / "data"], (), None)
    return make_items(table, "model", {table.language: table})


def test_evaluation_reads_the_tiles_that_the_processor_makes(
    loaded: tuple[Any, ParrotProcessor], folder: Path, items: list[Item]
) -> None:
    model, processor = loaded
    predictor = ModelPredictor(model, processor, checkpoint=folder, max_new_tokens=6)
    predictions = predictor.predict(items, "model")
    sizes = set()
    for item, prediction in zip(items, predictions, strict=True):
        turns = [{"from": "human", "value": item.prompt}]
        ids = torch.tensor([processor.format_conversation(turns, add_generation_prompt=True)["input_ids"]])
        pictures = processor.pictures([item.table.image(item.question.image_key)])
        output = model.generate(ids, images=pictures, max_new_tokens=6)
        answer = processor.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()
        assert prediction.response == answer
        sizes.add(len(pictures[0].rows.source))
        assert predictor.problem(item) == ""
    assert len(sizes) > 1
    predictor.config = replace(predictor.config, max_seq_len=40)
    assert all("exceeds the 40 positions" in predictor.problem(item) for item in items)


def test_chat_gives_the_answer_of_generate(
    loaded: tuple[Any, ParrotProcessor], items: list[Item], tmp_path: Path
) -> None:
    model, processor = loaded
    session = ChatSession(model=model, processor=processor, max_new_tokens=6)
    paths = []
    for number, item in enumerate(items[:2]):
        paths.append(tmp_path / f"{number}.png")
        paths[-1].write_bytes(item.table.image(item.question.image_key).data)
        session.add_image(paths[-1])
    answer = session.ask("Which?")
    ids = processor.format_conversation(session.turns[:1], add_generation_prompt=True)["input_ids"]
    output = model.generate(torch.tensor([ids]), images=processor.pictures(paths), max_new_tokens=6)
    assert answer.text == processor.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True).strip()
    again = session.ask("And now?")  # the pictures stay in the conversation
    assert isinstance(again.text, str)


def test_tiles_of_another_model_are_refused(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    settings = other / "preprocessor_config.json"
    assert '"tile_side": 2' in settings.read_text()
    settings.write_text(settings.read_text().replace('"tile_side": 2', '"tile_side": 1'))
    with pytest.raises(CheckpointError, match="cuts pictures into tiles by"):
        parrot_sys.load_pretrained(other)

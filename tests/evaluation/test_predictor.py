"""The real model behind the runner: the tiny released checkpoint, against its public methods and as a command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import parrot_sys
from parrot_sys.errors import CheckpointError, DataError
from parrot_sys.evaluation.digest import checkpoint_digest
from parrot_sys.evaluation.items import Item
from parrot_sys.evaluation.main import evaluate, main
from parrot_sys.evaluation.predictor import ModelPredictor
from parrot_sys.evaluation.runner import load_tables, make_items
from parrot_sys.megatron.runtime.initialize import shutdown
from parrot_sys.modules.text_guided_moe import RoutingOverride
from tests.evaluation.scripted import config
from tests.evaluation.tables import picture, write_table

CHECKPOINT = Path(__file__).parents[1] / "fixtures" / "parrot_tiny" / "model"


@pytest.fixture(scope="module", autouse=True)
def _groups() -> Iterator[None]:
    yield
    shutdown()


@pytest.fixture(scope="module")
def loaded() -> tuple:
    return parrot_sys.load_pretrained(CHECKPOINT)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for suffix, question in (("en", "What is it?"), ("tr", "Bu uzun bir soru: resimde ne var?")):
        rows = [
            {"index": i, "question": f"{question} {'x' * i}", "A": "cat", "B": "dog", "answer": "AB"[i % 2],
             "split": "style", "image": picture((40 * i, 20, 200 - 40 * i), (20 + i, 30))}
            for i in range(5)
        ]  # fmt: skip
        write_table(tmp_path / "data" / f"mmmb_{suffix}.tsv", rows)
    return tmp_path / "data"


def _items(data: Path, routing: str = "model") -> list[Item]:
    tables = load_tables([data], (), None)
    by_language = {table.language: table for table in tables}
    return [item for table in tables for item in make_items(table, routing, by_language)]  # type: ignore[arg-type]


def _inputs(loaded: tuple, item: Item, prompt: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    processor = loaded[1]
    turns = [{"from": "human", "value": prompt or item.prompt}]
    ids = processor.format_conversation(turns, add_generation_prompt=True)["input_ids"]
    return torch.tensor([ids]), processor.images([item.table.image(item.question.image_key)])


@pytest.mark.parametrize("routing", ["model", "off", "other-language"])
def test_generation_is_that_of_the_model_one_by_one(loaded: tuple, data: Path, routing: str) -> None:
    model, processor = loaded
    predictor = ModelPredictor(model, processor, checkpoint=CHECKPOINT, max_new_tokens=5)
    items = _items(data, routing)
    predictions = predictor.predict(items, routing)  # type: ignore[arg-type]
    for item, prediction in zip(items, predictions, strict=True):
        ids, pixels = _inputs(loaded, item)
        override = None
        if routing == "off":
            override = RoutingOverride(mode="off")
        elif routing == "other-language":
            override = RoutingOverride(probs=model(*_guided(loaded, item)).routing.probs)
        output, routes = model.generate(
            ids, images=pixels, max_new_tokens=5, routing_override=override, return_routing=True
        )
        assert (
            prediction.response
            == processor.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()
        )
        assert prediction.experts == pytest.approx(routes.probs[0].tolist(), abs=1e-5)
        if override is not None:
            own = model(ids, images=pixels).logits
            assert (model(ids, images=pixels, routing_override=override).logits - own).abs().max() > 0


def _guided(loaded: tuple, item: Item) -> tuple[torch.Tensor, None, torch.Tensor]:
    ids, pixels = _inputs(loaded, item, item.guidance_prompt)
    return ids, None, pixels


def test_likelihood_is_that_of_score(loaded: tuple, data: Path) -> None:
    model, processor = loaded
    predictor = ModelPredictor(model, processor, checkpoint=CHECKPOINT, mode="likelihood")
    items = _items(data)
    for item, prediction in zip(items, predictor.predict(items, "model"), strict=True):
        ids, pixels = _inputs(loaded, item)
        letters = [processor.tokenizer.encode(letter) for letter in "AB"]
        (scores,) = model.score(ids, [letters], images=pixels)
        assert list(prediction.option_scores.values()) == pytest.approx(scores.tolist(), abs=1e-4)
        assert prediction.response == "AB"[int(scores.argmax())]


def test_text_likelihood_is_that_of_score(loaded: tuple, data: Path) -> None:
    model, processor = loaded
    tokenizer = processor.tokenizer
    predictor = ModelPredictor(model, processor, checkpoint=CHECKPOINT, mode="text-likelihood")
    items = _items(data)
    for item, prediction in zip(items, predictor.predict(items, "model"), strict=True):
        ids, pixels = _inputs(loaded, item)
        answers = [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in item.question.options.values()]
        (scores,) = model.score(ids, [answers], images=pixels)
        assert list(prediction.option_scores.values()) == pytest.approx(scores.tolist(), abs=1e-4)
        assert prediction.response == list(item.question.options)[int(scores.argmax())]
        assert list(prediction.option_tokens.values()) == list(map(len, answers))


def test_pictures_are_encoded_once(loaded: tuple, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = loaded
    predictor = ModelPredictor(model, processor, checkpoint=CHECKPOINT, mode="likelihood")
    encoded: list[int] = []
    real = processor.pictures
    monkeypatch.setattr(processor, "pictures", lambda images: (lambda t: (encoded.append(len(t)), t)[1])(real(images)))
    items = _items(data)
    predictor.predict(items, "model")
    predictor.predict(items, "off")
    assert encoded == [5]  # both languages show the same five pictures


def test_route_changes_logits_and_needs_experts(loaded: tuple, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = loaded
    predictor = ModelPredictor(model, processor, checkpoint=CHECKPOINT)
    assert predictor.logit_change(_items(data), "off") > 1e-3
    assert predictor.logit_change(_items(data, "other-language"), "other-language") > 1e-4
    monkeypatch.setattr(model.model.bridge, "bypass", frozenset({"moe"}))
    bypassed = ModelPredictor(model, processor, checkpoint=CHECKPOINT)
    assert not bypassed.has_experts
    (note,) = bypassed.notes
    assert note.startswith("The checkpoint holds moe, but they are not used")
    assert predictor.notes == ()
    assert bypassed.predict(_items(data)[:1], "model")[0].experts == []


@pytest.mark.parametrize("mode", ["generate", "likelihood", "text-likelihood"])
@pytest.mark.parametrize("routing", ["model", "off", "other-language"])
def test_nothing_is_chosen_among_numbers_that_are_none(data: Path, mode: str, routing: str) -> None:
    """Experts of NaN: only the routing `off` goes past them, and is then what the answers are made of."""
    model, processor = parrot_sys.load_pretrained(CHECKPOINT)
    with torch.no_grad():
        for parameter in model.model.moe.parameters():
            parameter.fill_(float("nan"))
    predictor = ModelPredictor(model, processor, checkpoint=CHECKPOINT, mode=mode, max_new_tokens=2)  # type: ignore[arg-type]
    items = _items(data, routing)
    if routing == "off":
        assert all(prediction.response for prediction in predictor.predict(items, "off"))
    else:
        with pytest.raises(CheckpointError, match=r"request 0 \(mmmb_en\.tsv, index 0\) and 9 more: \d+ of"):
            predictor.predict(items, routing)  # type: ignore[arg-type]
    if routing != "model":
        with pytest.raises(CheckpointError, match=r"mmmb_en\.tsv, index 0"):
            predictor.logit_change(items, routing)  # type: ignore[arg-type]


def test_digest_follows_content(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    first = checkpoint_digest(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"abd")
    assert checkpoint_digest(tmp_path) != first


def test_command_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # the program's log handler writes to the stderr that is captured here and would outlive it
    monkeypatch.setattr("parrot_sys.evaluation.main.setup_logging", lambda: None)
    output = tmp_path / "out"
    arguments = ["--checkpoint", str(CHECKPOINT), "--data", str(data), "--output", str(output), "--mode", "likelihood"]
    assert main([*arguments, "--routing", "model", "off", "other-language"]) == 0
    report = json.loads((output / "report.json").read_text())
    assert set(report["style"]) == {"en", "tr"}
    assert set(report["details"]["routing"]) == {"off", "other-language"}
    assert report["details"]["logit_change"]["style"]["en"]["off"] > 0
    assert len(report["details"]["experts"]["style"]["tr"]) == 6
    assert "| style: accuracy in % | en | tr |" in capsys.readouterr().out


def _table(path: Path, **changes: object) -> Path:
    rows = [
        {"index": i, "question": "What is it?", "A": "cat", "B": "dog", "answer": "A", "image": picture((9 * i, 9, 9))}
        for i in range(1, 4)
    ]
    rows[1] |= changes
    return write_table(path, rows)


BAD = {
    "too long": {"question": "word " * 500},
    "an option too long": {"B": "word " * 500},
    "no picture": {"image": None},
    "a broken picture": {"image": picture()[:72]},
    "half a picture": {"image": picture((1, 2, 3), (60, 60))[:104]},
    "no base64": {"image": "photo/" + "x" * 80 + ".png"},
    "an unknown row's picture": {"image": 99},
    "no question": {"question": None},
    "no options": {"A": None, "B": None},
    "no such option": {"answer": "C"},
}


@pytest.mark.parametrize("mode", ["generate", "text-likelihood"])
@pytest.mark.parametrize("kind", BAD)
def test_one_bad_question_does_not_end_an_evaluation(
    loaded: tuple, tmp_path: Path, kind: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = loaded
    data = _table(tmp_path / "data" / "mine_en.tsv", **BAD[kind])
    settings = {"batch_size": 3, "mode": mode, "max_new_tokens": 3}
    predictor = ModelPredictor(model, processor, checkpoint=CHECKPOINT, mode=mode, max_new_tokens=3)  # type: ignore[arg-type]
    predict = predictor.predict
    asked: list[int] = []
    monkeypatch.setattr(
        predictor,
        "predict",
        lambda items, routing: (asked.extend(i.question.index for i in items), predict(items, routing))[1],
    )
    with pytest.raises(DataError, match=r"mine_en\.tsv, row 3, index 2: .*--on-bad-question wrong"):
        evaluate(config(data.parent, **settings), predictor)
    assert asked == []  # it shows before the first answer
    (result,) = evaluate(config(data.parent, on_bad_question="wrong", **settings), predictor)
    assert asked == [1, 3]
    (bad,) = result["bad_questions"]
    assert (bad["row"], bad["index"]) == (3, 2)
    scores = result["parts"]["mine"]["scores"]
    assert (scores["n"], scores["bad_questions"]) == (3, 1)
    assert result["parts"]["mine"]["rows"]["right"][1] == 0
    assert any("1 of 3 questions could not be asked and count as wrong: row 3, index 2: " in n for n in result["notes"])
    # the others are answered as in a table without bad questions
    clean = _items(_table(tmp_path / "clean" / "mine_en.tsv").parent)
    records = [json.loads(line) for line in next((tmp_path / "out").rglob("*.jsonl")).read_text().splitlines()[1:]]
    assert [record["index"] for record in records] == [1, 3]
    alone = predict([item for item in clean if item.question.index != 2], "model")
    assert [record["response"] for record in records] == [prediction.response for prediction in alone]

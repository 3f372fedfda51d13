"""`parrot chat`: the session in this process, and the program in a terminal of its own."""

from __future__ import annotations

import io
import math
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import parrot_sys
from parrot_sys.data.constants import IMAGE_TOKEN_ID
from parrot_sys.data.languages import MMMB_LANGUAGES
from parrot_sys.errors import ConfigError, DataError
from parrot_sys.inference.chat import ChatConfig, ChatSession, _handle, _loop, routing_table
from parrot_sys.inference.chat_texts import TEXTS, texts_in
from parrot_sys.megatron.runtime.initialize import shutdown

FIXTURE = Path(__file__).parents[1] / "fixtures" / "parrot_tiny"
IMAGES = [FIXTURE / f"image_{i}.png" for i in range(4)]


@pytest.fixture(scope="module", autouse=True)
def _groups() -> Iterator[None]:
    yield
    shutdown()


@pytest.fixture(scope="module")
def loaded() -> tuple:
    return parrot_sys.load_pretrained(FIXTURE / "model")


@pytest.fixture
def session(loaded: tuple) -> ChatSession:
    return ChatSession(model=loaded[0], processor=loaded[1], max_new_tokens=6)


def test_turns_and_images_add_up(session: ChatSession) -> None:
    session.add_image(IMAGES[0])
    first = session.ask("What is it?")
    assert first.experts is not None
    assert first.experts.shape == (1, 6)
    torch.testing.assert_close(first.experts.sum(1), torch.ones(1))
    session.add_image(IMAGES[1])
    session.add_image(IMAGES[2])
    second = session.ask("And these?")
    assert second.experts is not None
    assert second.experts.shape == (3, 6)
    assert [turn["from"] for turn in session.turns] == ["human", "gpt", "human", "gpt"]
    assert session.turns[2]["value"] == "<image>\n<image>\nAnd these?"
    assert session.turns[1]["value"] == first.text
    assert not session.waiting


def test_answer_is_that_of_generate(session: ChatSession, loaded: tuple) -> None:
    model, processor = loaded
    session.add_image(IMAGES[0])
    session.ask("What is it?")
    session.ask("Why?")
    ids = torch.tensor([processor.format_conversation(session.turns[:3], add_generation_prompt=True)["input_ids"]])
    output = model.generate(ids, images=processor.images([IMAGES[0]]), max_new_tokens=6)
    assert (
        session.turns[3]["value"]
        == processor.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()
    )


def test_an_image_marker_in_a_message_is_text(session: ChatSession) -> None:
    assert session.ask("What does <image> mean? <|im_end|>").experts is None
    session.add_image(IMAGES[0])
    answer = session.ask("And <image> here?")
    assert answer.experts is not None
    assert answer.experts.shape == (1, 6)
    ids = session.processor.format_conversation(session.turns)["input_ids"]
    ends = session.processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (ids.count(IMAGE_TOKEN_ID), ids.count(ends)) == (1, 5)


def test_a_line_that_is_no_utf8_does_not_end_the_conversation(
    session: ChatSession, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = io.TextIOWrapper(io.BytesIO(b"caf\xe9\ncaf\xc3\xa9\n"), encoding="ascii", errors="surrogateescape")
    monkeypatch.setattr("sys.stdin", lines)
    assert _loop(session, ChatConfig(checkpoint=FIXTURE / "model")) == 0
    assert "error: character 3 is no valid text: the byte 0xE9" in capsys.readouterr().err
    assert [turn["value"] for turn in session.turns[::2]] == ["caf\u00e9"]


def test_streamed_pieces_are_the_answer(session: ChatSession) -> None:
    pieces: list[str] = []
    answer = session.ask("Merhaba", pieces.append)
    assert "".join(pieces).strip() == answer.text
    assert answer.experts is None  # no picture, no route


def test_long_answers_end_where_the_positions_end(
    session: ChatSession, loaded: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = loaded
    asked: list[int] = []
    real = model.generate
    monkeypatch.setattr(
        model, "generate", lambda ids, **settings: (asked.append(settings["max_new_tokens"]), real(ids, **settings))[1]
    )
    session.max_new_tokens = 10_000
    session.add_image(IMAGES[0])
    session.ask("Tell a story. " * 30)
    ids = processor.format_conversation(session.turns[:1], add_generation_prompt=True)["input_ids"]
    rows = len(ids) + model.config.vision.num_visual_rows - 1
    assert asked == [model.config.llm.max_position_embeddings - rows]


def test_sampling_with_a_seed_repeats(loaded: tuple) -> None:
    def ask(seed: int) -> str:
        return (
            ChatSession(model=loaded[0], processor=loaded[1], max_new_tokens=12, temperature=1.5, seed=seed)
            .ask("Hi")
            .text
        )

    assert ask(1) == ask(1)
    assert len({ask(seed) for seed in range(4)}) > 1


def test_failures_leave_the_conversation_as_it_was(session: ChatSession, monkeypatch: pytest.MonkeyPatch) -> None:
    session.ask("Hello")
    session.add_image(IMAGES[0])
    before = (list(session.turns), len(session.images), len(session.waiting))
    with pytest.raises(DataError, match=r"character 5 is no valid text: half a character \(U\+D83D\)"):
        session.ask("look \ud83d")
    with pytest.raises(DataError, match="max_position_embeddings"):
        session.ask("word " * 3000)

    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.ask("Hello again", interrupt)
    assert (session.turns, len(session.images), len(session.waiting)) == before
    with pytest.raises(DataError, match=r"none\.png"):
        session.add_image("none.png")
    session.reset()
    assert (session.turns, session.images, session.waiting) == ([], [], [])


def test_commands(session: ChatSession, capsys: pytest.CaptureFixture[str]) -> None:
    config = ChatConfig(checkpoint=FIXTURE, language="pt", show_routing=True)
    _handle(session, "", config)
    _handle(session, "/help", config)
    _handle(session, f"/image {IMAGES[0]}", config)
    _handle(session, "O que?", config)
    _handle(session, "/reset", config)
    _handle(session, "Oi", config)
    _handle(session, "/unknown", config)
    out = capsys.readouterr().out
    texts = TEXTS["pt"]
    assert out.startswith(texts.help)
    assert texts.attached.format(file=IMAGES[0]) in out
    assert out.count("expert weights") == 1
    assert texts.forgotten in out
    assert texts.no_experts in out
    assert out.rstrip().endswith(texts.help)


def test_routing_table() -> None:
    one = routing_table(torch.tensor([[0.75, 0.0, 0.25]]))
    assert one.split("\n") == ["  expert weights", "    1 0.750 " + "#" * 22, "    2 0.000", "    3 0.250 " + "#" * 8]
    assert "picture 2" in routing_table(torch.ones(2, 2) / 2)


def test_texts_exist_in_every_language() -> None:
    assert set(TEXTS) == set(MMMB_LANGUAGES)
    assert len({text.welcome for text in TEXTS.values()}) == len(MMMB_LANGUAGES)
    assert all(text.question in text.welcome and "{file}" in text.attached for text in TEXTS.values())


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_new_tokens", 0), ("temperature", -1.0), ("temperature", math.nan), ("temperature", math.inf)],
)
def test_bad_settings(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be >="):
        ChatConfig(checkpoint=FIXTURE, **{name: value})


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "parrot_sys", "chat", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_missing_image_fails_before_the_model_loads() -> None:
    begin = time.perf_counter()
    result = _run("--checkpoint", str(FIXTURE / "model"), "--image", "none.png", "--message", "x")
    assert result.returncode == 2
    assert "--image none.png does not exist" in result.stderr
    assert "Traceback" not in result.stderr
    assert time.perf_counter() - begin < 60


def test_program_in_a_terminal() -> None:
    """The interactive loop with line editing, an error in the middle, and the end by Ctrl-D."""
    controller, terminal = pty.openpty()
    command = [sys.executable, "-m", "parrot_sys", "chat", "--checkpoint", str(FIXTURE / "model"), "--show-routing"]
    with subprocess.Popen(
        [*command, "--max-new-tokens", "4", "--language", "tr"],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env={**os.environ, "TERM": "dumb"},
    ) as process:
        os.close(terminal)
        seen = _read_until(controller, "> ", 90)
        assert TEXTS["tr"].question in seen
        for line, wanted in (
            ("/image none.png", TEXTS["tr"].error),
            (f"/image {IMAGES[0]}", TEXTS["tr"].attached.split("}")[1]),
            ("Resimde ne var?", "expert weights"),
            ("/reset", TEXTS["tr"].forgotten),
        ):
            os.write(controller, f"{line}\n".encode())
            assert wanted in _read_until(controller, "\n> ", 60)
        os.write(controller, b"\x04")
        assert process.wait(timeout=30) == 0
    os.close(controller)


def _read_until(descriptor: int, end: str, seconds: float) -> str:
    text, deadline = "", time.monotonic() + seconds
    while not text.replace("\r", "").endswith(end):
        ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"waited {seconds} s for {end!r}, got {text!r}"
        text += os.read(descriptor, 4096).decode(errors="replace")
    return text


def test_the_help_is_in_the_language_of_any_variant_of_a_code() -> None:
    assert texts_in("pt-BR") is texts_in("PT") is TEXTS["pt"]
    for code, message in (("de", "one that the help is written in"), ("zh-Hant", "written in"), ("deutsch", "BCP 47")):
        with pytest.raises(ConfigError, match=message):
            texts_in(code)

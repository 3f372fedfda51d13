"""The way from VLMEvalKit to a server, without the kit: keys, and errors that say what to do."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from parrot_sys.errors import ConfigError
from parrot_sys.integrations.vlmevalkit.__main__ import main, parser
from parrot_sys.integrations.vlmevalkit.server_client import ask, base_url, served_model
from tests.integrations.openai_stub import completion, refusal, stub

FREE = "http://127.0.0.1:{port}"


def test_the_key_is_sent_where_there_is_one() -> None:
    with stub(lambda _: completion("x")) as server:
        assert served_model(server.url, "k") == served_model(f"{server.url}/v1/", "") == "the-model"
        assert ask(f"{base_url(server.url)}/chat/completions", "k", {"a": 1})[0] == 200
    assert server.keys == ["Bearer k", None, "Bearer k"]


@pytest.mark.parametrize(
    ("models", "key", "words"),
    [
        (
            refusal(401, "a valid key is needed"),
            "",
            ("401 (a valid key is needed)", "asks for a key", "PARROT_API_KEY"),
        ),
        (refusal(401, "no"), "old", ("another key than the one sent", "--key")),
        (refusal(404, "Not\nFound"), "", ("404 (Not Found)", "parrot serve")),
        ((200, "<html>hello</html>"), "", ("200 (<html>hello</html>)", "parrot serve")),
        ((200, {"data": []}), "", ("200", "parrot serve")),
        ((200, ["x"]), "", ("200", "parrot serve")),
        ((500, "x" * 10_000), "", ("500 (xxx", "...")),
    ],
)
def test_a_server_that_names_no_model_is_an_error_on_one_line(
    models: tuple[int, Any], key: str, words: tuple[str, ...]
) -> None:
    with stub(lambda _: completion("x"), models) as server, pytest.raises(ConfigError) as error:
        served_model(server.url, key)
    line = str(error.value)
    assert "\n" not in line
    assert len(line) < 500
    assert all(word in line for word in (f"--server {server.url}: wanted the list of models at", *words)), line


def test_a_server_that_is_not_there_or_no_address_is_an_error_on_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for server, word in ((FREE.format(port=port), "Connection refused"), ("127.0.0.1:8000", "an address such as")):
        with pytest.raises(ConfigError, match=word) as error:
            served_model(server, "")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("option", ["--mode", "--max-tokens", "--kit-x", "--serve", "--data", "--judge-key"])
def test_options_of_run_py_are_left_to_it(option: str) -> None:
    own, others = parser().parse_known_args(["--kit", "k", option, "infer"])
    assert (own.model, own.max_new_tokens, others) == ("parrot", 512, [option, "infer"])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--base-url", "http://x/v1"], "--base-url of run.py chooses another model: take --server"),
        (["--base=http://x/v1"], "--base-url of run.py"),
        (["--config", "c.json"], "--config of run.py chooses another model"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be >= 1, got 0"),
    ],
)
def test_what_would_ask_another_model_or_for_nothing_is_refused(
    options: list[str], named: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    kit = tmp_path_factory.mktemp("kit")
    (kit / "run.py").touch()
    with pytest.raises(ConfigError, match=named):
        main(["--kit", str(kit), "--server", "http://x", *options])

"""vLLM's OpenAI-compatible server with the plugin, as the `openai` client sees it."""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.integrations.vllm_cases import (
    NEW_TOKENS,
    PICTURES,
    QUESTIONS,
    SYSTEM,
    answer,
    parrot_checkpoint,
    reference,
    request,
    wings_checkpoint,
)

pytest.importorskip("parrot_vllm", reason="runs in an environment of its own: make test-vllm")

START_SECONDS = 300
SMALL = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@contextlib.contextmanager
def serve(model: Path, log: Path) -> Iterator[openai.OpenAI]:
    """The server, which finds the plugin by itself, and a client of it (`vllm serve` asks for the version of a package
    `vllm`, which vllm-cpu does not have)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", "tiny"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "512", "--limit-mm-per-prompt", '{"image": 4}', "--block-size", "32"]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, **SMALL})
        try:
            wait(f"http://127.0.0.1:{port}/health", process, log)
            yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)
        finally:
            process.terminate()
            process.wait(60)


def wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        running = process.poll() is None and time.monotonic() < end
        assert running, log.read_text()[-6000:]
        time.sleep(0.5)


@pytest.fixture(scope="module", params=["parrot", "wings"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("vllm")
    made = {"parrot": parrot_checkpoint, "wings": wings_checkpoint}[request.param](folder / request.param)
    # Exported checkpoints have a chat_template; that of the fixture is older.
    exported = folder / "exported"
    shutil.copytree(made.parent, exported)
    reference(made)[1].save_pretrained(exported / "model")
    with serve(exported / "model", folder / "log") as client:
        yield client, made


def messages(question: str, images: tuple[int, ...]) -> list[dict[str, Any]]:
    pictures = [f"data:image/png;base64,{base64.b64encode(Path(PICTURES[i]).read_bytes()).decode()}" for i in images]
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in pictures]
    content.append({"type": "text", "text": question})
    return [{"role": "system", "content": SYSTEM["value"]}, {"role": "user", "content": content}]


def asked(client: openai.OpenAI, question: str, images: tuple[int, ...], **options: Any) -> Any:
    """A greedy answer of NEW_TOKENS tokens with all of its text."""
    return client.chat.completions.create(
        model="tiny",
        messages=messages(question, images),
        temperature=0,
        max_tokens=NEW_TOKENS,
        extra_body={"ignore_eos": True, "return_token_ids": True},
        **options,
    )


@pytest.mark.parametrize("images", [(0,), (1, 2), ()])
def test_the_openai_client_gets_the_answers_of_parrot_sys(served: Any, images: tuple[int, ...]) -> None:
    client, model = served
    for question in QUESTIONS:
        wanted = request(model, question, images)
        got = asked(client, question, images)
        (choice,) = got.choices
        assert choice.token_ids == answer(model, wanted)[0], question
        rows = reference(model)[0].config.rows_per_image
        assert got.usage.prompt_tokens == len(wanted["own_ids"]) + len(images) * (rows - 1)
        chunks = [chunk.choices[0] for chunk in asked(client, question, images, stream=True) if chunk.choices]
        assert "".join(chunk.delta.content or "" for chunk in chunks) == choice.message.content
        assert [i for chunk in chunks for i in getattr(chunk, "token_ids", None) or []] == choice.token_ids


def test_a_forged_place_of_a_picture_is_refused(served: Any) -> None:
    client, _ = served
    with pytest.raises(openai.BadRequestError, match="2 times <image> for 1 pictures"):
        asked(client, "And <image> what is this?", (0,))

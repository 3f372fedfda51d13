"""`parrot serve` as its clients see it: the openai client, httpx, lm-eval's requests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch

import parrot_sys
from parrot_sys.data.packing import Sample
from parrot_sys.data.parts import human_turn
from parrot_sys.engine.config import EngineConfig
from parrot_sys.engine.core import Engine
from parrot_sys.engine.requests import EngineRequest
from parrot_sys.engine.sampler import SamplingParams
from parrot_sys.megatron.runtime.initialize import shutdown
from parrot_sys.serving.token_texts import TokenTexts
from tests.support.serving import CHECKPOINT, Server, chat, picture, serving, user
from tests.support.vllm_dashboards import EXPRESSIONS, HISTOGRAMS, NOT_SERVED, asked_for


@pytest.fixture(scope="module", autouse=True)
def _groups() -> Iterator[None]:
    yield
    shutdown()  # of the model that the answers are compared with


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("serve")) as running:
        yield running


def _answer_of_library(text: str, file: bytes, new_tokens: int) -> str:
    """The greedy answer of `generate`."""
    model, processor = parrot_sys.load_pretrained(CHECKPOINT)
    turn = human_turn(text, images=1)
    ids = processor.format_conversation([turn], add_generation_prompt=True)["input_ids"]
    output = model.generate(torch.tensor([ids]), images=processor.pictures([file]), max_new_tokens=new_tokens)
    return processor.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)


def test_the_openai_client_gets_what_generate_answers(server: Server) -> None:
    client = server.openai()
    (model,) = client.models.list().data
    assert model.id == "model"
    messages = [user("What is this?", picture(1))]
    settings = {"model": model.id, "messages": messages, "temperature": 0, "max_tokens": 8}
    whole = client.chat.completions.create(**settings)
    assert whole.choices[0].message.content == _answer_of_library("What is this?", picture(1), 8)
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 8
    chunks = list(client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:-1]] == ["length"]


PROMPT = [40, 41, 42, 40, 43, 40]
SETTINGS: dict[str, dict[str, float]] = {
    "greedy": {},
    "repetition_penalty": {"repetition_penalty": 1.5},
    "presence_penalty": {"presence_penalty": 0.5},
    "frequency_penalty": {"frequency_penalty": 0.5},
    "seed": {"temperature": 1.5, "seed": 7},
    "another seed": {"temperature": 1.5, "seed": 8},
    "temperature": {"temperature": 0.7, "seed": 7},
    "top_k": {"temperature": 1.5, "seed": 7, "top_k": 3},
    "top_p": {"temperature": 1.5, "seed": 7, "top_p": 0.3},
    "min_p": {"temperature": 1.5, "seed": 7, "min_p": 0.3},
    "top_k of one": {"temperature": 1.5, "seed": 7, "top_k": 1},
    "tiny top_p": {"temperature": 1.5, "seed": 7, "top_p": 1e-6},
    "min_p of one": {"temperature": 1.5, "seed": 7, "min_p": 1},
}
GREEDY = ("greedy", "top_k of one", "tiny top_p", "min_p of one")


def test_settings_of_requests_do_what_those_of_the_engine_do(server: Server) -> None:
    """No two of them give the same answer but those that leave one token, so that a field in the place of another one
    is seen."""
    model, processor = parrot_sys.load_pretrained(CHECKPOINT)
    engine = Engine(model.lockstep, EngineConfig(), tokenizer=processor.tokenizer)
    texts, sample, names = TokenTexts(processor.tokenizer), Sample(input_ids=PROMPT), {}
    for name, given in SETTINGS.items():
        params: Any = given
        names[engine.submit(EngineRequest(sample=sample, max_new_tokens=24, sampling=SamplingParams(**params)))] = name
    wanted: dict[str, list[int]] = {name: [] for name in SETTINGS}
    while engine.has_requests:
        for delta in engine.step():
            wanted[names[delta.number]] += delta.tokens
    assert all(wanted[name] == wanted["greedy"] for name in GREEDY)
    assert len(set(map(tuple, wanted.values()))) == len(SETTINGS) - len(GREEDY) + 1
    body = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0, "ignore_eos": True, "logprobs": 0}
    with server.http() as http:
        for name, given in SETTINGS.items():
            choice = http.post("/v1/completions", json=body | given).json()["choices"][0]
            assert choice["logprobs"]["tokens"] == [texts.text(token) for token in wanted[name]], name
        two = http.post("/v1/completions", json=body | SETTINGS["seed"] | {"n": 2}).json()["choices"]
        assert two[1]["logprobs"]["tokens"] == [texts.text(token) for token in wanted["another seed"]]
        stop = wanted["seed"][5]
        place = wanted["seed"].index(stop) + 1
        ended = body | SETTINGS["seed"] | {"stop_token_ids": [stop]}
        choice = http.post("/v1/completions", json=ended).json()["choices"][0]
        assert choice["finish_reason"] == "stop"
        assert choice["logprobs"]["tokens"] == [texts.text(token) for token in wanted["seed"][:place]]


def test_errors_are_those_of_the_openai_client(server: Server) -> None:
    client = server.openai()
    with pytest.raises(openai.NotFoundError, match="there is no model 'other' here"):
        client.chat.completions.create(model="other", messages=[user("?")])
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="model", messages=[user("?")], top_logprobs=2)
    assert "top_logprobs needs logprobs" in str(caught.value)


def test_health_models_and_page(server: Server) -> None:
    with server.http() as http:
        assert http.get("/health").json() == {"status": "ok"}
        card = http.get("/v1/models").json()["data"][0]
        assert card["parrot"]["system"] == "parrot"
        assert card["parrot"]["num_experts"] == 6
        page = http.get("/")
        assert page.headers["content-type"].startswith("text/html")
        assert "default-src 'self'" in page.headers["content-security-policy"]
        answered = http.post("/v1/chat/completions", json=chat("?"), headers={"Origin": "https://page.example"})
        assert answered.status_code == 200
        assert "access-control-allow-origin" not in answered.headers, "pages of other origins may not read it"


def test_vllms_dashboards_find_what_they_ask_for(server: Server) -> None:
    with server.http() as http:
        assert http.post("/v1/chat/completions", json=chat("?", n=2, stop=["no such text"])).status_code == 200
    samples, labels = server.metrics(), {sample.name: set(sample.labels) for sample in server.samples()}
    for expression in EXPRESSIONS:
        names, wanted = asked_for(expression)
        assert names
        for name in names - NOT_SERVED.keys():
            assert wanted <= labels.get(name, set()), f"{expression}: {name} has {labels.get(name)}"
    assert not NOT_SERVED.keys() & samples.keys()
    asked = {name.removesuffix("_bucket") for own in EXPRESSIONS for name in asked_for(own)[0] if "bucket" in name}
    for name in {*asked, *HISTOGRAMS}:
        assert samples[f"{name}_count"] > 0, name
    assert set(server.ends()) == {"stop", "length", "abort", "error"}
    assert server.ends()["length"] >= 2


def test_a_step_counts_its_prompt_and_its_tokens(server: Server) -> None:
    before = server.wait_idle()
    with server.http() as http:
        usage = http.post("/v1/chat/completions", json=chat("?", picture(5), max_tokens=3)).json()["usage"]
    after = server.wait_idle()
    grown = {name: after[name] - before[name] for name in after}
    assert grown["vllm:prompt_tokens_total"] == usage["prompt_tokens"]
    assert grown["vllm:generation_tokens_total"] == 3
    assert grown["vllm:iteration_tokens_total_sum"] == usage["total_tokens"]
    assert grown["vllm:iteration_tokens_total_count"] == 3
    assert grown["vllm:request_params_max_tokens_sum"] == 3

"""`parrot serve` with the other systems: answers are those of `generate`, and the page promises no experts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from playwright.sync_api import Browser, expect

import parrot_sys
from parrot_sys.data.parts import human_turn
from parrot_sys.megatron.runtime.initialize import shutdown
from parrot_sys.serving.token_texts import TokenTexts
from tests.support.page import CHROMIUM, ask, attach, chromium, opening, set_length
from tests.support.serving import Server, chat, picture, serving
from tests.support.tiny_systems import write_system

PICTURES = [picture(1), picture(2, (90, 40))]
NEW_TOKENS = 6


@pytest.fixture(scope="module", autouse=True)
def _groups() -> Iterator[None]:
    yield
    shutdown()  # of the models that the answers are compared with


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser | None]:
    if CHROMIUM is None:
        yield None
        return
    with chromium() as launched:
        yield launched


@pytest.mark.parametrize(
    ("system", "rule", "most"),
    [("wings", "paper", 2), ("wings", "released", 1), ("multimodal_gpt", None, 2), ("llava", None, 2)],
)
def test_a_system(system: str, rule: str | None, most: int, browser: Browser | None, tmp_path: Path) -> None:
    checkpoint = write_system(system, tmp_path)
    model, processor = parrot_sys.load_pretrained(checkpoint, compat=rule)
    texts = TokenTexts(processor.tokenizer)
    options = [] if rule is None else ["--compat", rule]
    with serving(tmp_path, *options, checkpoint=checkpoint) as server, server.http() as http:
        for count in (0, 1, 2, 0):
            body = chat("w1 w2 ?", *PICTURES[:count], max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=True)
            got = http.post("/v1/chat/completions", json=body | {"parrot_routing": True})
            if count > most:
                assert (got.status_code, got.json()["error"]["param"]) == (
                    400,
                    f"messages[0].content[{most}].image_url.url",
                )
                continue
            turn = human_turn("w1 w2 ?", images=count)
            ids = processor.format_conversation([turn], add_generation_prompt=True)["input_ids"]
            images = processor.pictures(PICTURES[:count])
            wanted = model.generate(torch.tensor([ids]), images=images, max_new_tokens=NEW_TOKENS, eos_token_id=[])
            assert got.status_code == 200, got.text
            told = [own["token"] for own in got.json()["choices"][0]["logprobs"]["content"]]
            assert told == [texts.text(token) for token in wanted[0, len(ids) :].tolist()]
            assert got.json()["parrot_routing"] == {"images": []}
        card = http.get("/v1/models").json()["data"][0]["parrot"]
        assert (card["system"], card["num_experts"]) == (system, 0)
        if browser is not None:
            _use_page(server, browser, tmp_path, most)


def _use_page(server: Server, browser: Browser, folder: Path, most: int) -> None:
    """One question about a picture; no chart is promised and none is drawn."""
    (folder / "picture.png").write_bytes(PICTURES[0])
    with opening(browser) as open_page:
        page = open_page(server.url)
        expect(page.locator("#experts")).to_have_text("This model has no experts for pictures.")
        assert "which experts" not in page.inner_text("main")
        set_length(page, 3)
        attach(page, folder / "picture.png")
        ask(page, "w1 ?")
        expect(page.locator("article.model .answer")).to_have_count(1)
        expect(page.locator(".routing, figure")).to_have_count(0)
        page.set_input_files("#files", folder / "picture.png")
        expect(page.locator("#pictures img")).to_have_count(most - 1 if most == 1 else 1)
        if most == 1:
            expect(page.get_by_role("alert")).to_have_text("Limit of pictures in a conversation: 1.")

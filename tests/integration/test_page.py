"""The page of `parrot serve` in Chromium, against the real process."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, FileChooser, Locator, Page, expect, sync_playwright

from tests.support.serving import Server, answer, chat, picture, serving

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
LANGUAGES = ("en", "zh", "pt", "ar", "tr", "ru")
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 800}

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("page")) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM)
        yield launched
        launched.close()


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two pictures; the name of one is HTML."""
    found = [tmp_path / "first.png", tmp_path / "<img src=x onerror=alert(1)>.png"]
    for seed, path in enumerate(found):
        path.write_bytes(picture(seed))
    return found


@pytest.fixture
def opened(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens an address in a context of its own; an error or a dialog of a script fails the test."""
    contexts = []

    def open_page(url: str, **options: Any) -> Page:
        contexts.append(browser.new_context(**{"locale": "en-US", "viewport": DESKTOP, **options}))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: pytest.fail(str(error)))
        page.on("dialog", lambda dialog: pytest.fail(f"a script of a user ran: {dialog.message}"))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()


def set_length(page: Page, tokens: int) -> None:
    """Sets the longest answer under Settings."""
    page.click("summary")
    page.fill("#length", str(tokens))
    page.click("summary")


def text_of(place: Locator) -> str:
    """Text of an element as it is, line ends included."""
    return (place.text_content() or "").strip()


def shares(page: Page, figure: int) -> list[float]:
    """Weights of the experts as they are written beside the bars, in percent."""
    texts = page.locator("figure").nth(figure).locator("dd:not(.track)").all_inner_texts()
    return [float(text.rstrip("%")) for text in texts]


def test_pictures_answer_and_routes(server: Server, opened: Callable[..., Page], files: list[Path]) -> None:
    page = opened(server.url)
    page.set_input_files("#files", files)
    expect(page.locator("#pictures img")).to_have_count(2)
    set_length(page, 8)
    page.fill("#message", "What is <b>here</b>?")
    page.press("#message", "Enter")
    model = page.locator("article.model")
    expect(model).to_have_attribute("aria-busy", "false", timeout=60_000)

    with server.http() as client:
        body = chat("What is <b>here</b>?", *(file.read_bytes() for file in files), parrot_routing=True)
        assert text_of(model.locator(".answer")) == answer(client, body).strip()
        routing = client.post("/v1/chat/completions", json=body).json()["parrot_routing"]["images"]
    assert len(routing) == 2
    for index, image in enumerate(routing):
        assert shares(page, index) == pytest.approx([100 * share for share in image["experts"]], abs=0.051)
        spans = page.locator("figure").nth(index).locator(".words span").all_text_contents()
        assert spans == [word["text"] for word in image["attention"]]
    assert page.locator("article.user").get_by_text("What is <b>here</b>?").count() == 1
    assert page.locator("#pictures li").count() == 0, "the pictures went with the message"


def test_a_conversation_goes_on_and_can_be_reset(
    server: Server, opened: Callable[..., Page], files: list[Path]
) -> None:
    page = opened(server.url)
    set_length(page, 4)
    sent: list[Any] = []
    page.on("request", lambda request: sent.append(request.post_data_json) if request.method == "POST" else None)
    for number, text in enumerate(("one", "two"), 1):
        page.set_input_files("#files", files[:1] if number == 1 else [])
        page.fill("#message", text)
        page.press("#message", "Enter")
        expect(page.locator("article.model[aria-busy=false]")).to_have_count(number, timeout=60_000)
    first = page.locator("article.model .answer").nth(0).text_content()
    assert [message["role"] for message in sent[1]["messages"]] == ["user", "assistant", "user"]
    assert sent[1]["messages"][:2] == [sent[0]["messages"][0], {"role": "assistant", "content": first}]
    page.click("#reset")
    expect(page.locator("article")).to_have_count(0)


def test_one_picture_in_six_languages(server: Server, opened: Callable[..., Page], files: list[Path]) -> None:
    page = opened(server.url)
    page.click("#compare")
    expect(page.get_by_role("alert")).to_have_text("Attach a picture first.")
    page.set_input_files("#files", files[0])
    expect(page.locator("#pictures img")).to_have_count(1)
    set_length(page, 4)
    page.click("#compare")
    questions = page.locator("#questions input")
    asked = [questions.nth(index).input_value() for index in range(questions.count())]
    assert len(set(asked)) == len(LANGUAGES)
    page.click("#ask")
    expect(page.locator(".side article[aria-busy=false]")).to_have_count(6, timeout=60_000)
    with server.http() as client:
        for index, question in enumerate(asked):
            shown = page.locator(".side article").nth(index)
            expected = answer(client, chat(question, files[0].read_bytes(), max_tokens=4))
            assert shown.get_attribute("lang") == LANGUAGES[index]
            assert text_of(shown.locator(".answer")) == expected.strip()
            assert shown.locator("figure").count() == 1


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language_has_every_text(server: Server, opened: Callable[..., Page], language: str) -> None:
    page = opened(server.url, locale=language)
    assert page.evaluate("[document.documentElement.lang, document.documentElement.dir]") == [
        language,
        "rtl" if language == "ar" else "ltr",
    ]
    texts = page.evaluate("import('./texts.js').then((module) => module.TEXTS)")
    places = {key: set(re.findall(r"\{\w+\}", text)) for key, text in texts["en"].items()}
    assert {key: set(re.findall(r"\{\w+\}", text)) for key, text in texts[language].items()} == places
    assert all(text.strip() for text in texts[language].values())
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is cut at the side"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("language", "viewport"), [("en", DESKTOP), ("ar", PHONE)], ids=["desktop", "arabic-phone"])
def test_no_violation_that_axe_finds(
    server: Server, opened: Callable[..., Page], files: list[Path], scheme: Any, language: str, viewport: Any
) -> None:
    page = opened(server.url, locale=language, color_scheme=scheme, viewport=viewport)
    page.set_input_files("#files", files)
    set_length(page, 4)
    page.fill("#message", "?")
    page.press("#message", "Enter")
    expect(page.locator("article.model")).to_have_attribute("aria-busy", "false", timeout=60_000)
    page.set_input_files("#files", files)
    expect(page.locator("#pictures img")).to_have_count(2)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is cut at the side"
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    page.click("#compare")
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


def test_with_the_keyboard_alone(server: Server, opened: Callable[..., Page], files: list[Path]) -> None:
    page = opened(server.url)
    # The browser is told to hand choosers over long before the key that opens one: else a busy machine may lose it.
    choosers: list[FileChooser] = []
    page.on("filechooser", lambda chooser: choosers.append(chooser))
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # the link to the message
    assert page.evaluate("document.activeElement.id || location.hash") in ("message", "#message")
    page.focus("#message")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "attach"
    with page.expect_event("filechooser"):
        page.keyboard.press("Enter")
    choosers[0].set_files(files[0])
    expect(page.locator("#pictures img")).to_have_count(1)
    page.focus("#message")
    page.keyboard.type("line")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("line")
    assert page.input_value("#message") == "line\nline"
    page.keyboard.press("Enter")
    expect(page.locator("article.model")).to_have_attribute("aria-busy", "false", timeout=60_000)
    assert page.evaluate("document.activeElement.id") == "message"


def test_escape_stops_the_answer(server: Server, opened: Callable[..., Page]) -> None:
    page = opened(server.url)
    set_length(page, 400)
    page.fill("#message", "Go on")
    page.press("#message", "Enter")
    expect(page.locator("#stop")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#stop")).to_be_hidden(timeout=10_000)
    server.wait_idle()


def test_what_is_refused_can_be_changed_and_sent_again(
    server: Server, opened: Callable[..., Page], tmp_path: Path
) -> None:
    page = opened(server.url)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    page.set_input_files("#files", broken)
    expect(page.get_by_role("alert")).to_have_text("broken.png is not a picture that this browser can read.")
    drawing = tmp_path / "drawing.svg"  # the browser reads it, the server does not
    drawing.write_text('<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>')
    page.set_input_files("#files", drawing)
    expect(page.locator("#pictures img")).to_have_count(1)
    page.fill("#message", "What is this?")
    page.press("#message", "Enter")
    expect(page.get_by_role("alert")).to_contain_text("image")
    assert page.input_value("#message") == "What is this?"
    expect(page.locator("#pictures img")).to_have_count(1)
    expect(page.locator("article")).to_have_count(0)


def test_a_key_is_asked_for(opened: Callable[..., Page], tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    with serving(tmp_path, "--api-key-file", str(keys)) as server:
        page = opened(server.url)
        expect(page.get_by_role("alert")).to_have_text("The server wants an API key: enter it under Settings.")
        page.click("summary")
        page.fill("#key", "secret")
        page.press("#key", "Tab")
        expect(page.get_by_role("alert")).to_be_hidden()
        expect(page.locator("#model")).not_to_have_text("Parrot")


def test_nothing_is_loaded_from_elsewhere(server: Server, browser: Browser) -> None:
    page = browser.new_context().new_page()
    seen: list[str] = []
    page.on("request", lambda request: seen.append(request.url))
    page.goto(server.url, wait_until="networkidle")
    assert len(seen) >= 7
    assert not [url for url in seen if not url.startswith((server.url, "data:"))], json.dumps(seen)

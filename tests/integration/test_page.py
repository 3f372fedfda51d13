"""The page of `parrot serve` in Chromium, against the real process.

    pytest tests/integration/test_page.py --screenshots FOLDER

leaves the screenshots that the tests take.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, FileChooser, Page, Route, expect

from tests.support.page import (
    CHROMIUM,
    DESKTOP,
    PHONE,
    ask,
    attach,
    check_bars,
    chromium,
    opening,
    photograph,
    set_length,
    text_of,
)
from tests.support.serving import Server, answer, chat, picture, serving
from tests.support.serving_faults import slow_steps

LONG = 400
"""Tokens of an answer that takes seconds, so that there is time to stop it."""
LANGUAGES = ("en", "zh", "pt", "ar", "tr", "ru")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("page"), before=functools.partial(slow_steps, 0.01)) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as launched:
        yield launched


@pytest.fixture
def opened(browser: Browser) -> Iterator[Callable[..., Page]]:
    with opening(browser) as open_page:
        yield open_page


@pytest.fixture
def screenshots(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Folder for screenshots."""
    folder = Path(request.config.getoption("--screenshots") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two pictures; the name of one is HTML."""
    found = [tmp_path / "first.png", tmp_path / "<img src=x onerror=alert(1)>.png"]
    for seed, path in enumerate(found):
        path.write_bytes(picture(seed))
    return found


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


def test_one_picture_in_six_languages(
    server: Server, opened: Callable[..., Page], files: list[Path], screenshots: Path
) -> None:
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
            assert [shown.locator(part).get_attribute("lang") for part in ("h2", ".answer")] == [LANGUAGES[index]] * 2
            assert text_of(shown.locator(".answer")) == expected.strip()
            assert shown.locator("figure").count() == 1
    expect(page.get_by_role("status")).to_have_text("The answer is complete.")
    photograph(page, screenshots / "comparison.png", "light")


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
    server: Server,
    opened: Callable[..., Page],
    files: list[Path],
    screenshots: Path,
    scheme: Any,
    language: str,
    viewport: Any,
) -> None:
    """And bars start at the right in Arabic, and it looks like a page."""
    page = opened(server.url, locale=language, color_scheme=scheme, viewport=viewport)
    attach(page, *files)
    set_length(page, 4)
    ask(page, "?")
    check_bars(page, "rtl" if language == "ar" else "ltr")
    page.locator("figure").first.scroll_into_view_if_needed()
    photograph(page, screenshots / f"{'phone' if viewport == PHONE else 'desktop'}-{language}-{scheme}.png", scheme)
    attach(page, *files)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is cut at the side"
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    page.click("#compare")
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


def test_what_is_there_changes_its_language(server: Server, opened: Callable[..., Page], files: list[Path]) -> None:
    page = opened(server.url)
    attach(page, files[0])
    set_length(page, 4)
    own = ask(page, "What?")
    said, check = text_of(own.locator(".answer")), page.locator("#conversation")
    check_bars(page, "ltr")
    page.select_option("#language", "ar")
    assert page.locator("article h2").all_inner_texts() == ["أنت", "النموذج"]
    assert text_of(check.locator("figcaption")) == "الصورة 1: وزن كل خبير"
    assert text_of(check.locator("dt").first) == "الخبير 1"
    expect(check.locator("article.user img")).to_have_attribute("alt", "الصورة 1")
    check_bars(page, "rtl")
    assert text_of(own.locator(".answer")) == said
    assert "Expert" not in text_of(check)
    page.select_option("#language", "en")
    assert page.locator("article h2").all_inner_texts() == ["You", "Model"]
    check_bars(page, "ltr")


def test_the_page_offers_what_the_server_does(opened: Callable[..., Page], files: list[Path], tmp_path: Path) -> None:
    """Also languages in which nobody wrote its texts, and no more pictures than the server takes."""
    codes = ["de", "pt-BR", "zh-Hant", "ar"]
    with serving(tmp_path, "--languages", *codes, "--engine.limits.max-images", "1") as server:
        page = opened(server.url, locale="pt-BR")
        options = page.locator("#language option")
        expect(options).to_have_text(["Deutsch", "português (Brasil)", "繁體中文", "العربية"])
        assert options.evaluate_all("(all) => all.map((own) => own.value)") == codes
        for code, spoken in (("pt-BR", "pt"), ("de", "pt"), ("zh-Hant", "zh"), ("ar", "ar"), ("pt-BR", "pt")):
            page.select_option("#language", code)
            assert page.evaluate("document.documentElement.lang") == spoken
        page.set_input_files("#files", files)
        expect(page.get_by_role("alert")).to_have_text("Limite de imagens por conversa: 1.")
        expect(page.locator("#pictures img")).to_have_count(1)
        set_length(page, 2)
        page.click("#compare")
        questions = page.locator("#questions input")
        assert questions.evaluate_all("(all) => all.map((own) => own.name)") == codes
        assert [bool(questions.nth(index).input_value()) for index in range(4)] == [False, True, False, True]
        questions.first.fill("Was ist das?")
        page.click("#ask")
        expect(page.locator(".side article[aria-busy=false] h2")).to_have_text(
            ["Deutsch", "português (Brasil)", "العربية"], timeout=60_000
        )
        ask(page, "O que é?")
        page.set_input_files("#files", files[0])
        expect(page.get_by_role("alert")).to_have_text("Limite de imagens por conversa: 1.")
        expect(page.locator("#pictures img")).to_have_count(0)


def test_a_question_that_is_refused_stands_beside_the_others(
    server: Server, opened: Callable[..., Page], files: list[Path]
) -> None:
    """And the others can be stopped."""
    page = opened(server.url)
    asked: list[Any] = []

    def refuse_the_third(route: Route) -> None:
        asked.append(route.request.post_data_json)
        if len(asked) % 6 == 3:
            route.fulfill(status=429, json={"error": {"message": "too many requests", "code": "queue_full"}})
        else:
            go_on_to_the_end(route)

    page.route("**/v1/chat/completions", refuse_the_third)
    attach(page, files[0])
    set_length(page, 4)
    page.click("#compare")
    page.click("#ask")
    expect(page.locator(".side article[aria-busy=false]")).to_have_count(6, timeout=60_000)
    expect(page.get_by_role("status")).to_have_text("Not every question was answered.")
    expect(page.locator(".side .wrong")).to_have_text(["too many requests"])
    expect(page.locator(".side figure")).to_have_count(5)
    before = server.ends()["abort"]
    set_length(page, LONG)
    page.click("#compare")
    page.click("#ask")
    expect(page.locator(".side .wrong")).to_have_count(2)
    page.click("#stop")
    expect(page.locator("#stop")).to_be_hidden()
    expect(page.locator(".side article[aria-busy=false]")).to_have_count(12)
    expect(page.get_by_role("status")).to_have_text("Stopped.")
    server.wait_idle()
    assert server.ends()["abort"] > before


def test_only_files_are_taken_from_what_is_dropped(server: Server, opened: Callable[..., Page]) -> None:
    page = opened(server.url)
    drop = """([name, add]) => {
        const dataTransfer = new DataTransfer();
        if (add === "text") dataTransfer.setData("text/plain", "What is here?");
        else dataTransfer.items.add(new File(["no picture"], "broken.png"));
        const event = new DragEvent(name, { dataTransfer, bubbles: true, cancelable: true });
        return document.getElementById("message").dispatchEvent(event);
    }"""
    for name in ("dragover", "drop"):
        assert page.evaluate(drop, [name, "text"]), "the browser puts the text where it is dropped"
        expect(page.locator("#composer.over")).to_have_count(0)
    assert not page.evaluate(drop, ["dragover", "file"])
    expect(page.locator("#composer.over")).to_have_count(1)
    assert not page.evaluate(drop, ["drop", "file"])
    expect(page.get_by_role("alert")).to_have_text("broken.png is not a picture that this browser can read.")


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


def go_on_to_the_end(route: Route) -> None:
    """Sends a question on whose answer is as long as it may be."""
    route.continue_(post_data={**route.request.post_data_json, "ignore_eos": True})


def test_escape_stops_the_answer(server: Server, opened: Callable[..., Page]) -> None:
    page = opened(server.url)
    page.route("**/v1/chat/completions", go_on_to_the_end)
    set_length(page, LONG)
    page.fill("#message", "Go on")
    page.press("#message", "Enter")
    expect(page.locator("#stop")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#stop")).to_be_hidden(timeout=10_000)
    expect(page.get_by_role("status")).to_have_text("Stopped.")
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

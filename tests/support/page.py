"""The page of `parrot serve` in Chromium: opens it, uses it, and photographs it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 800}
GROUND = {"light": (255, 255, 255), "dark": (22, 25, 29)}
BARS = {"light": (28, 107, 51), "dark": (105, 219, 124)}
"""Colours of `style.css`."""


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser."""
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM)
        yield launched
        launched.close()


@contextmanager
def opening(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens an address in a context of its own; an error or a dialog of a script fails the test."""
    contexts = []

    def open_page(url: str, **options: Any) -> Page:
        settings = {"locale": "en-US", "viewport": DESKTOP, "reduced_motion": "reduce", **options}
        contexts.append(browser.new_context(**settings))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: pytest.fail(str(error)))
        page.on("dialog", lambda dialog: pytest.fail(f"a script of a user ran: {dialog.message}"))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()


def attach(page: Page, *files: Path) -> None:
    """Adds pictures to the next message."""
    page.set_input_files("#files", files)
    expect(page.locator("#pictures img")).to_have_count(len(files))


def ask(page: Page, question: str) -> Locator:
    """Sends a message and waits for the end of its answer."""
    number = page.locator("article.model").count() + 1
    page.fill("#message", question)
    page.press("#message", "Enter")
    expect(page.locator("article.model[aria-busy=false]")).to_have_count(number, timeout=60_000)
    return page.locator("article.model").nth(number - 1)


def set_length(page: Page, tokens: int) -> None:
    """Sets the longest answer under Settings."""
    page.click("summary")
    page.fill("#length", str(tokens))
    page.click("summary")


def text_of(place: Locator) -> str:
    """Text of an element as it is, line ends included."""
    return (place.text_content() or "").strip()


def check_bars(page: Page, direction: str) -> None:
    """Every bar starts where lines of the language do and is as long as its share; so do labels and messages."""
    measured = page.evaluate(
        """[...document.querySelectorAll(".track")].map((track) => {
            const bar = track.querySelector(".bar").getBoundingClientRect(), all = track.getBoundingClientRect();
            const label = track.previousElementSibling.getBoundingClientRect();
            return [bar.left - all.left, all.right - bar.right, label.left - all.left, all.width,
                    Number(track.style.getPropertyValue("--share"))];
        })"""
    )
    assert measured
    for left, right, label, width, share in measured:
        before, after = (left, right) if direction == "ltr" else (right, left)
        assert before == pytest.approx(0, abs=0.5)
        assert after == pytest.approx((1 - share) * width, abs=0.5)
        assert (label < 0) == (direction == "ltr")
    gaps = page.locator("article.user").first.evaluate(
        "(own) => { const [a, b] = [own, own.parentElement].map((e) => e.getBoundingClientRect());"
        " return [a.left - b.left, b.right - a.right]; }"
    )
    assert min(gaps) == gaps[1 if direction == "ltr" else 0], "what the user says stands at the end of the line"


def photograph(page: Page, file: Path, scheme: str) -> None:
    """Takes a screenshot, which must show bars of experts on a ground of the wanted colours."""
    page.screenshot(path=file)
    with Image.open(file) as image:
        assert page.viewport_size is not None
        assert image.size == (page.viewport_size["width"], page.viewport_size["height"])
        counts = {colour: count for count, colour in image.convert("RGB").getcolors(image.width * image.height) or []}
    assert max(counts, key=counts.__getitem__) == GROUND[scheme]
    assert counts.get(BARS[scheme], 0) > 100, "the bars are seen"
    assert len(counts) > 100, "letters and pictures have many colours"

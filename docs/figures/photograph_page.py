"""Takes the screenshots of the page of `parrot serve` that the documentation shows.

Start a server with the checkpoint of `make demo` first, then:

    .venv/bin/python docs/figures/photograph_page.py --url http://127.0.0.1:8000 --image runs/demo/report/en.png
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from playwright.sync_api import Page, sync_playwright

FOLDER = Path(__file__).parent


def ask(page: Page, image: Path) -> None:
    """Asks the question that the page suggests about a picture."""
    page.set_input_files("#files", image)
    page.wait_for_selector("#pictures img")
    page.fill("#message", page.get_attribute("#message", "placeholder") or "")
    page.press("#message", "Enter")
    page.wait_for_selector("article.model[aria-busy=false]")


def compare(page: Page, image: Path) -> None:
    """Asks about a picture in every language of the page."""
    page.set_input_files("#files", image)
    page.wait_for_selector("#pictures img")
    page.click("#compare")
    page.click("#ask")
    columns = page.locator("#language option").count()
    page.wait_for_function(f"document.querySelectorAll('.side article[aria-busy=false]').length == {columns}")


SHOTS: tuple[tuple[str, str, Literal["light", "dark"], tuple[int, int], Callable[[Page, Path], None]], ...] = (
    ("serve_page.png", "en", "light", (1000, 760), ask),
    ("serve_phone.png", "ar", "dark", (390, 780), ask),
    ("serve_languages.png", "en", "light", (1000, 1400), compare),
)
"""File, language, colours, size in CSS pixels and content of each screenshot."""


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server")
    parser.add_argument("--image", type=Path, required=True, help="picture that is asked about")
    parser.add_argument("--chromium", default=shutil.which("chromium"), help="the browser's program")
    arguments = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=arguments.chromium)
        for name, locale, scheme, size, act in SHOTS:
            page = browser.new_page(locale=locale, viewport={"width": size[0], "height": size[1]})
            page.emulate_media(color_scheme=scheme)
            page.goto(arguments.url)
            act(page, arguments.image)
            page.wait_for_timeout(500)  # bars grow to their length
            page.screenshot(path=FOLDER / name)
        browser.close()


if __name__ == "__main__":
    main()

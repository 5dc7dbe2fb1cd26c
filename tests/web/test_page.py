"""The page in a real browser: Debian's Chromium, driven by Playwright. Skipped where there is none."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.web.process import DRAW_SECONDS, WebServer

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium (apt install chromium)")

MILLISECONDS = DRAW_SECONDS * 1000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any, server: WebServer) -> Iterator[Any]:
    """The page, ready to draw with the tiny model. An error of its scripts fails the test."""
    errors: list[str] = []
    context = browser.new_context(viewport={"width": 1100, "height": 800})
    opened = context.new_page()
    opened.set_default_timeout(MILLISECONDS)
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.goto(server.url)
    opened.select_option("#model", "tiny")
    opened.fill("#prompt", "a cat")
    for name, value in (("width", "64"), ("height", "64"), ("steps", "2"), ("seed", "11")):
        opened.fill(f"[name={name}]", value)
    yield opened
    context.close()
    assert not errors


def test_a_picture_and_what_goes_on_with_it(page: Any, server: WebServer) -> None:
    """Drawn, looked at, its settings taken back, begun with and painted over, deleted."""
    before = page.locator("#gallery img").count()
    page.click("#draw")
    playwright.expect(page.locator("#gallery img")).to_have_count(before + 1, timeout=MILLISECONDS)
    newest = page.locator("#gallery button").first
    playwright.expect(newest.locator("img")).to_have_attribute("src", re.compile("^blob:"), timeout=MILLISECONDS)
    page.fill("[name=seed]", "99")
    newest.click()
    playwright.expect(page.locator("#facts")).to_contain_text("11")
    page.click("#reuse")
    assert page.input_value("[name=seed]") == "11"
    newest.click()
    page.click("#continue")
    canvas = page.locator("#canvas")
    playwright.expect(canvas).to_be_visible()
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + 20, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + 60, box["y"] + 60)
    page.mouse.up()
    page.click("#draw")
    playwright.expect(page.locator("#gallery img")).to_have_count(before + 2, timeout=MILLISECONDS)
    job = server.ask("/sdcpp/v1/jobs").json()[0]
    assert job["inputs"] == {"init_image": 1, "mask": 1}
    page.locator("#gallery button").first.click()
    page.click("#forget")
    playwright.expect(page.locator("#gallery img")).to_have_count(before + 1, timeout=MILLISECONDS)


def test_the_queue_shows_and_cancels(page: Any) -> None:
    page.fill("[name=steps]", "500")
    page.keyboard.press("Control+Enter")
    row = page.locator("#queue li").first
    playwright.expect(row.locator(".state")).to_contain_text("step", timeout=MILLISECONDS)
    row.locator(".cancel").click()
    playwright.expect(page.locator("#queue li")).to_have_count(0, timeout=MILLISECONDS)


def test_what_is_wrong_is_said(page: Any) -> None:
    page.fill("#prompt", "a cat (nose:.)")
    page.click("#draw")
    playwright.expect(page.locator("#problem")).to_contain_text("the weight")


def test_a_key_is_asked_for_once(browser: Any, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("s3cret\n")
    with WebServer(tmp_path / "data", "--api-key-file", str(tmp_path / "keys")) as locked:
        context = browser.new_context()
        page = context.new_page()
        page.set_default_timeout(MILLISECONDS)
        page.goto(locked.url)
        page.fill("#key", "s3cret")
        page.keyboard.press("Enter")
        playwright.expect(page.locator("#devices")).to_contain_text("CPU", timeout=MILLISECONDS)
        page.reload()
        playwright.expect(page.locator("#devices")).to_contain_text("CPU", timeout=MILLISECONDS)
        playwright.expect(page.locator("#door")).to_be_hidden()
        context.close()


def test_it_fits_a_phone_and_every_field_has_a_name(browser: Any, server: WebServer) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 740}, has_touch=True)
    page = context.new_page()
    page.goto(server.url)
    playwright.expect(page.locator("#draw")).to_be_visible(timeout=MILLISECONDS)
    wide = page.locator("html").evaluate("(root) => root.scrollWidth - root.clientWidth")
    assert wide <= 0
    nameless = page.locator("input, select, textarea, button").evaluate_all(
        "(all) => all.filter((one) => !(one.labels?.length || one.ariaLabel || one.textContent.trim())).length"
    )
    assert nameless == 0
    context.close()

"""The page in a real browser: Debian's Chromium, driven by Playwright. Skipped where there is none."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.remote.test_control import made, stored
from tests.support.process import ServerProcess
from tests.web.process import DRAW_SECONDS, WebServer
from tools.checkpoints import make

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium (apt install chromium)")

MILLISECONDS = DRAW_SECONDS * 1000
playwright.expect.set_options(timeout=MILLISECONDS)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=MILLISECONDS)
        yield opened
        opened.close()


@contextmanager
def opened_page(browser: Any, server: WebServer, **fields: str) -> Iterator[Any]:
    """The page, ready to draw with the tiny model and these fields. An error of its scripts fails the test."""
    errors: list[str] = []
    context = browser.new_context(viewport={"width": 1100, "height": 800})
    opened = context.new_page()
    opened.set_default_timeout(MILLISECONDS)
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.goto(server.url)
    opened.select_option("#model", "tiny")
    opened.fill("#prompt", "a cat")
    for name, value in {"width": "64", "height": "64", **fields}.items():
        opened.fill(f"[name={name}]", value)
    yield opened
    context.close()
    assert not errors


@pytest.fixture
def page(browser: Any, server: WebServer) -> Iterator[Any]:
    with opened_page(browser, server, steps="2", seed="11") as opened:
        yield opened


def test_a_picture_and_what_goes_on_with_it(page: Any, server: WebServer) -> None:
    """Drawn, looked at, its settings taken back, begun with and painted over, deleted."""
    page.fill("#prompt", "a cat that goes on")  # others draw on this server, too
    drawn = page.locator('#gallery button[aria-label*="a cat that goes on"]')
    page.click("#draw")
    playwright.expect(drawn).to_have_count(1)
    newest = drawn.first
    playwright.expect(newest.locator("img")).to_have_attribute("src", re.compile("^blob:"))
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
    playwright.expect(drawn).to_have_count(2)
    job = server.ask("/sdcpp/v1/jobs").json()[0]
    assert job["inputs"] == {"init_image": 1, "mask": 1}
    drawn.first.click()
    page.click("#forget")
    playwright.expect(drawn).to_have_count(1)


def test_the_queue_shows_and_cancels(page: Any) -> None:
    page.fill("[name=steps]", "500")
    page.keyboard.press("Control+Enter")
    row = page.locator("#queue li").first
    playwright.expect(row.locator(".state")).to_contain_text("step")
    row.locator(".cancel").click()
    playwright.expect(page.locator("#queue li")).to_have_count(0)


def test_what_is_wrong_is_said(page: Any) -> None:
    page.fill("#prompt", "a cat (nose:.)")
    page.click("#draw")
    playwright.expect(page.locator("#problem")).to_contain_text("the weight")


@contextmanager
def a_browser_of_its_own(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A Chromium that can be killed with all of its processes, and where it is driven."""
    assert CHROMIUM is not None
    words = [CHROMIUM, "--headless", "--no-sandbox", "--remote-debugging-port=0", f"--user-data-dir={folder}"]
    process = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stderr is not None
    with process.stderr:
        try:
            found = (re.search(r"DevTools listening on (ws://\S+)", line) for line in process.stderr)
            yield process, next(match[1] for match in found if match)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_a_browser_that_is_killed_loses_nothing(browser: Any, server: WebServer, tmp_path: Path) -> None:
    """kill -9 while one job is drawn and one waits: another browser finds both, ends the first, and has the picture of
    the second."""
    expect = playwright.expect
    with a_browser_of_its_own(tmp_path) as (process, address):
        killed = browser.browser_type.connect_over_cdp(address, timeout=MILLISECONDS)
        page = killed.contexts[0].new_page()
        page.set_default_timeout(MILLISECONDS)
        page.goto(server.url)
        page.select_option("#model", "tiny")
        for prompt, steps, pictures in (("a long day", "500", "16"), ("a dog that waits", "1", "1")):
            for name, value in (("width", "64"), ("height", "64"), ("steps", steps), ("batch_count", pictures)):
                page.fill(f"[name={name}]", value)
            page.fill("#prompt", prompt)
            page.click("#draw")
            expect(page.locator("#queue").get_by_text(prompt)).to_be_visible()
        expect(page.locator("#queue li").first).to_contain_text("step")
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        with suppress(playwright.Error):
            killed.close()
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(MILLISECONDS)
    page.goto(server.url)
    expect(page.locator("#queue li")).to_have_count(2)
    expect(page.locator("#queue li").first).to_contain_text("step")
    page.locator("#queue li", has_text="a long day").get_by_role("button", name="Cancel").click()
    picture = page.get_by_role("button", name="a dog that waits").locator("img")
    expect(picture).to_have_attribute("src", re.compile("^blob:"))
    context.close()


def test_a_key_is_asked_for_once(browser: Any, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("s3cret\n")
    with WebServer(tmp_path / "data", "--api-key-file", str(tmp_path / "keys")) as locked:
        context = browser.new_context()
        page = context.new_page()
        page.set_default_timeout(MILLISECONDS)
        page.goto(locked.url)
        page.fill("#key", "s3cret")
        page.keyboard.press("Enter")
        playwright.expect(page.locator("#devices")).to_contain_text("CPU")
        page.reload()
        playwright.expect(page.locator("#devices")).to_contain_text("CPU")
        playwright.expect(page.locator("#door")).to_be_hidden()
        context.close()


def test_a_phone_without_any_other_network(browser: Any, server: WebServer) -> None:
    """A picture, begun again with a mask that a finger draws. All requests go to the server. Buttons are clicked:
    whether a touch is a tap or a long press is a matter of time."""
    expect, others = playwright.expect, []

    def passed(route: Any) -> None:
        if route.request.url.startswith(f"{server.url}/"):
            route.continue_()
        else:
            others.append(route.request.url)
            route.abort()

    context = browser.new_context(
        viewport={"width": 390, "height": 844}, device_scale_factor=2, has_touch=True, is_mobile=True
    )
    context.route(re.compile("^(?!blob:|data:)"), passed)
    page = context.new_page()
    page.set_default_timeout(MILLISECONDS)
    page.goto(server.url)
    page.select_option("#model", "tiny")
    page.fill("#prompt", "a cat on a phone")
    for name, value in (("width", "64"), ("height", "64"), ("steps", "2")):
        page.fill(f"[name={name}]", value)
    page.click("#draw")
    picture = page.get_by_role("button", name="a cat on a phone").first
    expect(picture.locator("img")).to_have_attribute("src", re.compile("^blob:"))
    assert _too_wide(page) == 0
    picture.click()
    expect(page.get_by_role("dialog", name="Picture")).to_be_visible()
    page.click("#continue")
    canvas = page.get_by_label("Paint over what is drawn anew")
    canvas.scroll_into_view_if_needed()
    before, box = page.evaluate("scrollY"), canvas.bounding_box()
    finger = context.new_cdp_session(page)
    for kind, at in (("touchStart", 0.25), ("touchMove", 0.5), ("touchMove", 0.75), ("touchEnd", None)):
        points = [] if at is None else [{"x": box["x"] + at * box["width"], "y": box["y"] + at * box["height"]}]
        finger.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    assert page.evaluate("scrollY") == before  # it painted, and did not move the page
    page.fill("#prompt", "a dog on a phone")
    page.click("#draw")
    expect(page.get_by_role("button", name="a dog on a phone")).to_be_visible()
    job = server.ask("/sdcpp/v1/jobs").json()[0]
    assert job["inputs"] == {"init_image": 1, "mask": 1}
    mask = np.asarray(Image.open(BytesIO(server.ask(f"/sdcpp/v1/jobs/{job['id']}/inputs/mask/0").body)).convert("L"))
    assert [int(mask[at, at]) for at in (16, 32, 48)] == [255] * 3  # along the finger's way
    assert [int(mask[at]) for at in ((2, 60), (60, 2))] == [0] * 2
    page.click("#devices")
    devices = page.get_by_role("dialog", name="Devices")
    expect(devices).to_be_visible()
    expect(devices).to_contain_text("Choose a device for each part. In", use_inner_text=True)  # nothing of a mouse
    assert _too_wide(page) == 0
    assert others == []
    context.close()


def _too_wide(page: Any) -> int:
    """Pixels that the page, or a dialog on it, is wider than there is room."""
    measure = "(all) => Math.max(...all.map((one) => one.scrollWidth - one.clientWidth))"
    return int(page.locator("html, dialog[open]").evaluate_all(measure))


def test_a_picture_by_keyboard_alone(page: Any) -> None:
    """Also in the dark, and everything on the way says what it is."""
    keyboard, expect = page.keyboard, playwright.expect

    def tab_to(what: str) -> None:
        """Press Tab until the focus is there."""
        for _ in range(60):
            if page.evaluate("(what) => document.activeElement.matches(what)", what):
                return
            keyboard.press("Tab")
        raise AssertionError(f"Tab does not lead to {what}")

    nameless = page.locator("input, select, textarea, button").evaluate_all(
        "(all) => all.filter((one) => !(one.labels?.length || one.ariaLabel || one.textContent.trim())).length"
    )
    assert nameless == 0
    said = page.locator("body").aria_snapshot()
    for role in (
        'form "What to draw"', 'textbox "Prompt"', 'textbox "Not in the picture (negative prompt)"', 'combobox "Model"',
        'spinbutton "Width"', 'spinbutton "Seed"', 'button "Draw', 'region "Pictures"', 'list "Queue"',
        'button "Dark or light"',
    ):  # fmt: skip
        assert role in said, role
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.evaluate("document.activeElement.blur()")
    tab_to("#theme")
    keyboard.press("Enter")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
    tab_to("#prompt")
    keyboard.press("Control+A")
    keyboard.type("by keyboard alone")
    tab_to("#draw")
    keyboard.press("Enter")
    picture = page.get_by_role("button", name="by keyboard alone")
    expect(picture).to_be_visible()
    tab_to("#gallery button")
    keyboard.press("Enter")
    viewer = page.get_by_role("dialog", name="Picture")
    expect(viewer).to_contain_text("by keyboard alone")
    tab_to("#reuse")
    keyboard.press("Enter")
    expect(viewer).to_be_hidden()
    expect(page.locator("#prompt")).to_be_focused()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[WebServer]:
    """A server with this machine's device and another one, a model of pictures, one of films, and a LoRA."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "models").mkdir()
    (folder / "models" / "tiny.safetensors").symlink_to(models / "tiny.safetensors")
    film = make("wan", folder / "wan").files["model"]
    (folder / "models" / f"film{film.suffix}").symlink_to(film)
    (folder / "watercolour.safetensors").write_bytes(b"")
    with ServerProcess("--precision", "exact", "--device", "CPU") as other:
        options = ("--models-dir", str(folder / "models"), "--rpc", f"127.0.0.1:{other.port}")
        with WebServer(folder / "data", *options, "--lora-model-dir", str(folder)) as process:
            yield process


@pytest.fixture
def studio(browser: Any, two: WebServer) -> Iterator[Any]:
    with opened_page(browser, two, steps="1", seed="1") as opened:
        yield opened


def test_parts_are_put_on_devices_by_select_and_by_drag(studio: Any, two: WebServer) -> None:
    expect = playwright.expect

    def placed() -> dict[str, list[str]]:
        found: dict[str, list[str]] = two.ask("/sdcpp/v1/placement?model=tiny").json()["components"]
        return found

    studio.click("#devices")
    here = studio.locator("#cards section[aria-label=CPU]")
    there = studio.locator("#cards section[aria-label=RPC0]")
    expect(there.locator(".chip")).to_have_count(3)
    expect(there.locator("meter")).to_have_count(2)
    expect(here).to_contain_text("GB used")
    studio.get_by_role("combobox", name="vae").select_option("CPU")
    expect(here.locator(".chip")).to_have_text(["vae"])
    assert placed() == {"clip_l": ["RPC0"], "diffusion": ["RPC0"], "vae": ["CPU"]}
    there.get_by_text("clip_l").drag_to(here)
    expect(here.locator(".chip")).to_have_text(["clip_l", "vae"])
    assert placed() == {"clip_l": ["CPU"], "diffusion": ["RPC0"], "vae": ["CPU"]}
    words = studio.get_by_role("textbox", name="diffusion, in words")
    words.fill("RPC0&nowhere")
    words.press("Enter")
    expect(studio.locator("#misplaced")).to_contain_text("there is no such device")
    words.fill("RPC0&CPU, RPC0")
    words.press("Enter")
    expect(here.locator(".chip")).to_have_text(["clip_l", "diffusion", "vae"])
    expect(there.locator(".chip")).to_have_text(["diffusion"])
    expect(studio.locator("#misplaced")).to_be_empty()
    assert placed()["diffusion"] == ["RPC0&CPU", "RPC0"]
    expect(words).to_be_focused()
    words.fill("RPC0")
    words.press("Enter")
    for key, becomes in (("Shift", ["RPC0&CPU"]), ("Control", ["RPC0|CPU"]), ("Alt", ["RPC0", "CPU"])):
        expect(here.locator(".chip")).to_have_text(["clip_l", "vae"])
        studio.keyboard.down(key)
        there.get_by_text("diffusion").drag_to(here)
        studio.keyboard.up(key)
        expect(here.locator(".chip")).to_have_text(["clip_l", "diffusion", "vae"])
        assert placed()["diffusion"] == becomes
        here.get_by_text("diffusion").drag_to(there)
    expect(here.locator(".chip")).to_have_text(["clip_l", "vae"])
    studio.click("#leave")
    studio.click("#draw")
    expect(studio.locator("#gallery img")).to_have_count(1)
    studio.click("#devices")
    studio.click("#usual")
    expect(there.locator(".chip")).to_have_count(3)
    assert set(map(tuple, placed().values())) == {("RPC0",)}


def test_a_film_and_a_larger_picture(studio: Any, two: WebServer) -> None:
    expect = playwright.expect
    pictures = studio.locator("#gallery button")
    before = len(two.ask("/sdcpp/v1/jobs").json())
    studio.click("#draw")
    expect(pictures).to_have_count(before + 1)
    pictures.first.click()
    studio.select_option("#upscaler", "Lanczos")
    studio.click("#enlarge")
    expect(pictures).to_have_count(before + 2)
    pictures.first.click()
    expect(studio.locator("#facts")).to_contain_text("128×128")
    studio.click("#close")
    assert studio.locator("[name=video_frames]").is_hidden()
    studio.select_option("#model", "film")
    studio.fill("[name=video_frames]", "5")
    studio.click("#draw")
    expect(pictures.first.locator("video")).to_have_attribute("src", re.compile("^blob:"))
    job = two.ask("/sdcpp/v1/jobs?most=1").json()[0]
    assert (job["kind"], job["request"]["video_frames"]) == ("vid_gen", 5)


def test_a_lora_is_named_by_its_strength(studio: Any) -> None:
    """It is a file that is none, which the server says."""
    studio.click("#adapters summary")
    studio.get_by_label("watercolour").fill("0.8")
    studio.click("#draw")
    playwright.expect(studio.locator("#gallery .failed").first).to_contain_text("watercolour")


def test_what_this_model_can_is_on_the_page(browser: Any, tmp_path: Path) -> None:
    """A ControlNet, a second pass with its numbers, and steps that are not computed; all of it comes back with the
    picture's settings. On a phone a job that was asked for is in sight."""
    expect = playwright.expect
    hint = tmp_path / "hint.png"
    Image.new("RGB", (64, 64), "white").save(hint)
    made_of = make("sd1", tmp_path / "sd1")
    network = stored(made(made_of.pipeline()), tmp_path / "control.safetensors", original=True)
    files = ("-m", str(made_of.files["model"]), "--control-net", str(network))
    with WebServer(tmp_path / "data", *files) as controlled:
        context = browser.new_context(viewport={"width": 390, "height": 500})
        page = context.new_page()
        page.set_default_timeout(MILLISECONDS)
        page.goto(controlled.url)
        expect(page.locator("#model")).not_to_have_value("")
        for summary in ("Sampler", "hires fix", "ControlNet"):
            page.locator("summary", has_text=summary).click()
        expect(page.locator("#references")).to_be_hidden()
        expect(page.locator("#ending")).to_be_hidden()
        page.fill("#prompt", "a cat along lines")
        page.get_by_label("Picture to follow").set_input_files(hint)
        page.get_by_label("Skip steps").select_option("easycache")
        given = {"width": "64", "height": "64", "steps": "2", "seed": "3", "control_strength": "0.4",
                 "hires_scale": "1.5", "hires_steps": "3", "hires_denoising_strength": "0.5"}  # fmt: skip
        for name, value in given.items():
            page.fill(f"[name={name}]", value)
        page.click("#draw")
        picture = page.get_by_role("button", name="a cat along lines")
        expect(picture.locator("img")).to_have_attribute("src", re.compile("^blob:"))
        [job] = controlled.ask("/sdcpp/v1/jobs").json()
        assert job["inputs"] == {"control_image": 1}
        asked = job["request"]
        assert (asked["control_strength"], asked["cache_mode"]) == (0.4, "easycache")
        assert [asked[name] for name in ("hires_scale", "hires_steps", "hires_denoising_strength")] == [1.5, 3, 0.5]
        page.evaluate("localStorage.clear()")
        page.reload()
        picture.click()
        expect(page.locator("#facts")).to_contain_text("1.5")
        page.click("#reuse")
        assert {name: page.input_value(f"[name={name}]") for name in given} == given
        assert page.input_value("[name=cache_mode]") == "easycache"
        page.fill("[name=steps]", "500")
        page.fill("#prompt", "a long one")
        page.click("#draw")
        row = page.locator("#queue li", has_text="a long one")
        expect(row).to_be_in_viewport()
        row.get_by_role("button", name="Cancel").click()
        expect(row).to_have_count(0)
        context.close()

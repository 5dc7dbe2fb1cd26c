"""Draws docs/sd-server.png and docs/sd-server-devices.png: the page of a real sd-server in Debian's Chromium.

    python -m tools.page_pictures

Two rpc-servers of this machine are the devices; the model is the one that ships.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.support.process import ServerProcess
from tests.web.process import WebServer

DOCS = Path(__file__).parent.parent / "docs"
PROMPTS = (
    "a large red circle on a white background",
    "a small yellow star on a blue background",
    "a large green square on a black background",
    "a red circle on the left of a blue square on a white background",
    "a large yellow star on the left of a small red heart, on a blue background",
)
WAIT = 600_000


def main() -> None:
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or sys.exit("there is no Chromium (apt install chromium)")
    with (
        tempfile.TemporaryDirectory() as folder,
        ServerProcess("--device", "CPU") as one,
        ServerProcess("--device", "CPU") as other,
        WebServer(Path(folder), "--rpc", f"127.0.0.1:{one.port},127.0.0.1:{other.port}") as server,
        sync_playwright() as driver,
    ):
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 830}, color_scheme="light")
        page.set_default_timeout(WAIT)
        page.goto(server.url)
        drawing(page)
        page.evaluate("() => scrollTo(0, 0)")
        page.screenshot(path=DOCS / "sd-server.png")
        placing(page)
        page.screenshot(path=DOCS / "sd-server-devices.png")
        browser.close()


def drawing(page: Any) -> None:
    """Pictures in the gallery, and one that is being drawn."""
    page.fill("[name=cfg_scale]", "4")
    for seed, prompt in enumerate(PROMPTS, 1):
        page.fill("#prompt", prompt)
        page.fill("[name=seed]", str(seed))
        page.click("#draw")
    page.wait_for_function("count => document.querySelectorAll('#gallery img[src]').length == count", arg=len(PROMPTS))
    page.fill("[name=steps]", "120")
    page.click("#draw")
    page.locator("#queue .preview").first.wait_for(state="visible")


def placing(page: Any) -> None:
    """The devices, and a part that was moved."""
    page.click("#devices")
    page.locator("#cards .chip").first.wait_for(state="visible")
    page.locator("select[data-part=vae]").select_option("CPU")
    page.locator("#cards section[aria-label=CPU] .chip").wait_for(state="visible")


if __name__ == "__main__":
    main()

"""stable-diffusion.cpp's own API: jobs, their events, and what is refused."""

from __future__ import annotations

import base64
import json
import urllib.request
import zlib
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.web.process import DRAW_SECONDS, LONG, SMALL, WebServer


def data_url(width: int = 64, height: int = 64) -> str:
    buffer = BytesIO()
    Image.fromarray(np.full((height, width, 3), 90, np.uint8)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def test_a_job_from_its_begin_to_its_end(server: WebServer) -> None:
    answer = server.ask("/sdcpp/v1/img_gen", SMALL | {"batch_count": 2, "seed": -1})
    told = answer.json()
    assert (answer.status, told["kind"], told["status"]) == (202, "img_gen", "queued")
    done = server.until(told["poll_url"].rpartition("/")[2], "completed")
    assert [image["index"] for image in done["result"]["images"]] == [0, 1]
    assert done["seeds"][1] == done["seeds"][0] + 1
    picture = server.ask(f"/sdcpp/v1/jobs/{done['id']}/images/1")
    assert picture.body == base64.b64decode(done["result"]["images"][1]["b64_json"])
    assert picture.headers["content-type"] == "image/png"
    assert Image.open(BytesIO(picture.body)).info["parameters"].startswith("a cat\n")
    assert done["id"] in [job["id"] for job in server.ask("/sdcpp/v1/jobs").json()]
    assert server.ask(f"/sdcpp/v1/jobs/{done['id']}", method="DELETE").status == 204
    assert server.ask(f"/sdcpp/v1/jobs/{done['id']}").status == 404


def test_events(server: WebServer) -> None:
    """A job's stream ends with its pictures; steps are told on the way."""
    name = server.submit(sample_params={"sample_steps": 5})
    with urllib.request.urlopen(f"{server.url}/sdcpp/v1/jobs/{name}/events", timeout=DRAW_SECONDS) as stream:
        jobs = [json.loads(line[6:]) for line in stream if line.startswith(b"data: ")]
    assert jobs[-1]["status"] == "completed"
    assert jobs[-1]["result"]["images"]
    steps = [job["progress"]["step"] for job in jobs if job["progress"] and job["progress"]["steps"]]
    assert steps == sorted(steps)
    assert any(job["progress"]["preview"] for job in jobs if job["progress"])


def test_cancelling(server: WebServer) -> None:
    """One that is drawn, one that waits, one that is over."""
    drawn, waits = server.submit(**LONG), server.submit()
    server.until(drawn, "generating")
    assert server.job(waits)["queue_position"] == 1
    assert server.ask(f"/sdcpp/v1/jobs/{waits}/cancel", {}).json()["status"] == "cancelled"
    assert server.ask(f"/sdcpp/v1/jobs/{drawn}", method="DELETE").status == 409
    server.ask(f"/sdcpp/v1/jobs/{drawn}/cancel", {})
    ended = server.until(drawn, "cancelled")
    assert ended["error"]["code"] == "cancelled"
    assert server.ask(f"/sdcpp/v1/jobs/{drawn}/cancel", {}).status == 409
    assert server.ask("/sdcpp/v1/jobs/job_nothing/cancel", {}).status == 404


def test_pictures_to_begin_with(server: WebServer) -> None:
    done = server.until(server.submit(init_image=data_url(), mask_image=data_url(), strength=0.5), "completed")
    assert done["inputs"] == {"init_image": 1, "mask": 1}
    assert Image.open(BytesIO(server.ask(f"/sdcpp/v1/jobs/{done['id']}/inputs/init_image/0").body)).size == (64, 64)
    assert server.ask(f"/sdcpp/v1/jobs/{done['id']}/inputs/..%2f..%2fjobs.sqlite/0").status == 404


def test_what_there_is(server: WebServer) -> None:
    can = server.ask("/sdcpp/v1/capabilities").json()
    assert {model["name"] for model in can["models"]} == {"demo", "tiny"}
    assert len(can["samplers"]) == 21
    assert server.ask("/sdcpp/v1/devices").json()[0]["total"] > 0
    assert b"sdrpc_pictures_total" in server.ask("/metrics").body
    assert server.ask("/health").json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("changes", "status", "says"),
    [
        ({"width": "wide"}, 422, "width: "),
        ({"wdith": 64}, 422, "wdith: "),
        ({"lora": [{"path": "../x"}]}, 400, "loras ../x: is no name of a file in"),
        ({"lora": [{"path": "/etc/passwd"}]}, 400, "loras /etc/passwd: is no name"),
        ({"lora": [{"path": "none"}]}, 400, "loras none: no such LoRA"),
        ({"lora": [{"path": "none", "multiplier": "x"}]}, 422, "lora.0.multiplier"),
        ({"width": -8}, 400, "width -8: it can be 1 …"),
        ({"width": 1 << 80}, 400, "width"),
        ({"seed": 1 << 80}, 400, "seed"),
        ({"batch_count": 10**6}, 400, "batch_count 1000000: it can be 1 … 16"),
        ({"model": "../tiny"}, 400, "model ../tiny: there is no such model"),
        ({"model": "/etc/passwd"}, 400, "there is no such model"),
        ({"model": "tiny\0"}, 400, "there is no such model"),
        ({"init_image": "!"}, 400, "init_image !: is no picture in base64"),
        ({"init_image": "AAAA"}, 400, "init_image '3 bytes': is no picture"),
        ({"sample_params": {"sample_method": "x"}}, 400, "sampling_method x: does not exist"),
        ({"sample_params": {"flow_shift": "NaN"}}, 400, "flow_shift nan"),
        ({"prompt": "<lora:x:1>"}, 400, "loras x: no such LoRA"),
        ({"control_image": data_url()}, 400, "needs a ControlNet: name its file (control_net)"),
    ],
)
def test_refusals(server: WebServer, changes: dict[str, Any], status: int, says: str) -> None:
    answer = server.ask("/sdcpp/v1/img_gen", SMALL | changes)
    assert (answer.status, says in answer.error) == (status, True), answer.body


def test_a_bomb_is_refused_before_it_is_decoded(server: WebServer) -> None:
    """65,000 × 65,000 pixels in a few kilobytes."""
    header = b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + (65000).to_bytes(4, "big") * 2 + b"\x08\2\0\0\0"
    bomb = header + zlib.crc32(header[12:]).to_bytes(4, "big") + b"\0\0\0\0IDAT" + b"\0" * 4
    answer = server.ask("/sdcpp/v1/img_gen", SMALL | {"init_image": base64.b64encode(bomb).decode()})
    assert answer.status == 400
    assert "pixels" in answer.error

"""stable-diffusion.cpp's own API: jobs, their events, and what is refused."""

from __future__ import annotations

import base64
import json
import urllib.request
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


def test_the_queues_events(server: WebServer) -> None:
    """One who opens the page sees what is there, then what changes."""
    with urllib.request.urlopen(f"{server.url}/sdcpp/v1/events", timeout=DRAW_SECONDS) as stream:
        states = (json.loads(line[6:]) for line in stream if line.startswith(b"data: "))
        next(states)
        name = server.submit(**LONG)
        assert name in next([job["id"] for job in state["jobs"]] for state in states if state["jobs"])
        while not any((job["progress"] or {}).get("step") for job in next(states)["jobs"]):
            pass
        server.ask(f"/sdcpp/v1/jobs/{name}/cancel", {})
        while next(states)["jobs"]:
            pass


def test_what_is_usual_sampling_and_a_second_pass(server: WebServer) -> None:
    """The body that stable-diffusion.cpp documents, with everything in it; then one where all of it means something."""
    sampling = {
        "scheduler": "karras", "sample_method": "euler", "sample_steps": 2, "eta": 0.0, "shifted_timestep": 0,
        "custom_sigmas": [], "flow_shift": None,
        "guidance": {"txt_cfg": 4.0, "img_cfg": 4.0, "distilled_guidance": 3.5,
                     "slg": {"layers": [7, 8, 9], "layer_start": 0.01, "layer_end": 0.2, "scale": 0.0}},
    }  # fmt: skip
    usual = server.ask("/sdcpp/v1/capabilities").json()["defaults_by_mode"]["img_gen"]
    whole = usual | SMALL | {"sample_params": sampling}
    first = server.until(server.ask("/sdcpp/v1/img_gen", whole).json()["id"], "completed")
    assert Image.open(BytesIO(base64.b64decode(first["result"]["images"][0]["b64_json"]))).size == (64, 64)
    changed = {
        "hires": {"enabled": True, "upscaler": "tiny-esrgan", "target_width": 128, "custom_sigmas": [3.0, 0.0]},
        "vae_tiling_params": {"enabled": True, "tile_size_x": 8, "tile_size_y": 8},
        "sample_params": sampling | {"custom_sigmas": [14.6, 3.0, 0.0]},
        "cache_mode": "easycache",
    }
    second = server.until(server.ask("/sdcpp/v1/img_gen", whole | changed).json()["id"], "completed")
    drawn = Image.open(BytesIO(base64.b64decode(second["result"]["images"][0]["b64_json"])))
    assert drawn.size == (128, 128)
    assert "Custom Sigmas: [14.6, 3, 0]" in drawn.info["parameters"]
    assert "Hires steps: 1, Hires sigmas: [3, 0]," in drawn.info["parameters"]


def test_what_there_is(server: WebServer) -> None:
    can = server.ask("/sdcpp/v1/capabilities").json()
    assert {model["name"] for model in can["models"]} == {"demo", "tiny"}
    assert len(can["samplers"]) == 21
    assert {"Latent", "Lanczos", "tiny-esrgan"} <= {each["name"] for each in can["upscalers"]}
    assert server.ask("/sdcpp/v1/devices").json()[0]["total"] > 0
    assert b"sdrpc_pictures_total" in server.ask("/metrics").body
    assert server.ask("/health").json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("changes", "status", "says"),
    [
        ({"width": "wide"}, 400, "width: "),
        ({"wdith": 64}, 400, "wdith: this server knows no such field"),
        ({"lora": [{"path": "none"}]}, 400, "lora none: no such LoRA"),
        ({"lora": [{"path": "none", "multiplier": "x"}]}, 400, "lora.0.multiplier"),
        ({"seed": 1 << 80}, 400, "seed"),
        ({"init_image": "!"}, 400, "init_image !: is no picture in base64"),
        ({"init_image": "aaaa"}, 400, "init_image '3 bytes': is no picture"),
        ({"sample_params": {"sample_method": "x"}}, 400, "sample_params.sample_method x: does not exist"),
        ({"sample_params": {"flow_shift": float("nan")}}, 400, "sample_params.flow_shift: is no finite number"),
        ({"prompt": "<lora:x:1>"}, 400, "lora x: no such LoRA"),
        ({"sample_params": {"flow_shift": 3}}, 400, "sample_params.flow_shift 3.0: only flow models have a shift"),
        (
            {"sample_params": {"guidance": {"img_cfg": 2}}},
            400,
            "sample_params.guidance.img_cfg 2.0: the model",
        ),
        ({"sample_params": {"guidance": {"slg": {"scale": 2}}}}, 400, "sample_params.guidance.slg.scale"),
        ({"cache_mode": "dbcache"}, 400, "cache_mode"),
        ({"scm_mask": "1,0"}, 400, "scm_mask"),
        ({"auto_resize_ref_image": False}, 400, "auto_resize_ref_image"),
        ({"hires": {"enabled": True, "upscaler": "x"}}, 400, "hires.upscaler x"),
        ({"hires": {"enabled": True, "scale": 1e9}}, 400, "hires.scale"),
        (
            {"vae_tiling_params": {"enabled": True, "tile_size_x": 1, "tile_size_y": 1}},
            400,
            "params.tile_size_x 1x1",
        ),
        ({"control_image": data_url()}, 400, "needs a ControlNet: name its file (--control-net)"),
    ],
)
def test_refusals(server: WebServer, changes: dict[str, Any], status: int, says: str) -> None:
    answer = server.ask("/sdcpp/v1/img_gen", SMALL | changes)
    assert (answer.status, says in answer.error) == (status, True), answer.body

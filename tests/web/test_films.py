"""Films over HTTP: stable-diffusion.cpp's vid_gen, with a tiny Wan."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from io import BytesIO
from types import SimpleNamespace
from typing import Any, cast

import av
import numpy as np
import pytest

from sdrpc.diffusion.pictures import Sound, Video
from sdrpc.web.studio import Studio
from tests.web.process import WebServer
from tools.checkpoints import make

FILM: dict[str, Any] = {
    "prompt": "a lovely cat", "width": 64, "height": 64, "seed": 3, "video_frames": 6, "fps": 8,
    "sample_params": {"sample_steps": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def cinema(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebServer]:
    folder = tmp_path_factory.mktemp("cinema")
    with WebServer(folder / "data", "-m", str(make("wan", folder).files["model"])) as process:
        yield process


def test_a_film(cinema: WebServer) -> None:
    """Six frames are rounded down to what the model draws; the file is a film of so many, and says so."""
    accepted = cinema.ask("/sdcpp/v1/vid_gen", FILM)
    assert (accepted.status, accepted.json()["kind"]) == (202, "vid_gen")
    job = cinema.until(accepted.json()["id"], "completed")
    result = job["result"]
    told = {name: result[name] for name in ("output_format", "mime_type", "fps", "frame_count")}
    assert told == {"output_format": "webm", "mime_type": "video/webm", "fps": 8, "frame_count": 5}
    data = base64.b64decode(result["b64_json"])
    with av.open(BytesIO(data)) as film:
        assert [(frame.width, frame.height) for frame in film.decode(video=0)] == [(64, 64)] * 5
        assert "a lovely cat" in next(value for name, value in film.metadata.items() if name.lower() == "comment")
    file = cinema.ask(f"/sdcpp/v1/jobs/{job['id']}/images/0")
    assert (file.body, file.headers["content-type"]) == (data, "video/webm")


def test_what_a_server_of_films_can_do(cinema: WebServer) -> None:
    can = cinema.ask("/sdcpp/v1/capabilities").json()
    assert (can["current_mode"], can["models"][0]["films"]) == ("vid_gen", True)
    assert can["supported_modes"] == ["img_gen", "vid_gen"]
    assert {"webm", "webp", "avi"} <= set(can["output_formats"])
    assert can["features_by_mode"]["vid_gen"]["end_image"]
    usual = can["defaults_by_mode"]["vid_gen"]
    assert cinema.ask("/sdcpp/v1/vid_gen", usual | FILM | {"output_format": "webp"}).status == 202


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"batch_count": 2}, "batch_count: this server knows no such field"),
        ({"output_format": "png"}, "output_format: Input should be 'webm'"),
        ({"video_frames": 0}, "video_frames: "),
        ({"width": 2048, "height": 2048, "video_frames": 1000}, "video_frames 997: a film can have 256 mebipixels"),
        ({"control_frames": ["AAAA"]}, "control_frames 1: this server does not have it"),
        ({"vace_strength": 0.5}, "vace_strength 0.5: this server does not have it"),
        ({"high_noise_sample_params": {"scheduler": "karras"}}, "high_noise_sample_params scheduler: this server does"),
        ({"high_noise_sample_params": {"sample_steps": 3}}, "high_noise"),
        ({"init_image": "aaaa"}, "init_image '3 bytes': is no picture"),
        ({"vae_tiling_params": {"enabled": True}}, "vae_tiling_params.enabled on: films are decoded frame by frame"),
    ],
)
def test_refusals(cinema: WebServer, changes: dict[str, Any], says: str) -> None:
    answer = cinema.ask("/sdcpp/v1/vid_gen", FILM | changes)
    assert (answer.status, says in answer.error) == (400, True), answer.body


def test_a_model_of_pictures_draws_no_films(server: WebServer) -> None:
    answer = server.ask("/sdcpp/v1/vid_gen", FILM | {"model": "tiny"})
    assert (answer.status, "draws pictures, no films" in answer.error) == (400, True)


@pytest.mark.parametrize(("kind", "silent"), [("webp", True), ("avi", False)])
def test_that_a_format_holds_no_sound_is_said(caplog: pytest.LogCaptureFixture, kind: str, silent: bool) -> None:
    sound = Sound(np.zeros((2, 800), np.float32), 8000)
    film = Video(iter([np.zeros((16, 16, 3), np.uint8)]), 1, 10, 16, 16, 1, sound)
    session = SimpleNamespace(settings=lambda *_, **__: None, draw_video=lambda *_: [film])
    here = SimpleNamespace(_session=lambda *_: session, _request=lambda _: None, _told=lambda *_: None)
    job = SimpleNamespace(id="7", task=SimpleNamespace(output_format=kind))
    [(seed, data)] = Studio._film(cast(Any, here), cast(Any, None), cast(Any, job), cast(Any, None), lambda: False)
    assert seed == 1
    assert data
    assert ("7: the film is silent, for .webp holds no sound; there are webm, avi, mp4" in caplog.text) == silent

"""sd-cli --mode vid_gen from the outside: a small Wan, a real server, real files."""

from __future__ import annotations

import wave
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tests.cli.conftest import Outcome
from tests.support.process import ServerProcess
from tools.checkpoints import make

Sd = Callable[..., Outcome]
Servers = tuple[ServerProcess, ServerProcess]

FRAMES = 5


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("wan", tmp_path_factory.mktemp("wan")).files["model"]


@pytest.fixture(scope="module")
def ltx2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("ltx2", tmp_path_factory.mktemp("ltx2")).files["model"]


@pytest.fixture
def film(wan: Path, servers: Servers, sd: Sd) -> Callable[..., Outcome]:
    def run(*arguments: object) -> Outcome:
        common = ("-M", "vid_gen", "--rpc", f"127.0.0.1:{servers[0].port}", "-m", wan, "-p", "a lovely cat")
        small = ("-W", "64", "-H", "64", "--steps", "2", "--video-frames", "6", "--fps", "8")
        return sd(*common, *small, *arguments)

    return run


def test_sound_is_beside_what_holds_none(ltx2: Path, tmp_path: Path, servers: Servers, sd: Sd) -> None:
    made = sd(
        "-M", "vid_gen", "--rpc", f"127.0.0.1:{servers[0].port}", "-m", ltx2, "-p", "a lovely cat", "-W", 64, "-H", 64,
        "--steps", 1, "--cfg-scale", 1, "--video-frames", 9, "-o", tmp_path / "film.webp",
    )  # fmt: skip
    assert made.status == 0, made.err
    assert made.out.split() == [str(tmp_path / "film.webp"), str(tmp_path / "film.wav")]
    with wave.open(str(tmp_path / "film.wav")) as file:
        assert (file.getnchannels(), file.getframerate(), file.getnframes()) == (2, 24000, (4 * 9 - 3) * 240)
        assert np.frombuffer(file.readframes(7920), "<i2").std() > 300


def test_a_picture_of_a_model_of_films_with_sound_is_a_film_of_one_frame(
    ltx2: Path, tmp_path: Path, servers: Servers, sd: Sd
) -> None:
    """Sound is drawn beside a picture, too, for the model attends to it; nobody hears it."""
    server = f"127.0.0.1:{servers[0].port}"
    common = ("--rpc", server, "-m", ltx2, "-p", "a lovely cat", "-W", 64, "-H", 64, "--steps", 1, "--cfg-scale", 1)
    picture = sd(*common, "-o", tmp_path / "picture.png")
    assert picture.status == 0, picture.err
    assert picture.out.split() == [str(tmp_path / "picture.png")]
    film = sd(*common, "-M", "vid_gen", "--video-frames", 1, "-o", tmp_path / "frame_%d.png")
    assert film.status == 0, film.err
    with Image.open(tmp_path / "picture.png") as one, Image.open(tmp_path / "frame_0.png") as other:
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
        assert np.asarray(one).std() > 10


def test_a_film_and_its_frames_are_the_same_pictures(film: Callable[..., Outcome], tmp_path: Path) -> None:
    """Frames without loss beside an animation; six frames are rounded down."""
    path = tmp_path / "film.mp4"
    path.write_bytes(b"an old film")
    made = film("-o", path)
    assert made.status == 0, made.err
    assert made.out.split() == [str(path)]
    assert "6 frames are rounded down to 5" in made.err
    assert sorted(tmp_path.iterdir()) == [path]  # nothing is left of what was made meanwhile
    singly = film("-o", tmp_path / "frame_%02d.png")
    assert singly.status == 0, singly.err
    names = [tmp_path / f"frame_{number:02}.png" for number in range(FRAMES)]
    assert singly.out.split() == [str(name) for name in names]
    with av.open(path) as container:
        assert container.streams.video[0].average_rate == 8
        assert "a lovely cat" in container.metadata["comment"]
        assert '"mode":"vid_gen"' in container.metadata["comment"]
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(decoded) == FRAMES
    pictures = []
    for name, shown in zip(names, decoded, strict=True):
        with Image.open(name) as image:
            assert "a lovely cat" in image.info["parameters"]
            pictures.append(np.asarray(image))
        assert np.abs(pictures[-1].astype(int) - shown).mean() < 25  # random weights give noise, which H.264 blurs
    assert np.abs(pictures[0].astype(int) - pictures[-1]).mean() > 1, "something moves"


def test_what_can_not_be_filmed_is_refused_before_anything_is_opened(sd: Sd, tmp_path: Path) -> None:
    missing = tmp_path / "no.safetensors"
    refused = sd("-M", "vid_gen", "-m", missing, "-o", tmp_path / "film.mov")
    assert refused.status == 2
    assert "films are written as .mp4, .webm, .avi, .webp, .gif" in refused.error
    many = sd("-M", "vid_gen", "--video-frames", "0", "-W", "64", "-H", "64")
    assert many.status == 2


def test_a_model_of_pictures_makes_no_films(sd: Sd, checkpoint: Path, tmp_path: Path) -> None:
    refused = sd("-M", "vid_gen", "-m", checkpoint, "-o", tmp_path / "film.mp4", "--backend", "cpu")
    assert refused.status == 2
    assert "Stable Diffusion 1.x draws pictures, no films" in refused.error
    assert not list(tmp_path.iterdir())

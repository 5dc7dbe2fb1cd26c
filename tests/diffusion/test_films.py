"""Films as files: what other programs read in them, and that frames are never there together."""

from __future__ import annotations

import sys
import wave
import weakref
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from sdrpc.cli.output import FILM_SIDES
from sdrpc.diffusion.films import CODECS, SUFFIXES, check_format, encode, has_sound, wav
from sdrpc.diffusion.metadata import Parameters
from sdrpc.diffusion.pictures import Sound, Video
from sdrpc.errors import InvalidValue
from tests.diffusion.test_metadata import PARAMETERS

WIDTH, HEIGHT, FRAMES, FPS = 64, 48, 9, 10
LOUDEST = {".gif": 12.0}
"""Mean difference per pixel that a format may make of these smooth frames; GIF has 256 colours."""
LOUD = 4.0


def frame(number: int) -> np.ndarray:
    """Smooth and another one for each number."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return np.stack([x * 3, y * 4, np.full_like(x, 20 * number)], axis=-1).astype(np.uint8)


def film(frames: Iterator[np.ndarray] | None = None) -> Video:
    return Video(frames or map(frame, range(FRAMES)), FRAMES, FPS, WIDTH, HEIGHT, 7)


def parameters() -> Parameters:
    return replace(PARAMETERS, video_frames=FRAMES, fps=FPS)


def read(file: BytesIO, suffix: str) -> tuple[list[np.ndarray], float, str]:
    """A file's frames, its frames per second, and what it says of itself."""
    file.seek(0)
    if suffix in CODECS:
        with av.open(file) as container:
            frames = [one.to_ndarray(format="rgb24") for one in container.decode(video=0)]
            rate: Any = container.streams.video[0].average_rate
            told = {key.lower(): value for key, value in container.metadata.items()}
            return frames, float(rate), told.get("comment", "")
    with Image.open(file) as image:
        frames, durations = [], []
        for number in range(image.n_frames):
            image.seek(number)
            frames.append(np.asarray(image.convert("RGB")))
            durations.append(image.info["duration"])
        image.seek(0)
        said = image.info.get("comment", image.info.get("xmp", b"")).decode()
        return frames, 1000 / float(np.mean(durations)), said


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_has_the_films_frames_its_speed_and_its_parameters(suffix: str) -> None:
    file = BytesIO()
    encode(film(), suffix, file, parameters())
    frames, fps, said = read(file, suffix)
    assert len(frames) == FRAMES
    assert fps == pytest.approx(FPS, rel=0.01)
    for number, found in enumerate(frames):
        apart = np.abs(found.astype(int) - frame(number)).mean()
        assert apart < LOUDEST.get(suffix, LOUD), number
    assert "(lovely:1.3) cat" in said
    assert '"frame_count":9' in said.replace("&quot;", '"')


RATE = 24000


def tones(ears: int = 2, rate: int = RATE) -> Sound:
    """As long as the film: an ear's number + 1 times 300 Hz."""
    seconds = np.arange(rate * FRAMES // FPS) / rate
    return Sound(np.stack([np.sin(2 * np.pi * 300 * (i + 1) * seconds) / 2 for i in range(ears)]).astype("f4"), rate)


@pytest.mark.parametrize(("suffix", "ears", "rate"), [(each, 2, RATE) for each in CODECS] + [(".mp4", 1, 400)])
def test_a_video_has_the_films_sound(suffix: str, ears: int, rate: int) -> None:
    """Which the codec may shift by what it looks ahead, and resample."""
    file, sound = BytesIO(), tones(ears, rate)
    if rate == 400:  # no tone of 300 Hz fits
        sound = Sound(np.sin(np.arange(rate * FRAMES // FPS)[None] / 20).astype("f4"), rate)
    encode(replace(film(), sound=sound), suffix, file, None)
    frames, *_ = read(file, suffix)
    assert len(frames) == FRAMES
    file.seek(0)
    with av.open(file) as container:
        stream = container.streams.audio[0]
        heard = np.concatenate([one.to_ndarray().reshape(-1, ears) if one.format.is_packed else one.to_ndarray().T
                                for one in container.decode(audio=0)])  # fmt: skip
        found = stream.rate
    scale = 32768 if heard.dtype == np.int16 else 1
    assert len(heard) / found == pytest.approx(FRAMES / FPS, abs=0.1)
    if rate == RATE:
        for ear in range(ears):
            spectrum = np.abs(np.fft.rfft(heard[:, ear]))
            loudest = np.argmax(spectrum) * found / len(heard)
            assert loudest == pytest.approx(300 * (ear + 1), abs=3)
            assert np.std(heard[:, ear] / scale) == pytest.approx(0.5 / 2**0.5, rel=0.1)


def test_a_wav_file_has_what_animations_have_not() -> None:
    assert [suffix for suffix in SUFFIXES if not has_sound(suffix)] == [".webp", ".gif"]
    sound = tones()
    with wave.open(BytesIO(wav(Sound(sound.samples * 4, sound.rate)))) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (2, 2, RATE)
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2").reshape(-1, 2).T
    np.testing.assert_allclose(samples / 32767, np.clip(sound.samples * 4, -1, 1), atol=1e-4)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_film_says_nothing_of_itself_where_it_shall_not(suffix: str) -> None:
    file = BytesIO()
    encode(film(), suffix, file, None)
    assert "lovely" not in read(file, suffix)[2]


def test_frames_are_not_kept_once_they_are_encoded() -> None:
    """As with a film that is larger than memory: the encoder of .avi looks back at none, the others at a few."""
    alive: list[weakref.ref[np.ndarray]] = []

    def frames() -> Iterator[np.ndarray]:
        for number in range(FRAMES):
            coming = frame(number)
            alive.append(weakref.ref(coming))
            yield coming
            del coming
            assert sum(reference() is not None for reference in alive) <= 2, number

    for suffix in (".avi", ".webp"):
        alive.clear()
        encode(film(frames()), suffix, BytesIO(), None)
        assert len(alive) == FRAMES


def test_without_pyav_videos_are_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    check_format(".mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(InvalidValue, match=r"pip install 'sdrpc\[video\]'; .webp and .gif need nothing more"):
        check_format(".MP4")
    check_format(".webp")


def test_other_formats_are_refused() -> None:
    with pytest.raises(InvalidValue, match=r"films are written as \.mp4"):
        check_format(".mov")


def test_the_command_knows_the_same_formats() -> None:
    assert set(FILM_SIDES) == set(SUFFIXES)

"""Films as files, frame after frame: animations of pictures (.webp, .gif), and with PyAV videos (.mp4, .webm, .avi).

Frames are encoded as they come, so that none but those that an encoder looks back at are in memory. What a film was
made with (:class:`sdrpc.diffusion.metadata.Parameters`) is the comment of its container, in .webp files XMP as in
pictures.
"""

from __future__ import annotations

import wave
from collections.abc import Callable, Iterator
from fractions import Fraction
from io import BytesIO
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import InvalidValue
from .metadata import QUALITY, Parameters, xmp
from .pictures import F32, Sound, Video


class Codec(NamedTuple):
    """How PyAV writes a kind of file: its name for the container and the codec, how pixels are stored, the codec's
    options, the codec for sound."""

    container: str
    codec: str
    pixels: str
    options: dict[str, str]
    sound: str


CODECS = {
    ".mp4": Codec("mp4", "libx264", "yuv420p", {"crf": "18", "preset": "medium"}, "aac"),
    ".webm": Codec("webm", "libvpx-vp9", "yuv420p", {"crf": "24", "b": "0", "row-mt": "1", "cpu-used": "4"}, "libopus"),
    ".avi": Codec("avi", "mjpeg", "yuvj420p", {"qmin": "2", "qmax": "3"}, "pcm_s16le"),
}
"""By suffix. Quality is such that a film looks as its frames do."""

ANIMATIONS = (".webp", ".gif")
"""What Pillow writes."""

SUFFIXES = (*CODECS, *ANIMATIONS)

_BT709, _MPEG_RANGE = 1, 1
"""FFmpeg's numbers of how colours are stored: those of high-definition television."""


def has_videos() -> bool:
    """Whether the package that writes videos is here."""
    from importlib.util import find_spec

    return find_spec("av") is not None


def check_format(suffix: str) -> None:
    """Raises :class:`InvalidValue` where films of this kind can't be written."""
    if suffix.lower() not in SUFFIXES:
        raise InvalidValue("output", suffix, f"films are written as {', '.join(SUFFIXES)}, or frames: frame_%03d.png")
    if suffix.lower() in CODECS and not has_videos():
        reason = "needs the package av: pip install 'sdrpc[video]'"
        raise InvalidValue("output", suffix, f"{reason}; {' and '.join(ANIMATIONS)} need nothing more")


def encode(film: Video, suffix: str, file: IO[bytes], parameters: Parameters | None) -> None:
    """Write ``film`` into a new file in the format that ``suffix`` means (one of :data:`SUFFIXES`), with its parameters
    if they are given. Frames are asked for one by one. Sound is in files of :data:`CODECS`; for others there is
    :func:`wav`."""
    text = None if parameters is None else parameters.text()
    _ENCODERS[suffix.lower()](film, file, text)


def has_sound(suffix: str) -> bool:
    """Whether a film's file of this kind holds its sound."""
    return suffix.lower() in CODECS


def wav(sound: Sound) -> bytes:
    """A .wav file, 16 bits a sample."""
    file = BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(len(sound.samples))
        out.setsampwidth(2)
        out.setframerate(sound.rate)
        out.writeframes(_integers(sound.samples).T.tobytes())
    return file.getvalue()


def _integers(samples: F32) -> NDArray[np.int16]:
    return (np.clip(samples, -1, 1) * np.float32(32767)).round().astype("<i2")


# Pillow ---------------------------------------------------------------------------------------------------------------


class _Frames(Image.Image):
    """A film as Pillow's own pictures of several frames are: ``seek`` goes to the next one. ``change``: what becomes of
    each before it is encoded."""

    def __init__(self, film: Video, change: Callable[[Image.Image], Image.Image] = lambda frame: frame) -> None:
        super().__init__()
        self._coming = film.frames
        self._change = change
        self._at = -1
        self.n_frames = film.count
        self.is_animated = film.count > 1
        self.seek(0)

    def seek(self, frame: int) -> None:
        """Raises :class:`EOFError` behind the last frame, as Pillow's pictures do."""
        while self._at < frame:
            pixels = next(self._coming, None)
            if pixels is None:
                raise EOFError("no more frames")
            shown = self._change(Image.fromarray(pixels))
            self.im, self._mode, self._size, self.palette = shown.im, shown.mode, shown.size, shown.palette
            self._at += 1

    def tell(self) -> int:
        return self._at


def _webp(film: Video, file: IO[bytes], text: str | None) -> None:
    described = b"" if text is None else xmp(text)
    _Frames(film).save(
        file,
        "WEBP",
        save_all=True,
        duration=1000 / film.fps,
        loop=0,
        quality=QUALITY,
        minimize_size=False,
        xmp=described,
    )


def _gif(film: Video, file: IO[bytes], text: str | None) -> None:
    """Its times are hundredths of a second, and viewers slow down what has less than two."""
    comment: Any = {} if text is None else {"comment": text.encode()}
    frames = _Frames(film, lambda frame: frame.quantize(256, Image.Quantize.FASTOCTREE))
    frames.save(file, "GIF", save_all=True, duration=max(1000 / film.fps, 20), loop=0, **comment)


# PyAV -----------------------------------------------------------------------------------------------------------------


def _video(kind: Codec) -> Callable[[Video, IO[bytes], str | None], None]:
    def write(film: Video, file: IO[bytes], text: str | None) -> None:
        import av

        with av.open(file, "w", format=kind.container) as container:
            if text is not None:
                container.metadata["comment"] = text
            stream: Any = container.add_stream(kind.codec, rate=Fraction(film.fps), options=kind.options)
            stream.width, stream.height, stream.pix_fmt = film.width, film.height, kind.pixels
            context = stream.codec_context
            if kind.pixels == "yuv420p":
                context.color_primaries = context.color_trc = context.colorspace = _BT709
                context.color_range = _MPEG_RANGE
            heard = _Heard(container, kind, film.sound, film.fps)
            for packets in _packets(stream, film, kind):
                for packet in (*packets, *heard.beside_a_frame()):
                    container.mux(packet)
            for packet in heard.rest():
                container.mux(packet)

    return write


class _Heard:
    """A film's sound beside its frames: so much of it for each of them, so that a player finds both in one place."""

    def __init__(self, container: Any, kind: Codec, sound: Sound | None, fps: int) -> None:
        self._sound, self._fps, self._frames, self._at = sound, fps, 0, 0
        if sound is not None:
            layout = {1: "mono", 2: "stereo"}[len(sound.samples)]
            self._stream = container.add_stream(kind.sound, rate=_known_rate(kind.sound, sound.rate), layout=layout)
            self._layout = layout

    def beside_a_frame(self) -> Iterator[Any]:
        self._frames += 1
        return self._until(self._frames)

    def rest(self) -> Iterator[Any]:
        if self._sound is None:
            return
        yield from self._until(None)
        yield from self._stream.encode(None)

    def _until(self, frames: int | None) -> Iterator[Any]:
        """What is heard until so many frames are over; None: all of it."""
        import av

        if self._sound is None:
            return
        samples, rate = self._sound
        end = samples.shape[1] if frames is None else min(samples.shape[1], frames * rate // self._fps)
        if end == self._at:
            return
        part = np.ascontiguousarray(np.clip(samples[:, self._at : end], -1, 1), np.float32)
        frame = av.AudioFrame.from_ndarray(part, format="fltp", layout=self._layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, self._at, Fraction(1, rate)
        self._at = end
        yield from self._stream.encode(frame)


def _known_rate(codec: str, rate: int) -> int:
    """The least of the rates that a codec has which is no less than ``rate``, to which that is resampled, or its
    highest."""
    import av

    rates = sorted(av.Codec(codec, "w").audio_rates or [rate])
    return next((each for each in rates if each >= rate), rates[-1])


def _packets(stream: Any, film: Video, kind: Codec) -> Iterator[Any]:
    import av

    matrix = "ITU709" if kind.pixels == "yuv420p" else None
    for pixels in film.frames:
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        yield stream.encode(frame.reformat(format=kind.pixels, dst_colorspace=matrix))
    yield stream.encode()


_ENCODERS: dict[str, Callable[[Video, IO[bytes], str | None], None]] = {
    ".webp": _webp, ".gif": _gif, **{suffix: _video(kind) for suffix, kind in CODECS.items()}
}  # fmt: skip

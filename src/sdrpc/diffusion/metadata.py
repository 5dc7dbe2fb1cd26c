"""Pictures as files, with their generation parameters as stable-diffusion.cpp and the web UIs write them.

The text called ``parameters`` is the prompt, a line for the negative prompt, and a line of ``Key: value`` pairs whose
last, ``SDCPP``, repeats everything as JSON (schema ``sdcpp.image.params/v1``). It is a text chunk of PNG files, a
comment of JPEG files, and an entry in the XMP of WebP files.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .. import __version__
from .guidance import SKIPPED, LeftOut
from .hires import Hires
from .pictures import Picture, Video

if TYPE_CHECKING:
    from ..families.model import ModelFiles
    from .request import Settings

log = logging.getLogger(__name__)

KEYWORD = "parameters"
GENERATOR = "sdrpc"
QUALITY = 90
"""Of JPEG and WebP, as stable-diffusion.cpp writes them."""
MAX_COMMENT = 65533
"""Bytes of a JPEG comment: its length is 16 bits, which count themselves."""

_XMP = """<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
  <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
    <rdf:Description xmlns:sdcpp="https://github.com/leejet/stable-diffusion.cpp/ns/1.0/">
      <sdcpp:parameters>{}</sdcpp:parameters>
    </rdf:Description>
  </rdf:RDF>
</x:xmpmeta>
<?xpacket end="w"?>"""
_NO_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")
"""Characters that XML does not have."""


@dataclass(frozen=True)
class Parameters:
    """How a picture came about. ``eta`` is None when the sampler's own was used; ``guidance``: of distilled models, but
    always written; ``models``: base names of files by the JSON's keys (``model``, ``clip_l``, ``clip_g``, ``t5xxl``,
    ``llm``, ``diffusion_model``, ``vae``); ``sampler_rng`` is None where it is ``rng``; ``loras``: names with
    strengths; ``video_frames`` and ``fps`` are a film's."""

    prompt: str
    negative_prompt: str
    width: int
    height: int
    steps: int
    cfg_scale: float
    seed: int
    sampler: str
    scheduler: str
    rng: str
    version: str
    clip_skip: int = -1
    eta: float | None = None
    guidance: float = 3.5
    flow_shift: float | None = None
    sampler_rng: str | None = None
    strength: float = 0.75
    control_strength: float = 0.9
    img_cfg_scale: float | None = None
    sigmas: tuple[float, ...] = ()
    timestep_shift: int = 0
    left_out: LeftOut | None = None
    hires: Hires | None = None
    models: Mapping[str, str] = field(default_factory=dict)
    loras: Sequence[tuple[str, float]] = ()
    video_frames: int | None = None
    fps: int | None = None

    def text(self) -> str:
        """What stands under ``parameters``."""
        lines = [self.prompt]
        if self.negative_prompt:
            lines.append(f"Negative prompt: {self.negative_prompt}")
        files = (
            ("TE", "clip_l"), ("TE", "clip_g"), ("TE", "t5xxl"), ("TE", "llm"),
            ("Unet", "diffusion_model"), ("VAE", "vae"),
        )  # fmt: skip
        pairs = [
            f"Steps: {self.steps}",
            f"CFG scale: {self.cfg_scale:.6f}",
            *self._skipped_layers(),
            f"Guidance: {self.guidance:.6f}",
            f"Eta: {'inf' if self.eta is None else f'{self.eta:.6f}'}",
            f"Seed: {self.seed}",
            f"Size: {self.width}x{self.height}",
            f"Model: {self.models.get('model', '')}",
            f"RNG: {self.rng}",
            *([f"Sampler RNG: {self.sampler_rng}"] if self.sampler_rng else []),
            f"Sampler: {self.sampler} {self._levels()}",
            *(f"{title}: {self.models[key]}" for title, key in files if key in self.models),
            *([f"Clip skip: {self.clip_skip}"] if self.clip_skip != -1 else []),
            *self._second_pass(),
            f"Version: {GENERATOR}",
            f"SDCPP: {json.dumps(self._json(), sort_keys=True, separators=(',', ':'), ensure_ascii=False)}",
        ]
        text = "\n".join([*lines, ", ".join(pairs)])
        # names of files may be bytes that are no text
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")

    def _second_pass(self) -> list[str]:
        if self.hires is None:
            return []
        return [
            f"Hires upscaler: {self.hires.upscaler}",
            f"Hires resize: {self.hires.width}x{self.hires.height}",
            f"Hires steps: {self.hires.steps}",
            *([f"Hires sigmas: {_listed(self.hires.sigmas)}"] if self.hires.sigmas else []),
            f"Denoising strength: {self.hires.strength:.6f}",
        ]

    def _skipped_layers(self) -> list[str]:
        if self.left_out is None:
            return []
        return [
            f"SLG scale: {self.left_out.scale:.6f}",
            f"Skip layers: [{', '.join(map(str, self.left_out.layers))}]",
            f"Skip layer start: {self.left_out.start:.6f}",
            f"Skip layer end: {self.left_out.end:.6f}",
        ]

    def _levels(self) -> str:
        return f"| Custom Sigmas: {_listed(self.sigmas)}" if self.sigmas else self.scheduler

    def _json(self) -> dict[str, Any]:
        left_out = self.left_out or LeftOut(0.0, *SKIPPED)
        return {
            "schema": "sdcpp.image.params/v1",
            "mode": "img_gen" if self.video_frames is None else "vid_gen",
            **({} if self.video_frames is None else {"video": {"frame_count": self.video_frames, "fps": self.fps}}),
            "generator": {"name": GENERATOR, "version": self.version, "commit": ""},
            "seed": self.seed,
            "width": self.width,
            "height": self.height,
            "prompt": {"positive": self.prompt, "negative": self.negative_prompt},
            "sampling": {
                "steps": self.steps, "eta": _single(self.eta), "shifted_timestep": self.timestep_shift,
                "flow_shift": _single(self.flow_shift),
                "guidance": {
                    "txt_cfg": _single(self.cfg_scale), "img_cfg": _single(self.img_cfg_scale),
                    "distilled_guidance": _single(self.guidance),
                    "slg": {
                        "scale": _single(left_out.scale), "layers": list(left_out.layers),
                        "start": _single(left_out.start), "end": _single(left_out.end),
                    },
                },
                "method": self.sampler, "scheduler": self.scheduler,
                "custom_sigmas": [_single(sigma) for sigma in self.sigmas],
                "extra_sample_args": "",
            },
            "models": dict(self.models),
            **({"loras": [_lora(*each) for each in self.loras]} if self.loras else {}),
            "clip_skip": self.clip_skip,
            **({} if self.hires is None else {"hires": _second_pass(self.hires)}),
            "strength": _single(self.strength),
            "control_strength": _single(self.control_strength),
            "auto_resize_ref_image": True,
            "increase_ref_index": False,
            "ip_adapter_strength": 1.0,
            "rng": self.rng,
            **({"sampler_rng": self.sampler_rng} if self.sampler_rng else {}),
        }  # fmt: skip


def parameters_of(
    settings: Settings,
    drawn: Picture | Video,
    files: ModelFiles,
    eta: float | None = None,
    sampler_rng: str | None = None,
) -> Parameters:
    """What the file of a picture or film says that was ``drawn`` with ``settings``. ``eta`` and ``sampler_rng``: as
    they were asked for, None where the sampler's own, or ``rng``, was meant."""
    film = drawn if isinstance(drawn, Video) else None
    return Parameters(
        prompt=settings.prompt,
        negative_prompt=settings.negative_prompt,
        width=settings.width,
        height=settings.height,
        steps=settings.steps,
        cfg_scale=settings.cfg_scale,
        guidance=settings.guidance,
        seed=drawn.seed,
        sampler=settings.sampling_method,
        scheduler=settings.scheduler,
        rng=settings.rng,
        sampler_rng=sampler_rng,
        version=__version__,
        clip_skip=settings.clip_skip,
        eta=eta,
        flow_shift=settings.flow_shift,
        strength=settings.strength,
        control_strength=settings.control_strength,
        img_cfg_scale=None if settings.img_cfg_scale == settings.cfg_scale else settings.img_cfg_scale,
        sigmas=settings.sigmas,
        timestep_shift=settings.timestep_shift,
        left_out=settings.left_out,
        hires=settings.hires,
        models={name: path.name for name, path in files.named.items()},
        loras=[(Path(lora.name).name, lora.strength) for lora in settings.loras],
        video_frames=None if film is None else film.count,
        fps=None if film is None else film.fps,
    )


def _listed(sigmas: Sequence[float]) -> str:
    return f"[{', '.join(f'{sigma:g}' for sigma in sigmas)}]"


def _second_pass(hires: Hires) -> dict[str, Any]:
    """By stable-diffusion.cpp's names. Of a network's file there is the name alone."""
    return {
        "enabled": True, "upscaler": hires.upscaler, "target_width": hires.width, "target_height": hires.height,
        "steps": hires.steps, "denoising_strength": _single(hires.strength),
        "custom_sigmas": [_single(sigma) for sigma in hires.sigmas], "upscale_tile_size": hires.tile,
    }  # fmt: skip


def _lora(name: str, strength: float) -> dict[str, Any]:
    return {"name": name, "multiplier": _single(strength), "is_high_noise": False}


def _single(value: float | None) -> float | None:
    """A number as a program writes it that keeps it in single precision; JSON has no infinity."""
    return None if value is None or not math.isfinite(value) else float(np.float32(value))


Pixels = NDArray[np.uint8]


def encode(image: Pixels, suffix: str, parameters: Parameters | None, quality: int = QUALITY) -> bytes:
    """A file of uint8 pixels (height, width, 3) in the format that ``suffix`` means (.png, .jpg, .jpeg, .webp), with
    its parameters if they are given. ``quality``: of JPEG and WebP, 0 … 100."""
    buffer = BytesIO()
    text = None if parameters is None else parameters.text()
    _ENCODERS[suffix.lower()](Image.fromarray(image), buffer, text, quality)
    return buffer.getvalue()


def _png(picture: Image.Image, file: BytesIO, text: str | None, _quality: int) -> None:
    """PNG's tEXt chunk is Latin-1; texts in other scripts go into iTXt, which the web UIs read as well."""
    info = PngInfo()
    if text is not None:
        try:
            text.encode("latin-1")
        except UnicodeEncodeError:
            info.add_itxt(KEYWORD, text)
        else:
            info.add_text(KEYWORD, text)
    picture.save(file, "PNG", pnginfo=info)


def _jpeg(picture: Image.Image, file: BytesIO, text: str | None, quality: int) -> None:
    comment = b"" if text is None else f"{KEYWORD}\0{text}".encode()
    if len(comment) > MAX_COMMENT:
        log.warning("a JPEG file has no room for its parameters, %d bytes: they are not in it", len(comment))
        comment = b""
    picture.save(file, "JPEG", quality=quality, **({"comment": comment} if comment else {}))


def _webp(picture: Image.Image, file: BytesIO, text: str | None, quality: int) -> None:
    picture.save(file, "WEBP", quality=quality, xmp=b"" if text is None else xmp(text))


def xmp(text: str) -> bytes:
    """The XMP of a WebP file with these parameters."""
    return _XMP.format(escape(_NO_XML.sub("\ufffd", text))).encode()


_ENCODERS: dict[str, Callable[[Image.Image, BytesIO, str | None, int], None]] = {
    ".png": _png, ".jpg": _jpeg, ".jpeg": _jpeg, ".webp": _webp
}  # fmt: skip

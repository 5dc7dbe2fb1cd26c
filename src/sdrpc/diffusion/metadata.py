"""Generation parameters in PNG files, as stable-diffusion.cpp and the web UIs write them.

The text under the keyword ``parameters`` is the prompt, a line for the negative prompt, and a line of ``Key: value``
pairs whose last, ``SDCPP``, repeats everything as JSON (schema ``sdcpp.image.params/v1``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

KEYWORD = "parameters"
GENERATOR = "sdrpc"


@dataclass(frozen=True)
class Parameters:
    """How a picture came about. ``eta`` is None when the sampler's own was used; ``guidance``: of distilled models, but
    always written; ``models``: base names of files by the JSON's keys (``model``, ``clip_l``, ``clip_g``, ``t5xxl``,
    ``diffusion_model``, ``vae``)."""

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
    models: Mapping[str, str] = field(default_factory=dict)

    def text(self) -> str:
        """What stands under ``parameters``."""
        lines = [self.prompt]
        if self.negative_prompt:
            lines.append(f"Negative prompt: {self.negative_prompt}")
        files = (
            ("TE", "clip_l"), ("TE", "clip_g"), ("TE", "t5xxl"), ("Unet", "diffusion_model"), ("VAE", "vae")
        )  # fmt: skip
        pairs = [
            f"Steps: {self.steps}",
            f"CFG scale: {self.cfg_scale:.6f}",
            f"Guidance: {self.guidance:.6f}",
            f"Eta: {'inf' if self.eta is None else f'{self.eta:.6f}'}",
            f"Seed: {self.seed}",
            f"Size: {self.width}x{self.height}",
            f"Model: {self.models.get('model', '')}",
            f"RNG: {self.rng}",
            f"Sampler: {self.sampler} {self.scheduler}",
            *(f"{title}: {self.models[key]}" for title, key in files if key in self.models),
            *([f"Clip skip: {self.clip_skip}"] if self.clip_skip != -1 else []),
            f"Version: {GENERATOR}",
            f"SDCPP: {json.dumps(self._json(), sort_keys=True, separators=(',', ':'), ensure_ascii=False)}",
        ]
        return "\n".join([*lines, ", ".join(pairs)])

    def _json(self) -> dict[str, Any]:
        return {
            "schema": "sdcpp.image.params/v1",
            "mode": "img_gen",
            "generator": {"name": GENERATOR, "version": self.version, "commit": ""},
            "seed": self.seed,
            "width": self.width,
            "height": self.height,
            "prompt": {"positive": self.prompt, "negative": self.negative_prompt},
            "sampling": {
                "steps": self.steps, "eta": _single(self.eta), "shifted_timestep": 0,
                "flow_shift": _single(self.flow_shift),
                "guidance": {
                    "txt_cfg": _single(self.cfg_scale), "img_cfg": None, "distilled_guidance": _single(self.guidance),
                    "slg": {"scale": 0.0, "layers": [7, 8, 9], "start": _single(0.01), "end": _single(0.2)},
                },
                "method": self.sampler, "scheduler": self.scheduler, "custom_sigmas": [], "extra_sample_args": "",
            },
            "models": dict(self.models),
            "clip_skip": self.clip_skip,
            "strength": 0.75,
            "control_strength": _single(0.9),
            "auto_resize_ref_image": True,
            "increase_ref_index": False,
            "ip_adapter_strength": 1.0,
            "rng": self.rng,
        }  # fmt: skip


def _single(value: float | None) -> float | None:
    """A number as a program writes it that keeps it in single precision; JSON has no infinity."""
    return None if value is None or not math.isfinite(value) else float(np.float32(value))


def encode_png(image: NDArray[np.uint8], parameters: Parameters | None) -> bytes:
    """A PNG file of uint8 pixels (height, width, 3), with its parameters if they are given.

    PNG's tEXt chunk is Latin-1; texts in other scripts go into iTXt, which the web UIs read as well.
    """
    info = PngInfo()
    if parameters is not None:
        text = parameters.text()
        try:
            text.encode("latin-1")
        except UnicodeEncodeError:
            info.add_itxt(KEYWORD, text)
        else:
            info.add_text(KEYWORD, text)
    buffer = BytesIO()
    Image.fromarray(image).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()

"""The pictures that stable-diffusion.cpp drew, of SDXL, of FLUX.1 and, begun with other pictures, of SD 1.5, and the
checkpoints that it drew them from.

The checkpoints have random weights and are made once into ``$SDRPC_DEV_CACHE``: SD 1.5 and SDXL at their full size
(2 and 7 GB), FLUX.1 at its full widths with 2 double and 4 single blocks (3 GB; stable-diffusion.cpp counts blocks),
with the whole of T5 in 4-bit blocks (3 GB; its number of layers is fixed there).
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.checkpoints import make

ROOT = Path(__file__).parent.parent.parent
PICTURES = ROOT / "tests" / "data" / "reference"


@dataclass(frozen=True)
class Model:
    """A checkpoint: what tools/checkpoints is asked for."""

    name: str
    family: str
    options: dict[str, Any]

    def files(self) -> dict[str, Path]:
        """Its files by component, made when they are not there yet."""
        folder = Path(os.environ["SDRPC_DEV_CACHE"]) / f"parity-{self.name}"
        if not folder.is_dir():
            part = folder.with_suffix(".part")
            make(self.family, part, **self.options)
            part.rename(folder)
        return {path.stem: path for path in sorted(folder.iterdir())}


@dataclass(frozen=True)
class Whole(Model):
    """SD 1.5 at its full size with random weights, in one file (2.1 GB)."""

    def files(self) -> dict[str, Path]:
        path = Path(os.environ["SDRPC_DEV_CACHE"]) / "sd15-random.safetensors"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part.safetensors")
            subprocess.run([sys.executable, ROOT / "tools" / "make_checkpoint.py", "--size", "full", part], check=True)
            part.rename(path)
        return {"model": path}


SD15 = Whole("sd15", "sd1", {})

# Parts, since stable-diffusion.cpp does not transpose OpenCLIP's projection when it finds it in a whole file.
SDXL = Model("sdxl", "sdxl", {"size": "full", "form": "parts", "type": "F16"})
FLUX1_SCHNELL = Model(
    "flux1-schnell",
    "flux1-schnell",
    {
        "size": "reduced",
        "sizes": {"t5xxl": "full"},
        "form": "gguf-parts",
        "type": "F16",
        "types": {"t5xxl": "Q4_0"},
    },
)


@dataclass(frozen=True)
class Reference:
    """A picture: its name, the model, and the options of sd-cli beside the files (on a CPU, --rng cuda). ``side``: in
    pixels. ``begun``: files of pictures that it begins with, by their names in stable-diffusion.cpp's package."""

    name: str
    model: Model
    prompt: str
    steps: int
    cfg: float
    negative: str = ""
    seed: int = 42
    sampler: str = "euler"
    scheduler: str = "discrete"
    further: dict[str, Any] = field(default_factory=dict)
    side: int = 256
    begun: dict[str, Path] = field(default_factory=dict)

    @property
    def picture(self) -> Path:
        return PICTURES / f"{self.name}.png"

    def arguments(self) -> list[str]:
        """sd-cli's, without files and devices."""
        named: dict[str, Any] = {
            "-p": self.prompt, "-n": self.negative, "-W": self.side, "-H": self.side, "-s": self.seed,
            "--steps": self.steps, "--cfg-scale": self.cfg, "--sampling-method": self.sampler,
            "--scheduler": self.scheduler,
            **{f"--{name.replace('_', '-')}": value for name, value in self.further.items()},
            **{BEGUN[name]: path for name, path in self.begun.items()},
        }  # fmt: skip
        return [str(word) for name, value in named.items() for word in ((name,) if value is True else (name, value))]


BEGUN = {"init_image": "--init-img", "mask_image": "--mask"}
"""sd-cli's options for pictures that a picture begins with."""

CAT = "a lovely cat"
REFERENCES = (
    Reference("sdxl-euler", SDXL, CAT, steps=3, cfg=5.0),
    Reference("flux1-schnell-euler", FLUX1_SCHNELL, CAT, steps=4, cfg=1.0),
    Reference(
        "sd15-img2img",
        SD15,
        CAT,
        steps=8,
        cfg=5.0,
        further={"strength": 0.6},
        side=128,
        begun={"init_image": PICTURES / "begun.png"},
    ),
    Reference(
        "sd15-inpaint",
        SD15,
        CAT,
        steps=6,
        cfg=5.0,
        further={"strength": 1.0},
        side=128,
        begun={"init_image": PICTURES / "begun.png", "mask_image": PICTURES / "mask.png"},
    ),
    *(
        Reference(f"sd15-{name}", SD15, CAT, steps, 5.0, "blurry", sampler=sampler, further=further, side=side)
        for name, steps, sampler, side, further in (
            ("sigmas", 3, "euler", 64, {"sigmas": "14.6,7.8,3.5,0.0"}),
            ("res_2s", 2, "res_2s", 64, {"eta": 0.0}),
            ("tiling", 2, "euler", 128, {"vae_tiling": True, "vae_tile_size": "8x8", "vae_tile_overlap": 0.5}),
            ("hires-latent", 2, "euler", 64, {"hires": True, "hires_scale": 2.0, "hires_upscaler": "Latent"}),
            ("hires-lanczos", 2, "euler", 64, {"hires": True, "hires_scale": 2.0, "hires_upscaler": "Lanczos"}),
        )
    ),
)

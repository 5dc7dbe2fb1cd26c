"""Pictures of every family in every form of file: ours through servers, and diffusers' own pipeline in this process.

The checkpoints are small and random, in the original names (:mod:`tools.checkpoints`). Each is drawn once by diffusers'
pipeline with the same weights, noise, levels of noise and Euler's method; ours has its components on several devices.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from PIL import Image

from sdrpc.device import Device
from sdrpc.diffusion.predictions import Eps, NoiseScale, Prediction, prediction
from sdrpc.diffusion.request import Request
from sdrpc.diffusion.rng import make_rng
from sdrpc.diffusion.schedules import make_sigmas
from sdrpc.diffusion.session import Session
from sdrpc.families.ltx2 import sound_length
from sdrpc.families.model import ModelFiles
from sdrpc.runtime.cache import Cache
from sdrpc.storage import write_whole
from tests.support.references.draw import Drawing, draw, psnr
from tests.support.references.draw import Picture as Drawn
from tools.checkpoints import Made, make
from tools.checkpoints.formats import FORMATS as QUANTIZED
from tools.checkpoints.numbers import PLAIN
from tools.checkpoints.tokenizers import VOCABULARIES
from tools.native_ggml import CACHE

WIDTH, HEIGHT, STEPS, SEED = 128, 64, 3, 42
FRAMES = {"wan": 4, "ltx": 8}
"""Of films, by how families begin: how many frames a latent one stands for. Two latent ones are drawn."""

BOUNDS = {"exact": 45.0, "fast": 28.0, "native": 30.0}
"""dB that our picture has to be from diffusers' one, by what computes it.

``exact`` is float32 throughout, so that only the order of sums differs; ``fast`` multiplies in bfloat16; ggml's CPU
backend (``native``) rounds what it multiplies with F16 weights to F16 and with blocks to 8 bits."""


@dataclass(frozen=True)
class Case:
    """A checkpoint: family, form of file and number format of its matrices, as :func:`tools.checkpoints.make` has
    them."""

    family: str
    form: str
    type: str = "F16"

    def __str__(self) -> str:
        return f"{self.family}-{self.form}-{self.type}"


FAMILIES = {
    "sd1": "Stable Diffusion 1.x", "sd2": "Stable Diffusion 2.x (v)", "sd2-base": "Stable Diffusion 2.x (eps)",
    "sdxl": "Stable Diffusion XL", "flux1-dev": "FLUX.1 dev", "flux1-schnell": "FLUX.1 schnell",
    "sd3": "Stable Diffusion 3", "sd3-without-t5": "Stable Diffusion 3, without T5",
    "sd3.5-medium": "Stable Diffusion 3.5 medium", "sd3.5-large": "Stable Diffusion 3.5 large",
    "chroma": "Chroma", "z-image": "Z-Image", "flux2-klein-4b": "FLUX.2 klein", "flux2-dev": "FLUX.2 dev",
    "wan": "Wan 2.1", "wan2.1-i2v": "Wan 2.1, of a picture", "wan2.2-a14b": "Wan 2.2 A14B",
    "wan2.2-i2v": "Wan 2.2 A14B, of two pictures",
    "krea2": "Krea 2", "wan2.2-5b": "Wan 2.2 TI2V-5B",
    "pixart-sigma": "PixArt-Sigma", "pixart-alpha": "PixArt-Alpha", "lumina2": "Lumina-Image 2.0",
    "ltx-video": "LTX-Video 0.9.0", "ltx-video-13b": "LTX-Video 0.9.7, of a picture",
    "ltx2": "LTX-2", "ltx2-i2v": "LTX-2, of a picture",
    "ltx2.3": "LTX-2.3, of a picture",
    "sana": "Sana 1.0", "sana-1.5": "Sana 1.5",
    "qwen-image": "Qwen-Image", "qwen-image-edit": "Qwen-Image-Edit-2511, two pictures",
}  # fmt: skip

NUMBERS = {
    "F8_E4M3": ("fp8 (E4M3)", "F8_E4M3", 8), "F8_E5M2": ("fp8 (E5M2)", "F8_E5M2", 8),
    "fp8-scaled": ("fp8 scaled (`scaled_fp8`, `scale_weight`)", "F8_E4M3_SCALED", 8.5),
    "fp8-squares": ("fp8 with a scale for each 128×128 numbers (`weight_scale_inv`)", "F8_E4M3_SCALED", 8.5),
    "comfy-float8": ("`comfy_quant` float8_e4m3fn", "F8_E4M3_SCALED", 8.5),
    "comfy-int8": ("`comfy_quant` int8_tensorwise, a scale for each row", "Q8_0", 8.5),
    "comfy-convrot": ("`comfy_quant` int8_tensorwise with ConvRot", "I8_CONVROT, or F16", 8.125),
    "comfy-mxfp8": ("`comfy_quant` mxfp8", "MXFP8", 8.25), "comfy-nvfp4": ("`comfy_quant` nvfp4", "NVFP4_SCALED", 5),
    "bnb-nf4": ("bitsandbytes nf4, with quantized scales", "NF4", 4.5), "bnb-fp4": ("bitsandbytes fp4", "FP4", 4.5),
    "mixed": ("GGUF of 14 types, another one for each tensor", "as stored", None),
}  # fmt: skip
"""Of :data:`FORMAT_CASES`, by type: what they are, in which type our own devices hold matrices, its bits a number."""

FORMS = {
    "safetensors": "one .safetensors", "gguf": "one .gguf", "parts": "a .safetensors for each component",
    "gguf-parts": "GGUF of the diffusion model, and of T5 or a language model if any",
    "diffusers": "diffusers directory", "sharded": "diffusers directory, sharded",
}  # fmt: skip

FIRST = ("sd1", "sd2", "sdxl", "flux1-dev", "chroma")
"""Families that are drawn from every form of file."""
ENDS = ("init_image", "end_image")
"""What films begin and end with, as requests name it."""

CASES = (
    *(Case(family, form) for family in FIRST for form in ("safetensors", "gguf", "parts", "diffusers", "sharded")),
    *(Case(family, form) for family in ("sd2-base", "flux1-schnell") for form in ("safetensors", "sharded")),
    *(Case(family, "gguf", kind) for family in ("sd1", "sdxl", "flux1-dev") for kind in ("Q8_0", "Q4_K")),
    *(Case(family, "gguf-parts", kind) for family in ("sdxl", "flux1-dev") for kind in ("Q5_1", "Q6_K")),
    *(Case("chroma", "gguf-parts", kind) for kind in ("Q8_0", "Q4_K")),
    Case("sdxl", "parts", "BF16"),
    *(Case("sd3", form) for form in ("safetensors", "gguf", "parts", "diffusers")),
    *(Case("sd3-without-t5", form) for form in ("safetensors", "parts", "diffusers")),
    *(Case("sd3.5-medium", form) for form in ("safetensors", "gguf", "parts", "diffusers")),
    Case("sd3.5-large", "safetensors"), Case("sd3.5-medium", "gguf-parts", "Q8_0"),
    *(Case("z-image", form) for form in ("safetensors", "sharded")), Case("z-image", "gguf-parts", "Q4_K"),
    Case("flux2-klein-4b", "safetensors"), Case("flux2-klein-4b", "gguf-parts", "Q8_0"),
    Case("flux2-dev", "sharded"), Case("flux2-dev", "gguf-parts", "Q4_K"),
    *(Case("wan", form) for form in ("safetensors", "diffusers")), Case("wan", "gguf-parts", "Q8_0"),
    Case("wan2.1-i2v", "parts"), Case("wan2.1-i2v", "diffusers"), Case("wan2.2-i2v", "parts"),
    Case("wan2.2-a14b", "parts"), Case("wan2.2-a14b", "diffusers"), Case("wan2.2-5b", "safetensors"),
    *(Case("qwen-image", form) for form in ("safetensors", "sharded")), Case("qwen-image", "gguf-parts", "Q8_0"),
    Case("krea2", "safetensors"), Case("krea2", "sharded"),
    Case("pixart-sigma", "safetensors"), Case("pixart-sigma", "diffusers"), Case("pixart-alpha", "parts"),
    Case("lumina2", "safetensors"), Case("lumina2", "sharded"), Case("lumina2", "gguf-parts", "Q8_0"),
    Case("sana", "parts"), Case("sana", "sharded"), Case("sana-1.5", "safetensors"),
    Case("qwen-image-edit", "safetensors"), Case("qwen-image-edit", "gguf-parts", "Q8_0"),
    Case("ltx-video", "safetensors"), Case("ltx-video", "diffusers"), Case("ltx-video", "gguf-parts", "Q8_0"),
    Case("ltx-video-13b", "safetensors"), Case("ltx2", "safetensors"), Case("ltx2-i2v", "diffusers"),
    Case("ltx2.3", "safetensors"),
)  # fmt: skip

FORMAT_CASES = (
    Case("sdxl", "parts", "F8_E4M3"), Case("flux1-schnell", "parts", "F8_E5M2"),
    *(Case("flux1-dev", "parts", kind) for kind in QUANTIZED), Case("z-image", "safetensors", "comfy-nvfp4"),
    *(Case(family, "gguf-parts", "mixed") for family in ("sdxl", "flux1-dev")),
)  # fmt: skip
"""What files have numbers in, beside what the families are shown with."""

NOT_WHOLE = ("wan2.1-i2v", "wan2.2-a14b", "wan2.2-i2v", "pixart-alpha", "sana", "ltx2-i2v")
"""Which nobody has in one file, or others have as well; A14B's models are those of Wan 2.1, PixArt-Alpha's that of
Sigma, Sana 1.0's that of 1.5."""

NATIVE_CASES = (
    *(Case(family, "safetensors") for family in FAMILIES if family not in NOT_WHOLE),
    Case("wan2.1-i2v", "parts"),
    *(Case(family, "gguf", "Q8_0") for family in ("sd1", "sdxl", "flux1-dev")),
)
"""What is drawn through ggml's own server as well: its graphs depend on the family and on types, not on forms."""


@dataclass(frozen=True)
class Checkpoints:
    """The cases' files in ``folder``, each made when it is first asked for."""

    folder: Path

    def made(self, case: Case) -> Made:
        return _made(self.folder, case)

    def files(self, case: Case) -> ModelFiles:
        paths = dict(self.made(case).files)
        for name in ("diffusion", "high_noise_diffusion"):
            if name in paths:
                paths[f"{name}_model"] = paths.pop(name)
        return ModelFiles(**paths)

    def wanted(self, case: Case) -> np.ndarray:
        """What diffusers' pipeline draws: (height, width, 3) of 0 … 1, of a film (frames, height, width, 3)."""
        return _wanted(self.folder, self.first(case)).pixels

    def heard(self, case: Case) -> np.ndarray | None:
        """The sound of a film that it draws, (ears, samples) of -1 … 1; None where there is none."""
        return _wanted(self.folder, self.first(case)).sound

    def first(self, case: Case) -> Case:
        """The first case with the same numbers in its file: in another form it is the same picture."""
        return next((each for each in (*CASES, *FORMAT_CASES) if _same_numbers(each, case)), case)


def _same_numbers(one: Case, other: Case) -> bool:
    """Whether all forms hold numbers of this type, and so the same ones: in blocks they depend on how tensors lie."""
    return one == other or ((one.family, one.type) == (other.family, other.type) and one.type in PLAIN)


@cache
def _made(folder: Path, case: Case) -> Made:
    return make(case.family, folder / str(case), form=case.form, type=case.type)


@cache
def _wanted(folder: Path, case: Case) -> Drawn:
    """Kept outside the clone: ``make interop`` compares with the same pictures, and drawing them takes a minute."""
    path = KEPT / f"{case}-{_how_drawn(case)}.npz"
    if path.is_file():
        with np.load(path) as kept:
            return Drawn(**kept)
    drawn = draw(_made(folder, case).pipeline(), drawing(case))
    made = io.BytesIO()
    np.savez(made, **{name: array for name, array in drawn._asdict().items() if array is not None})
    write_whole(path, made.getvalue())
    return drawn


KEPT = CACHE / "pictures"
WHO_DRAWS = ("torch", "diffusers", "transformers", "tokenizers", "numpy", "gguf")


def _how_drawn(case: Case) -> str:
    """A digest of all that decides what diffusers draws: who makes the weights, what is asked for, and versions."""
    asked = {name: _plain(value) for name, value in vars(drawing(case)).items()}
    about = repr((_sources(), [version(name) for name in WHO_DRAWS], asked))
    return blake2b(about.encode(), digest_size=12).hexdigest()


@cache
def _sources() -> str:
    root = Path(__file__).parents[2]
    folders = (root / "tools" / "checkpoints", root / "tests" / "support" / "references")
    files = [*(path for folder in folders for path in folder.glob("*.py")), *VOCABULARIES.iterdir()]
    return blake2b(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [*map(_plain, value)]
    return blake2b(np.asarray(value).tobytes()).digest() if isinstance(value, np.ndarray | Image.Image) else value


@dataclass(frozen=True)
class Latents:
    """Of a family's diffusion model: channels, and pixels on a side that one of them stands for."""

    channels: int
    pixels: int = 8


def _latents(family: str) -> Latents:
    if family.startswith("flux2"):
        return Latents(128, 16)
    if family.startswith("ltx"):
        return Latents(128, 32)
    if family == "wan2.2-5b":
        return Latents(48, 16)
    if family.startswith("sana"):
        return Latents(32, 32)
    return Latents(4) if family.startswith(("sd1", "sd2", "sdxl", "pixart")) else Latents(16)


def shown(case: Case) -> tuple[np.ndarray, ...]:
    """The pictures that a case refers to, (height, width, 3), which Qwen2.5-VL sees in these sizes."""
    if case.family != "qwen-image-edit":
        return ()
    rows, columns = np.mgrid[:224, :672]
    scene = np.stack([rows, columns * 255 // 671, 255 - rows], -1).astype(np.uint8)
    return scene, np.ascontiguousarray(scene.transpose(1, 0, 2)[::-1])


def ends(case: Case) -> dict[str, np.ndarray]:
    """The pictures that a case's film begins and ends with (height, width, 3), by a request's names."""
    count = {"wan2.1-i2v": 1, "wan2.2-i2v": 2, "ltx-video-13b": 1, "ltx2-i2v": 1, "ltx2.3": 1}.get(case.family, 0)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return {
        name: np.stack([x * 2, y * 4, np.full_like(x, 90 * number)], -1).astype(np.uint8)
        for number, name in enumerate(ENDS[:count])
    }


HIGH_NOISE: dict[str, dict[str, Any]] = {
    "wan2.2-a14b": {"high_noise_cfg_scale": 2.5},
    "wan2.2-i2v": {"high_noise_steps": 1, "steps": STEPS - 1},  # those from the boundary on
}
"""What a case asks of the model for high noise, by a request's names."""


def request(case: Case) -> Request:
    """Guidance by a negative prompt for all but FLUX.1 and FLUX.2 dev."""
    distilled = case.family.startswith(("flux1", "flux2-dev"))
    return Request(
        "a lovely cat, in the style of nobody", "" if distilled else "blurry, dark", WIDTH, HEIGHT,
        cfg_scale=1.0 if distilled else 4.0, guidance=2.5, seed=SEED, sampling_method="euler", scheduler="discrete",
        prediction={"sd2": "v", "sd2-base": "eps"}.get(case.family), video_frames=_together(case.family) + 1,
        ref_images=shown(case), **ends(case), **{"steps": STEPS, **HIGH_NOISE.get(case.family, {})},
    )  # fmt: skip


def drawing(case: Case) -> Drawing:
    """The same for diffusers."""
    asked, latents = request(case), _latents(case.family)
    first, last = [*map(Image.fromarray, ends(case).values()), None, None][:2]
    shape = (latents.channels, HEIGHT // latents.pixels, WIDTH // latents.pixels)
    sound = sound_length(FRAMES["ltx"] + 1, 24) if case.family.startswith("ltx2") else 0
    if _together(case.family):
        shape = (shape[0], 2 + -(-sound // (shape[1] * shape[2])), *shape[1:])
    noise = make_rng(asked.rng, SEED).normal(int(np.prod(shape))).reshape(shape)
    return Drawing(
        asked.prompt, noise, make_sigmas("discrete", STEPS, predicts(case.family)).tolist(), asked.negative_prompt,
        asked.cfg_scale or 1.0, asked.guidance or 0.0,
        prediction={"sd2": "v_prediction", "sd2-base": "epsilon"}.get(case.family), pixels=latents.pixels,
        shown=tuple(map(Image.fromarray, shown(case))), image=first, last=last,
        high_cfg=asked.high_noise_cfg_scale, sound=sound,
    )  # fmt: skip


def _together(family: str) -> int:
    """Frames that a latent one stands for, 0 of pictures."""
    return next((frames for begins, frames in FRAMES.items() if family.startswith(begins)), 0)


def predicts(family: str) -> Prediction:
    if family.startswith("ltx"):
        return prediction("sd3_flow", shift=1.0)
    if family.startswith("wan"):
        return prediction("sd3_flow", shift=5.0)
    if family == "lumina2":
        return prediction("sd3_flow", shift=6.0)
    if family.startswith("sana"):
        return prediction("sd3_flow", shift=3.0)
    if family.startswith(("sd3", "z-image", "qwen-image")):
        return prediction("sd3_flow")
    if family.startswith(("flux", "chroma", "krea2")):
        return prediction("flux_flow", shift=_shift(family))
    found = prediction("v" if family == "sd2" else "eps")
    return Eps(NoiseScale(0.0001, 0.02, linear=True)) if family.startswith("pixart") else found


def _shift(family: str) -> float:
    """1.15 for Krea 2, 1 for FLUX.1 schnell and Chroma; FLUX.1 dev's for this size, on the line from 0.5 at 256 tokens
    to 1.15 at 4096; FLUX.2's by its pipeline."""
    tokens = (WIDTH // 16) * (HEIGHT // 16)
    if family.startswith("flux2"):
        return float(compute_empirical_mu(tokens, STEPS))
    if family in ("flux1-schnell", "chroma"):
        return 1.0
    if family == "krea2":
        return 1.15
    return 0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)


def distance(checkpoints: Checkpoints, case: Case, devices: Sequence[Device], graphs: Path) -> float:
    """dB between our picture, its components on ``devices`` in turn, and diffusers' one; of a film with sound the less
    of pictures and sound."""
    files = checkpoints.files(case)
    with Session.open(files, devices[0], Cache(graphs)) as probe:
        names = list(probe.model.components)
    placement: Mapping[str, Device] = {name: devices[i % len(devices)] for i, name in enumerate(names)}
    with Session.open(files, placement, Cache(graphs)) as session:
        drawn, sound = _film(session, case) if session.model.frames else (_picture(session, case), None)
    wanted, heard = checkpoints.wanted(case), checkpoints.heard(case)
    assert wanted.std() > 0.01, "something is to be seen"
    if heard is None or sound is None:
        assert heard is sound
        return psnr(drawn, wanted)
    assert heard.std() > 0.01, "something is to be heard"
    return min(psnr(drawn, wanted), psnr((sound + 1) / 2, (heard + 1) / 2))


def _picture(session: Session, case: Case) -> np.ndarray:
    (picture,) = session.generate(request(case))
    return picture.image


def _film(session: Session, case: Case) -> tuple[np.ndarray, np.ndarray | None]:
    """(frames, height, width, 3), and its sound (ears, samples)."""
    (film,) = session.generate_video(request(case))
    return np.stack(list(film.frames)), None if film.sound is None else film.sound.samples

"""What to draw, and what is filled in where a request says nothing."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np

from ..errors import InvalidValue
from ..families.base import Defaults, Resize
from ..prompts.tags import loras
from ..prompts.text import check
from .caching import POLICIES, CacheOptions, find_options
from .canny import canny
from .guidance import SKIPPED, LeftOut
from .halves import HIGH_NOISE, HighNoise
from .hires import LATENT, UPSCALERS, Hires, second_size
from .pictures import Pixels, fitted
from .predictions import PREDICTIONS, TIMESTEPS
from .previews import Previews, find_previews
from .rng import RNGS, make_rng
from .samplers import find_sampler
from .schedules import ALIASES, SCHEDULES
from .tiles import Tiling
from .upscaling import MAX_TILE as MAX_UPSCALER_TILE
from .upscaling import MIN_TILE as MIN_UPSCALER_TILE
from .upscaling import TILE as UPSCALER_TILE

T = TypeVar("T")

MAX_SIDE = 16384
MAX_STEPS = 10000
MAX_BATCH = 10000
MAX_FACTOR = 1e6
MAX_REFERENCES = 16
MAX_FRAMES = 10000
MAX_FPS = 1000
MIN_TILE = 8
MAX_OVERLAP = 0.9

APPLY_MODES = ("auto", "immediately", "at_runtime")
"""How LoRAs are applied, by stable-diffusion.cpp's names. ``at_runtime``: beside the weights, which stay as they are;
another strength or LoRA sends no weights. ``immediately``: merged into the weights while these are sent, which costs
nothing per step. ``auto``: at_runtime, since over a network it is the weights that take time."""


@dataclass(frozen=True)
class Applied:
    """A LoRA and how strongly it is applied. ``name``: in the session's folder; a :class:`Path` is a file anywhere."""

    name: str | Path
    strength: float


def summed(loras: Iterable[tuple[str | Path, float]]) -> tuple[Applied, ...]:
    """Each LoRA once, in the order in which they are first named, with the sum of its strengths, as in
    stable-diffusion.cpp. Raises :class:`InvalidValue` for a strength that is no number."""
    strengths: dict[str | Path, float] = {}
    for name, strength in loras:
        if not abs(strength) < MAX_FACTOR:
            raise InvalidValue("loras", f"{name}:{strength}", f"its strength is not a number below {MAX_FACTOR:.0e}")
        strengths[name] = strengths.get(name, 0.0) + strength
    return tuple(Applied(name, strength) for name, strength in strengths.items())


@dataclass(frozen=True)
class Request:
    """What to draw. The fields have the names of sd-cli's options; None means what the model or the sampler is made
    for. Pictures are pixels, uint8 (height, width, 3); they are cut and scaled to the size that is drawn."""

    prompt: str
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    """In pixels; None with ``init_image``: its size."""
    steps: int | None = None
    cfg_scale: float | None = None
    """How strongly to follow the prompt; 1: no guidance by a negative prompt."""
    guidance: float | None = None
    """Of models that were distilled with it (FLUX.1 dev)."""
    seed: int = 42
    """Below 0: a random one."""
    batch_count: int = 1
    """How many pictures, with seeds counting up."""
    sampling_method: str | None = None
    scheduler: str | None = None
    clip_skip: int = -1
    """2 leaves out CLIP's last layer; below 1: the family's own."""
    rng: str = "cuda"
    """Where the noise comes from that a picture begins as."""
    sampler_rng: str | None = None
    """Where the noise comes from that samplers add; None: as ``rng``."""
    eta: float | None = None
    """How much new noise a sampler adds."""
    prediction: str | None = None
    """What the model predicts, where its file does not tell."""
    flow_shift: float | None = None
    loras: Sequence[tuple[str | Path, float]] = ()
    """Names (in the session's folder, or a :class:`Path`) with strengths, besides those in the prompt,
    ``<lora:name:0.8>``."""

    control_image: Pixels | None = field(default=None, compare=False, repr=False)
    """What a ControlNet is shown."""
    control_strength: float = 0.9
    """How much that counts."""
    control_mode: int | None = None
    """Which kind of picture it is, for ControlNets for several (Union)."""
    canny: bool = False
    """The ControlNet is shown the picture's edges."""

    init_image: Pixels | None = field(default=None, compare=False, repr=False)
    """The picture to begin with."""
    strength: float = 0.75
    """How much of the noise it gets, 0 … 1; 1: all."""
    mask: Pixels | None = field(default=None, compare=False, repr=False)
    """Pixels (height, width): where ``init_image`` is drawn anew (255), stays (0), or something between."""
    ref_images: tuple[Pixels, ...] = field(default=(), compare=False, repr=False)
    """Pictures that the model is shown, where its family knows what to do with them."""
    img_cfg_scale: float | None = None
    """How strongly an inpainting model follows what is around the mask; None: as ``cfg_scale``, 1: as much as it was
    trained to."""

    sigmas: tuple[float, ...] = ()
    """Levels of noise, falling to 0, instead of those of ``scheduler`` and ``steps``."""
    timestep_shift: int = 0
    """Of NitroFusion's models; 0: none."""
    slg_scale: float = 0.0
    """Skip layer guidance: how far away from what the model predicts without ``skip_layers``, between
    ``skip_layer_start`` and ``skip_layer_end`` of the steps."""
    skip_layers: tuple[int, ...] = SKIPPED.layers
    skip_layer_start: float = SKIPPED.start
    skip_layer_end: float = SKIPPED.end
    cache_mode: str = "disabled"
    """``easycache`` leaves steps out in which little would change, ``dbcache`` blocks of transformers."""
    cache_option: str = ""
    """How: ``name=number`` with commas in between, the fields of :class:`sdrpc.diffusion.easycache.Options` or
    :class:`sdrpc.diffusion.dbcache.Options`."""
    scm_mask: str = ""
    """For dbcache: which steps are computed (1) and which may leave out blocks (0), with commas in between."""
    scm_policy: str = POLICIES[0]
    """Whether those leave blocks out where little changes (``dynamic``), or always (``static``)."""

    video_frames: int | None = None
    """Of a film, how many pictures it has."""
    fps: int | None = None
    """How many of them make a second."""
    moe_boundary: float | None = None
    """The level of noise, 0 … 1, from which on a model for high noise predicts, if there is one."""
    high_noise_steps: int | None = None
    """Or the steps that are its own, before the others."""
    high_noise_cfg_scale: float | None = None
    high_noise_sampling_method: str | None = None
    high_noise_eta: float | None = None
    """Of its steps, where they have others than the rest."""
    end_image: Pixels | None = field(default=None, compare=False, repr=False)
    """What a film ends with that begins with ``init_image``."""

    preview: str = "none"
    """What events show of a picture while it is drawn: ``proj`` (colours of latents, no network), ``tae`` (by the tiny
    autoencoder), ``vae``, ``none``."""
    preview_interval: int = 1
    """After every how many steps."""
    preview_noisy: bool = False
    """Of latents with their noise."""
    taesd_preview_only: bool = False
    """A tiny autoencoder decodes no pictures, but previews."""
    vae_tiling: bool = False
    """The VAE works in tiles; where memory would not do for the whole it does so anyway."""
    vae_tile_size: tuple[int, int] = (32, 32)
    """Latents, width and height."""
    vae_tile_overlap: float = 0.5
    """Share of a tile's side that is the next one's as well."""

    hires: bool = False
    """Draw in ``width`` and ``height``, enlarge that, and draw on from there."""
    hires_scale: float = 2.0
    hires_width: int | None = None
    hires_height: int | None = None
    """In pixels; None: ``hires_scale`` times."""
    hires_steps: int = 0
    """Of the second pass; 0: as many as in the first."""
    hires_denoising_strength: float = 0.7
    """How much of the noise the enlarged picture gets, 0 … 1."""
    hires_upscaler: str | Path = LATENT
    """A filter's name, or the :class:`Path` of a network (ESRGAN and whatever else spandrel reads)."""
    hires_sigmas: tuple[float, ...] = ()
    """Levels of noise of the second pass, falling to 0, instead of its steps and strength."""
    hires_upscale_tile_size: int = UPSCALER_TILE
    """Pixels on a side of what goes through that network at once."""

    def resolved(
        self,
        defaults: Defaults,
        size: tuple[int, int],
        multiple: int,
        together: int = 0,
        drawn: Resize | None = None,
    ) -> Settings:
        """The request with everything filled in: a model's ``defaults``, and its ``size`` (width and height in pixels),
        rounded up to a ``multiple`` as stable-diffusion.cpp does. Pictures have the size that is drawn.

        ``together``: frames of a film that are drawn together behind the first one, so that the number of frames is
        rounded down to one more than a multiple of it; 0 for a picture. ``drawn``: the size of what is drawn of a
        reference picture, where that decides it.

        Raises :class:`InvalidValue` for what can't be drawn, so that nothing is loaded in vain.
        """
        text, named = loras("prompt", self.prompt)
        check("prompt", text)
        check("negative_prompt", self.negative_prompt)
        self._check_pictures()
        _check_sigmas("sigmas", self.sigmas)
        self._check_names()
        width, height = self._size(size, drawn, together > 0)
        steps = len(self.sigmas) - 1 if self.sigmas else _or(self.steps, defaults.steps)
        frames = _or(self.video_frames, defaults.frames) if together else 1
        fps = _or(self.fps, defaults.fps)
        cfg_scale, guidance = _or(self.cfg_scale, defaults.cfg_scale), _or(self.guidance, defaults.guidance)
        boundary = _or(self.moe_boundary, defaults.moe_boundary)
        if not 0 <= boundary <= 1:
            raise InvalidValue("moe_boundary", boundary, "it can be 0 … 1")
        _check_counts(
            width=width, height=height, steps=steps, batch_count=self.batch_count, video_frames=frames, fps=fps
        )
        _check_factors(
            cfg_scale=cfg_scale, guidance=guidance, eta=self.eta, flow_shift=self.flow_shift,
            img_cfg_scale=self.img_cfg_scale, slg_scale=self.slg_scale, control_strength=self.control_strength,
            high_noise_cfg_scale=self.high_noise_cfg_scale, high_noise_eta=self.high_noise_eta,
        )  # fmt: skip
        seed = self.seed if self.seed >= 0 else secrets.randbelow(1 << 31)
        make_rng(self.rng, seed + self.batch_count - 1)
        method = self.sampling_method or defaults.sampler
        sampler = find_sampler(method)
        eta = sampler.told(self.eta)
        width, height = _up(width, multiple), _up(height, multiple)

        def fit(picture: Pixels | None) -> Pixels | None:
            return None if picture is None else fitted(picture, width, height)

        return Settings(
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            width=width,
            height=height,
            steps=steps,
            cfg_scale=cfg_scale,
            guidance=guidance,
            seed=seed,
            batch_count=self.batch_count,
            sampling_method=method,
            scheduler=self.scheduler or defaults.scheduler or sampler.schedule,
            clip_skip=self.clip_skip,
            rng=self.rng,
            sampler_rng=self.sampler_rng or self.rng,
            eta=eta,
            prediction=self.prediction or defaults.prediction,
            flow_shift=_or(self.flow_shift, defaults.flow_shift),
            text=text,
            loras=summed([*named, *self.loras]),
            control_image=self._shown_to_control(width, height),
            control_strength=self.control_strength,
            control_mode=self.control_mode,
            init_image=fit(self.init_image),
            strength=self.strength,
            mask=fit(self.mask),
            ref_images=self.ref_images,
            img_cfg_scale=_or(self.img_cfg_scale, cfg_scale),
            sigmas=self.sigmas,
            timestep_shift=self._timestep_shift(),
            left_out=self._left_out(),
            cache=find_options(self.cache_mode, self.cache_option, self.scm_mask, self.scm_policy),
            video_frames=(frames - 1) // max(together, 1) * together + 1,
            fps=fps,
            moe_boundary=boundary,
            end_image=fit(self.end_image),
            previews=find_previews(self.preview, self.preview_interval, self.preview_noisy),
            taesd_preview_only=self.taesd_preview_only,
            vae_tiling=self.vae_tiling,
            tiling=self._tiling(),
            hires=self._hires(width, height, multiple, steps),
            high_noise=self._high_noise(steps, cfg_scale, method, eta),
        )

    def _size(self, size: tuple[int, int], drawn: Resize | None, film: bool) -> tuple[int, int]:
        """Width and height as they are asked for; else of the picture that is begun with, of the last one that is
        referred to, or ``size``."""
        if self.ref_images and drawn is not None:
            rows, columns = self.ref_images[-1].shape[:2]
            size = drawn(columns, rows)
        if self.init_image is not None and not film:
            size = self.init_image.shape[1], self.init_image.shape[0]
        return _or(self.width, size[0]), _or(self.height, size[1])

    def _check_names(self) -> None:
        for entry, name, known, aliases in (
            ("sampler_rng", self.sampler_rng, RNGS, ()),
            ("prediction", self.prediction, PREDICTIONS, ()),
            ("scheduler", self.scheduler or None, SCHEDULES, ALIASES),
        ):
            if name is not None and name not in known and name not in aliases:
                raise InvalidValue(entry, name, f"does not exist; there are {', '.join(known)}")

    def _high_noise(self, steps: int, cfg_scale: float, method: str, eta: float) -> HighNoise | None:
        """How the model for high noise draws, if anything is said of it; the rest as the other one."""
        more, sampler = self.high_noise_steps, self.high_noise_sampling_method
        if all(said is None for said in (more, self.high_noise_cfg_scale, sampler, self.high_noise_eta)):
            return None
        most = steps if self.sigmas else MAX_STEPS - steps
        if more is not None and not 0 <= more <= most:
            raise InvalidValue("high_noise_steps", more, f"it can be 0 … {most}")
        if sampler is not None:
            eta = find_sampler(sampler).told(self.eta)
        return HighNoise(
            more, cfg_scale if self.high_noise_cfg_scale is None else self.high_noise_cfg_scale, sampler or method,
            eta if self.high_noise_eta is None else self.high_noise_eta,
        )  # fmt: skip

    def _timestep_shift(self) -> int:
        if not 0 <= self.timestep_shift <= TIMESTEPS:
            raise InvalidValue("timestep_shift", self.timestep_shift, f"it can be 0 (none) … {TIMESTEPS}")
        return self.timestep_shift

    def _hires(self, width: int, height: int, multiple: int, steps: int) -> Hires | None:
        if not self.hires:
            return None
        network = self.hires_upscaler if isinstance(self.hires_upscaler, Path) else None
        if network is None and self.hires_upscaler not in UPSCALERS:
            reason = f"does not exist here; there are {', '.join(UPSCALERS)}, and files of networks"
            raise InvalidValue("hires_upscaler", self.hires_upscaler, reason)
        _check_sigmas("hires_sigmas", self.hires_sigmas)
        tile = self.hires_upscale_tile_size
        if not MIN_UPSCALER_TILE <= tile <= MAX_UPSCALER_TILE:
            reason = f"it can be {MIN_UPSCALER_TILE} … {MAX_UPSCALER_TILE}"
            raise InvalidValue("hires_upscale_tile_size", tile, reason)
        if not 0 <= self.hires_denoising_strength <= 1:
            raise InvalidValue("hires_denoising_strength", self.hires_denoising_strength, "it can be 0 … 1")
        if not 0 <= self.hires_steps <= MAX_STEPS:
            raise InvalidValue("hires_steps", self.hires_steps, f"it can be 0 … {MAX_STEPS}")
        wanted = self.hires_width, self.hires_height
        for name, side in zip(("hires_width", "hires_height"), wanted, strict=True):
            if side is not None and not 1 <= side <= MAX_SIDE:
                raise InvalidValue(name, side, f"it can be 1 … {MAX_SIDE}")
        larger = second_size(width, height, wanted, self.hires_scale, multiple)
        if max(larger) > MAX_SIDE:
            raise InvalidValue("hires_scale", self.hires_scale, f"{max(larger)} pixels on a side; {MAX_SIDE} can be")
        name = str(self.hires_upscaler) if network is None else network.stem
        steps = len(self.hires_sigmas) - 1 if self.hires_sigmas else self.hires_steps or steps
        strength = 1.0 if self.hires_sigmas else self.hires_denoising_strength
        return Hires(*larger, name, steps, strength, network, tile, self.hires_sigmas)

    def _tiling(self) -> Tiling:
        width, height = self.vae_tile_size
        if not MIN_TILE <= min(width, height) <= max(width, height) <= MAX_SIDE:
            raise InvalidValue("vae_tile_size", f"{width}x{height}", f"sides can be {MIN_TILE} … {MAX_SIDE} latents")
        if not 0 <= self.vae_tile_overlap <= MAX_OVERLAP:
            raise InvalidValue("vae_tile_overlap", self.vae_tile_overlap, f"it can be 0 … {MAX_OVERLAP}")
        return Tiling(width, height, self.vae_tile_overlap)

    def _left_out(self) -> LeftOut | None:
        """Skip layer guidance, if there is any."""
        start, end = self.skip_layer_start, self.skip_layer_end
        for name, share in (("skip_layer_start", start), ("skip_layer_end", end)):
            if not 0 <= share <= 1:
                raise InvalidValue(name, share, "it can be 0 … 1")
        if self.slg_scale == 0 or not self.skip_layers:
            return None
        return LeftOut(self.slg_scale, tuple(sorted(set(self.skip_layers))), start, end)

    def _check_pictures(self) -> None:
        """Raises :class:`InvalidValue` for arrays that are no pictures, or that nothing can be done with."""
        if not 0 <= self.strength <= 1:
            raise InvalidValue("strength", self.strength, "it can be 0 … 1")
        if self.init_image is not None:
            _check_pixels("init_image", self.init_image, 3)
        if self.end_image is not None:
            _check_pixels("end_image", self.end_image, 3)
        if self.mask is not None:
            _check_pixels("mask", self.mask, 2)
            if self.init_image is None:
                size = "×".join(map(str, self.mask.shape[::-1]))
                raise InvalidValue("mask", size, "there is no init_image to mask", "init_image")
        if self.control_image is not None:
            _check_pixels("control_image", self.control_image, 3)
        elif self.canny:
            raise InvalidValue("canny", "on", "there is no control_image whose edges it could be", "control_image")
        if len(self.ref_images) > MAX_REFERENCES:
            raise InvalidValue("ref_images", len(self.ref_images), f"up to {MAX_REFERENCES} are taken")
        for picture in self.ref_images:
            _check_pixels("ref_images", picture, 3)

    def _shown_to_control(self, width: int, height: int) -> Pixels | None:
        if self.control_image is None:
            return None
        picture = fitted(self.control_image, width, height)
        return canny(picture) if self.canny else picture


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


_MOST = {
    "width": MAX_SIDE, "height": MAX_SIDE, "steps": MAX_STEPS, "batch_count": MAX_BATCH, "video_frames": MAX_FRAMES,
    "fps": MAX_FPS,
}  # fmt: skip


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if not 1 <= value <= _MOST[name]:
            raise InvalidValue(name, value, f"it can be 1 … {_MOST[name]}")


def _check_factors(**factors: float | None) -> None:
    for name, number in factors.items():
        if number is not None and not abs(number) < MAX_FACTOR:
            raise InvalidValue(name, number, f"not a number below {MAX_FACTOR:.0e}")


def _check_sigmas(field: str, sigmas: tuple[float, ...]) -> None:
    if not sigmas:
        return
    shown = ",".join(f"{sigma:g}" for sigma in sigmas)
    falling = all(later < earlier < MAX_FACTOR for earlier, later in pairwise(sigmas))
    if len(sigmas) < 2 or not falling or sigmas[-1] != 0:
        raise InvalidValue(field, shown, "levels of noise fall from one to the next, and end in 0: 14.6,7.8,3.5,0")


_SHAPES = {2: "height, width", 3: "height, width, 3"}


def _check_pixels(name: str, pixels: Pixels, dimensions: int) -> None:
    said = f"{pixels.dtype} {list(pixels.shape)}"
    if pixels.dtype != np.uint8 or pixels.ndim != dimensions or pixels.shape[2:] not in ((), (3,)):
        raise InvalidValue(name, said, f"uint8 pixels ({_SHAPES[dimensions]}) are needed")
    if not 0 < min(pixels.shape[:2]) <= max(pixels.shape[:2]) <= MAX_SIDE:
        height, width = pixels.shape[:2]
        raise InvalidValue(name, f"{width}×{height}", f"sides of a picture can be 1 … {MAX_SIDE} pixels")


def _up(side: int, multiple: int) -> int:
    return -(-side // multiple) * multiple


@dataclass(frozen=True)
class Settings:
    """A request in which nothing is left open but what only an evaluation of the model tells (``prediction``), or what
    follows from the size (``flow_shift``). ``prompt`` as it was given, ``text``: what of it is encoded."""

    prompt: str
    negative_prompt: str
    width: int
    height: int
    steps: int
    cfg_scale: float
    guidance: float
    seed: int
    batch_count: int
    sampling_method: str
    scheduler: str
    clip_skip: int
    rng: str
    sampler_rng: str
    eta: float
    prediction: str | None
    flow_shift: float | None
    text: str
    loras: tuple[Applied, ...]
    control_image: Pixels | None = field(compare=False, repr=False)
    control_strength: float
    control_mode: int | None = None
    init_image: Pixels | None = field(default=None, compare=False, repr=False)
    strength: float = 0.75
    mask: Pixels | None = field(default=None, compare=False, repr=False)
    ref_images: tuple[Pixels, ...] = field(default=(), compare=False, repr=False)
    img_cfg_scale: float = 7.0
    sigmas: tuple[float, ...] = ()
    timestep_shift: int = 0
    left_out: LeftOut | None = None
    cache: CacheOptions | None = None
    video_frames: int = 1
    fps: int = 16
    moe_boundary: float = 0.875
    end_image: Pixels | None = field(default=None, compare=False, repr=False)
    previews: Previews | None = None
    taesd_preview_only: bool = False
    vae_tiling: bool = False
    tiling: Tiling | None = None
    hires: Hires | None = None
    high_noise: HighNoise | None = None

    @property
    def all_steps(self) -> int:
        """Of both models, where one has its own for high noise."""
        return self.steps + ((self.high_noise and self.high_noise.steps) or 0)

    @property
    def predictions(self) -> int:
        """How many of the diffusion model make the one that a sampler follows: with the prompt, with the negative one,
        and with that beside what is around a mask."""
        apart = self.img_cfg_scale != self.cfg_scale
        if self.cfg_scale == 1 and not apart:
            return 1
        return 3 if apart and self.img_cfg_scale != 1 else 2

    def of(self, component: str) -> Settings:
        """What holds for the steps that one diffusion model draws."""
        high = self.high_noise
        if component != HIGH_NOISE or high is None:
            return self
        return replace(
            self, cfg_scale=high.cfg_scale, img_cfg_scale=high.cfg_scale, sampling_method=high.sampling_method,
            eta=high.eta,
        )  # fmt: skip

    @property
    def final_size(self) -> tuple[int, int]:
        """Width and height of what comes out."""
        return (self.width, self.height) if self.hires is None else (self.hires.width, self.hires.height)

"""What to draw, and what is filled in where a request says nothing."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

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
    for.

    ``seed`` below 0: a random one. ``clip_skip`` below 1: the family's own. ``cfg_scale`` 1: no guidance by a negative
    prompt; ``guidance``: of models that were distilled with it (FLUX.1 dev). ``eta``: how much new noise a sampler
    adds; ``sampler_rng``: where that comes from, if not from ``rng`` like the noise that a picture begins as.
    ``loras``: names (in the session's folder, or a :class:`Path`) with strengths, besides those in the prompt,
    ``<lora:name:0.8>``.

    ``init_image``: pixels (height, width, 3) to begin with, uint8; they are cut and scaled to the picture's size, which
    is theirs where none is given. ``strength``: how much of the noise they get, 0 … 1; 1: all. ``mask``: pixels
    (height, width), uint8: where ``init_image`` is drawn anew (255), stays (0), or something between. ``ref_images``:
    pictures that the model is shown, where its family knows what to do with them. ``img_cfg_scale``: how strongly an
    inpainting model follows what is around the mask; None: as ``cfg_scale``, 1: as much as it was trained to.

    ``sigmas``: levels of noise, falling to 0, instead of those of ``scheduler`` and ``steps``. ``timestep_shift``: of
    NitroFusion's models, 0: none. ``slg_scale``: skip layer guidance, how far away from what the model predicts without
    ``skip_layers``, between ``skip_layer_start`` and ``skip_layer_end`` of the steps. ``cache_mode``: ``easycache``
    leaves steps out in which little would change, ``dbcache`` blocks of transformers, as ``cache_option`` says (the
    fields of :class:`sdrpc.diffusion.easycache.Options` and :class:`sdrpc.diffusion.dbcache.Options`); ``scm_mask``:
    for dbcache, which steps are computed (1) and which may leave out blocks (0), or always do if ``scm_policy`` is
    ``static``.

    ``control_image``: pixels (height, width, 3), uint8, that a ControlNet is shown, cut and scaled likewise;
    ``control_strength``: how much it counts; ``canny``: it is shown the picture's edges; ``control_mode``: which kind
    of picture it is, for those that are for several (Union).

    ``video_frames`` and ``fps``: of a film, how many pictures it has and how many make a second. ``moe_boundary``: the
    level of noise, 0 … 1, from which on a model for high noise predicts, if there is one; or ``high_noise_steps`` are
    its own, before the others. ``high_noise_cfg_scale``, ``high_noise_sampling_method`` and ``high_noise_eta``: of its
    steps, where they have others than the rest. ``end_image``: what a film
    ends with that begins with ``init_image``; both are cut and scaled to its size.
    ``preview``: what events show of a picture while it is drawn, after every ``preview_interval``-th step: ``proj``
    (colours of latents, no network), ``tae`` (by the tiny autoencoder), ``vae``, ``none``; with ``preview_noisy`` of
    latents with their noise. A tiny autoencoder decodes pictures as well, unless ``taesd_preview_only``.
    ``vae_tiling``: let the VAE work in tiles of ``vae_tile_size`` latents (width, height) that share
    ``vae_tile_overlap`` of a side; where memory would not do for the whole it does so anyway.

    ``hires``: draw in ``width`` and ``height``, enlarge that by ``hires_upscaler`` to ``hires_width`` and
    ``hires_height`` (or ``hires_scale`` times), and draw on in that size, in ``hires_steps`` (0: as many), from
    ``hires_denoising_strength`` of the noise. ``hires_upscaler``: a filter's name, or the :class:`Path` of a network
    (ESRGAN and whatever else spandrel reads), which works in tiles of ``hires_upscale_tile_size`` pixels on a side.
    ``hires_sigmas``: the levels of noise of then, falling to 0, instead of steps and strength.
    """

    prompt: str
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    cfg_scale: float | None = None
    guidance: float | None = None
    seed: int = 42
    batch_count: int = 1
    sampling_method: str | None = None
    scheduler: str | None = None
    clip_skip: int = -1
    rng: str = "cuda"
    sampler_rng: str | None = None
    eta: float | None = None
    prediction: str | None = None
    flow_shift: float | None = None
    loras: Sequence[tuple[str | Path, float]] = ()
    control_image: Pixels | None = field(default=None, compare=False, repr=False)
    control_strength: float = 0.9
    control_mode: int | None = None
    canny: bool = False
    init_image: Pixels | None = field(default=None, compare=False, repr=False)
    strength: float = 0.75
    mask: Pixels | None = field(default=None, compare=False, repr=False)
    ref_images: tuple[Pixels, ...] = field(default=(), compare=False, repr=False)
    img_cfg_scale: float | None = None
    sigmas: tuple[float, ...] = ()
    timestep_shift: int = 0
    slg_scale: float = 0.0
    skip_layers: tuple[int, ...] = SKIPPED.layers
    skip_layer_start: float = SKIPPED.start
    skip_layer_end: float = SKIPPED.end
    cache_mode: str = "disabled"
    cache_option: str = ""
    scm_mask: str = ""
    scm_policy: str = POLICIES[0]
    video_frames: int | None = None
    fps: int | None = None
    moe_boundary: float | None = None
    high_noise_steps: int | None = None
    high_noise_cfg_scale: float | None = None
    high_noise_sampling_method: str | None = None
    high_noise_eta: float | None = None
    end_image: Pixels | None = field(default=None, compare=False, repr=False)
    preview: str = "none"
    preview_interval: int = 1
    preview_noisy: bool = False
    taesd_preview_only: bool = False
    vae_tiling: bool = False
    vae_tile_size: tuple[int, int] = (32, 32)
    vae_tile_overlap: float = 0.5
    hires: bool = False
    hires_scale: float = 2.0
    hires_width: int | None = None
    hires_height: int | None = None
    hires_steps: int = 0
    hires_denoising_strength: float = 0.7
    hires_upscaler: str | Path = LATENT
    hires_sigmas: tuple[float, ...] = ()
    hires_upscale_tile_size: int = UPSCALER_TILE

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
        if self.ref_images and drawn is not None:
            rows, columns = self.ref_images[-1].shape[:2]
            size = drawn(columns, rows)
        if self.init_image is not None and not together:
            size = self.init_image.shape[1], self.init_image.shape[0]
        width = size[0] if self.width is None else self.width
        height = size[1] if self.height is None else self.height
        _check_sigmas("sigmas", self.sigmas)
        steps = defaults.steps if self.steps is None else self.steps
        if self.sigmas:
            steps = len(self.sigmas) - 1
        frames = (defaults.frames if self.video_frames is None else self.video_frames) if together else 1
        fps = defaults.fps if self.fps is None else self.fps
        boundary = defaults.moe_boundary if self.moe_boundary is None else self.moe_boundary
        if not 0 <= boundary <= 1:
            raise InvalidValue("moe_boundary", boundary, "it can be 0 … 1")
        for name, value, largest in (
            ("width", width, MAX_SIDE), ("height", height, MAX_SIDE), ("steps", steps, MAX_STEPS),
            ("batch_count", self.batch_count, MAX_BATCH), ("video_frames", frames, MAX_FRAMES), ("fps", fps, MAX_FPS),
        ):  # fmt: skip
            if not 1 <= value <= largest:
                raise InvalidValue(name, value, f"it can be 1 … {largest}")
        cfg_scale = defaults.cfg_scale if self.cfg_scale is None else self.cfg_scale
        guidance = defaults.guidance if self.guidance is None else self.guidance
        for name, number in (
            ("cfg_scale", cfg_scale), ("guidance", guidance), ("eta", self.eta), ("flow_shift", self.flow_shift),
            ("img_cfg_scale", self.img_cfg_scale), ("slg_scale", self.slg_scale),
            ("high_noise_cfg_scale", self.high_noise_cfg_scale), ("high_noise_eta", self.high_noise_eta),
            ("control_strength", self.control_strength),
        ):  # fmt: skip
            if number is not None and not abs(number) < MAX_FACTOR:
                raise InvalidValue(name, number, f"not a number below {MAX_FACTOR:.0e}")
        seed = self.seed if self.seed >= 0 else secrets.randbelow(1 << 31)
        make_rng(self.rng, seed + self.batch_count - 1)
        if self.sampler_rng is not None and self.sampler_rng not in RNGS:
            raise InvalidValue("sampler_rng", self.sampler_rng, f"does not exist; there are {', '.join(RNGS)}")
        method = self.sampling_method or defaults.sampler
        sampler = find_sampler(method)
        scheduler = self.scheduler or defaults.scheduler or sampler.schedule
        if self.prediction is not None and self.prediction not in PREDICTIONS:
            raise InvalidValue("prediction", self.prediction, f"does not exist; there are {', '.join(PREDICTIONS)}")
        if scheduler not in SCHEDULES and scheduler not in ALIASES:
            raise InvalidValue("scheduler", scheduler, f"does not exist; there are {', '.join(SCHEDULES)}")
        width, height = _up(width, multiple), _up(height, multiple)
        eta = sampler.eta if self.eta is None else self.eta
        return Settings(
            self.prompt, self.negative_prompt, width, height, steps, cfg_scale, guidance,
            seed, self.batch_count, method, scheduler, self.clip_skip, self.rng, self.sampler_rng or self.rng,
            eta, self.prediction or defaults.prediction,
            defaults.flow_shift if self.flow_shift is None else self.flow_shift,
            text, summed([*named, *self.loras]), self._shown_to_control(width, height), self.control_strength,
            self.control_mode,
            None if self.init_image is None else fitted(self.init_image, width, height), self.strength,
            None if self.mask is None else fitted(self.mask, width, height), self.ref_images,
            cfg_scale if self.img_cfg_scale is None else self.img_cfg_scale, self.sigmas, self._timestep_shift(),
            self._left_out(),
            find_options(self.cache_mode, self.cache_option, self.scm_mask, self.scm_policy),
            (frames - 1) // max(together, 1) * together + 1, fps, boundary,
            None if self.end_image is None else fitted(self.end_image, width, height),
            find_previews(self.preview, self.preview_interval, self.preview_noisy), self.taesd_preview_only,
            self.vae_tiling, self._tiling(), self._hires(width, height, multiple, steps),
            self._high_noise(steps, cfg_scale, method, eta),
        )  # fmt: skip

    def _high_noise(self, steps: int, cfg_scale: float, method: str, eta: float) -> HighNoise | None:
        """How the model for high noise draws, if anything is said of it; the rest as the other one."""
        more, sampler = self.high_noise_steps, self.high_noise_sampling_method
        if all(said is None for said in (more, self.high_noise_cfg_scale, sampler, self.high_noise_eta)):
            return None
        most = steps if self.sigmas else MAX_STEPS - steps
        if more is not None and not 0 <= more <= most:
            raise InvalidValue("high_noise_steps", more, f"it can be 0 … {most}")
        if sampler is not None:
            eta = find_sampler(sampler).eta if self.eta is None else eta
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

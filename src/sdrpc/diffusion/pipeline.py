"""From a request to pictures: tokens, text encoder, sampler around the diffusion model, VAE.

Everything here is numpy; the three parts are functions (:class:`Parts`) that run wherever they were placed.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import ComputeError, UsageError
from ..prompts import Tokens, apply_weights, clip_chunks
from .clock import Clock
from .predictions import F32, f32, prediction
from .rng import make_rng
from .samplers import Guess, denoiser, find_sampler, sample
from .schedules import make_sigmas

SIZE_MULTIPLE = 64
"""Pictures are as many pixels wide and high as a multiple of this: 8 for the VAE times 8 for the UNet."""

LATENT_SCALE = 8
MAX_SIDE = 16384
MAX_STEPS = 10000
MAX_BATCH = 10000
MAX_FACTOR = 1e6

DEFAULT_SAMPLER = "euler_a"


class Parts(Protocol):
    """The model's parts as functions. Arrays are float32 unless said otherwise; b is the batch."""

    @property
    def token_length(self) -> int:
        """Tokens in a chunk."""
        ...

    @property
    def latent_channels(self) -> int: ...

    @property
    def scaling_factor(self) -> float:
        """What the VAE's latents are multiplied with to be the diffusion model's."""
        ...

    @property
    def prediction(self) -> str:
        """``eps`` or ``v``."""
        ...

    def encode(self, ids: NDArray[np.int32], clip_skip: int) -> F32:
        """Tokens (1, length) → hidden states (1, length, width)."""
        ...

    def predict(self, latents: F32, timestep: F32, context: F32) -> F32:
        """Latents (b, c, h, w), timesteps (b,), text (b, tokens, width) → the prediction, shaped as the latents."""
        ...

    def decode(self, latents: F32) -> F32:
        """Latents (1, c, h, w) → picture (1, 3, 8h, 8w), about -1 … 1."""
        ...


@dataclass(frozen=True)
class Request:
    """What to draw; sd-cli's defaults, for SD 1.5. None: what belongs to the sampler; seed below 0: a random one."""

    prompt: str
    negative_prompt: str = ""
    width: int = 512
    height: int = 512
    steps: int = 20
    cfg_scale: float = 7.0
    seed: int = 42
    batch_count: int = 1
    sampler: str = DEFAULT_SAMPLER
    scheduler: str | None = None
    clip_skip: int = -1
    rng: str = "cuda"
    eta: float | None = None

    def resolved(self) -> Request:
        """The request with a seed and a scheduler, and its size rounded up as stable-diffusion.cpp does.

        Raises :class:`UsageError` for what can't be drawn, so that nothing is loaded in vain.
        """
        for option, value, largest in (
            ("--width", self.width, MAX_SIDE), ("--height", self.height, MAX_SIDE), ("--steps", self.steps, MAX_STEPS),
            ("--batch-count", self.batch_count, MAX_BATCH),
        ):  # fmt: skip
            if not 1 <= value <= largest:
                raise UsageError(f"{option} {value}: it can be 1 … {largest}")
        for option, number in (("--cfg-scale", self.cfg_scale), ("--eta", self.eta)):
            if number is not None and not abs(number) < MAX_FACTOR:
                raise UsageError(f"{option} {number}: not a number below {MAX_FACTOR:.0e}")
        seed = self.seed if self.seed >= 0 else secrets.randbelow(1 << 31)
        make_rng(self.rng, seed + self.batch_count - 1)
        scheduler = self.scheduler or find_sampler(self.sampler).schedule
        make_sigmas(scheduler, self.steps, prediction("eps"))
        width, height = (-(-side // SIZE_MULTIPLE) * SIZE_MULTIPLE for side in (self.width, self.height))
        return replace(self, seed=seed, scheduler=scheduler, width=width, height=height)


class Picture(NamedTuple):
    """A finished picture: uint8 (height, width, 3), and the seed that it was drawn with."""

    image: NDArray[np.uint8]
    seed: int


Step = Callable[[int, int], None]
"""Called with the steps that are done and all steps of a picture."""


def generate(request: Request, parts: Parts, clock: Clock, on_step: Step = lambda *_: None) -> Iterator[Picture]:
    """Draw the pictures of a resolved request, one after the other, with seeds counting up.

    Raises :class:`ComputeError` when a part's output is not a number, and what the parts raise.
    """
    with clock("encode"):
        contexts = _contexts(request, parts)
    for seed in range(request.seed, request.seed + request.batch_count):
        with clock("sample"):
            latents = _sample(request, seed, contexts, parts, on_step)
        with clock("decode"):
            picture = parts.decode(latents / f32(parts.scaling_factor))
            image = to_pixels(finite(picture, "the VAE's picture")[0])
        yield Picture(image, seed)


def to_pixels(picture: F32) -> NDArray[np.uint8]:
    """A picture (3, height, width) of -1 … 1 as pixels (height, width, 3) of 0 … 255, rounded half up."""
    unit = np.clip((picture + f32(1)) * f32(0.5), f32(0), f32(1))
    return np.ascontiguousarray((unit * f32(255) + f32(0.5)).astype(np.uint8).transpose(1, 2, 0))


def finite(values: F32, what: str) -> F32:
    """``values``, or :class:`ComputeError` that says what they are when some are no finite numbers."""
    if np.isfinite(values).all():
        return values
    broken = np.count_nonzero(~np.isfinite(values))
    raise ComputeError(
        f"{what}: {broken} of {values.size} values are NaN or infinite; damaged weights give that, and so may reduced "
        "precision (try --precision exact)"
    )


def _contexts(request: Request, parts: Parts) -> list[F32]:
    """The encoded prompt, and before it the negative one where guidance needs it: each (1, tokens, width)."""
    prompts = [request.prompt] if request.cfg_scale == 1 else [request.negative_prompt, request.prompt]
    return [_encoded(clip_chunks(prompt, length=parts.token_length), request.clip_skip, parts) for prompt in prompts]


def _encoded(tokens: Tokens, clip_skip: int, parts: Parts) -> F32:
    chunks = [
        apply_weights(finite(parts.encode(ids[None], clip_skip), "the text encoder's output")[0], weights)
        for ids, weights in zip(tokens.ids, tokens.weights, strict=True)
    ]
    return np.concatenate(chunks)[None]


def _sample(request: Request, seed: int, contexts: list[F32], parts: Parts, on_step: Step) -> F32:
    predicted = prediction(parts.prediction)
    sigmas = make_sigmas(request.scheduler or find_sampler(request.sampler).schedule, request.steps, predicted)
    shape = (1, parts.latent_channels, request.height // LATENT_SCALE, request.width // LATENT_SCALE)
    rng = make_rng(request.rng, seed)
    start = predicted.start(rng.normal(int(np.prod(shape))).reshape(shape), sigmas[0])
    denoise = denoiser(_guided(contexts, f32(request.cfg_scale), parts), predicted)
    return sample(request.sampler, denoise, start, sigmas, rng, flow=predicted.flow, eta=request.eta, on_step=on_step)


def _guided(contexts: list[F32], cfg_scale: f32, parts: Parts) -> Callable[[F32, f32], Guess]:
    """Classifier-free guidance: one evaluation of a batch of two, or two where the texts differ in length."""
    alike = len({context.shape for context in contexts}) == 1
    batches = [np.concatenate(contexts)] if alike else contexts

    def predict(x: F32, timestep: f32) -> Guess:
        results = [
            parts.predict(np.repeat(x, len(batch), axis=0), np.full(len(batch), timestep, f32), batch)
            for batch in batches
        ]
        predicted = finite(np.concatenate(results), f"the diffusion model's prediction at timestep {timestep:.0f}")
        if len(predicted) == 1:
            return Guess(predicted)
        negative, positive = predicted[:1], predicted[1:]
        return Guess(negative + cfg_scale * (positive - negative), negative)

    return predict

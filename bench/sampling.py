"""A picture's sampling loop, timed step by step: sdrpc's, and diffusers' own in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from sdrpc.diffusion.guidance import Told
from sdrpc.diffusion.request import Request, Settings
from sdrpc.diffusion.rng import make_rng
from sdrpc.diffusion.session import Session
from sdrpc.families.model import Model

from .recorded import now, recorded

F32 = NDArray[np.float32]

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


class Sampled(NamedTuple):
    """The latents of a picture (1, c, h, w) or a film (1, c, frames, h, w), and the seconds of a step: the time from
    noise to latents that are here, over the steps. (Steps are not timed one by one: nobody waits for each.)"""

    latents: F32
    seconds: float


def step_seconds(*runs: Sampled) -> float:
    """The median of all runs."""
    return median(run.seconds for run in runs)


def difference(one: F32, other: F32) -> float:
    """Relative, in the L2 norm."""
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def sample(
    session: Session, request: Request, conditions: Told, noted: Callable[[int], None] = lambda _: None
) -> Sampled:
    """The first picture of ``request`` up to its latents, without the VAE. ``noted`` is called when a step is done."""
    settings = session.settings(request, video=request.video_frames is not None)
    start = time.perf_counter()
    latents = session.sampling.sample(settings, request.seed, conditions, lambda done, _: noted(done))
    return Sampled(latents, (time.perf_counter() - start) / settings.steps)


def draw(session: Session, settings: Settings) -> Sampled:
    """As :func:`sample`, with all that the settings' picture is drawn with: its LoRAs and its ControlNet."""
    before = session.timer.seconds.get("sample", 0.0)
    ((latents, _),) = session.draw_latents(settings)
    return Sampled(latents, (session.timer.seconds["sample"] - before) / settings.steps)


class InProcess:
    """diffusers' UNet with the checkpoint's weights and its Euler sampler, as StableDiffusionPipeline runs them."""

    def __init__(self, model: Model, device: torch.device, dtype: torch.dtype) -> None:
        self.model, self.device, self.dtype = model, device, dtype
        with torch.device("meta"):
            self.unet: Any = model["diffusion"].module().build()[0]
        weights = {}
        for name, weight in model["diffusion"].found.tensors.items():
            stored = torch.frombuffer(bytearray(weight.data()), dtype=DTYPES[weight.type.name.lower()])
            weights[name] = stored.reshape(weight.shape).to(device, dtype)
        self.unet.load_state_dict(weights, assign=True)
        self.unet.eval()

    @contextmanager
    def compiled(self) -> Iterator[None]:
        """The model as Inductor makes it, for shapes that stay."""
        plain = self.unet
        self.unet = torch.compile(plain, dynamic=False)
        try:
            yield
        finally:
            self.unet = plain

    @torch.inference_mode()
    def sample(self, request: Settings, context: F32, *, graph: bool = False) -> Sampled:
        """The same picture, from the same noise. ``graph``: with the UNet as a CUDA graph."""
        from diffusers import EulerDiscreteScheduler

        make: Any = EulerDiscreteScheduler  # untyped
        scheduler = make(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="linspace")
        scheduler.set_timesteps(request.steps, device=self.device)
        pixels = self.model.pixels
        shape = (1, self.model.latent_channels, request.height // pixels, request.width // pixels)
        noise = make_rng(request.rng, request.seed).normal(prod(shape)).reshape(shape)
        latents = torch.from_numpy(noise).to(self.device, self.dtype) * scheduler.init_noise_sigma
        text = torch.from_numpy(context).to(self.device, self.dtype)
        predict: Callable[..., torch.Tensor] = self._predict
        if graph:
            given = torch.cat([latents] * 2), scheduler.timesteps[0].clone(), text
            predict = recorded(self._predict, given, torch.cuda.CUDAGraph())
        start = now(self.device)
        for timestep in scheduler.timesteps:
            pair = scheduler.scale_model_input(torch.cat([latents] * 2), timestep)
            negative, positive = predict(pair, timestep, text).chunk(2)
            predicted = negative + request.cfg_scale * (positive - negative)
            latents = scheduler.step(predicted, timestep, latents, return_dict=False)[0]
        result = latents.float().cpu().numpy()
        return Sampled(result, (now(self.device) - start) / request.steps)

    def _predict(self, pair: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        predicted: torch.Tensor = self.unet(pair, timestep, text, return_dict=False)[0]
        return predicted

"""A picture's sampling loop, timed step by step: sdrpc's, and diffusers' own in this process."""

from __future__ import annotations

import time
from collections.abc import Callable
from math import prod
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from sdrpc.diffusion.model import Model
from sdrpc.diffusion.modules import spec
from sdrpc.diffusion.pipeline import LATENT_SCALE, Request, generate
from sdrpc.diffusion.placed import PlacedModel
from sdrpc.diffusion.rng import make_rng

F32 = NDArray[np.float32]

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


class Sampled(NamedTuple):
    """The latents (1, c, h, w) of a picture, and the seconds that each step took."""

    latents: F32
    seconds: tuple[float, ...]

    @property
    def warm(self) -> tuple[float, ...]:
        """The steps after the first one, which uploads, compiles and allocates."""
        return self.seconds[1:]


def step_seconds(*runs: Sampled) -> float:
    """The median over the warm steps of all runs."""
    return median(seconds for run in runs for seconds in run.warm)


def difference(one: F32, other: F32) -> float:
    """Relative, in the L2 norm."""
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


class Undecoded:
    """A model on devices without the VAE: it keeps the latents and the text that it was given. ``noted`` is called
    when a step is done."""

    def __init__(self, model: PlacedModel) -> None:
        self._model = model
        self.context: F32 | None = None
        self.latents: F32 | None = None

    @property
    def token_length(self) -> int:
        return self._model.token_length

    @property
    def latent_channels(self) -> int:
        return self._model.latent_channels

    @property
    def scaling_factor(self) -> float:
        return self._model.scaling_factor

    @property
    def prediction(self) -> str:
        return self._model.prediction

    def encode(self, ids: NDArray[np.int32], clip_skip: int) -> F32:
        return self._model.encode(ids, clip_skip)

    def predict(self, latents: F32, timestep: F32, context: F32) -> F32:
        self.context = context
        return self._model.predict(latents, timestep, context)

    def decode(self, latents: F32) -> F32:
        self.latents = latents * np.float32(self.scaling_factor)
        _, _, height, width = latents.shape
        return np.zeros((1, 3, height * LATENT_SCALE, width * LATENT_SCALE), np.float32)

    def sample(self, request: Request, noted: Callable[[int], None] = lambda _: None) -> Sampled:
        """Draw the first picture of ``request`` up to its latents."""
        times: list[float] = []

        def on_step(done: int, _total: int) -> None:
            times.append(time.perf_counter())
            noted(done)

        for _ in generate(request, self, self._model.clock, on_step):
            pass
        assert self.latents is not None
        return Sampled(self.latents, tuple(np.diff(times).tolist()))


class InProcess:
    """diffusers' UNet with the checkpoint's weights and its Euler sampler, as StableDiffusionPipeline runs them."""

    def __init__(self, model: Model, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        with torch.device("meta"):
            self.unet: Any = spec(model.unet).build()[0]
        weights = {}
        for name, weight in model.unet.tensors.tensors.items():
            stored = torch.frombuffer(bytearray(weight.data()), dtype=DTYPES[weight.type.name.lower()])
            weights[name] = stored.reshape(weight.shape).to(device, dtype)
        self.unet.load_state_dict(weights, assign=True)
        self.unet.eval()

    @torch.inference_mode()
    def sample(self, request: Request, context: F32, channels: int, *, graph: bool = False) -> Sampled:
        """The same picture, from the same noise. ``graph``: with the UNet as a CUDA graph."""
        from diffusers import EulerDiscreteScheduler

        make: Any = EulerDiscreteScheduler  # untyped
        scheduler = make(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="linspace")
        scheduler.set_timesteps(request.steps, device=self.device)
        shape = (1, channels, request.height // LATENT_SCALE, request.width // LATENT_SCALE)
        noise = make_rng(request.rng, request.seed).normal(prod(shape)).reshape(shape)
        latents = torch.from_numpy(noise).to(self.device, self.dtype) * scheduler.init_noise_sigma
        text = torch.from_numpy(context).to(self.device, self.dtype)
        predict = self._recorded(latents, scheduler.timesteps[0], text) if graph else self._predict
        times = [self._now()]
        for timestep in scheduler.timesteps:
            pair = scheduler.scale_model_input(torch.cat([latents] * 2), timestep)
            negative, positive = predict(pair, timestep, text).chunk(2)
            predicted = negative + request.cfg_scale * (positive - negative)
            latents = scheduler.step(predicted, timestep, latents, return_dict=False)[0]
            times.append(self._now())
        return Sampled(latents.float().cpu().numpy(), tuple(np.diff(times).tolist()))

    def _predict(self, pair: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        predicted: torch.Tensor = self.unet(pair, timestep, text, return_dict=False)[0]
        return predicted

    def _recorded(
        self, latents: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor
    ) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
        pair, at = torch.cat([latents] * 2), timestep.clone()
        side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(side):  # kernels are chosen and memory is found before anything is recorded
            for _ in range(3):
                self._predict(pair, at, text)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = self._predict(pair, at, text)

        def replay(new_pair: torch.Tensor, new_timestep: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
            pair.copy_(new_pair)
            at.copy_(new_timestep)
            graph.replay()
            return result

        return replay

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

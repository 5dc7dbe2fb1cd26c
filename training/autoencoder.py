"""Train the VAE: pictures to latents and back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import model, scenes
from .loop import Plan, Run, train

PLAN = Plan(steps=5000, batch=96, rate=6e-4)

DIVERGENCE = 6e-3
"""Weight of the latents' divergence from noise, in nats per number of the picture: the more, the smoother they are."""

DRAWN = 64
"""Batches that are drawn at once."""


class Loss(nn.Module):
    """Reconstruction and divergence of a batch of pictures [n, 3, h, w] of -1 to 1."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, picture: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The loss and its parts: absolute and square error, divergence."""
        vae: Any = self.vae
        mean, log_variance = vae.quant_conv(vae.encoder(picture)).float().chunk(2, 1)
        log_variance = log_variance.clamp(-30, 20)
        latents = mean + noise * (0.5 * log_variance).exp()
        drawn = vae.decoder(vae.post_quant_conv(latents)).float()
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum() / picture.numel()
        absolute, square = (drawn - picture).abs().mean(), (drawn - picture).square().mean()
        return absolute + square + DIVERGENCE * divergence, absolute, square, divergence


def fit(folder: Path, device: torch.device, seed: int, until: float, plan: Plan = PLAN, fast: bool = True) -> bool:
    """Train the VAE, or go on; whether it is done. Its state is ``vae.pt`` in the folder."""
    torch.manual_seed(seed)
    vae = model.vae().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    run = Run(nn.ModuleDict({"vae": vae}), plan, device, seed)
    losses: Any = torch.compile(Loss(vae)) if fast else Loss(vae)
    pictures = _Pictures(plan.batch, seed, device)

    def inputs(run: Run) -> tuple[Tensor, Tensor]:
        picture = pictures.at(run.step)
        side = model.SIDE // model.FACTOR
        shape = (len(picture), model.LATENTS, side, side)
        return picture, torch.randn(shape, generator=run.generator(), device=device)

    return train(run, folder / "vae.pt", losses, inputs, until)


class _Pictures:
    """Batches of fresh scenes, drawn many at a time."""

    def __init__(self, batch: int, seed: int, device: torch.device) -> None:
        self.batch, self.seed, self.device = batch, seed, device
        self.number = -1
        self.drawn = torch.empty(0)

    def at(self, step: int) -> Tensor:
        """Pictures of one step, [batch, 3, h, w] of -1 to 1."""
        number, within = divmod(step, DRAWN)
        if number != self.number:
            sampled = scenes.sample(np.random.default_rng((self.seed, 1, number)), DRAWN * self.batch)
            self.drawn, self.number = draw(sampled, self.device, self.seed + number), number
        return self.drawn[within * self.batch : (within + 1) * self.batch].contiguous(memory_format=torch.channels_last)


def draw(sampled: scenes.Scenes, device: torch.device, seed: int, line: float = 0) -> Tensor:
    """Pictures as the VAE sees them: [n, 3, 128, 128], -1 to 1, their colours moved a little.

    ``line``: as of :func:`scenes.draw`.
    """
    generator = torch.Generator(device).manual_seed(seed)
    jitter = torch.rand((len(sampled), scenes.MOST + 1, 3), generator=generator, device=device) * 2 - 1
    return scenes.draw(sampled, model.SIDE, device, jitter, line) * 2 - 1


def finished(folder: Path, device: torch.device) -> nn.Module:
    """The trained VAE, its latents made standard."""
    vae = model.vae()
    state = torch.load(folder / "vae.pt", map_location="cpu", weights_only=True)["mean"]
    vae.load_state_dict({name.removeprefix("vae."): weight for name, weight in state.items()})
    vae = vae.to(device).eval().requires_grad_(False)
    sampled = scenes.sample(np.random.default_rng((0, 2)), 4096)
    latents = torch.cat([encode(vae, draw(sampled.part(i, i + 256), device, i)) for i in range(0, 4096, 256)])
    latents /= model.SCALING_FACTOR
    model.standardize(vae, latents.mean((0, 2, 3)), latents.std((0, 2, 3)))
    return vae


@torch.no_grad()
def encode(vae: nn.Module, pictures: Tensor) -> Tensor:
    """Latents as the diffusion model sees them (means, times SD's factor): [n, 4, 16, 16], f32."""
    coder: Any = vae
    means: Tensor = coder.quant_conv(coder.encoder(pictures))[:, : model.LATENTS]
    return means.float() * model.SCALING_FACTOR


@torch.no_grad()
def colours(vae: nn.Module, device: torch.device, count: int = 512) -> tuple[list[list[float]], list[float]]:
    """What latents look like: the linear function of their channels that is nearest to the mean colour, -1 to 1, of the
    pixels that each stands for. Factors [4][3] and what is added [3]."""
    sampled = scenes.sample(np.random.default_rng((0, 7)), count)
    known, wanted = [], []
    for i in range(0, count, 64):
        pictures = draw(sampled.part(i, i + 64), device, i)
        known.append(encode(vae, pictures).permute(0, 2, 3, 1).flatten(0, 2))
        wanted.append(nn.functional.avg_pool2d(pictures, model.FACTOR).permute(0, 2, 3, 1).flatten(0, 2))
    latents = nn.functional.pad(torch.cat(known), (0, 1), value=1).double()
    *factors, bias = torch.linalg.lstsq(latents, torch.cat(wanted).double()).solution.cpu().numpy().round(6).tolist()
    return factors, bias


@torch.no_grad()
def psnr(vae: nn.Module, device: torch.device, count: int = 512) -> float:
    """Peak signal to noise of pictures through the VAE and back, in dB: of the mean square error over all of them."""
    coder: Any = vae
    sampled = scenes.sample(np.random.default_rng((0, 3)), count)
    errors = []
    for i in range(0, count, 64):
        pictures = draw(sampled.part(i, i + 64), device, i)
        back = coder.decode(coder.encode(pictures).latent_dist.mean).sample.clamp(-1, 1)
        errors.append(((back - pictures) / 2).square().mean())
    return -10 * math.log10(float(torch.stack(errors).mean()))

"""Train the text encoder and the UNet, together, on latents and captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdrpc.prompts import clip_tokenizer

from . import bank, model
from .loop import Plan, Run, train

PLAN = Plan(steps=14000, batch=512, rate=8e-4, warm_up=500)
SCENES = 500_000

DROPPED = 0.1
"""The share of captions replaced by the empty one: what guidance steers away from."""

HIGHEST_WEIGHT = 10.0
"""Of an error in the picture, relative to pure noise: see :func:`weight`."""

STEPS = 1000


def signal() -> Tensor:
    """ᾱ of each timestep, [1000]: SD's schedule, whose √β are in a line from √0.00085 to √0.012."""
    roots = torch.linspace(0.00085**0.5, 0.012**0.5, STEPS, dtype=torch.float64)
    return (1 - roots.square()).cumprod(0).float()


def weight(alpha: Tensor) -> Tensor:
    """How much an error of the predicted noise counts.

    An error e of the noise is one of e² / SNR in the picture. That counts min(SNR + 1, 10): never less than 1 (as when
    v is predicted, so that composition and colour, which high noise decides, are learnt) and not much more where hardly
    any noise is left (as in min-SNR weighting, Hang et al. 2023).
    """
    ratio = alpha / (1 - alpha)
    return (ratio + 1).clamp(max=HIGHEST_WEIGHT) / ratio


class Loss(nn.Module):
    """The weighted error of the noise that is predicted in a batch."""

    def __init__(self, text_encoder: nn.Module, unet: nn.Module) -> None:
        super().__init__()
        self.text_encoder, self.unet = text_encoder, unet
        self.alphas: Tensor
        self.register_buffer("alphas", signal(), persistent=False)

    def forward(self, latents: Tensor, tokens: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """latents and noise [n, 4, 16, 16], tokens [n, 77], timesteps [n] → the weighted error and the plain one."""
        alpha = self.alphas[timesteps]
        root, rest = (part.sqrt()[:, None, None, None] for part in (alpha, 1 - alpha))
        text = self.text_encoder(input_ids=tokens).last_hidden_state
        predicted = self.unet(root * latents + rest * noise, timesteps, text, return_dict=False)[0]
        error = (predicted.float() - noise).square().mean((1, 2, 3))
        return (error * weight(alpha)).mean(), error.mean()


def fit(folder: Path, learnt: bank.Bank, device: torch.device, seed: int, until: float, plan: Plan = PLAN,
        fast: bool = True) -> bool:  # fmt: skip
    """Train both, or go on; whether they are done. Their state is ``diffusion.pt`` in the folder."""
    torch.manual_seed(seed)
    modules = nn.ModuleDict({"text_encoder": model.text_encoder(), "unet": model.unet()})
    run = Run(modules, plan, device, seed)
    unet: Any = torch.compile(modules["unet"]) if fast else modules["unet"]
    losses = Loss(modules["text_encoder"], unet).to(device)
    empty = torch.from_numpy(bank.padded(iter([[]]))).to(device)

    def inputs(run: Run) -> tuple[Tensor, ...]:
        return batch(learnt, plan.batch, empty, run.generator())

    return train(run, folder / "diffusion.pt", losses, inputs, until)


def batch(learnt: bank.Bank, n: int, empty: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs of :class:`Loss` for one step."""
    device = learnt.latents.device

    def numbers(below: int) -> Tensor:
        return torch.randint(below, (n,), generator=random, device=device)

    chosen = numbers(len(learnt.latents))
    tokens = learnt.tokens[chosen, numbers(bank.CAPTIONS)]
    tokens = torch.where(torch.rand((n, 1), generator=random, device=device) < DROPPED, empty, tokens)
    latents = learnt.latents[chosen].float()
    return latents, tokens, torch.randn(latents.shape, generator=random, device=device), numbers(STEPS)


def finished(folder: Path, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """The trained text encoder and UNet."""
    modules = nn.ModuleDict({"text_encoder": model.text_encoder(), "unet": model.unet()})
    modules.load_state_dict(torch.load(folder / "diffusion.pt", map_location="cpu", weights_only=True)["mean"])
    modules = modules.to(device).eval().requires_grad_(False)
    return modules["text_encoder"], modules["unet"]


@torch.no_grad()
def preview(text_encoder: nn.Module, unet: nn.Module, vae: nn.Module, prompts: Sequence[str], device: torch.device,
            steps: int = 20, guidance: float = 4.0) -> Tensor:  # fmt: skip
    """A picture of each prompt, [n, 3, 128, 128] of 0 to 1, by Euler's method: to look at in training."""
    coder: Any = vae
    encoded = clip_tokenizer().encode_batch([""] * len(prompts) + list(prompts), add_special_tokens=False)
    tokens = torch.from_numpy(bank.padded(each.ids for each in encoded)).to(device)
    text = text_encoder(input_ids=tokens).last_hidden_state
    at = torch.linspace(STEPS - 1, 0, steps).round().long()
    alphas = signal()[at]
    sigmas = [*((1 - alphas) / alphas).sqrt().tolist(), 0.0]
    shape = (len(prompts), model.LATENTS, model.SIDE // model.FACTOR, model.SIDE // model.FACTOR)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device) * sigmas[0]
    for timestep, now, then in zip(at, sigmas, sigmas[1:], strict=False):
        scaled = (x / (now**2 + 1) ** 0.5).repeat(2, 1, 1, 1)
        without, with_text = unet(scaled, timestep.to(device), text, return_dict=False)[0].chunk(2)
        x = x + (without + guidance * (with_text - without)) * (then - now)
    pictures: Tensor = coder.decode(x / model.SCALING_FACTOR).sample
    return (pictures / 2 + 0.5).clamp(0, 1)

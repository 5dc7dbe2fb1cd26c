"""What a model's components ask of devices, guessed from their sizes: nothing is captured for that."""

from __future__ import annotations

from math import isqrt, prod

from ..device import Target
from ..families.model import Model
from ..ggml.memory_planner import aligned
from ..runtime.cutting import ALIGNMENT
from ..runtime.run import held_as
from .fitting import Demand
from .halves import HIGH_NOISE
from .request import Settings

DRAWING = ("diffusion", HIGH_NOISE, "control")
"""The components that run in each step."""

AUTOENCODERS = ("vae", "taesd")

TOKENS = 256
"""Of a text, and what a text is to a diffusion model."""

PATCH, DECODING = 4, 6
"""A diffusion model's weights meet about a quarter of the latents' places each (it joins 2×2 of them, or goes down to
smaller pictures); an autoencoder's, which goes up to larger ones, six times as many."""


def demands(model: Model, settings: Settings, target: Target) -> list[Demand]:
    """A demand for each component of ``model``, for a picture or film with these ``settings``, on devices that take
    graphs for ``target``."""
    frames = (settings.video_frames - 1) // model.frames + 1 if model.frames else 1
    places = frames * (settings.width // model.pixels) * (settings.height // model.pixels)
    pixels = settings.width * settings.height * settings.video_frames
    prompts = min(settings.predictions, 2)
    found = []
    for name, component in model.components.items():
        weights = component.found.tensors.values()
        sizes = [aligned(held_as(w.type, target).row_bytes(prod(w.shape)), ALIGNMENT) for w in weights]
        elements, widest = sum(prod(w.shape) for w in weights), max(prod(w.shape) for w in weights)
        if name in DRAWING:
            runs, seen = settings.steps * settings.predictions, places // PATCH + TOKENS
            moved = 8 * places * model.latent_channels
        elif name in AUTOENCODERS:
            runs, seen, moved = 1, places * DECODING, 12 * pixels
        else:
            runs, seen, moved = prompts, TOKENS, 4 * TOKENS * 4096
        crossing = 4 * seen * isqrt(widest)
        # no graph is cut between any two weights: twice the largest one is about what stays together
        found.append(Demand(name, sum(sizes), 2 * max(sizes), float(elements) * seen, runs, moved, crossing))
    return found

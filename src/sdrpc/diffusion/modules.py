"""The torch modules that a model's parts are: diffusers' and transformers', and how they are called.

A :class:`ModuleSpec` is plain data and stands for a module without importing what it is made of, so that a graph which
was captured from it before can be found again by its digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .model import ModelPart

if TYPE_CHECKING:
    import torch
    from torch import nn

    Call = Callable[..., tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class ModuleSpec:
    """A kind of module and the arguments that it is made with."""

    kind: str
    config: Mapping[str, Any]

    @cached_property
    def digest(self) -> str:
        """Names this module: equal for equal kinds and arguments."""
        text = json.dumps([self.kind, dict(self.config)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def build(self) -> tuple[nn.Module, Call]:
        """The module, its parameters uninitialized as the caller arranges it, and the function of its inputs."""
        return _BUILDERS[self.kind](self.config)


def spec(part: ModelPart, clip_skip: int = -1) -> ModuleSpec:
    """The module of a part. ``clip_skip`` leaves out the text encoder's last ``clip_skip - 1`` layers.

    Raises :class:`UsageError` when there are not so many.
    """
    config = dict(part.config)
    if part.part.name == "text_encoder" and clip_skip > 1:
        layers = config["num_hidden_layers"]
        if clip_skip > layers:
            raise UsageError(f"--clip-skip {clip_skip}: the text encoder has {layers} layers")
        config["num_hidden_layers"] = layers - clip_skip + 1
    return ModuleSpec(part.part.name, config)


def _text_encoder(config: Mapping[str, Any]) -> tuple[nn.Module, Call]:
    """Inputs: ids, int (1, length). Output: hidden states after the final norm, (1, length, width)."""
    from transformers import CLIPTextConfig, CLIPTextModel

    model = CLIPTextModel(CLIPTextConfig(**config))
    inner = getattr(model, "text_model", model)  # transformers 5 has no such layer in between any more
    return inner, lambda module, ids: (module(input_ids=ids).last_hidden_state,)


def _unet(config: Mapping[str, Any]) -> tuple[nn.Module, Call]:
    """Inputs: latents (batch, channels, height, width), timestep (batch,), context (batch, length, width)."""
    import diffusers

    make: Any = diffusers.UNet2DConditionModel
    return make(**config), lambda module, latents, timestep, context: (
        module(latents, timestep, context, return_dict=False)[0],
    )


def _vae(config: Mapping[str, Any]) -> tuple[nn.Module, Call]:
    """Input: latents (1, channels, height, width). Output: the picture, (1, 3, 8 · height, 8 · width)."""
    import diffusers

    make: Any = diffusers.AutoencoderKL
    return make(**config), lambda module, latents: (module.decode(latents, return_dict=False)[0],)


_BUILDERS: dict[str, Callable[[Mapping[str, Any]], tuple[nn.Module, Call]]] = {
    "text_encoder": _text_encoder, "unet": _unet, "vae": _vae,
}  # fmt: skip

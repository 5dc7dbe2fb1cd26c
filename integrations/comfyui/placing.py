"""What ComfyUI has loaded, with its networks computed by a device: through the means that ComfyUI has for it.

A MODEL and a CLIP hold a ModelPatcher, which puts objects in the place of a model's parts while the model is used
(``add_object_patch``), and has LoRAs added to weights. A VAE has its network as ``first_stage_model``. In their place
goes a stand-in that has the network's parts, so that weights are found and patched as ever, and lets a device compute.

ComfyUI keeps the weights in this machine's memory, none in its GPU's.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import sdrpc
from sdrpc import Device

CPU = torch.device("cpu")

OPTIONS = "transformer_options"

PATCHES = ("patches", "patches_replace", "optimized_attention_override")
"""Of the options of a call: functions of other nodes that go into the middle of a network."""

BOOKKEEPING = frozenset({
    "sigmas", "sample_sigmas", "cond_or_uncond", "uuids", "callbacks", "wrappers", "original_shape",
    "activations_shape", "transformer_index", "block", "block_index", "block_type", "total_blocks", *PATCHES,
})  # fmt: skip
"""Options that tell nodes how far sampling is, or that a network sets itself. A network computes the same without."""

INSIDE = "diffusion_model"
"""The kind of wrapper that goes around a network's own forward."""


class NotRemote(RuntimeError):
    """A node's function would have to run in the middle of a network that a device elsewhere computes."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"another node changes what the model computes inside ({what}): a device of the network can't run its "
            "code. Take that node out, or let the model compute here"
        )


def model_on(model: Any, device: Device) -> Any:
    """A MODEL whose diffusion model computes on ``device``."""
    placed = _here(model)
    network = placed.get_model_object("diffusion_model")
    placed.add_object_patch("diffusion_model", _standing_in(network, device))
    return placed


def clip_on(clip: Any, device: Device) -> Any:
    """A CLIP whose text encoders compute on ``device``; tokens and their weights stay here."""
    placed = clip.clone()
    placed.patcher = _here(clip.patcher)
    encoders = [
        f"{name}.transformer"
        for name, part in placed.cond_stage_model.named_modules()
        if isinstance(getattr(part, "transformer", None), nn.Module) and hasattr(part, "encode_token_weights")
    ]
    if not encoders:
        raise NotImplementedError(f"{type(placed.cond_stage_model).__name__} has no text encoder that sdrpc knows of")
    for path in encoders:
        placed.patcher.add_object_patch(path, sdrpc.offload(placed.cond_stage_model.get_submodule(path), device))
    return placed


def vae_on(vae: Any, device: Device) -> Any:
    """A VAE that computes on ``device``."""
    placed = copy.copy(vae)
    placed.patcher = _here(vae.patcher)
    placed.device = CPU
    placed.first_stage_model = sdrpc.offload(vae.first_stage_model, device)
    placed.first_stage_model.comfy_has_chunked_io = False  # it would write into memory that the device does not have
    return placed


def _here(patcher: Any) -> Any:
    """A clone that keeps the weights in this machine's memory."""
    whole = {"disable_dynamic": True} if "disable_dynamic" in inspect.signature(patcher.clone).parameters else {}
    placed = patcher.clone(**whole)
    placed.load_device = placed.offload_device = CPU
    return placed


def _standing_in(network: nn.Module, device: Device) -> nn.Module:
    """``network``, whose forward is computed by ``device``."""
    remote = sdrpc.offload(_Network(network), device)

    def forward(*args: Any, **kwargs: Any) -> Any:
        kwargs[OPTIONS] = plain(kwargs.get(OPTIONS) or {})
        # ComfyUI computes where nothing is recorded for gradients; so does who calls the model by itself
        with torch.no_grad():
            return remote(*args, **kwargs)

    stand_in = object.__new__(type(network))
    stand_in.__dict__.update(vars(network))
    stand_in.forward = forward
    return stand_in


class _Network(nn.Module):
    """A diffusion model that leaves its arguments as they are; those of ComfyUI take lists apart, and note in the
    options where they are."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *args: Any, control: Any = None, **kwargs: Any) -> Any:
        own = {name: list(value) for name, value in (control or {}).items()}
        kwargs[OPTIONS] = {**kwargs[OPTIONS], "optimized_attention_override": attention}
        return self.network(*args, control=own or None, **kwargs)


def plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a call that say what is computed. Raises :class:`NotRemote` where they hold code."""
    for name in PATCHES:
        if options.get(name):
            raise NotRemote(name)
    if options.get("wrappers", {}).get(INSIDE):
        raise NotRemote("wrappers")
    kept = {name: value for name, value in options.items() if name not in BOOKKEEPING}
    for name, value in kept.items():
        if _has_code(value):
            raise NotRemote(name)
    return kept


def _has_code(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_code, value.values()))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return any(map(_has_code, value))
    return callable(value) and not isinstance(value, Tensor)


def attention(
    _: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    attn_precision: Any = None,  # noqa: ARG001 # a device has a precision of its own
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **options: Any,
) -> Tensor:
    """Attention as ComfyUI calls it, as one operation: its own ways of splitting it look at the memory of a GPU.

    ``q``: (batch, tokens, heads × width), or with ``skip_reshape`` (batch, heads, tokens, width); ``k`` and ``v``: the
    same, or with heads and width apart, and fewer heads that several of ``q``'s share.
    """
    batch = q.shape[0]
    if not skip_reshape:
        width = q.shape[-1] // heads
        q, k, v = (t.reshape(batch, t.shape[1], -1, width).transpose(1, 2) for t in (q, k, v))
    if k.shape[1] != heads:
        k, v = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (k, v))
    if mask is not None and mask.ndim == 2:
        mask = mask[None, None]
    elif mask is not None and mask.ndim == 3:
        mask = mask[:, None]
    out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=options.get("scale"))
    return out if skip_output_reshape else out.transpose(1, 2).reshape(batch, -1, heads * out.shape[-1])

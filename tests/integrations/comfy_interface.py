"""As much of ComfyUI as the node pack meets, written down from its sources: it can be had from no package index.

What is here is what the pack relies on, and what could break it: a patcher puts objects in a model's places while the
model is loaded, clones share the model, patched weights are written into the parameters; a diffusion model takes
``control`` apart, notes in ``transformer_options`` where it is, and asks there for another attention; a VAE writes into
a buffer of its caller's where its network can.
"""

from __future__ import annotations

import copy
import uuid
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tests.lowering import models

GPU = "a GPU"
"""Stands for the device that ComfyUI would load to: nothing may be loaded there that a device of the network has."""


class ModelPatcher:
    """comfy.model_patcher.ModelPatcher"""

    def __init__(self, model: nn.Module, load_device: Any, offload_device: Any) -> None:
        self.model, self.load_device, self.offload_device = model, load_device, offload_device
        self.object_patches: dict[str, Any] = {}
        self.patches: dict[str, Tensor] = {}
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.backup: dict[str, Any] = {}

    def clone(self, disable_dynamic: bool = False) -> ModelPatcher:
        clone = ModelPatcher(self.model, self.load_device, self.offload_device)
        clone.object_patches, clone.patches = dict(self.object_patches), dict(self.patches)
        clone.model_options = copy.deepcopy(self.model_options)
        clone.backup = self.backup
        return clone

    def add_object_patch(self, name: str, value: Any) -> None:
        self.object_patches[name] = value

    def get_model_object(self, name: str) -> Any:
        return self.object_patches.get(name, self.backup.get(name, _get(self.model, name)))

    def add_patches(self, patches: Mapping[str, Tensor]) -> None:
        """Differences of weights, as LoRAs come to be."""
        self.patches |= patches

    def patch_model(self) -> None:
        assert self.load_device != GPU
        for name, value in self.object_patches.items():
            self.backup[name] = _get(self.model, name)
            _set(self.model, name, value)
        for name, difference in self.patches.items():
            weight = _get(self.model, name)
            self.backup[name] = weight
            _set(self.model, name, nn.Parameter(weight + difference, requires_grad=False))

    def unpatch_model(self) -> None:
        for name in reversed(list(self.backup)):
            _set(self.model, name, self.backup.pop(name))


def _get(root: Any, path: str) -> Any:
    for name in path.split("."):
        root = getattr(root, name)
    return root


def _set(root: Any, path: str, value: Any) -> None:
    parent, _, name = path.rpartition(".")
    setattr(_get(root, parent) if parent else root, name, value)


class UNetModel(nn.Module):
    """comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel, computed by diffusers' class; with an attention of its
    own behind that, called as ComfyUI's are."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = models.unet()
        self.dtype = torch.float32

    def forward(
        self, x: Tensor, timesteps: Tensor, context: Tensor, y: Any = None, control: Any = None,
        transformer_options: Any = {}, **kwargs: Any,  # noqa: B006 # theirs
    ) -> Tensor:  # fmt: skip
        transformer_options["original_shape"] = list(x.shape)
        transformer_options["block"] = ("input", 0)
        assert y is None
        assert not kwargs
        h = self.unet(x, timesteps, context).sample
        while control is not None and control["output"]:
            h = h + control["output"].pop()
        tokens = h.flatten(2).transpose(1, 2)
        attended = optimized_attention(tokens, tokens, tokens, 2, transformer_options=transformer_options)
        return attended.transpose(1, 2).reshape(h.shape)


def optimized_attention(*args: Any, transformer_options: Any, **kwargs: Any) -> Tensor:
    """comfy.ldm.modules.attention.optimized_attention, which looks at memory unless somebody else computes it."""
    if "optimized_attention_override" in transformer_options:
        found: Tensor = transformer_options["optimized_attention_override"](
            plain_attention, *args, transformer_options=transformer_options, **kwargs
        )
        return found
    return plain_attention(*args, **kwargs)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    assert q.device.type == "cpu", "how much memory is free there?"
    batch, tokens, width = q.shape
    q, k, v = (t.reshape(batch, tokens, heads, width // heads).transpose(1, 2) for t in (q, k, v))
    scores = (q @ k.transpose(-1, -2) * (width // heads) ** -0.5).softmax(-1)
    return (scores @ v).transpose(1, 2).reshape(batch, tokens, width)


class BaseModel(nn.Module):
    """comfy.model_base.BaseModel"""

    def __init__(self) -> None:
        super().__init__()
        self.diffusion_model = UNetModel()

    def apply_model(self, x: Tensor, t: Tensor, context: Tensor, control: Any, transformer_options: Any) -> Tensor:
        result: Tensor = self.diffusion_model(
            x, t, context=context, control=control, transformer_options=transformer_options
        )
        return result


def sample(patcher: ModelPatcher, steps: int = 2, control: bool = False) -> Tensor:
    """As much of sampling as decides how a model is called: other options in each step, two prompts in one call."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, 4, 8, 8, generator=generator)
    context = torch.randn(2, 77, 24, generator=generator)
    hint = torch.randn(2, 4, 8, 8, generator=generator)
    sigmas = torch.linspace(10, 1, steps + 1)
    patcher.patch_model()
    try:
        for sigma in sigmas[:-1]:
            options = {
                **copy.copy(patcher.model_options["transformer_options"]), "sigmas": sigma[None],
                "sample_sigmas": sigmas, "cond_or_uncond": [1, 0],
                "uuids": [uuid.uuid4(), uuid.uuid4()], "callbacks": {}, "wrappers": {},
            }  # fmt: skip
            given = {"input": [], "middle": [], "output": [hint.clone(), hint.clone()]} if control else None
            both = patcher.model.apply_model(x.repeat(2, 1, 1, 1), sigma.repeat(2), context, given, options)
            x = x - both.mean(0, keepdim=True) * 0.1
    finally:
        patcher.unpatch_model()
    return x


class SDClipModel(nn.Module):
    """comfy.sd1_clip.SDClipModel: its transformer gets embeddings, and further arguments that CLIP has no use for."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = CLIPTextModel()

    def encode_token_weights(self, tokens: list[int]) -> tuple[Tensor, Tensor]:
        embeds = self.transformer.get_input_embeddings()(torch.tensor([tokens]))
        found: tuple[Tensor, Tensor] = self.transformer(
            None, None, embeds=embeds, num_tokens=[len(tokens)], intermediate_output=-2,
            final_layer_norm_intermediate=True, dtype=torch.float32, embeds_info=[],
        )  # fmt: skip
        return found


class CLIPTextModel(nn.Module):
    """comfy.clip_model.CLIPTextModel, as few layers of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(50, 24)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(24, 2, 48, batch_first=True) for _ in range(2))
        models.randomized(self)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.tokens

    def forward(
        self, input_tokens: Any, attention_mask: Any = None, embeds: Any = None, num_tokens: Any = None,
        intermediate_output: Any = None, final_layer_norm_intermediate: bool = True, dtype: Any = torch.float32,
        embeds_info: Any = (),
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        states = [embeds.to(dtype)]
        for layer in self.layers:
            states.append(states[-1] + torch.tanh(layer.linear2(torch.relu(layer.linear1(layer.norm1(states[-1]))))))
        return states[intermediate_output], states[-1][:, num_tokens[0] - 1]


class CLIP:
    """comfy.sd.CLIP, of a model with two encoders."""

    def __init__(self) -> None:
        self.cond_stage_model = nn.Module()
        self.cond_stage_model.clip_l, self.cond_stage_model.clip_g = SDClipModel(), SDClipModel()
        self.patcher = ModelPatcher(self.cond_stage_model, GPU, torch.device("cpu"))

    def clone(self) -> CLIP:
        clone = copy.copy(self)
        clone.patcher = self.patcher.clone()
        return clone

    def encode(self, tokens: list[int]) -> Tensor:
        self.patcher.patch_model()
        try:
            encoders: list[Any] = [self.cond_stage_model.clip_l, self.cond_stage_model.clip_g]
            return torch.cat([part for encoder in encoders for part in (encoder.encode_token_weights(tokens)[0])])
        finally:
            self.patcher.unpatch_model()


class AutoencodingEngine(nn.Module):
    """comfy.ldm.models.autoencoder.AutoencodingEngine, by diffusers' class; one that can write into buffers."""

    comfy_has_chunked_io = True

    def __init__(self) -> None:
        super().__init__()
        self.vae = models.vae()

    def decode(self, z: Tensor, output_buffer: Tensor | None = None) -> Tensor:
        decoded: Tensor = self.vae.decode(z).sample
        return decoded if output_buffer is None else output_buffer.copy_(decoded)

    def encode(self, x: Tensor) -> Tensor:
        latents: Tensor = self.vae.encode(x).latent_dist.mode()
        return latents


class VAE:
    """comfy.sd.VAE"""

    def __init__(self) -> None:
        self.first_stage_model = AutoencodingEngine()
        self.device: Any = GPU
        self.patcher = ModelPatcher(self.first_stage_model, GPU, torch.device("cpu"))

    def decode(self, samples: Tensor) -> Tensor:
        assert self.device != GPU
        self.patcher.patch_model()
        samples = samples.to(self.device)
        if self.first_stage_model.comfy_has_chunked_io:
            out = torch.empty(samples.shape[0], 3, samples.shape[2] * 4, samples.shape[3] * 4)
            self.first_stage_model.decode(samples, output_buffer=out)
            return out
        return self.first_stage_model.decode(samples)

    def encode(self, pixels: Tensor) -> Tensor:
        return self.first_stage_model.encode(pixels.to(self.device))

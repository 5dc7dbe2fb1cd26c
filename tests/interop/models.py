"""The three networks of a small Stable Diffusion 1.x with random weights, and their weights in the types of ggml."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from sdrpc.ggml.types import TYPES
from sdrpc.ggml.weight import View, Weight
from tests.support import ggml

WIDTH = 256  # of the text embedding: a whole block of Q4_K
TOKENS, VOCABULARY = 77, 200

Inputs = dict[str, torch.Tensor]


class Part(NamedTuple):
    """A network: ``call`` is what is captured, ``inputs`` makes inputs for a size (latent height, width) and batch."""

    build: Callable[[], nn.Module]
    call: Callable[..., tuple[torch.Tensor, ...]]
    inputs: Callable[[int, int, int], Inputs]


def clip() -> nn.Module:
    config = CLIPTextConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=TOKENS, bos_token_id=0, eos_token_id=VOCABULARY - 1,
    )  # fmt: skip
    return CLIPTextModel(config)


def unet() -> nn.Module:
    return UNet2DConditionModel(
        block_out_channels=(64, 128), layers_per_block=1, cross_attention_dim=WIDTH, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def vae() -> nn.Module:
    return AutoencoderKL(
        block_out_channels=(32, WIDTH), layers_per_block=1, latent_channels=4, norm_num_groups=32,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def tokens(batch: int) -> torch.Tensor:
    ids = torch.randint(0, VOCABULARY, (batch, TOKENS), generator=torch.Generator().manual_seed(batch))
    return ids.to(torch.int32)


PARTS = {
    "clip": Part(clip, lambda m, ids: (m(ids).last_hidden_state,), lambda h, w, n: {"input_ids": tokens(n)}),
    "unet": Part(
        unet,
        lambda m, x, t, context: m(x, t, context, return_dict=False),
        lambda h, w, n: {"x": randn(n, 4, h, w), "t": torch.full((n,), 481.0), "context": randn(n, TOKENS, WIDTH)},
    ),
    "vae": Part(vae, lambda m, z: m.decode(z, return_dict=False), lambda h, w, n: {"latents": randn(n, 4, h, w)}),
}  # fmt: skip


def make(part: str) -> nn.Module:
    """The network with random weights, the same each time."""
    torch.manual_seed(7)
    return PARTS[part].build().eval()


def fitting(kind: str, shape: tuple[int, ...]) -> str:
    """The type that a file of ``kind`` weights has for a weight of ``shape``, as converters choose it."""
    block = TYPES[kind].block
    if len(shape) == 1 or kind == "F32":
        return "F32"
    return kind if block == 1 or (len(shape) == 2 and shape[1] % block == 0) else "F16"


def stored(module: nn.Module, kind: str) -> Mapping[str, Weight]:
    """The module's weights, stored as ``kind`` where they can be. The module keeps what can be read back from that:
    what is compared then is arithmetic, not the rounding of weights."""
    weights = {}
    with torch.no_grad():
        for name, parameter in module.state_dict().items():
            if not parameter.is_floating_point():
                continue
            shape = tuple(parameter.shape)
            chosen = fitting(kind, shape)
            data = ggml.encode(chosen, parameter.float().numpy())
            parameter.copy_(torch.from_numpy(ggml.decode(chosen, data).copy()).reshape(shape))
            weights[name] = Weight(name, TYPES[chosen], shape, View(memoryview(data)))
    assert any(weight.type == TYPES[kind] for weight in weights.values())
    return weights


def relative_error(theirs: np.ndarray, ours: np.ndarray) -> float:
    """‖ours - theirs‖ / ‖theirs‖."""
    assert ours.shape == theirs.shape
    return float(np.linalg.norm((ours - theirs).ravel()) / np.linalg.norm(theirs.ravel()))

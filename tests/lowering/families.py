"""Tiny modules of every model family, as diffusers and transformers make them, and calls with inputs of two sizes.

``FAMILIES`` maps a name to a function that makes the module and its calls. Sizes are as small as the classes allow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import diffusers as df
import torch
import transformers as tr
from torch import Tensor, nn

from tests.lowering.models import randomized


class Call(NamedTuple):
    """One call of a module's method."""

    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Family(NamedTuple):
    module: nn.Module
    calls: tuple[Call, ...]


Maker = Callable[[], Family]
FAMILIES: dict[str, Maker] = {}


def family(name: str) -> Callable[[Maker], Maker]:
    def register(make: Maker) -> Maker:
        FAMILIES[name] = make
        return make

    return register


def forward(*args: Any, **kwargs: Any) -> Call:
    return Call("forward", args, kwargs)


def made(module: nn.Module, calls: Sequence[Call]) -> Family:
    return Family(randomized(module), tuple(calls))


# inputs

_GENERATOR = torch.Generator().manual_seed(7)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_GENERATOR)


def picture(*shape: int) -> Tensor:
    return torch.rand(shape, generator=_GENERATOR)


def ids(words: int, *shape: int) -> Tensor:
    return torch.randint(0, words, shape, generator=_GENERATOR)


def mask(length: int, lengths: Sequence[int], dtype: torch.dtype = torch.long) -> Tensor:
    """A row for each length: that many ones, then zeros."""
    return (torch.arange(length)[None] < torch.tensor(lengths)[:, None]).to(dtype)


def positions(height: int, width: int, axes: int = 3) -> Tensor:
    """The place of each patch of a picture: 0, y, x, 0 …, one row a patch."""
    grid = torch.zeros(height, width, axes)
    grid[..., 1] += torch.arange(height)[:, None]
    grid[..., 2] += torch.arange(width)[None]
    return grid.reshape(height * width, axes)


def step(batch: int, value: float = 601.0) -> Tensor:
    return torch.full((batch,), value)


# UNets and their helpers

CROSS = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "cross_attention_dim": 24,
    "norm_num_groups": 8,
}
UNET = CROSS | {"sample_size": 8, "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
SIZES = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 68}
LATENTS = ((2, 8, 8, 7), (1, 6, 10, 5))
"""Batch, height, width and words of a UNet's calls."""


def size_conditions(batch: int) -> dict[str, Tensor]:
    return {"text_embeds": noise(batch, 20), "time_ids": noise(batch, 6) * 50}


@family("unet-sd2-v")
def _() -> Family:
    unet = df.UNet2DConditionModel(**UNET, attention_head_dim=(2, 4), use_linear_projection=True)
    return made(unet, [forward(noise(b, 4, h, w), 601, noise(b, t, 24)) for b, h, w, t in LATENTS])


@family("unet-sd15-inpaint-lcm")
def _() -> Family:
    unet = df.UNet2DConditionModel(**UNET, in_channels=9, attention_head_dim=2, time_cond_proj_dim=12)
    return made(
        unet, [forward(noise(b, 9, h, w), 601, noise(b, t, 24), timestep_cond=noise(b, 12)) for b, h, w, t in LATENTS]
    )


@family("unet-sdxl")
def _() -> Family:
    unet = df.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32, 64),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 4, 8),
        cross_attention_dim=24,
        norm_num_groups=8,
        use_linear_projection=True,
        **SIZES,
    )
    return made(
        unet,
        [
            forward(
                noise(b, 4, h, w),
                601,
                noise(b, t, 24),
                added_cond_kwargs=size_conditions(b),
                cross_attention_kwargs=None,
            )
            for b, h, w, t in ((2, 8, 12, 7), (1, 16, 8, 5))
        ],
    )


@family("controlnet-sd15")
def _() -> Family:
    net = df.ControlNetModel(**CROSS, attention_head_dim=2, conditioning_embedding_out_channels=(8, 16))
    return made(net, [_control(b, h, w, t) for b, h, w, t in LATENTS])


@family("controlnet-sdxl")
def _() -> Family:
    options = CROSS | {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
    net = df.ControlNetModel(
        **options,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        conditioning_embedding_out_channels=(8, 16),
        use_linear_projection=True,
        **SIZES,
    )
    return made(net, [_control(b, h, w, t, added_cond_kwargs=size_conditions(b)) for b, h, w, t in LATENTS])


def _control(batch: int, height: int, width: int, words: int, **more: Any) -> Call:
    hint = picture(batch, 3, height * 2, width * 2)
    options = {"conditioning_scale": 0.7, "guess_mode": False, "return_dict": False}
    context = noise(batch, words, 24)
    return forward(
        noise(batch, 4, height, width), 301, encoder_hidden_states=context, controlnet_cond=hint, **options, **more
    )


@family("unet-with-residuals")
def _() -> Family:
    unet = df.UNet2DConditionModel(**UNET, attention_head_dim=2)

    def call(b: int, h: int, w: int, t: int) -> Call:
        down = [(16, 1), (16, 1), (16, 2), (32, 2)]
        residuals = [noise(b, channels, h // by, w // by) for channels, by in down]
        return forward(
            noise(b, 4, h, w),
            601,
            encoder_hidden_states=noise(b, t, 24),
            down_block_additional_residuals=residuals,
            mid_block_additional_residual=noise(b, 32, h // 2, w // 2),
        )

    return made(unet, [call(*size) for size in LATENTS])


@family("unet-ip-adapter")
def _() -> Family:
    unet = randomized(df.UNet2DConditionModel(**UNET, attention_head_dim=2))
    adapter, widths = {}, {"mid": 32, "up_0": 32, "up_1": 16, "down_0": 16, "down_1": 32}
    number = 1
    for name in unet.attn_processors:
        if not name.endswith("attn1.processor"):
            block, _, rest = name.partition("_block")
            width = widths[block if block == "mid" else f"{block}_{rest[2]}"]
            adapter[f"{number}.to_k_ip.weight"] = noise(width, 24) * 0.2
            adapter[f"{number}.to_v_ip.weight"] = noise(width, 24) * 0.2
            number += 2
    projection = {
        "proj.weight": noise(96, 20) * 0.2,
        "proj.bias": noise(96) * 0.2,
        "norm.weight": torch.ones(24),
        "norm.bias": torch.zeros(24),
    }
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": adapter}], low_cpu_mem_usage=False)
    return Family(
        unet.eval(),
        tuple(
            forward(
                noise(b, 4, h, w),
                601,
                encoder_hidden_states=noise(b, t, 24),
                added_cond_kwargs={"image_embeds": [noise(b, 1, 20)]},
            )
            for b, h, w, t in LATENTS
        ),
    )


# transformers of pictures

SD3 = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 4,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 24,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 20,
    "out_channels": 4,
    "pos_embed_max_size": 12,
}


def _sd3_calls() -> list[Call]:
    return [
        forward(
            hidden_states=noise(b, 4, h, w),
            encoder_hidden_states=noise(b, t, 24),
            pooled_projections=noise(b, 20),
            timestep=step(b),
        )
        for b, h, w, t in ((2, 8, 8, 7), (1, 12, 8, 5))
    ]


@family("sd3")
def _() -> Family:
    return made(df.SD3Transformer2DModel(**SD3, num_layers=2), _sd3_calls())


@family("sd35-medium")
def _() -> Family:
    model = df.SD3Transformer2DModel(**SD3, num_layers=3, dual_attention_layers=(0, 1), qk_norm="rms_norm")
    return made(model, _sd3_calls())


HEADS = {"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 24}
FLUX = HEADS | {
    "patch_size": 1,
    "in_channels": 16,
    "num_single_layers": 2,
    "pooled_projection_dim": 20,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}
PATCHES = ((1, 4, 6, 7), (2, 5, 4, 9))
"""Batch, rows and columns of patches, and words."""


def _flux_call(b: int, h: int, w: int, t: int, **more: Any) -> Call:
    inputs: dict[str, Any] = {
        "hidden_states": noise(b, h * w, 16),
        "timestep": step(b, 0.601),
        "guidance": step(b, 3.5),
        "pooled_projections": noise(b, 20),
        "encoder_hidden_states": noise(b, t, 24),
        "txt_ids": torch.zeros(t, 3),
        "img_ids": positions(h, w),
    }
    return forward(**inputs | more)


@family("flux-dev")
def _() -> Family:
    return made(df.FluxTransformer2DModel(**FLUX), [_flux_call(*size) for size in PATCHES])


@family("flux-schnell")
def _() -> Family:
    model = df.FluxTransformer2DModel(**FLUX | {"guidance_embeds": False})
    return made(model, [_flux_call(*size, guidance=None, joint_attention_kwargs={}) for size in PATCHES])


@family("flux-with-controlnet")
def _() -> Family:
    def call(b: int, h: int, w: int, t: int) -> Call:
        blocks = [noise(b, h * w, 32), noise(b, h * w, 32)]
        single = [noise(b, h * w, 32)]
        return _flux_call(b, h, w, t, controlnet_block_samples=blocks, controlnet_single_block_samples=single)

    return made(df.FluxTransformer2DModel(**FLUX), [call(*size) for size in PATCHES])


@family("flux-controlnet")
def _() -> Family:
    net = df.FluxControlNetModel(**FLUX | {"axes_dims_rope": [4, 6, 6]}, num_mode=3)
    return made(
        net,
        [
            _flux_call(
                b, h, w, t, controlnet_cond=noise(b, h * w, 16), controlnet_mode=torch.ones(b, 1, dtype=torch.long),
                conditioning_scale=0.7,
            )
            for b, h, w, t in PATCHES
        ],
    )  # fmt: skip


def _flux2(guidance: bool) -> Family:
    model = df.Flux2Transformer2DModel(
        **HEADS,
        patch_size=1,
        in_channels=16,
        num_single_layers=2,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance,
    )
    calls = [
        forward(
            hidden_states=noise(b, h * w, 16),
            timestep=step(b, 0.601),
            guidance=step(b, 4.0) if guidance else None,
            encoder_hidden_states=noise(b, t, 24),
            txt_ids=positions(1, t, 4)[None].repeat(b, 1, 1),
            img_ids=positions(h, w, 4)[None].repeat(b, 1, 1),
        )
        for b, h, w, t in PATCHES
    ]
    return made(model, calls)


@family("flux2-dev")
def _() -> Family:
    return _flux2(guidance=True)


@family("flux2-klein")
def _() -> Family:
    return _flux2(guidance=False)


@family("chroma")
def _() -> Family:
    model = df.ChromaTransformer2DModel(
        **HEADS,
        patch_size=1,
        in_channels=16,
        num_single_layers=2,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=16,
        approximator_hidden_dim=32,
        approximator_layers=2,
    )
    calls = [
        forward(
            hidden_states=noise(b, h * w, 16),
            timestep=step(b, 0.601),
            encoder_hidden_states=noise(b, t, 24),
            txt_ids=torch.zeros(t, 3),
            img_ids=positions(h, w),
            attention_mask=torch.cat([mask(t, [t - 2] * b), torch.ones(b, h * w)], 1).float(),
        )
        for b, h, w, t in PATCHES
    ]
    return made(model, calls)


QWEN = {"in_channels": 16, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 3}


def _qwen_call(b: int, h: int, w: int, t: int, seen: Tensor | None, images: int = 1, **more: Any) -> Call:
    return forward(
        hidden_states=noise(b, images * h * w, 16),
        timestep=step(b, 0.601),
        encoder_hidden_states_mask=seen,
        encoder_hidden_states=noise(b, t, 24),
        img_shapes=[[(1, h, w)] * images] * b,
        **more,
    )


def _qwen_masks(dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
    return None, mask(9, [9, 6], dtype)


@family("qwen-image")
def _() -> Family:
    model = df.QwenImageTransformer2DModel(
        **QWEN, patch_size=2, out_channels=4, joint_attention_dim=24, axes_dims_rope=(4, 6, 6)
    )
    return made(model, [_qwen_call(*s, m) for s, m in zip(PATCHES, _qwen_masks(torch.long), strict=True)])


@family("qwen-image-edit")
def _() -> Family:
    model = df.QwenImageTransformer2DModel(
        **QWEN, patch_size=2, out_channels=4, joint_attention_dim=24, axes_dims_rope=(4, 6, 6), zero_cond_t=True
    )
    return made(model, [_qwen_call(*size, None, images=2) for size in PATCHES])


@family("qwen-image-2.1")
def _() -> Family:
    model = df.QwenImage21Transformer2DModel(**QWEN, out_channels=16, context_in_dim=24, axes_dims_rope=(4, 6, 6))

    def call(b: int, h: int, w: int, t: int, lengths: list[int]) -> Call:
        places = torch.cat([torch.zeros(b, t), torch.ones(b, h * w // 4)], 1).bool()
        return _qwen_call(b, h, w, t, mask(t, lengths, torch.bool), img_mask=places)

    return made(model, [call(1, 4, 6, 7, [7]), call(2, 5, 4, 9, [9, 6])])


@family("z-image")
def _() -> Family:
    model = df.ZImageTransformer2DModel(
        in_channels=4, dim=48, n_layers=2, n_refiner_layers=1, n_heads=3, n_kv_heads=3, cap_feat_dim=24,
        axes_dims=[4, 6, 6], axes_lens=[512, 64, 64],
    )  # fmt: skip

    def call(b: int, h: int, w: int, words: list[int]) -> Call:
        return forward([noise(4, 1, h, w) for _ in range(b)], step(b, 0.4), [noise(t, 24) for t in words])

    return made(model, [call(1, 8, 8, [7]), call(2, 8, 12, [9, 35])])


@family("lumina2")
def _() -> Family:
    model = df.Lumina2Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=48, num_layers=2, num_refiner_layers=1,
        num_attention_heads=3, num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 6, 6), axes_lens=(32, 16, 16),
        cap_feat_dim=20,
    )  # fmt: skip

    def call(b: int, h: int, w: int, t: int, lengths: list[int]) -> Call:
        context = {"encoder_hidden_states": noise(b, t, 20), "encoder_attention_mask": mask(t, lengths)}
        return forward(hidden_states=noise(b, 4, h, w), timestep=step(b, 0.6), **context, attention_kwargs={})

    return made(model, [call(1, 8, 8, 7, [7]), call(2, 4, 12, 9, [9, 5])])


SANA = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 3, "attention_head_dim": 8, "num_layers": 2,
    "num_cross_attention_heads": 2, "cross_attention_head_dim": 12, "cross_attention_dim": 24, "caption_channels": 20,
    "sample_size": 8,
}  # fmt: skip
MASKED = ((1, 8, 8, 7, [5]), (2, 6, 10, 9, [9, 5]))
"""Batch, height, width, words, and how many of the words count."""


def _masked_call(b: int, h: int, w: int, t: int, lengths: list[int], timestep: Tensor, **more: Any) -> Call:
    return forward(
        noise(b, 4, h, w),
        encoder_hidden_states=noise(b, t, 20),
        encoder_attention_mask=mask(t, lengths),
        timestep=timestep,
        **more,
    )


@family("sana")
def _() -> Family:
    return made(df.SanaTransformer2DModel(**SANA), [_masked_call(*size, step(size[0])) for size in MASKED])


@family("sana-sprint")
def _() -> Family:
    model = df.SanaTransformer2DModel(**SANA, guidance_embeds=True, qk_norm="rms_norm_across_heads")
    return made(model, [_masked_call(*s, step(s[0], 0.6), guidance=step(s[0], 0.45)) for s in MASKED])


PIXART = {
    "num_attention_heads": 3, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 2,
    "cross_attention_dim": 24, "caption_channels": 20,
}  # fmt: skip


@family("pixart-alpha-1024")
def _() -> Family:
    model = df.PixArtTransformer2DModel(**PIXART, sample_size=128, use_additional_conditions=True)

    def conditions(b: int) -> dict[str, Tensor]:
        return {"resolution": torch.full((b, 2), 1024.0), "aspect_ratio": torch.ones(b, 1)}

    return made(model, [_masked_call(*s, step(s[0]).long(), added_cond_kwargs=conditions(s[0])) for s in MASKED])


@family("pixart-sigma")
def _() -> Family:
    model = df.PixArtTransformer2DModel(
        **PIXART, sample_size=16, interpolation_scale=1, use_additional_conditions=False
    )
    none = {"resolution": None, "aspect_ratio": None}
    return made(model, [_masked_call(*s, step(s[0]).long(), added_cond_kwargs=none) for s in MASKED])


@family("krea2")
def _() -> Family:
    model = df.Krea2Transformer2DModel(
        in_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, timestep_embed_dim=32, text_hidden_dim=24, num_text_layers=3,
        text_num_attention_heads=2, text_num_key_value_heads=2, text_intermediate_size=32,
        num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip

    def call(b: int, h: int, w: int, t: int, seen: Tensor | None) -> Call:
        return forward(
            hidden_states=noise(b, h * w, 16),
            encoder_hidden_states=noise(b, t, 3, 24),
            timestep=step(b, 0.6),
            position_ids=torch.cat([torch.zeros(t, 3), positions(h, w)]),
            encoder_attention_mask=seen,
        )

    return made(model, [call(*s, m) for s, m in zip(PATCHES, _qwen_masks(torch.bool), strict=True)])


@family("auraflow")
def _() -> Family:
    model = df.AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=2, attention_head_dim=8,
        num_attention_heads=3, joint_attention_dim=20, caption_projection_dim=24, out_channels=4, pos_embed_max_size=64,
    )  # fmt: skip
    calls = [
        forward(noise(b, 4, h, w), encoder_hidden_states=noise(b, t, 20), timestep=step(b, 0.6))
        for b, h, w, t in ((1, 8, 8, 7), (2, 6, 10, 9))
    ]
    return made(model, calls)


@family("cogview4")
def _() -> Family:
    model = df.CogView4Transformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=3,
        text_embed_dim=20, time_embed_dim=16, condition_dim=8, pos_embed_max_size=16, sample_size=16,
        rope_axes_dim=(8, 8),
    )  # fmt: skip
    calls = [
        forward(
            hidden_states=noise(b, 4, h, w),
            encoder_hidden_states=noise(b, t, 20),
            timestep=step(b).long(),
            original_size=torch.full((b, 2), 128.0),
            target_size=torch.full((b, 2), 128.0),
            crop_coords=torch.zeros(b, 2),
        )
        for b, h, w, t in ((1, 8, 8, 7), (2, 6, 10, 9))
    ]
    return made(model, calls)


@family("hunyuan-image-2.1")
def _() -> Family:
    model = df.HunyuanImageTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2, num_single_layers=2,
        num_refiner_layers=1, text_embed_dim=20, text_embed_2_dim=12, rope_axes_dim=(8, 8),
    )  # fmt: skip
    calls = [
        forward(hidden_states=noise(b, 4, h, w), timestep=step(b), **_two_texts(b, t))
        for b, h, w, t in ((1, 4, 6, 7), (2, 4, 4, 9))
    ]
    return made(model, calls)


def _two_texts(batch: int, words: int) -> dict[str, Tensor]:
    return {
        "encoder_hidden_states": noise(batch, words, 20),
        "encoder_attention_mask": mask(words, [words - 3] * batch),
        "encoder_hidden_states_2": noise(batch, 6, 12),
        "encoder_attention_mask_2": mask(6, [4] * batch),
    }


@family("hidream")
def _() -> Family:
    model = df.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, caption_channels=[24, 20], text_emb_dim=12, num_routed_experts=2,
        num_activated_experts=1, axes_dims_rope=(4, 6, 6), max_resolution=(16, 16), llama_layers=(0, 1),
    )  # fmt: skip
    call = forward(
        hidden_states=noise(1, 4, 8, 8),
        timesteps=step(1).long(),
        encoder_hidden_states_t5=noise(1, 7, 24),
        encoder_hidden_states_llama3=noise(2, 1, 7, 20),
        pooled_embeds=noise(1, 12),
    )
    return made(model, [call])


# transformers of films

WAN = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "out_channels": 4, "text_dim": 20,
    "freq_dim": 32, "ffn_dim": 48, "num_layers": 2, "rope_max_seq_len": 32,
}  # fmt: skip
FILMS = ((1, 3, 8, 6, 7), (2, 2, 4, 8, 9))
"""Batch, frames, height, width, words."""


@family("wan-t2v")
def _() -> Family:
    model = df.WanTransformer3DModel(**WAN, in_channels=4)
    return made(model, [forward(noise(b, 4, f, h, w), step(b).long(), noise(b, t, 20)) for b, f, h, w, t in FILMS])


@family("wan-i2v-14b")
def _() -> Family:
    model = df.WanTransformer3DModel(**WAN, in_channels=9, image_dim=16, added_kv_proj_dim=24)
    calls = [
        forward(noise(b, 9, f, h, w), step(b).long(), noise(b, 512, 20), encoder_hidden_states_image=noise(b, 257, 16))
        for b, f, h, w, _ in FILMS
    ]
    return made(model, calls)


@family("wan22-ti2v-5b")
def _() -> Family:
    """A step for each patch."""
    model = df.WanTransformer3DModel(**WAN, in_channels=4)
    calls = [
        forward(noise(b, 4, f, h, w), torch.full((b, f * h * w // 4), 601), noise(b, t, 20)) for b, f, h, w, t in FILMS
    ]
    return made(model, calls)


LTX = {
    "in_channels": 8, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 12, "cross_attention_dim": 24,
    "num_layers": 2, "caption_channels": 20,
}  # fmt: skip
LTX_SIZES = ((1, 2, 4, 3, 7, 5), (2, 3, 2, 4, 9, 6))


@family("ltx-video")
def _() -> Family:
    calls = [
        forward(
            hidden_states=noise(b, f * h * w, 8), encoder_hidden_states=noise(b, t, 20), timestep=step(b).long(),
            encoder_attention_mask=mask(t, [t - 3] * b), num_frames=f, height=h, width=w,
            rope_interpolation_scale=(0.32, 32, 32),
        )
        for b, f, h, w, t, _ in LTX_SIZES
    ]  # fmt: skip
    return made(df.LTXVideoTransformer3DModel(**LTX), calls)


@family("ltx2-video")
def _() -> Family:
    model = df.LTX2VideoTransformer3DModel(
        **LTX, audio_in_channels=8, audio_out_channels=8, audio_num_attention_heads=2, audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
    )  # fmt: skip
    calls = [
        forward(
            hidden_states=noise(b, f * h * w, 8), audio_hidden_states=noise(b, a, 8),
            encoder_hidden_states=noise(b, t, 20), audio_encoder_hidden_states=noise(b, t, 20),
            timestep=step(b), sigma=step(b), encoder_attention_mask=mask(t, [t - 3] * b),
            audio_encoder_attention_mask=mask(t, [t - 3] * b), num_frames=f, height=h, width=w, fps=24.0,
            audio_num_frames=a, video_coords=model.rope.prepare_video_coords(b, f, h, w, "cpu", fps=24.0),
            audio_coords=model.audio_rope.prepare_audio_coords(b, a, "cpu"),
        )
        for b, f, h, w, t, a in LTX_SIZES
    ]  # fmt: skip
    return made(model, calls)


@family("hunyuan-video")
def _() -> Family:
    model = df.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2, num_single_layers=2,
        num_refiner_layers=1, text_embed_dim=20, pooled_projection_dim=12, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    calls = [
        forward(
            hidden_states=noise(b, 4, f, h, w), timestep=step(b).long(), encoder_hidden_states=noise(b, t, 20),
            encoder_attention_mask=mask(t, [t - 3] * b), pooled_projections=noise(b, 12), guidance=step(b, 6000.0),
        )
        for b, f, h, w, t in FILMS
    ]  # fmt: skip
    return made(model, calls)


@family("hunyuan-video-1.5")
def _() -> Family:
    model = df.HunyuanVideo15Transformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2, num_refiner_layers=1,
        text_embed_dim=20, text_embed_2_dim=12, image_embed_dim=12, rope_axes_dim=(4, 6, 6), task_type="t2v",
    )  # fmt: skip
    calls = [
        forward(
            hidden_states=noise(b, 9, f, h, w), image_embeds=torch.zeros(b, 5, 12), timestep=step(b), **_two_texts(b, t)
        )
        for b, f, h, w, t in ((1, 3, 4, 6, 7), (2, 2, 4, 4, 9))
    ]
    return made(model, calls)


@family("cogvideox")
def _() -> Family:
    model = df.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=20, num_layers=2, sample_width=8, sample_height=8, sample_frames=9, patch_size=2,
        max_text_seq_length=8, use_rotary_positional_embeddings=True,
    )  # fmt: skip

    def call(b: int, f: int, h: int, w: int) -> Call:
        patches = f * (h // 2) * (w // 2)
        return forward(
            hidden_states=noise(b, f, 4, h, w), encoder_hidden_states=noise(b, 8, 20), timestep=step(b).long(),
            image_rotary_emb=(torch.cos(noise(patches, 16)), torch.sin(noise(patches, 16))),
        )  # fmt: skip

    return made(model, [call(1, 3, 8, 8), call(2, 3, 8, 4)])


@family("mochi")
def _() -> Family:
    model = df.MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=8, in_channels=4,
        text_embed_dim=24, time_embed_dim=16, max_sequence_length=8,
    )  # fmt: skip

    def call(b: int, f: int, h: int, w: int) -> Call:
        return forward(
            hidden_states=noise(b, 4, f, h, w), encoder_hidden_states=noise(b, 8, 24), timestep=step(b),
            encoder_attention_mask=mask(8, [5] * b, torch.bool),
        )  # fmt: skip

    return made(model, [call(1, 3, 8, 8), call(2, 2, 8, 4)])


# autoencoders


def _decode(*shape: int) -> Call:
    return Call("decode", (noise(*shape),), {"return_dict": False})


def _encode(*shape: int) -> Call:
    return Call("encode", (noise(*shape),), {})


def _image_calls(latent_channels: int, by: int = 4) -> list[Call]:
    return [_decode(1, latent_channels, 6, 5), _encode(1, 3, 6 * by, 5 * by), _decode(2, latent_channels, 4, 7)]


KL = {
    "block_out_channels": (16, 16, 32),
    "norm_num_groups": 8,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
}


@family("vae-sdxl")
def _() -> Family:
    return made(df.AutoencoderKL(**KL, layers_per_block=2, latent_channels=4), _image_calls(4))


@family("vae-flux")
def _() -> Family:
    options = {"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.1159, "scaling_factor": 0.3611}
    return made(df.AutoencoderKL(**KL, layers_per_block=1, latent_channels=16, **options), _image_calls(16))


@family("vae-flux2")
def _() -> Family:
    return made(df.AutoencoderKLFlux2(**KL, layers_per_block=1, latent_channels=8), _image_calls(8))


FILM_VAE = {
    "z_dim": 4, "base_dim": 8, "dim_mult": [1, 2, 2], "num_res_blocks": 1, "temperal_downsample": [False, True],
    "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4,
}  # fmt: skip


@family("vae-qwen-image")
def _() -> Family:
    calls = [_decode(1, 4, 1, 6, 5), _encode(1, 3, 1, 24, 20), _decode(2, 4, 1, 4, 7)]
    return made(df.AutoencoderKLQwenImage(**FILM_VAE), calls)


@family("vae-wan-2.1")
def _() -> Family:
    calls = [_decode(1, 4, 1, 6, 5), _decode(1, 4, 3, 4, 6), _encode(1, 3, 5, 16, 24)]
    return made(df.AutoencoderKLWan(**FILM_VAE), calls)


@family("vae-wan-2.2")
def _() -> Family:
    model = df.AutoencoderKLWan(
        **FILM_VAE, decoder_base_dim=8, is_residual=True, in_channels=12, out_channels=12, patch_size=2,
        scale_factor_spatial=8,
    )  # fmt: skip
    return made(model, [_decode(1, 4, 1, 6, 5), _decode(1, 4, 3, 4, 6), _encode(1, 3, 5, 32, 48)])


@family("vae-taesd")
def _() -> Family:
    widths = (16, 16, 16)
    model = df.AutoencoderTiny(
        encoder_block_out_channels=widths, decoder_block_out_channels=widths, num_encoder_blocks=(1, 2, 2),
        num_decoder_blocks=(2, 2, 1),
    )  # fmt: skip
    return made(model, _image_calls(4))


def _dc(scales: tuple[Any, ...], **options: Any) -> nn.Module:
    blocks = ("ResBlock", "ResBlock", "EfficientViTBlock")
    return df.AutoencoderDC(
        latent_channels=8, attention_head_dim=8, encoder_block_types=blocks, decoder_block_types=blocks,
        encoder_block_out_channels=(16, 16, 32), decoder_block_out_channels=(16, 16, 32),
        encoder_layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1), encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales, **options,
    )  # fmt: skip


@family("vae-dc")
def _() -> Family:
    options = {"downsample_block_type": "Conv", "upsample_block_type": "interpolate", "decoder_act_fns": "silu"}
    return made(_dc(((), (), (5,)), **options), _image_calls(8))


@family("vae-dc-pixel-shuffle")
def _() -> Family:
    return made(_dc(((), (), ())), _image_calls(8))


@family("vae-ltx")
def _() -> Family:
    model = df.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 16, 16), decoder_block_out_channels=(8, 8, 16, 16),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1), patch_size=2,
    )  # fmt: skip
    return made(model, [_decode(1, 8, 1, 4, 4), _encode(1, 3, 1, 32, 64), _decode(1, 8, 2, 2, 4)])


@family("vae-hunyuan-video")
def _() -> Family:
    model = df.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4
    )
    return made(model, [_decode(1, 4, 1, 4, 4), _encode(1, 3, 5, 16, 16), _decode(1, 4, 2, 2, 4)])


@family("vae-hunyuan-image")
def _() -> Family:
    model = df.AutoencoderKLHunyuanImage(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 64, 64), layers_per_block=1,
        spatial_compression_ratio=4, sample_size=32,
    )  # fmt: skip
    return made(model, [_decode(1, 4, 4, 3), _encode(1, 3, 16, 12), _decode(2, 4, 2, 3)])


# encoders of texts and pictures

CLIP = {
    "vocab_size": 99, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3,
    "max_position_embeddings": 77, "bos_token_id": 97, "eos_token_id": 98, "projection_dim": 20,
}  # fmt: skip


@family("text-clip-l")
def _() -> Family:
    calls = [forward(ids(99, 2, 77), output_hidden_states=True), forward(ids(99, 1, 33))]
    return made(tr.CLIPTextModel(tr.CLIPTextConfig(**CLIP)), calls)


@family("text-clip-g")
def _() -> Family:
    calls = [forward(ids(99, 2, 77), output_hidden_states=True), forward(ids(99, 1, 33), output_hidden_states=True)]
    return made(tr.CLIPTextModelWithProjection(tr.CLIPTextConfig(**CLIP, hidden_act="gelu")), calls)


T5 = {
    "vocab_size": 99, "d_model": 24, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 3,
    "feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16,
}  # fmt: skip


@family("text-t5")
def _() -> Family:
    calls = [forward(ids(99, 2, 16)), forward(ids(99, 1, 9), attention_mask=mask(9, [6]))]
    return made(tr.T5EncoderModel(tr.T5Config(**T5)), calls)


@family("text-umt5")
def _() -> Family:
    calls = [forward(ids(99, 2, 16), mask(16, [16, 9])), forward(ids(99, 1, 9), mask(9, [6]))]
    return made(tr.UMT5EncoderModel(tr.UMT5Config(**T5)), calls)


LANGUAGE = {
    "vocab_size": 99, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def _language_calls() -> list[Call]:
    return [
        forward(input_ids=ids(80, 2, 16), attention_mask=mask(16, [16, 9]), output_hidden_states=True, use_cache=False),
        forward(input_ids=ids(80, 1, 9), attention_mask=mask(9, [6]), output_hidden_states=True),
    ]


@family("text-qwen2.5-vl")
def _() -> Family:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 24}
    config = tr.Qwen2_5_VLConfig(
        text_config=LANGUAGE | {"rope_parameters": rope}, vision_config=vision | {"patch_size": 2}, image_token_id=90,
        video_token_id=91, vision_start_token_id=92, vision_end_token_id=93,
    )  # fmt: skip
    return made(tr.Qwen2_5_VLForConditionalGeneration(config), _language_calls())


@family("text-qwen3")
def _() -> Family:
    return made(tr.Qwen3Model(tr.Qwen3Config(**LANGUAGE, head_dim=8)), _language_calls())


@family("text-qwen3-logits")
def _() -> Family:
    return made(tr.Qwen3ForCausalLM(tr.Qwen3Config(**LANGUAGE, head_dim=8)), _language_calls())


GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}


@family("text-gemma2")
def _() -> Family:
    return made(tr.Gemma2Model(tr.Gemma2Config(**LANGUAGE, **GEMMA)), _language_calls())


@family("text-gemma3")
def _() -> Family:
    return made(tr.Gemma3TextModel(tr.Gemma3TextConfig(**LANGUAGE, **GEMMA)), _language_calls())


@family("text-mistral")
def _() -> Family:
    return made(tr.MistralModel(tr.MistralConfig(**LANGUAGE, head_dim=8)), _language_calls())


@family("text-mistral3")
def _() -> Family:
    vision = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = tr.Mistral3Config(
        text_config=LANGUAGE | {"model_type": "mistral", "head_dim": 8},
        vision_config=vision | {"num_attention_heads": 2, "image_size": 16, "patch_size": 4},
        image_token_index=90,
    )
    return made(tr.Mistral3ForConditionalGeneration(config), _language_calls())


@family("text-llama")
def _() -> Family:
    return made(tr.LlamaModel(tr.LlamaConfig(**LANGUAGE, head_dim=8)), _language_calls())


VISION = {
    "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


def _vision_calls() -> list[Call]:
    return [forward(noise(2, 3, 28, 28)), forward(noise(1, 3, 28, 28), output_hidden_states=True)]


@family("vision-clip")
def _() -> Family:
    return made(tr.CLIPVisionModelWithProjection(tr.CLIPVisionConfig(**VISION, projection_dim=20)), _vision_calls())


@family("vision-siglip")
def _() -> Family:
    return made(tr.SiglipVisionModel(tr.SiglipVisionConfig(**VISION)), _vision_calls())


# upscalers


class Dense(nn.Module):
    """Five convolutions, each of all that came before (ESRGAN's residual dense block)."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        outs = [growth] * 4 + [width]
        self.convs = nn.ModuleList(nn.Conv2d(width + i * growth, out, 3, 1, 1) for i, out in enumerate(outs))
        self.activation = nn.LeakyReLU(0.2, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        seen = [x]
        for conv in self.convs[:-1]:
            seen.append(self.activation(conv(torch.cat(seen, 1))))
        result: Tensor = self.convs[-1](torch.cat(seen, 1)) * 0.2 + x
        return result


class Upscaler(nn.Module):
    """ESRGAN, which makes pictures of a quarter of the size four times larger; by 2 it begins with fewer pixels."""

    def __init__(self, scale: int, width: int = 16) -> None:
        super().__init__()
        self.shrink = 4 // scale
        self.first = nn.Conv2d(3 * self.shrink**2, width, 3, 1, 1)
        self.body = nn.Sequential(Dense(width, 8), Dense(width, 8))
        self.up = nn.ModuleList(nn.Conv2d(width, width, 3, 1, 1) for _ in range(2))
        self.last = nn.Conv2d(width, 3, 3, 1, 1)
        self.activation = nn.LeakyReLU(0.2, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(nn.functional.pixel_unshuffle(x, self.shrink) if self.shrink > 1 else x)
        x = x + self.body(x) * 0.2
        for conv in self.up:
            x = self.activation(conv(nn.functional.interpolate(x, scale_factor=2, mode="nearest")))
        result: Tensor = self.last(x)
        return result


@family("esrgan-x4")
def _() -> Family:
    return made(Upscaler(4), [forward(picture(1, 3, 8, 6)), forward(picture(2, 3, 5, 7))])


@family("esrgan-x2")
def _() -> Family:
    return made(Upscaler(2), [forward(picture(1, 3, 8, 6)), forward(picture(2, 3, 4, 8))])

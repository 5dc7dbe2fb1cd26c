"""Families: their components as diffusers' and transformers' classes, in several sizes, and where files have them.

``full`` has the published models' sizes, ``tiny`` the same structure with the real vocabularies (a picture on a CPU
takes seconds), and ``reduced`` (some) the real widths with few blocks.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any
from unittest.mock import patch

import diffusers
import torch
import transformers
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder, LTX2VocoderWithBWE
from torch import nn

from . import names
from .names import Naming, Shape, prefixed
from .tokenizers import GEMMA_WORDS

# diffusers' classes have no annotations
AutoencoderKL: Any = diffusers.AutoencoderKL
AutoencoderKLFlux2: Any = diffusers.AutoencoderKLFlux2
EulerDiscreteScheduler: Any = diffusers.EulerDiscreteScheduler
FlowMatchEulerDiscreteScheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler
Flux2Transformer2DModel: Any = diffusers.Flux2Transformer2DModel
FluxTransformer2DModel: Any = diffusers.FluxTransformer2DModel
SD3Transformer2DModel: Any = diffusers.SD3Transformer2DModel
ChromaTransformer2DModel: Any = diffusers.ChromaTransformer2DModel
UNet2DConditionModel: Any = diffusers.UNet2DConditionModel
ZImageTransformer2DModel: Any = diffusers.ZImageTransformer2DModel
QwenImageTransformer2DModel: Any = diffusers.QwenImageTransformer2DModel
AutoencoderKLWan: Any = diffusers.AutoencoderKLWan
AutoencoderKLLTX2Video: Any = diffusers.AutoencoderKLLTX2Video
AutoencoderKLLTX2Audio: Any = diffusers.AutoencoderKLLTX2Audio
LTX2VideoTransformer3DModel: Any = diffusers.LTX2VideoTransformer3DModel
AutoencoderKLLTXVideo: Any = diffusers.AutoencoderKLLTXVideo
LTXVideoTransformer3DModel: Any = diffusers.LTXVideoTransformer3DModel
Lumina2Transformer2DModel: Any = diffusers.Lumina2Transformer2DModel
Krea2Transformer2DModel: Any = diffusers.Krea2Transformer2DModel
AutoencoderDC: Any = diffusers.AutoencoderDC
SanaTransformer2DModel: Any = diffusers.SanaTransformer2DModel
PixArtTransformer2DModel: Any = diffusers.PixArtTransformer2DModel
WanTransformer3DModel: Any = diffusers.WanTransformer3DModel

CLIP_WORDS, CLIP_LENGTH, T5_WORDS, UMT5_WORDS = 49408, 77, 32128, 256384
QWEN_WORDS, QWEN25_WORDS, MISTRAL_WORDS = 151936, 152064, 131072
HEAD = 64
"""Width of an attention head in all text encoders, and in the UNets of SD 2.x and SDXL."""


@dataclass(frozen=True, eq=False)
class Component:
    """A part of a model: the class with its configuration, and its names in files.

    ``name`` is the option of sd-cli that takes it alone, ``folder`` where a diffusers directory has it, ``whole`` its
    naming in a file with all components, ``alone`` that in a file of its own. ``unused`` are tensors which files have
    though the class has no use for them, by names like those of the class. ``pieces``: what stands before the name of
    the tensor that is its vocabulary in a file with all components, if files have one.
    """

    name: str
    folder: str
    build: Callable[[], Any]
    whole: Naming
    alone: Naming
    unused: Mapping[str, Shape] = field(default_factory=dict)
    pieces: str = ""

    def shapes(self) -> dict[str, Shape]:
        """The shapes of the class's tensors and the unused ones, by :func:`tensor_name`."""
        return dict(self._shapes)

    @cached_property
    def _shapes(self) -> dict[str, Shape]:
        with torch.device("meta"), not_initialized():
            module = self.build()
        return {**{name: tuple(tensor.shape) for name, tensor in saved_tensors(module).items()}, **self.unused}


@contextmanager
def not_initialized() -> Iterator[None]:
    """Parameters of modules that are built inside have no numbers yet: random ones cost more time than all else."""
    with patch.dict(vars(nn.init), dict.fromkeys(_RANDOM, lambda tensor, *_, **__: tensor)):
        yield


_RANDOM = (
    "uniform_", "normal_", "trunc_normal_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "xavier_normal_",
    "orthogonal_",
)  # fmt: skip


def saved_tensors(module: Any) -> dict[str, torch.Tensor]:
    """A module's parameters and the tables that it saves with them, each once, by :func:`tensor_name`."""
    saved = module.state_dict()
    tables = {name: table for name, table in module.named_buffers() if name in saved and table.is_floating_point()}
    return {tensor_name(name): tensor for name, tensor in (*module.named_parameters(), *tables.items())}


def tensor_name(parameter: str) -> str:
    """A parameter's name without what transformers put around the text model in some versions and classes."""
    return parameter.removeprefix("text_model.")


@dataclass(frozen=True, eq=False)
class Family:
    """A family of models. ``components`` by size; ``architecture`` is what GGUF files of diffusion models alone say;
    ``extras`` tensors that whole files have besides; ``scheduler`` as the published directory has it."""

    name: str
    pipeline: type
    components: Mapping[str, tuple[Component, ...]]
    scheduler: Callable[[], Any]
    architecture: str | None = None
    extras: Mapping[str, Callable[[], torch.Tensor]] = field(default_factory=dict)

    def of_size(self, size: str) -> tuple[Component, ...]:
        """The components in ``size``. Raises :class:`ValueError` where the family has no such size."""
        if size not in self.components:
            raise ValueError(f"size {size}: {self.name} has {', '.join(self.components)}")
        return self.components[size]


def _clip_config(width: int, layers: int, activation: str, projection: int) -> transformers.CLIPTextConfig:
    return transformers.CLIPTextConfig(
        vocab_size=CLIP_WORDS,
        max_position_embeddings=CLIP_LENGTH,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // HEAD,
        hidden_act=activation,
        projection_dim=projection,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )


def _clip_l(whole: str, width: int, layers: int) -> Component:
    """OpenAI's CLIP ViT-L/14."""
    return Component(
        "clip_l",
        "text_encoder",
        lambda: transformers.CLIPTextModel(_clip_config(width, layers, "quick_gelu", width)),
        prefixed(whole, names.clip),
        names.clip,
    )


def _clip_h(width: int, layers: int) -> Component:
    """OpenCLIP ViT-H/14. Files have one layer more than is used."""
    config = _clip_config(width, layers, "gelu", width)
    block = f"encoder.layers.{layers}"
    unused: dict[str, Shape] = {"text_projection.weight": (width, width)}
    for inner in ("q_proj", "k_proj", "v_proj", "out_proj"):
        unused |= {f"{block}.self_attn.{inner}.weight": (width, width), f"{block}.self_attn.{inner}.bias": (width,)}
    for norm in ("layer_norm1", "layer_norm2"):
        unused |= {f"{block}.{norm}.weight": (width,), f"{block}.{norm}.bias": (width,)}
    unused |= {f"{block}.mlp.fc1.weight": (4 * width, width), f"{block}.mlp.fc1.bias": (4 * width,)}
    unused |= {f"{block}.mlp.fc2.weight": (width, 4 * width), f"{block}.mlp.fc2.bias": (width,)}
    return Component(
        "clip_l",
        "text_encoder",
        lambda: transformers.CLIPTextModel(config),
        prefixed("cond_stage_model.model.", names.open_clip),
        names.clip,
        unused,
    )


def _projecting_clip_l(whole: str, width: int, layers: int) -> Component:
    """OpenAI's CLIP ViT-L/14 with a projection, as SD 3's files have it."""
    return replace(
        _clip_l(whole, width, layers),
        build=lambda: transformers.CLIPTextModelWithProjection(_clip_config(width, layers, "quick_gelu", width)),
    )


def _clip_g(width: int, layers: int) -> Component:
    """OpenCLIP ViT-bigG/14 with its projection."""
    return Component(
        "clip_g",
        "text_encoder_2",
        lambda: transformers.CLIPTextModelWithProjection(_clip_config(width, layers, "gelu", width)),
        prefixed("conditioner.embedders.1.model.", names.open_clip),
        names.clip,
    )


def _t5(width: int, inner: int, heads: int, layers: int, folder: str = "text_encoder_2") -> Component:
    """The encoder of T5 1.1. ``inner`` is the width of the feed-forward layers."""
    config = transformers.T5Config(
        vocab_size=T5_WORDS,
        d_model=width,
        d_kv=HEAD,
        d_ff=inner,
        num_layers=layers,
        num_heads=heads,
        feed_forward_proj="gated-gelu",
    )
    return Component(
        "t5xxl",
        folder,
        lambda: transformers.T5EncoderModel(config),
        prefixed("text_encoders.t5xxl.transformer.", names.unchanged),
        names.unchanged,
    )


def _umt5(width: int, inner: int, heads: int, layers: int) -> Component:
    """As :func:`_t5`."""
    config = transformers.UMT5Config(
        vocab_size=UMT5_WORDS, d_model=width, d_kv=HEAD, d_ff=inner, num_layers=layers, num_heads=heads,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return Component(
        "t5xxl",
        "text_encoder",
        lambda: transformers.UMT5EncoderModel(config),
        prefixed("text_encoders.t5xxl.transformer.", names.unchanged),
        names.unchanged,
    )


def _unet(widths: tuple[int, ...], attends: tuple[bool, ...], text: int, **options: Any) -> Component:
    """``attends``: whether each level, from the finest, attends to a text of width ``text``."""
    down = tuple("CrossAttnDownBlock2D" if level else "DownBlock2D" for level in attends)
    up = tuple("CrossAttnUpBlock2D" if level else "UpBlock2D" for level in reversed(attends))
    return Component(
        "diffusion",
        "unet",
        lambda: UNet2DConditionModel(
            sample_size=64,
            block_out_channels=widths,
            down_block_types=down,
            up_block_types=up,
            cross_attention_dim=text,
            **options,
        ),
        prefixed("model.diffusion_model.", names.ldm_unet),
        names.ldm_unet,
    )


def _sdxl_unet(widths: tuple[int, ...], depths: tuple[int, ...], text: int, pooled: int) -> Component:
    """``depths``: transformer blocks in a layer of each level; the finest level has none in fact."""
    return _unet(
        widths,
        (False, *(True for _ in widths[1:])),
        text,
        transformer_layers_per_block=depths,
        attention_head_dim=tuple(width // HEAD for width in widths),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=pooled + 6 * 256,
    )


def _vae(whole: str, widths: tuple[int, ...], layers: int, channels: int = 4, **options: Any) -> Component:
    return Component(
        "vae",
        "vae",
        lambda: AutoencoderKL(
            latent_channels=channels,
            block_out_channels=widths,
            layers_per_block=layers,
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            sample_size=512,
            **options,
        ),
        prefixed(whole, names.ldm_vae),
        names.ldm_vae,
    )


def _flux(
    heads: int, blocks: int, single_blocks: int, text: int, pooled: int, guidance: bool, inputs: int = 64
) -> Component:
    """``inputs``: of a token; Fill sees more than the 64 numbers of its latents."""
    return Component(
        "diffusion",
        "transformer",
        lambda: FluxTransformer2DModel(
            in_channels=inputs,
            out_channels=64,
            num_attention_heads=heads,
            num_layers=blocks,
            num_single_layers=single_blocks,
            joint_attention_dim=text,
            pooled_projection_dim=pooled,
            guidance_embeds=guidance,
        ),
        prefixed("model.diffusion_model.", names.flux),
        names.flux,
    )


def _sd3(
    blocks: int, heads: int, text: int, pooled: int, side: int, dual: int = 0, norm: str | None = None
) -> Component:
    """``side``: rows and columns of the table of positions; ``dual``: how many blocks attend a second time."""
    return Component(
        "diffusion",
        "transformer",
        lambda: SD3Transformer2DModel(
            num_layers=blocks,
            num_attention_heads=heads,
            caption_projection_dim=heads * HEAD,
            joint_attention_dim=text,
            pooled_projection_dim=pooled,
            pos_embed_max_size=side,
            dual_attention_layers=tuple(range(dual)),
            qk_norm=norm,
        ),
        prefixed("model.diffusion_model.", names.sd3),
        names.sd3,
    )


def _chroma(heads: int, blocks: int, single_blocks: int, text: int, modulation: tuple[int, int]) -> Component:
    """``modulation``: width and layers of the network that makes shifts, scales and gates."""

    def build() -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*FluxPosEmbed", FutureWarning)  # diffusers' warning of its own import
            return ChromaTransformer2DModel(
                num_attention_heads=heads,
                num_layers=blocks,
                num_single_layers=single_blocks,
                joint_attention_dim=text,
                approximator_hidden_dim=modulation[0],
                approximator_layers=modulation[1],
            )

    return Component("diffusion", "transformer", build, prefixed("model.diffusion_model.", names.flux), names.flux)


def _qwen3(whole: str, width: int, inner: int, heads: tuple[int, int], head: int, layers: int) -> Component:
    """Qwen3. ``whole``: what files with all components call it; ``heads``: of queries, and of keys."""
    config = transformers.Qwen3Config(
        vocab_size=QWEN_WORDS,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=head,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
    )
    return Component(
        "llm",
        "text_encoder",
        lambda: transformers.Qwen3Model(config),
        prefixed(f"text_encoders.{whole}.transformer.model.", names.unchanged),
        prefixed("model.", names.unchanged),
    )


def _mistral(whole: str, width: int, inner: int, heads: tuple[int, int], layers: int) -> Component:
    """Mistral Small 3, arguments as those of :func:`_qwen3`."""
    config = transformers.MistralConfig(
        vocab_size=MISTRAL_WORDS,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=128,
        rope_parameters={"rope_type": "default", "rope_theta": 1e9},
        rms_norm_eps=1e-5,
        sliding_window=None,
    )
    return Component(
        "llm",
        "text_encoder",
        lambda: transformers.MistralModel(config),
        prefixed(f"text_encoders.{whole}.transformer.model.", names.unchanged),
        prefixed("language_model.model.", names.unchanged),
    )


def _flux2(heads: int, head: int, blocks: int, single_blocks: int, text: int, guidance: bool) -> Component:
    return Component(
        "diffusion",
        "transformer",
        lambda: Flux2Transformer2DModel(
            num_layers=blocks,
            num_single_layers=single_blocks,
            attention_head_dim=head,
            num_attention_heads=heads,
            joint_attention_dim=text,
            axes_dims_rope=(head // 4,) * 4,
            guidance_embeds=guidance,
        ),
        prefixed("model.diffusion_model.", names.flux2),
        names.flux2,
    )


def _flux2_vae(widths: tuple[int, ...], layers: int) -> Component:
    return Component(
        "vae",
        "vae",
        lambda: AutoencoderKLFlux2(
            block_out_channels=widths,
            layers_per_block=layers,
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
        ),
        prefixed("vae.", names.flux2_vae),
        names.flux2_vae,
    )


def _z_image(width: int, heads: int, layers: int, refiners: int, text: int) -> Component:
    head = width // heads
    axes = [head // 4, head * 3 // 8, head * 3 // 8]
    return Component(
        "diffusion",
        "transformer",
        lambda: ZImageTransformer2DModel(
            dim=width,
            n_layers=layers,
            n_refiner_layers=refiners,
            n_heads=heads,
            n_kv_heads=heads,
            cap_feat_dim=text,
            axes_dims=axes,
            axes_lens=[1536, 512, 512],
        ),
        prefixed("model.diffusion_model.", names.z_image),
        names.z_image,
    )


def _qwen25(width: int, inner: int, heads: tuple[int, int], layers: int, vision: Mapping[str, int]) -> Component:
    """Qwen2.5-VL; ``heads``: of queries, and of keys; ``vision``: sizes of the part that sees pictures."""
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": QWEN25_WORDS, "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": heads[0], "num_key_value_heads": heads[1], "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
            "max_position_embeddings": 128000, "use_sliding_window": False,
        },
        vision_config={"out_hidden_size": width, **vision},
        tie_word_embeddings=vision["depth"] < 32,
    )  # fmt: skip
    return Component(
        "llm",
        "text_encoder",
        lambda: transformers.Qwen2_5_VLForConditionalGeneration(config),
        prefixed("text_encoders.qwen25_7b.transformer.", names.qwen25),
        names.qwen25,
    )


def _qwen_image(heads: int, blocks: int, text: int, head: int = 128, zero: bool = False) -> Component:
    """``zero``: whether pictures that it is shown have the timestep 0, which files say by a tensor more."""
    channels = 16
    return Component(
        "diffusion",
        "transformer",
        lambda: QwenImageTransformer2DModel(
            in_channels=4 * channels,
            out_channels=channels,
            num_layers=blocks,
            attention_head_dim=head,
            num_attention_heads=heads,
            joint_attention_dim=text,
            axes_dims_rope=(head - 14 * head // 16, 7 * head // 16, 7 * head // 16),
            zero_cond_t=zero,
        ),
        prefixed("model.diffusion_model.", names.unchanged),
        names.unchanged,
        {"__index_timestep_zero__": (1,)} if zero else {},
    )


def _qwen3_vl(width: int, inner: int, heads: tuple[int, int], head: int, layers: int) -> Component:
    """Qwen3-VL, arguments as those of :func:`_qwen3`; with the smallest part that sees, which is not used."""
    config = transformers.Qwen3VLConfig(
        text_config={
            "vocab_size": QWEN_WORDS, "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": heads[0], "num_key_value_heads": heads[1], "head_dim": head, "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 5e6, "mrope_interleaved": True,
                "mrope_section": [head * 3 // 16, head * 5 // 32, head * 5 // 32],
            },
        },
        vision_config={
            "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": width,
            "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
        },
        tie_word_embeddings=True,
    )  # fmt: skip
    return Component(
        "llm",
        "text_encoder",
        lambda: transformers.Qwen3VLModel(config),
        prefixed("text_encoders.qwen3vl_4b.transformer.model.", names.unchanged),
        prefixed("model.", names.unchanged),
    )


def _gemma2(width: int, inner: int, heads: tuple[int, int], layers: int, words: int) -> Component:
    """Gemma 2, arguments as those of :func:`_qwen3`; ``words``: of its vocabulary."""
    config = transformers.Gemma2Config(
        vocab_size=words, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads[0], num_key_value_heads=heads[1], head_dim=256,
    )  # fmt: skip
    return Component(
        "llm",
        "text_encoder",
        lambda: transformers.Gemma2Model(config),
        prefixed("text_encoders.gemma2_2b.transformer.model.", names.unchanged),
        prefixed("model.", names.unchanged),
        pieces="text_encoders.gemma2_2b.",
    )


def _gemma3(width: int, inner: int, heads: tuple[int, int], layers: int, words: int) -> Component:
    """Gemma 3, likewise; positions of every sixth layer are stretched as those of 12B."""
    config = transformers.Gemma3TextConfig(
        vocab_size=words, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads[0], num_key_value_heads=heads[1], head_dim=256, sliding_window=1024,
        rope_parameters={"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}},
    )  # fmt: skip
    return Component(
        "llm",
        "text_encoder",
        lambda: transformers.Gemma3TextModel(config),
        prefixed("text_encoders.gemma3_12b.transformer.model.", names.unchanged),
        prefixed("model.", names.unchanged),
        pieces="text_encoders.gemma3_12b.",
    )


def _lumina2(heads: tuple[int, int], head: int, layers: int, refiners: int, text: int, round_to: int) -> Component:
    """``heads``: of queries, and of keys; ``round_to``: what the width of the feed-forward layers is a multiple of."""
    return Component(
        "diffusion",
        "transformer",
        lambda: Lumina2Transformer2DModel(
            hidden_size=heads[0] * head, num_layers=layers, num_refiner_layers=refiners, num_attention_heads=heads[0],
            num_kv_heads=heads[1], axes_dim_rope=(head // 3,) * 3, cap_feat_dim=text, multiple_of=round_to,
        ),
        prefixed("model.diffusion_model.", names.lumina2),
        names.lumina2,
    )  # fmt: skip


def _krea2(heads: tuple[int, int], head: int, inner: int, blocks: int, text: tuple[int, int, int]) -> Component:
    """``heads``: of queries, and of keys; ``text``: width, heads, and that of the feed-forward layers."""
    return Component(
        "diffusion",
        "transformer",
        lambda: Krea2Transformer2DModel(
            num_layers=blocks, attention_head_dim=head, num_attention_heads=heads[0], num_key_value_heads=heads[1],
            intermediate_size=inner, text_hidden_dim=text[0], text_num_attention_heads=text[1],
            text_num_key_value_heads=text[1], text_intermediate_size=text[2],
            axes_dims_rope=(head // 4, head * 3 // 8, head * 3 // 8),
        ),
        prefixed("model.diffusion_model.", names.krea2),
        names.krea2,
    )  # fmt: skip


def _pixart(heads: int, blocks: int, text: int, tokens: int, told_sizes: bool) -> Component:
    """``tokens``: of a text; ``told_sizes``: whether it is told the size of a picture."""
    return Component(
        "diffusion",
        "transformer",
        lambda: PixArtTransformer2DModel(
            num_attention_heads=heads, cross_attention_dim=heads * 72, num_layers=blocks, caption_channels=text,
            sample_size=128, use_additional_conditions=told_sizes,
        ),
        prefixed("model.diffusion_model.", names.pixart),
        names.pixart,
        {"caption_projection.y_embedding": (tokens, text)},
    )  # fmt: skip


def _sana(heads: int, cross_heads: int, blocks: int, text: int, normed: bool = False) -> Component:
    """``heads``: of linear attention, ``cross_heads``: of that to the text; ``normed``: queries and keys, as in 1.5."""
    width = heads * 32
    return Component(
        "diffusion",
        "transformer",
        lambda: SanaTransformer2DModel(
            num_attention_heads=heads, num_layers=blocks, num_cross_attention_heads=cross_heads,
            cross_attention_head_dim=width // cross_heads, cross_attention_dim=width, caption_channels=text,
            qk_norm="rms_norm_across_heads" if normed else None,
        ),
        prefixed("model.diffusion_model.", names.sana),
        names.sana,
        {"caption_projection.y_embedding": (300, text)},
    )  # fmt: skip


def _dc_vae(widths: tuple[int, ...], head: int, encoder: int, decoder: int) -> Component:
    """Sana's autoencoder: the second half of its levels attends. ``encoder`` and ``decoder``: blocks of a level."""
    half = len(widths) // 2
    blocks = ("ResBlock",) * half + ("EfficientViTBlock",) * half
    scales = ((),) * half + ((5,),) * half
    return Component(
        "vae",
        "vae",
        lambda: AutoencoderDC(
            attention_head_dim=head, encoder_block_types=blocks, decoder_block_types=blocks,
            encoder_block_out_channels=widths,
            decoder_block_out_channels=widths, encoder_layers_per_block=(encoder,) * half + (encoder + 1,) * half,
            decoder_layers_per_block=(decoder,) * len(widths), encoder_qkv_multiscales=scales,
            decoder_qkv_multiscales=scales, upsample_block_type="interpolate", downsample_block_type="Conv",
            decoder_act_fns="silu", scaling_factor=0.41407,
        ),
        prefixed("vae.", names.dc_vae),
        names.dc_vae,
    )  # fmt: skip


def _wan(
    heads: int, inner: int, blocks: int, text: int, channels: int = 16, shown: int = 0, **sees: int | None
) -> Component:
    """``inner`` is the width of the feed-forward layers, ``shown`` further channels, of pictures, ``sees`` what the
    class is told of those that CLIP sees."""
    return Component(
        "diffusion",
        "transformer",
        lambda: WanTransformer3DModel(
            num_attention_heads=heads, in_channels=channels + shown, out_channels=channels, text_dim=text,
            ffn_dim=inner, num_layers=blocks, **sees,
        ),
        prefixed("model.diffusion_model.", names.wan),
        names.wan,
    )  # fmt: skip


def _clip_vision(width: int, inner: int, layers: int) -> Component:
    """OpenCLIP ViT-H/14's vision part."""
    config = transformers.CLIPVisionConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=width // 80,
        image_size=224, patch_size=14, hidden_act="gelu",
    )  # fmt: skip
    return Component(
        "clip_vision",
        "image_encoder",
        lambda: transformers.CLIPVisionModel(config),
        prefixed("clip_vision.", names.clip_vision),
        names.clip_vision,
    )


def _film_vae(width: int, layers: int, **options: Any) -> Component:
    """Wan's autoencoder; ``width`` of its finest level."""
    return Component(
        "vae",
        "vae",
        lambda: AutoencoderKLWan(base_dim=width, num_res_blocks=layers, **options),
        prefixed("first_stage_model.", names.film_vae),
        names.film_vae,
    )


WAN22_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891, 0.157,
    -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502, -0.2055, -0.0322,
    0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.123, -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.052,
    0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
WAN22_DEVIATION = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.499, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165,
    0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659, 0.7069, 0.5338, 0.4889, 0.4917,
    0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.06,
    0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip
"""Of the latents of Wan 2.2's autoencoder, by channel, as it is published."""


def _ltx(inner: int, blocks: int, text: int) -> Component:
    """``inner``: its width, of 32 heads."""
    return Component(
        "diffusion",
        "transformer",
        lambda: LTXVideoTransformer3DModel(
            num_attention_heads=32, attention_head_dim=inner // 32, cross_attention_dim=inner, num_layers=blocks,
            caption_channels=text,
        ),
        prefixed("model.diffusion_model.", names.ltx),
        names.ltx,
    )  # fmt: skip


def _ltx_vae(widths: tuple[int, ...], layers: tuple[int, ...]) -> Component:
    """LTX-Video's autoencoder in version 0.9.0."""
    return _ltx_vae_of(
        block_out_channels=widths, decoder_block_out_channels=widths, layers_per_block=layers,
        decoder_layers_per_block=layers,
    )  # fmt: skip


def _ltx_vae_095(width: int, layers: tuple[int, ...], decoder_layers: tuple[int, ...]) -> Component:
    """The same from 0.9.5 on; ``width`` of its finest level."""
    return _ltx_vae_of(
        block_out_channels=tuple(width * factor for factor in (1, 2, 4, 8, 16)),
        decoder_block_out_channels=tuple(width * factor for factor in (2, 4, 8)), layers_per_block=layers,
        decoder_layers_per_block=decoder_layers, down_block_types=("LTXVideo095DownBlock3D",) * 4,
        spatio_temporal_scaling=(True,) * 4, decoder_spatio_temporal_scaling=(True,) * 3,
        decoder_inject_noise=(False,) * 4, upsample_residual=(True,) * 3, upsample_factor=(2,) * 3,
        downsample_type=("spatial", "temporal", "spatiotemporal", "spatiotemporal"), timestep_conditioning=True,
        spatial_compression_ratio=32, temporal_compression_ratio=8,
    )  # fmt: skip


def _ltx_vae_of(**options: Any) -> Component:
    return Component(
        "vae",
        "vae",
        lambda: AutoencoderKLLTXVideo(**options),
        prefixed("vae.", names.ltx_vae),
        names.ltx_vae,
    )


def _ltx2(inner: int, sound: int, blocks: int, text: int, **options: Any) -> Component:
    """``inner`` and ``sound``: its widths for pictures and for sound, of 32 heads each."""
    return Component(
        "diffusion",
        "transformer",
        lambda: LTX2VideoTransformer3DModel(
            attention_head_dim=inner // 32, cross_attention_dim=inner, audio_attention_head_dim=sound // 32,
            audio_cross_attention_dim=sound, num_layers=blocks, caption_channels=text, rope_type="split", **options,
        ),
        prefixed("model.diffusion_model.", names.ltx2),
        names.ltx2,
    )  # fmt: skip


def _ltx2_connectors(width: int, states: int) -> Component:
    heads = {f"{side}_connector_num_attention_heads": width // 128 for side in ("video", "audio")}
    return Component(
        "connectors",
        "connectors",
        lambda: LTX2TextConnectors(caption_channels=width, text_proj_in_factor=states, rope_type="split", **heads),
        names.ltx2_connectors,
        names.ltx2_connectors,
    )


def _ltx23_connectors(width: int, states: int, film: int, sound: int, layers: int) -> Component:
    """Those of 2.3; ``width`` of the language model."""
    sides = {
        f"{side}_{name}": value
        for side, inner in (("video", film), ("audio", sound))
        for name, value in {
            "connector_num_attention_heads": 32,
            "connector_attention_head_dim": inner // 32,
            "hidden_dim": inner,
            "connector_num_layers": layers,
            "gated_attn": True,
        }.items()
    }
    return replace(
        _ltx2_connectors(width, states),
        build=lambda: LTX2TextConnectors(
            caption_channels=width, text_proj_in_factor=states, rope_type="split", per_modality_projections=True,
            proj_bias=True, **sides,
        ),
    )  # fmt: skip


def _ltx23_vae(width: int, layers: tuple[int, ...]) -> Component:
    return replace(
        _ltx2_vae(width, layers, layers),
        build=lambda: AutoencoderKLLTX2Video(
            block_out_channels=tuple(width * factor for factor in (2, 4, 8, 8)), layers_per_block=layers,
            decoder_block_out_channels=tuple(width * factor for factor in (2, 4, 4, 8)),
            decoder_layers_per_block=layers, decoder_causal=False, spatial_compression_ratio=32,
            decoder_spatio_temporal_scaling=(True,) * 4, decoder_inject_noise=(False,) * 5,
            upsample_type=("spatiotemporal", "spatiotemporal", "temporal", "spatial"), upsample_residual=(False,) * 4,
            upsample_factor=(2, 2, 1, 2), decoder_spatial_padding_mode="zeros", temporal_compression_ratio=8,
        ),
    )  # fmt: skip


def _ltx2_vae(width: int, layers: tuple[int, ...], decoder_layers: tuple[int, ...]) -> Component:
    """``width``: of the finest level of its decoder."""
    return Component(
        "vae",
        "vae",
        lambda: AutoencoderKLLTX2Video(
            block_out_channels=tuple(width * factor for factor in (2, 4, 8, 16)), layers_per_block=layers,
            decoder_block_out_channels=tuple(width * factor for factor in (2, 4, 8)),
            decoder_layers_per_block=decoder_layers, decoder_causal=False, spatial_compression_ratio=32,
            temporal_compression_ratio=8,
        ),
        prefixed("vae.", names.ltx_vae),
        names.ltx_vae,
    )  # fmt: skip


def _ltx2_audio_vae(multiples: tuple[int, ...], blocks: int) -> Component:
    return Component(
        "audio_vae",
        "audio_vae",
        lambda: AutoencoderKLLTX2Audio(ch_mult=multiples, num_res_blocks=blocks),
        prefixed("audio_vae.", names.ltx2_audio_vae),
        names.ltx2_audio_vae,
    )


def _ltx2_vocoder(build: Callable[[], Any]) -> Component:
    return Component("vocoder", "vocoder", build, prefixed("vocoder.", names.ltx2_vocoder), names.ltx2_vocoder)


def _tiny_vocoder() -> Any:
    """One block behind each step, of kernels of 3."""
    return LTX2Vocoder(hidden_channels=32, resnet_kernel_sizes=[3], resnet_dilations=[[1, 3, 5]])


def _tiny_wide_vocoder() -> Any:
    one: dict[str, Any] = {"resnet_kernel_sizes": [3], "resnet_dilations": [[1, 3, 5]]}
    wide = {f"bwe_{name}": value for name, value in one.items()}
    return LTX2VocoderWithBWE(hidden_channels=64, bwe_hidden_channels=32, **one, **wide)


FULL_VAE, TINY_VAE = ((128, 256, 512, 512), 2), ((32, 32, 64, 64), 1)


_FLUX_LATENTS: dict[str, Any] = {
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def _flux_components(guidance: bool, inputs: int = 64) -> dict[str, tuple[Component, ...]]:
    def components(
        vae: tuple[tuple[int, ...], int],
        clip: tuple[int, int],
        t5: tuple[int, int, int, int],
        dit: tuple[int, int, int],
    ) -> tuple[Component, ...]:
        return (
            _flux(*dit, text=t5[0], pooled=clip[0], guidance=guidance, inputs=inputs),
            _vae("vae.", *vae, channels=16, **_FLUX_LATENTS),
            _clip_l("text_encoders.clip_l.transformer.", *clip),
            _t5(*t5),
        )

    return {
        "full": components(FULL_VAE, (768, 12), (4096, 10240, 64, 24), (24, 19, 38)),
        "reduced": components(FULL_VAE, (768, 12), (4096, 10240, 64, 2), (24, 2, 4)),
        "tiny": components(TINY_VAE, (64, 2), (64, 160, 2, 2), (2, 2, 2)),
    }


def _chroma_components(
    vae: tuple[tuple[int, ...], int],
    t5: tuple[int, int, int, int],
    dit: tuple[int, int, int],
    modulation: tuple[int, int],
) -> tuple[Component, ...]:
    return (
        _chroma(*dit, text=t5[0], modulation=modulation),
        _vae("vae.", *vae, channels=16, **_FLUX_LATENTS),
        _t5(*t5, folder="text_encoder"),
    )


def _betas(prediction: str) -> Callable[[], Any]:
    return lambda: EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction,
        timestep_spacing="leading",
        steps_offset=1,
    )


def _positions() -> torch.Tensor:
    return torch.arange(CLIP_LENGTH).unsqueeze(0)


def _logit_scale() -> torch.Tensor:
    return torch.tensor(4.6052)


def sd1_components(
    widths: tuple[int, ...],
    attends: int,
    layers: int,
    vae: tuple[tuple[int, ...], int],
    text: tuple[int, int],
    inputs: int = 4,
) -> tuple[Component, ...]:
    """SD 1.x of any size: the UNet's ``widths`` from the finest level on, of which ``attends`` attend to text, and its
    ``layers`` in each; the VAE's widths and layers; the text encoder's width and layers; the channels that the UNet is
    given, of which inpainting models have more."""
    return (
        _unet(
            widths, tuple(level < attends for level in range(len(widths))), text[0],
            attention_head_dim=8, layers_per_block=layers, in_channels=inputs,
        ),
        _vae("first_stage_model.", *vae),
        _clip_l("cond_stage_model.transformer.", *text),
    )  # fmt: skip


SD1 = Family(
    "sd1",
    diffusers.StableDiffusionPipeline,
    {
        "full": sd1_components((320, 640, 1280, 1280), 3, 2, FULL_VAE, (768, 12)),
        "tiny": sd1_components((32, 64, 64), 2, 1, TINY_VAE, (64, 2)),
    },
    _betas("epsilon"),
    "sd1",
    {"cond_stage_model.transformer.text_model.embeddings.position_ids": _positions},
)
SD1_INPAINT = replace(
    SD1,
    name="sd1-inpaint",
    components={
        "full": sd1_components((320, 640, 1280, 1280), 3, 2, FULL_VAE, (768, 12), inputs=9),
        "tiny": sd1_components((32, 64, 64), 2, 1, TINY_VAE, (64, 2), inputs=9),
    },
)

_SD2 = {
    "full": (
        _unet(
            (320, 640, 1280, 1280), (True, True, True, False), 1024,
            attention_head_dim=(5, 10, 20, 20), use_linear_projection=True,
        ),
        _vae("first_stage_model.", *FULL_VAE),
        _clip_h(1024, 23),
    ),
    "tiny": (
        _unet(
            (64, 128, 128), (True, True, False), 128,
            attention_head_dim=(1, 2, 2), use_linear_projection=True, layers_per_block=1,
        ),
        _vae("first_stage_model.", *TINY_VAE),
        _clip_h(128, 2),
    ),
}  # fmt: skip

_SD2_EXTRAS = {"cond_stage_model.model.logit_scale": _logit_scale}
SD2 = Family("sd2", diffusers.StableDiffusionPipeline, _SD2, _betas("v_prediction"), extras=_SD2_EXTRAS)
"""SD 2.0 and 2.1 for 768 × 768, which predict velocities."""
SD2_BASE = Family("sd2-base", diffusers.StableDiffusionPipeline, _SD2, _betas("epsilon"), extras=_SD2_EXTRAS)
"""Those for 512 × 512, which predict noise. Their tensors have the same names and shapes."""

SDXL = Family(
    "sdxl",
    diffusers.StableDiffusionXLPipeline,
    {
        "full": (
            _sdxl_unet((320, 640, 1280), (1, 2, 10), 768 + 1280, 1280),
            _vae("first_stage_model.", *FULL_VAE, scaling_factor=0.13025, force_upcast=True),
            _clip_l("conditioner.embedders.0.transformer.", 768, 12),
            _clip_g(1280, 32),
        ),
        "tiny": (
            _sdxl_unet((64, 128, 128), (1, 1, 2), 64 + 128, 128),
            _vae("first_stage_model.", *TINY_VAE, scaling_factor=0.13025, force_upcast=True),
            _clip_l("conditioner.embedders.0.transformer.", 64, 3),
            _clip_g(128, 3),
        ),
    },
    _betas("epsilon"),
    "sdxl",
    {
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": _positions,
        "conditioner.embedders.1.model.logit_scale": _logit_scale,
    },
)

FLUX1_DEV = Family(
    "flux1-dev",
    diffusers.FluxPipeline,
    _flux_components(guidance=True),
    lambda: FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15,
        base_image_seq_len=256, max_image_seq_len=4096,
    ),
    "flux",
)  # fmt: skip
FLUX1_FILL = replace(FLUX1_DEV, name="flux1-fill", components=_flux_components(guidance=True, inputs=384))
FLUX1_SCHNELL = Family(
    "flux1-schnell",
    diffusers.FluxPipeline,
    _flux_components(guidance=False),
    lambda: FlowMatchEulerDiscreteScheduler(shift=1.0),
    "flux",
)

_SD3_LATENTS: dict[str, Any] = {
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def _sd3_family(name: str, full: Mapping[str, Any], tiny: Mapping[str, Any], t5: bool = True) -> Family:
    """``full`` and ``tiny``: what is special to the member's diffusion model."""

    def components(
        vae: tuple[tuple[int, ...], int],
        clip_l: tuple[int, int],
        clip_g: tuple[int, int],
        text: tuple[int, int, int, int],
        dit: Mapping[str, Any],
    ) -> tuple[Component, ...]:
        return (
            _sd3(text=text[0], pooled=clip_l[0] + clip_g[0], **dit),
            _vae("first_stage_model.", *vae, channels=16, **_SD3_LATENTS),
            _projecting_clip_l("text_encoders.clip_l.transformer.", *clip_l),
            replace(_clip_g(*clip_g), whole=prefixed("text_encoders.clip_g.transformer.", names.clip)),
            *((_t5(*text, folder="text_encoder_3"),) if t5 else ()),
        )

    return Family(
        name,
        diffusers.StableDiffusion3Pipeline,
        {
            "full": components(FULL_VAE, (768, 12), (1280, 32), (4096, 10240, 64, 24), full),
            "tiny": components(TINY_VAE, (64, 3), (128, 3), (256, 160, 2, 2), tiny),
        },
        lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
        "sd3",
    )


_SD3_MEDIUM: dict[str, Any] = {"blocks": 24, "heads": 24, "side": 192}
_SD3_TINY: dict[str, Any] = {"blocks": 3, "heads": 2, "side": 24}
_NORMED: dict[str, Any] = {"norm": "rms_norm"}
SD3 = _sd3_family("sd3", _SD3_MEDIUM, _SD3_TINY)
SD3_WITHOUT_T5 = _sd3_family("sd3-without-t5", _SD3_MEDIUM, _SD3_TINY, t5=False)
SD35_MEDIUM = _sd3_family(
    "sd3.5-medium", {"blocks": 24, "heads": 24, "side": 384, "dual": 13, **_NORMED}, {**_SD3_TINY, "dual": 2, **_NORMED}
)
SD35_LARGE = _sd3_family("sd3.5-large", {"blocks": 38, "heads": 38, "side": 192, **_NORMED}, {**_SD3_TINY, **_NORMED})

CHROMA = Family(
    "chroma",
    diffusers.ChromaPipeline,
    {
        "full": _chroma_components(FULL_VAE, (4096, 10240, 64, 24), (24, 19, 38), (5120, 5)),
        "reduced": _chroma_components(FULL_VAE, (4096, 10240, 64, 2), (24, 2, 4), (5120, 5)),
        "tiny": _chroma_components(TINY_VAE, (64, 160, 2, 2), (2, 2, 2), (96, 2)),
    },
    lambda: FlowMatchEulerDiscreteScheduler(shift=1.0),
    "flux",
)

QWEN3_4B: tuple[int, int, tuple[int, int], int, int] = (2560, 9728, (32, 8), 128, 36)
Z_IMAGE = Family(
    "z-image",
    diffusers.ZImagePipeline,
    {
        "full": (
            _z_image(3840, 30, 30, 2, QWEN3_4B[0]), _vae("vae.", *FULL_VAE, channels=16, **_FLUX_LATENTS),
            _qwen3("qwen3_4b", *QWEN3_4B),
        ),
        "reduced": (
            _z_image(3840, 30, 4, 2, QWEN3_4B[0]), _vae("vae.", *FULL_VAE, channels=16, **_FLUX_LATENTS),
            _qwen3("qwen3_4b", *QWEN3_4B[:-1], 3),
        ),
        "tiny": (
            _z_image(192, 3, 2, 1, 64), _vae("vae.", *TINY_VAE, channels=16, **_FLUX_LATENTS),
            _qwen3("qwen3_4b", 64, 160, (4, 2), 32, 3),
        ),
    },
    lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "lumina2",
)  # fmt: skip

WAN = Family(
    "wan",
    diffusers.WanPipeline,
    {
        "full": (_wan(40, 13824, 40, 4096), _film_vae(96, 2), _umt5(4096, 10240, 64, 24)),
        "small": (_wan(12, 8960, 30, 4096), _film_vae(96, 2), _umt5(4096, 10240, 64, 24)),
        "tiny": (_wan(2, 160, 2, 32), _film_vae(8, 1, dim_mult=[1, 2, 2, 2]), _umt5(32, 64, 1, 2)),
    },
    lambda: FlowMatchEulerDiscreteScheduler(shift=5.0),
    "wan",
)
"""Wan 2.1 of 14B and (``small``) 1.3B."""


def _with_two_models(components: tuple[Component, ...]) -> tuple[Component, ...]:
    """Wan 2.2's A14B: the first of the components twice, the second for high noise."""
    low, *rest = components
    high = replace(low, name="high_noise_diffusion", whole=prefixed("model.high_noise_diffusion_model.", names.wan))
    return (replace(low, folder="transformer_2"), high, *rest)


WAN22_A14B = replace(
    WAN, name="wan2.2-a14b", components={size: _with_two_models(WAN.components[size]) for size in ("full", "tiny")}
)


def _wan22_vae(width: int, up: int, layers: int, **options: Any) -> Component:
    """2.2's autoencoder; ``up``: width of its finest level on the way up."""
    return _film_vae(
        width, layers, decoder_base_dim=up, z_dim=48, is_residual=True, in_channels=12, out_channels=12, patch_size=2,
        scale_factor_spatial=16, latents_mean=list(WAN22_MEAN), latents_std=list(WAN22_DEVIATION), **options,
    )  # fmt: skip


WAN22_I2V = replace(
    WAN,
    name="wan2.2-i2v",
    pipeline=diffusers.WanImageToVideoPipeline,
    components={
        size: _with_two_models((_wan(*shape, shown=20), *WAN.components[size][1:]))
        for size, shape in {"full": (40, 13824, 40, 4096), "tiny": (2, 160, 2, 32)}.items()
    },
)


def _wan21_of_pictures(name: str, places: int | None) -> Family:
    """2.1's models that see a picture by CLIP (and, with ``places``, another one to end with)."""

    def components(
        wan: tuple[int, int, int, int], clip: tuple[int, int, int], rest: tuple[Component, ...]
    ) -> tuple[Component, ...]:
        inner = wan[0] * 128
        dit = _wan(*wan, 16, 20, image_dim=clip[0], added_kv_proj_dim=inner, pos_embed_seq_len=places)
        return (dit, *rest, _clip_vision(*clip))

    return replace(
        WAN,
        name=name,
        pipeline=diffusers.WanImageToVideoPipeline,
        components={
            "full": components((40, 13824, 40, 4096), (1280, 5120, 32), WAN.components["full"][1:]),
            "tiny": components((2, 160, 2, 32), (80, 96, 2), WAN.components["tiny"][1:]),
        },
    )


WAN21_I2V = _wan21_of_pictures("wan2.1-i2v", None)
WAN21_FLF2V = _wan21_of_pictures("wan2.1-flf2v", 514)

WAN22_5B = replace(
    WAN,
    name="wan2.2-5b",
    components={
        "full": (_wan(24, 14336, 30, 4096, channels=48), _wan22_vae(160, 256, 2), WAN.components["full"][2]),
        "reduced": (_wan(24, 14336, 2, 4096, channels=48), _wan22_vae(160, 256, 2), _umt5(4096, 10240, 64, 2)),
        "tiny": (
            _wan(2, 160, 2, 32, channels=48), _wan22_vae(8, 16, 1, dim_mult=[1, 2, 2, 2]), WAN.components["tiny"][2],
        ),
    },
)  # fmt: skip


def _ltx_scheduler() -> Any:
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, max_image_seq_len=4096,
        shift_terminal=0.1,
    )  # fmt: skip


LTX_VIDEO = Family(
    "ltx-video",
    diffusers.LTXPipeline,
    {
        "full": (
            _ltx(2048, 28, 4096), _ltx_vae((128, 256, 512, 512), (4, 3, 3, 3, 4)),
            _t5(4096, 10240, 64, 24, folder="text_encoder"),
        ),
        "tiny": (
            _ltx(128, 2, 64), _ltx_vae((8, 16, 32, 32), (1, 1, 1, 1, 1)), _t5(64, 160, 2, 2, folder="text_encoder"),
        ),
    },
    _ltx_scheduler,
    "ltxv",
)  # fmt: skip
"""0.9.0; of its transformer all versions of 2B."""
LTX_VIDEO_13B = replace(
    LTX_VIDEO,
    name="ltx-video-13b",
    pipeline=diffusers.LTXImageToVideoPipeline,
    components={
        "full": (
            _ltx(4096, 48, 4096), _ltx_vae_095(128, (4, 6, 6, 2, 2), (5, 5, 5, 5)), LTX_VIDEO.components["full"][2],
        ),
        "tiny": (
            _ltx(192, 2, 64), _ltx_vae_095(8, (1, 1, 1, 1, 1), (1, 1, 1, 1)), LTX_VIDEO.components["tiny"][2],
        ),
    },
)  # fmt: skip
"""0.9.7 and 0.9.8, with the autoencoder from 0.9.5 on."""

LTX2 = Family(
    "ltx2",
    diffusers.LTX2Pipeline,
    {
        "full": (
            _ltx2(4096, 2048, 48, 3840), _ltx2_connectors(3840, 49), _ltx2_vae(128, (4, 6, 6, 2, 2), (5, 5, 5, 5)),
            _gemma3(3840, 15360, (16, 8), 48, 262208), _ltx2_audio_vae((1, 2, 4), 2), _ltx2_vocoder(LTX2Vocoder),
        ),
        "tiny": (
            _ltx2(256, 128, 2, 128), _ltx2_connectors(128, 7), _ltx2_vae(8, (1, 1, 1, 1, 1), (1, 1, 1, 1)),
            _gemma3(128, 160, (2, 1), 6, GEMMA_WORDS), _ltx2_audio_vae((1, 1, 1), 0), _ltx2_vocoder(_tiny_vocoder),
        ),
    },
    _ltx_scheduler,
    "ltxv",
)  # fmt: skip

_LTX23 = {
    "gated_attn": True, "cross_attn_mod": True, "audio_gated_attn": True, "audio_cross_attn_mod": True,
    "use_prompt_embeddings": False,
}  # fmt: skip
LTX23 = replace(
    LTX2,
    name="ltx2.3",
    pipeline=diffusers.LTX2ImageToVideoPipeline,
    components={
        "full": (
            _ltx2(4096, 2048, 48, 4096, **_LTX23), _ltx23_connectors(3840, 49, 4096, 2048, 8),
            _ltx23_vae(128, (4, 6, 4, 2, 2)), *LTX2.components["full"][3:5], _ltx2_vocoder(LTX2VocoderWithBWE),
        ),
        "tiny": (
            _ltx2(256, 128, 2, 256, **_LTX23), _ltx23_connectors(128, 7, 256, 128, 1), _ltx23_vae(8, (1,) * 5),
            *LTX2.components["tiny"][3:5], _ltx2_vocoder(_tiny_wide_vocoder),
        ),
    },
)  # fmt: skip
LTX2_I2V = replace(LTX2, name="ltx2-i2v", pipeline=diffusers.LTX2ImageToVideoPipeline)

QWEN3_8B: tuple[int, int, tuple[int, int], int, int] = (4096, 12288, (32, 8), 128, 36)


def _flux2_scheduler() -> Any:
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


_TINY_KLEIN = (
    _flux2(2, 64, 2, 2, 3 * 64, guidance=False), _flux2_vae(*TINY_VAE), _qwen3("qwen3_4b", 64, 160, (4, 2), 32, 28),
)  # fmt: skip
FLUX2_KLEIN_4B = Family(
    "flux2-klein-4b",
    diffusers.Flux2KleinPipeline,
    {
        "full": (
            _flux2(24, 128, 5, 20, 3 * QWEN3_4B[0], guidance=False), _flux2_vae(*FULL_VAE),
            _qwen3("qwen3_4b", *QWEN3_4B),
        ),
        "tiny": _TINY_KLEIN,
    },
    _flux2_scheduler,
    "flux",
)  # fmt: skip
FLUX2_KLEIN_9B = Family(
    "flux2-klein-9b",
    diffusers.Flux2KleinPipeline,
    {
        "full": (
            _flux2(32, 128, 8, 24, 3 * QWEN3_8B[0], guidance=False), _flux2_vae(*FULL_VAE),
            _qwen3("qwen3_8b", *QWEN3_8B),
        ),
        "tiny": _TINY_KLEIN,
    },
    _flux2_scheduler,
    "flux",
)  # fmt: skip
FLUX2_DEV = Family(
    "flux2-dev",
    diffusers.Flux2Pipeline,
    {
        "full": (
            _flux2(48, 128, 8, 48, 15360, guidance=True), _flux2_vae(*FULL_VAE),
            _mistral("mistral3_24b", 5120, 32768, (32, 8), 40),
        ),
        "tiny": (
            _flux2(2, 64, 2, 2, 3 * 64, guidance=True), _flux2_vae(*TINY_VAE),
            _mistral("mistral3_24b", 64, 160, (2, 1), 31),
        ),
    },
    _flux2_scheduler,
    "flux",
)  # fmt: skip

_QWEN25_VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
_TINY_VISION = {"depth": 1, "hidden_size": 80, "intermediate_size": 48, "num_heads": 1}
QWEN_IMAGE = Family(
    "qwen-image",
    diffusers.QwenImagePipeline,
    {
        "full": (
            _qwen_image(24, 60, 3584), _film_vae(96, 2), _qwen25(3584, 18944, (28, 4), 28, _QWEN25_VISION),
        ),
        "reduced": (
            _qwen_image(24, 2, 3584), _film_vae(96, 2),
            _qwen25(3584, 18944, (28, 4), 2, {**_QWEN25_VISION, "depth": 1}),
        ),
        "tiny": (
            _qwen_image(3, 2, 128, head=32), _film_vae(8, 1, dim_mult=[1, 2, 2, 2]),
            _qwen25(128, 96, (1, 1), 2, _TINY_VISION),
        ),
    },
    lambda: FlowMatchEulerDiscreteScheduler(
        shift=1.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, base_image_seq_len=256,
        max_image_seq_len=8192, shift_terminal=0.02,
    ),
    "qwen_image",
)  # fmt: skip

KREA2 = Family(
    "krea2",
    diffusers.Krea2Pipeline,
    {
        "full": (
            _krea2((48, 12), 128, 16384, 28, (2560, 20, 6912)), _film_vae(96, 2), _qwen3_vl(*QWEN3_4B),
        ),
        "tiny": (
            _krea2((4, 2), 32, 96, 2, (64, 2, 96)), _film_vae(8, 1, dim_mult=[1, 2, 2, 2]),
            _qwen3_vl(64, 96, (2, 1), 32, 36),
        ),
    },
    lambda: FlowMatchEulerDiscreteScheduler(
        shift=1.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256,
        max_image_seq_len=6400,
    ),
)  # fmt: skip
LUMINA2 = Family(
    "lumina2",
    diffusers.Lumina2Pipeline,
    {
        "full": (
            _lumina2((24, 8), 96, 26, 2, 2304, 256), _vae("vae.", *FULL_VAE, channels=16, **_FLUX_LATENTS),
            _gemma2(2304, 9216, (8, 4), 26, 256000),
        ),
        "tiny": (
            _lumina2((4, 2), 24, 2, 1, 64, 100), _vae("vae.", *TINY_VAE, channels=16, **_FLUX_LATENTS),
            _gemma2(64, 96, (2, 1), 3, GEMMA_WORDS),
        ),
    },
    lambda: FlowMatchEulerDiscreteScheduler(shift=6.0),
    "lumina2",
)  # fmt: skip


def _pixart_components(vae: Mapping[str, Any], tokens: int, told_sizes: bool) -> dict[str, tuple[Component, ...]]:
    return {
        size: (
            _pixart(heads, blocks, text[0], tokens, told_sizes), _vae("vae.", *widths, **vae),
            _t5(*text, folder="text_encoder"),
        )
        for size, heads, blocks, text, widths in (
            ("full", 16, 28, (4096, 10240, 64, 24), FULL_VAE), ("tiny", 2, 2, (64, 160, 2, 2), TINY_VAE),
        )
    }  # fmt: skip


PIXART_SIGMA = Family(
    "pixart-sigma",
    diffusers.PixArtSigmaPipeline,
    _pixart_components({"scaling_factor": 0.13025}, 300, told_sizes=False),
    lambda: EulerDiscreteScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
)
PIXART_ALPHA = replace(
    PIXART_SIGMA,
    name="pixart-alpha",
    pipeline=diffusers.PixArtAlphaPipeline,
    components=_pixart_components({}, 120, told_sizes=True),
)
SANA = Family(
    "sana",
    diffusers.SanaPipeline,
    {
        "full": (
            _sana(70, 20, 20, 2304), _dc_vae((128, 256, 512, 512, 1024, 1024), 32, 2, 3),
            _gemma2(2304, 9216, (8, 4), 26, 256000),
        ),
        "tiny": (_sana(3, 3, 2, 64), _dc_vae((8, 8, 16, 16, 32, 32), 8, 1, 1), _gemma2(64, 96, (2, 1), 3, GEMMA_WORDS)),
    },
    lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
)  # fmt: skip
"""Sana 1.0 of 1.6B and 1024×1024."""
SANA15 = replace(
    SANA,
    name="sana-1.5",
    components={
        "full": (_sana(70, 20, 60, 2304, normed=True), *SANA.components["full"][1:]),
        "tiny": (_sana(3, 3, 2, 64, normed=True), *SANA.components["tiny"][1:]),
    },
)
"""Of 4.8B."""
QWEN_IMAGE_EDIT = replace(
    QWEN_IMAGE,
    name="qwen-image-edit",
    pipeline=diffusers.QwenImageEditPlusPipeline,
    components={
        "full": (_qwen_image(24, 60, 3584, zero=True), *QWEN_IMAGE.components["full"][1:]),
        "tiny": (_qwen_image(3, 2, 128, head=32, zero=True), *QWEN_IMAGE.components["tiny"][1:]),
    },
)
"""Qwen-Image-Edit-2511; 2509 has the tensors of Qwen-Image."""

FAMILIES = {
    family.name: family
    for family in (
        SD1, SD1_INPAINT, SD2, SD2_BASE, SDXL, FLUX1_DEV, FLUX1_FILL, FLUX1_SCHNELL, SD3, SD3_WITHOUT_T5, SD35_MEDIUM,
        SD35_LARGE, CHROMA, FLUX2_KLEIN_4B, FLUX2_KLEIN_9B, FLUX2_DEV, Z_IMAGE, WAN, WAN22_A14B,
        WAN22_5B, WAN22_I2V, WAN21_I2V, WAN21_FLF2V, KREA2, QWEN_IMAGE, QWEN_IMAGE_EDIT,
        PIXART_SIGMA, PIXART_ALPHA, LUMINA2, LTX_VIDEO, LTX_VIDEO_13B, LTX2, LTX2_I2V, LTX23, SANA, SANA15,
    )
}  # fmt: skip

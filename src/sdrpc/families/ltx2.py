"""LTX-2 and LTX-2.3: films of a text, or of a text and the picture that they begin with, with their sound: both are
drawn together, for they attend to each other. What decodes the sound may be missing; films are silent then."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InvalidValue
from ..prompts import Template
from . import configs, ltx
from .base import (
    F32,
    Begun,
    Component,
    Conditions,
    Config,
    Configs,
    Defaults,
    Encode,
    Family,
    Found,
    Joint,
    Latents,
    Naming,
    Prompt,
)
from .components import film_ltx, flux, gemma2, gemma3, llm, ltx2_connectors, sound
from .keys import same, table

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .base import Call

HEADS = 32
"""Of attention in the published model, of pictures and of sound: no tensor tells it."""
TIMESTEPS = ltx.TIMESTEPS
SPECTRA, SAMPLES, RATE = 4, 160, 16000
"""Spectra of sound that a latent stands for, samples that make one, and samples that make a second."""
SIDE = 32
"""Pixels on a side that a latent stands for."""
MODULATED = 9
"""Rows of a block's table in LTX-2.3, where noise changes what is asked of a text; 6 in 2.0."""
LEAST = 2 * SIDE
"""Pixels on a side of the smallest film: what is beside it is its mirror image."""

# The diffusion model --------------------------------------------------------------------------------------------------

_SOUND_TIME = "audio_time_embed.emb.timestep_embedder.linear_1.weight"


def _configure(found: Found, told: Config) -> dict[str, Any]:
    """Arguments of diffusers' LTX2VideoTransformer3DModel."""
    if found.has("keyframes_abs_pos_embedding"):
        raise found.error("this is LTX-2.5, which has another language model and VAE; it is not supported")
    if told.get("rope_type", "split") != "split":
        raise found.error(f"positions of kind {told['rope_type']!r} are not supported")
    inner, inputs = found.shape("proj_in.weight", 2)
    sound, sound_inputs = found.shape("audio_proj_in.weight", 2)
    outputs, _ = found.shape("proj_out.weight", 2)
    sound_outputs, _ = found.shape("audio_proj_out.weight", 2)
    projects = found.has("caption_projection.")
    _, text = found.shape("caption_projection.linear_1.weight", 2) if projects else (inner, inner)
    rows, _ = found.shape("transformer_blocks.0.scale_shift_table", 2)
    sound_rows, _ = found.shape("transformer_blocks.0.audio_scale_shift_table", 2)
    inferred = {
        "in_channels": inputs, "out_channels": outputs, "audio_in_channels": sound_inputs,
        "audio_out_channels": sound_outputs, "num_layers": found.count("transformer_blocks."),
        "caption_channels": text, "num_attention_heads": HEADS, "audio_num_attention_heads": HEADS,
    }  # fmt: skip
    config = configs.merged(found, inferred, told, ("num_attention_heads", "audio_num_attention_heads"))
    configs.check_divides(found, config, "num_attention_heads", [inner])
    configs.check_divides(found, config, "audio_num_attention_heads", [sound])
    if not inputs == outputs == sound_inputs == sound_outputs:
        numbers = f"{inputs} and {outputs} channels of pictures, {sound_inputs} and {sound_outputs} of sound"
        raise found.error(f"takes and gives {numbers}, which are not as many")
    return config | {
        "attention_head_dim": inner // config["num_attention_heads"], "cross_attention_dim": inner,
        "audio_attention_head_dim": sound // config["audio_num_attention_heads"], "audio_cross_attention_dim": sound,
        "rope_type": "split", "use_prompt_embeddings": projects, "cross_attn_mod": rows == MODULATED,
        "audio_cross_attn_mod": sound_rows == MODULATED,
        "use_prompt_adaln_single": rows != MODULATED or found.has("prompt_adaln."),
        "gated_attn": found.has("transformer_blocks.0.attn1.to_gate_logits."),
        "audio_gated_attn": found.has("transformer_blocks.0.audio_attn1.to_gate_logits."),
    }  # fmt: skip


def build(config: Config) -> tuple[nn.Module, Call]:
    """Inputs: latents (1 or batch, channels, frames, height, width), of pictures and, as further frames, of sound;
    timestep (1 or batch,) of 0 … 1000, context and sound_context (batch, 1024, hidden_size), times (batch, frames of
    pictures) and sounds (batch, latents of sound): the seconds at which these are. Output: the velocity (batch,
    channels, frames, height, width), 0 where there is no sound any more.

    With ``first`` (batch, channels, 1, height, width) the first latent frame is that one, without any noise, and its
    velocity goes there at once.
    """
    import diffusers
    import torch

    def call(
        module: Any,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        sound_context: torch.Tensor,
        times: torch.Tensor,
        sounds: torch.Tensor,
        first: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        batch, (_, channels, whole, height, width) = context.shape[0], latents.shape
        frames, length = times.shape[1], sounds.shape[1]
        everything, level = latents.expand(batch, -1, -1, -1, -1), timestep.expand(batch)
        shown, levels = everything[:, :, :frames], level[:, None]
        heard = everything[:, :, frames:].reshape(batch, channels, -1)[:, :, :length]
        if first is not None:
            shown = torch.cat((first, shown[:, :, 1:]), 2)
            noisy = torch.ones(frames, height * width)
            noisy[0] = 0
            levels = levels * noisy.reshape(1, -1)
        shape = (batch, frames, height, width)
        rows, columns = ((torch.arange(n) + 0.5) * SIDE for n in (height, width))
        places = torch.stack(
            (
                times[:, :, None, None].expand(shape),
                rows[None, None, :, None].expand(shape),
                columns[None, None, None].expand(shape),
            ),
            1,
        )
        pictures, sound = module(
            shown.reshape(batch, channels, -1).transpose(1, 2),
            heard.transpose(1, 2),
            encoder_hidden_states=context,
            audio_encoder_hidden_states=sound_context,
            timestep=levels,
            audio_timestep=level,
            sigma=level,
            video_coords=places.reshape(batch, 3, -1),
            audio_coords=sounds[:, None],
            use_cross_timestep=config["cross_attn_mod"],
            return_dict=False,
        )
        pictures = pictures.transpose(1, 2).reshape(batch, channels, *shape[1:])
        rest = (whole - frames) * height * width - length
        sound = torch.nn.functional.pad(sound.transpose(1, 2), (0, rest))
        sound = sound.reshape(batch, channels, whole - frames, height, width)
        if first is not None:
            there = (latents[:, :, :1] - first) * (TIMESTEPS / timestep.reshape(-1, 1, 1, 1, 1))
            pictures = torch.cat((there, pictures[:, :, 1:]), 2)
        return (torch.cat((pictures, sound), 2),)

    make: Any = diffusers.LTX2VideoTransformer3DModel
    return make(**config), call


_BLOCK, _BLOCKS = r"transformer_blocks\.(\d+)", r"transformer_blocks.\1"
_KIND = r"(weight|bias)"
_ATTENTION = "(attn1|attn2|audio_attn1|audio_attn2|audio_to_video_attn|video_to_audio_attn)"
_TIMES = {
    "adaln_single": "time_embed", "audio_adaln_single": "audio_time_embed",
    "av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
    "av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
    "av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
    "av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
    "prompt_adaln_single": "prompt_adaln", "audio_prompt_adaln_single": "audio_prompt_adaln",
}  # fmt: skip
_ORIGINAL = table(
    [
        (rf"patchify_proj\.{_KIND}", r"proj_in.\1"),
        (rf"audio_patchify_proj\.{_KIND}", r"audio_proj_in.\1"),
        *((rf"{old}\.linear\.{_KIND}", rf"{new}.linear.\1") for old, new in _TIMES.items()),
        *(
            (
                rf"{old}\.emb\.timestep_embedder\.linear_(1|2)\.{_KIND}",
                rf"{new}.emb.timestep_embedder.linear_\1.\2",
            )
            for old, new in _TIMES.items()
        ),
        (rf"(caption|audio_caption)_projection\.linear_(1|2)\.{_KIND}", r"\1_projection.linear_\2.\3"),
        (rf"{_BLOCK}\.{_ATTENTION}\.(q|k)_norm\.weight", rf"{_BLOCKS}.\2.norm_\3.weight"),
        (rf"{_BLOCK}\.{_ATTENTION}\.to_(q|k|v|gate_logits)\.{_KIND}", rf"{_BLOCKS}.\2.to_\3.\4"),
        (rf"{_BLOCK}\.{_ATTENTION}\.to_out\.0\.{_KIND}", rf"{_BLOCKS}.\2.to_out.0.\3"),
        (rf"{_BLOCK}\.(ff|audio_ff)\.net\.0\.proj\.{_KIND}", rf"{_BLOCKS}.\2.net.0.proj.\3"),
        (rf"{_BLOCK}\.(ff|audio_ff)\.net\.2\.{_KIND}", rf"{_BLOCKS}.\2.net.2.\3"),
        (
            rf"{_BLOCK}\.scale_shift_table_a2v_ca_(video|audio)",
            rf"{_BLOCKS}.\2_a2v_cross_attn_scale_shift_table",
        ),
        (
            rf"{_BLOCK}\.(scale_shift_table|audio_scale_shift_table|prompt_scale_shift_table|audio_prompt_scale_shift_table)",
            rf"{_BLOCKS}.\2",
        ),
        ("keyframes_abs_pos_embedding", "keyframes_abs_pos_embedding"),
        ("(scale_shift_table|audio_scale_shift_table)", r"\1"),
        (rf"(proj_out|audio_proj_out)\.{_KIND}", r"\1.\2"),
    ]
)
"""The names of Lightricks' own code."""

TRANSFORMER = Component(
    "diffusion",
    "diffusion model",
    flux.PREFIXES,
    (Naming("audio_patchify_proj.weight", _ORIGINAL), Naming(_SOUND_TIME, same)),
    _configure,
    build,
    "transformer",
    idle=("video_embeddings_connector.", "audio_embeddings_connector."),
)

# The family -----------------------------------------------------------------------------------------------------------

TEMPLATE = Template(gemma2.START, "")


def recognizes(diffusion: Found) -> bool:
    return {"audio_proj_in.weight", _SOUND_TIME} <= diffusion.tensors.keys()


def sound_length(frames: int, fps: int) -> int:
    """Latents of sound beside a film, as in diffusers' pipeline."""
    return max(1, round(frames / fps * (RATE / SAMPLES / SPECTRA)))


def conditions(encode: Encode, prompt: Prompt) -> Conditions:
    """What connectors make of all of Gemma's hidden states, for the film and for its sound (1, 1024, hidden_size) each,
    and at which seconds latents of pictures (1, frames) and of sound (1, latents) are.

    Raises :class:`InvalidValue` for a text that is too long."""
    states = encode.config(llm.NAME)["num_hidden_layers"] + 1
    hidden = llm.hidden_states(encode, prompt.text.strip(), TEMPLATE, gemma2.no_tokenizer, range(states))
    length = hidden.shape[1]
    if length > ltx2_connectors.TOKENS:
        reason = f"has {length} tokens; LTX-2 reads {ltx2_connectors.TOKENS}"
        raise InvalidValue("negative_prompt" if prompt.negative else "prompt", prompt.text, reason)
    given = ltx2_connectors.inputs(encode.config(ltx2_connectors.NAME), hidden, states)
    context, sound_context = encode(ltx2_connectors.NAME, given)
    together = film_ltx.frames(encode.config("vae"))
    frames = _edges((prompt.frames - 1) // together + 1, together) / np.float32(prompt.fps)
    sounds = _edges(sound_length(prompt.frames, prompt.fps), SPECTRA) * np.float32(SAMPLES) / np.float32(RATE)
    return {
        "context": context, "sound_context": sound_context, "times": _middles(frames), "sounds": _middles(sounds),
    }  # fmt: skip


def _edges(count: int, together: int) -> F32:
    """Where what so many latents stand for begins and ends, (count + 1,): the first one's is one, the others'
    ``together`` each."""
    edges: F32 = np.maximum(np.arange(count + 1) * together + 1 - together, 0).astype(np.float32)
    return edges


def _middles(edges: F32) -> F32:
    """(1, count) from (count + 1,)."""
    middles: F32 = (edges[:-1] + edges[1:]) / np.float32(2)
    return middles[None]


def check_begun(_configs: Configs, frames: int, first: bool, last: bool) -> None:
    """Films begin with a picture, or with none; a single picture does not."""
    if last:
        raise InvalidValue("end_image", "a picture", "LTX-2 is shown what a film begins with, no end")
    if first and frames == 1:
        raise InvalidValue("init_image", "a picture", "LTX-2 makes films of pictures, and no pictures")


def settings(_: Mapping[str, Found]) -> Defaults:
    """Sizes and frames of diffusers' pipeline; steps and guidance for guidance by the negative prompt alone, since its
    further ways are not done here; the authors' levels of noise."""
    return Defaults(
        size=(768, 512), sampler="euler", scheduler="ltx2", steps=40, cfg_scale=4.0, prediction="sd3_flow",
        flow_shift=1.0, frames=121, fps=24,
    )  # fmt: skip


def _takes_of_sound(configs: Configs) -> int:
    config = configs["diffusion"]
    return int(config["caption_channels" if config["use_prompt_embeddings"] else "audio_cross_attention_dim"])


def _steps_up(configs: Configs) -> int:
    """Of the autoencoder that belongs to a diffusion model: latents of the two versions have as many channels."""
    return film_ltx.LEVELS + int(configs["diffusion"]["cross_attn_mod"])


LTX2 = Family(
    "ltx2",
    "LTX-2",
    (
        gemma3.GEMMA3, ltx2_connectors.CONNECTORS, TRANSFORMER, film_ltx.VAE_2, sound.AUTOENCODER, sound.GENERATOR,
    ),
    recognizes,
    conditions,
    Latents(scale=1.0, multiple=SIDE, least=LEAST, films=True, sound=sound_length),
    settings,
    (
        Joint(llm.NAME, lambda c: c[llm.NAME]["hidden_size"] * (c[llm.NAME]["num_hidden_layers"] + 1),
              ltx2_connectors.NAME, lambda c: ltx2_connectors.numbers(c[ltx2_connectors.NAME]), "hidden numbers"),
        Joint(ltx2_connectors.NAME, lambda c: c[ltx2_connectors.NAME]["video_hidden_dim"], "diffusion",
              flux.takes("caption_channels")),
        Joint(ltx2_connectors.NAME, lambda c: c[ltx2_connectors.NAME]["audio_hidden_dim"], "diffusion", _takes_of_sound,
              "channels for sound"),
        Joint("vae", lambda c: len(c["vae"]["upsample_factor"]), "diffusion", _steps_up,
              "steps (three are LTX-2.0's, four LTX-2.3's)"),
        Joint("vae", lambda c: c["vae"]["latent_channels"], "diffusion", flux.takes("in_channels")),
        Joint(sound.AUDIO_VAE, lambda c: sound.numbers(c[sound.AUDIO_VAE]), "diffusion",
              flux.takes("audio_in_channels")),
        Joint(sound.AUDIO_VAE, lambda c: sound.heard(c[sound.AUDIO_VAE]), sound.VOCODER,
              lambda c: c[sound.VOCODER]["in_channels"], "numbers of a spectrum"),
    ),
    optional=frozenset({sound.AUDIO_VAE, sound.VOCODER}),
    begun=Begun(check_begun, ltx.takes, ltx.begun),
)  # fmt: skip

"""The sound of LTX-2's films: diffusers' AutoencoderKLLTX2Audio, whose decoder makes spectra of latents, and its
vocoders, LTX2Vocoder (2.0) and LTX2VocoderWithBWE (2.3), which make samples of them.

All of it stands in one file: Lightricks' own of everything, or ComfyUI's of the audio VAE.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING, Any

from ...ggml.weight import Weight
from ..base import Component, Config, Found, Naming, Weights
from ..keys import same, substituted

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..base import Call

AUDIO_VAE, VOCODER = "audio_vae", "vocoder"
TOGETHER = 4
"""Spectra, and frequencies of one, that a latent stands for; the first one stands for a single spectrum."""
SPECTRA = 100
"""A second."""
STEPS = {4: 2, 8: 2, 11: 5, 12: 6, 15: 5, 16: 6}
"""By how much a transposed convolution lengthens a line, by its taps: no shape tells it."""
DILATIONS = [1, 3, 5]
HOP = 80
"""Samples from one spectrum to the next, where the second vocoder makes its own: no shape tells it."""
EXTENDED = "bwe_"
"""What begins the names of a second vocoder's arguments, which widens the band of what the first one gives."""
LEAST = 1e-5
"""The quietest that is told from silence."""


def _configure(found: Found, told: Config) -> dict[str, Any]:
    """Arguments of diffusers' AutoencoderKLLTX2Audio."""
    levels = found.count("decoder.up.")
    outputs, width, *_ = found.shape("decoder.conv_out.conv.weight", 4)
    _, latents, *_ = found.shape("decoder.conv_in.conv.weight", 4)
    (numbers,) = found.shape("latents_mean", 1)
    widths = [found.shape(f"decoder.up.{level}.block.0.conv2.conv.weight", 4)[0] for level in range(levels)]
    if not levels or any(each % width for each in widths):
        raise found.error(f"its levels have {widths} channels, no multiples of {width}")
    if numbers % latents:
        raise found.error(f"{numbers} numbers are no {latents} channels", "latents_mean")
    if found.has("decoder.norm_out.") or found.has("decoder.up.0.attn."):
        raise found.error("has norms with weights, or attention between its levels, which are not supported")
    config: dict[str, Any] = {
        "base_channels": width, "output_channels": outputs, "ch_mult": [each // width for each in widths],
        "num_res_blocks": found.count("decoder.up.0.block.") - 1, "latent_channels": latents, "norm_type": "pixel",
        "mid_block_add_attention": found.has("decoder.mid.attn_1."), "mel_bins": numbers // latents * TOGETHER,
        "causality_axis": "height",
    }  # fmt: skip
    return _agreeing(found, config, told)


def _agreeing(found: Found, config: dict[str, Any], told: Config) -> dict[str, Any]:
    """``config``, with which what the file says has to agree."""
    for name, value in config.items():
        if name in told and told[name] != value:
            raise found.error(f"{name} of the {found.component.title} is {told[name]!r}, not {value!r}")
    return config


def numbers(config: Config) -> int:
    """Of a latent of sound."""
    return int(config["latent_channels"] * config["mel_bins"] // TOGETHER)


def heard(config: Config) -> int:
    """Numbers of a spectrum, of all ears."""
    return int(config["output_channels"] * config["mel_bins"])


def build(config: Config) -> tuple[nn.Module, Call]:
    """Input: latents of sound as the diffusion model draws them (1, channels · frequencies, length). Output: spectra
    (1, 2, 4 · length - 3, frequencies), of each ear."""
    import diffusers

    def decode(module: Any, latents: torch.Tensor) -> tuple[torch.Tensor, ...]:
        _, numbers, length = latents.shape
        meant = latents * module.latents_std[None, :, None] + module.latents_mean[None, :, None]
        channels = config["latent_channels"]
        return (module.decoder(meant.reshape(1, channels, numbers // channels, length).transpose(2, 3)),)

    make: Any = diffusers.AutoencoderKLLTX2Audio
    module = make(**config)
    del module.encoder
    return module, decode


def _configure_vocoder(found: Found, told: Config) -> dict[str, Any]:
    """Arguments of diffusers' LTX2Vocoder, or of LTX2VocoderWithBWE."""
    if not found.has("bwe_generator."):
        config = _generator(found, "")
        rate = SPECTRA * prod(config["upsample_factors"])
        return _agreeing(found, config | {"output_sampling_rate": rate}, told)
    config, wider = _generator(found, "vocoder."), _generator(found, "bwe_generator.")
    twice, _, window = found.shape("mel_stft.stft_fn.forward_basis", 3)
    frequencies, count = found.shape("mel_stft.mel_basis", 2)
    rate = SPECTRA * prod(config["upsample_factors"])
    if twice != 2 * count or window < HOP or count != window // 2 + 1:
        raise found.error(f"{twice} waves of {window} samples are no spectra of {count}", "mel_stft.mel_basis")
    wide = rate // HOP * prod(wider["upsample_factors"])
    if rate % HOP or wide % rate:
        raise found.error(f"makes {wide} samples a second of {rate}, which is no multiple")
    ears = config["out_channels"]
    if (frequencies * ears, ears) != (wider["in_channels"], wider["out_channels"]):
        reason = f"spectra of {frequencies} frequencies for {ears} ears are not what its second vocoder takes"
        raise found.error(reason, "mel_stft.mel_basis")
    config |= {EXTENDED + name: value for name, value in wider.items()}
    config |= {
        "filter_length": window, "window_length": window, "hop_length": HOP, "num_mel_channels": frequencies,
        "input_sampling_rate": rate, "output_sampling_rate": wide,
    }  # fmt: skip
    return _agreeing(found, config, told)


def _generator(found: Found, prefix: str) -> dict[str, Any]:
    """Of one vocoder; ``prefix``: what its tensors begin with."""
    hidden, inputs, _ = found.shape(f"{prefix}conv_in.weight", 3)
    outputs, _, _ = found.shape(f"{prefix}conv_out.weight", 3)
    ups, blocks = found.count(f"{prefix}upsamplers."), found.count(f"{prefix}resnets.")
    taps = [found.shape(f"{prefix}upsamplers.{i}.weight", 3)[2] for i in range(ups)]
    if not ups or blocks % ups or any(each not in STEPS for each in taps):
        raise found.error(f"{blocks} blocks behind steps up of {taps} taps are no vocoder that is known here")
    layers = found.count(f"{prefix}resnets.0.convs1.")
    if layers != len(DILATIONS):
        raise found.error(f"its blocks have {layers} layers, not {len(DILATIONS)}")
    if hidden % (1 << ups):
        raise found.error(f"{hidden} channels can't be halved {ups} times", f"{prefix}conv_in.weight")
    if outputs not in (1, 2):
        raise found.error(f"makes sound for {outputs} ears", f"{prefix}conv_out.weight")
    each = blocks // ups
    snakes = found.has(f"{prefix}act_out.")
    bias = found.has(f"{prefix}conv_out.bias")
    return {
        "in_channels": inputs, "hidden_channels": hidden, "out_channels": outputs, "upsample_kernel_sizes": taps,
        "upsample_factors": [STEPS[n] for n in taps],
        "resnet_kernel_sizes": [found.shape(f"{prefix}resnets.{i}.convs1.0.weight", 3)[2] for i in range(each)],
        "resnet_dilations": [DILATIONS] * each, "act_fn": "snakebeta" if snakes else "leaky_relu",
        "antialias": snakes, "final_act_fn": None if snakes else "tanh", "final_bias": bias,
    }  # fmt: skip


def rate(config: Config) -> int:
    """Samples a second that a vocoder gives."""
    return int(config["output_sampling_rate"])


def build_vocoder(config: Config) -> tuple[nn.Module, Call]:
    """Input: spectra (1, ears, length, frequencies). Output: samples (1, ears, length · rate / 100), -1 … 1."""
    import diffusers.pipelines.ltx2.vocoder as theirs
    import torch

    def narrow(module: Any, spectra: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (module(spectra),)

    def wide(module: Any, spectra: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """As LTX2VocoderWithBWE does it, without the phases, which nobody reads."""
        samples = module.vocoder(spectra)
        ears = samples.transpose(0, 1)
        waves = module.mel_stft.stft_fn
        behind = torch.nn.functional.pad(ears, (config["window_length"] - config["hop_length"], 0))
        parts = torch.nn.functional.conv1d(behind, waves.forward_basis, stride=config["hop_length"])
        real, imaginary = parts.chunk(2, 1)
        heard = module.mel_stft.mel_basis @ (real**2 + imaginary**2).sqrt()
        more = module.bwe_generator(heard.clamp(min=LEAST).log()[None].transpose(2, 3))
        ratio = config["output_sampling_rate"] // config["input_sampling_rate"]
        between = theirs.UpSample1d(ratio, window_type="hann", persistent=False)
        return ((more + between(samples)).clamp(-1, 1),)

    if EXTENDED + "in_channels" in config:
        extended: Any = theirs.LTX2VocoderWithBWE
        module = extended(**config)
        del module.resampler  # its numbers are in no file: they are made where they are needed
        return module, wide
    make: Any = theirs.LTX2Vocoder
    return make(**config), narrow


_vae_name = substituted(
    [
        (r"^per_channel_statistics\.mean-of-means$", "latents_mean"),
        (r"^per_channel_statistics\.std-of-means$", "latents_std"),
    ]
)
_vocoder_name = substituted(
    [
        (r"\bups\.", "upsamplers."), (r"\bresblocks\.", "resnets."), (r"\bconv_pre\.", "conv_in."),
        (r"\bconv_post\.", "conv_out."), (r"\bact_post\.", "act_out."),
        (r"\bdownsample\.lowpass\.", "downsample."),
    ]
)  # fmt: skip


def _renamed(name: Callable[[str], str]) -> Callable[[Weights], dict[str, Weight]]:
    """Lightricks' names, of which some are diffusers' own."""
    return lambda weights: {name(each): weight for each, weight in weights.items()}


AUTOENCODER = Component(
    AUDIO_VAE,
    "audio VAE",
    ("audio_vae.", ""),
    (Naming("decoder.mid.block_1.conv1.conv.weight", _renamed(_vae_name)),),
    _configure,
    build,
    AUDIO_VAE,
    idle=("encoder.", "per_channel_statistics."),
)

GENERATOR = Component(
    VOCODER,
    "vocoder",
    ("", "vocoder."),
    (
        Naming("bwe_generator.resblocks.0.convs1.0.weight", _renamed(_vocoder_name)),
        Naming("bwe_generator.resnets.0.convs1.0.weight", same),
        Naming("resblocks.0.convs1.0.weight", _renamed(_vocoder_name)),
        Naming("resnets.0.convs1.0.weight", same),
    ),
    _configure_vocoder,
    build_vocoder,
    VOCODER,
    idle=("mel_stft.stft_fn.inverse_basis",),
    within=AUDIO_VAE,
)

"""The names of sd-cli's options: spellings that users type, and native options that are not here yet.

Users write dashes or underscores (``--vae_backend_device``); both mean the option that exists. An option of
stable-diffusion.cpp's sd-cli that sdrpc does not have is refused by name, never ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..errors import UsageError

NOT_HERE_YET: dict[str, tuple[str, ...]] = {
    "other model families and their parts": (
        "--clip_vision", "--llm", "--llm_vision", "--qwen2vl", "--qwen2vl_vision",
        "--high-noise-diffusion-model", "--timestep-shift", "--slg-scale",
        "--skip-layers", "--skip-layer-start", "--skip-layer-end", "--chroma-disable-dit-mask",
        "--chroma-enable-t5-mask", "--chroma-t5-mask-pad", "--qwen-image-zero-cond-t", "--qwen-image-layers",
        "--force-sdxl-vae-conv-scale", "--model-args", "--uncond-diffusion-model",
    ),
    "images as input": (
        "--init-img", "-i", "--strength", "--mask", "--ref-image", "-r", "--increase-ref-index",
        "--disable-auto-resize-ref-image", "--img-cfg-scale", "--control-net", "--control-image",
        "--control-strength", "--canny", "--control-net-cpu", "--control-net-backend-device", "--photo-maker",
        "--pm-id-images-dir", "--pm-id-embed-path", "--pm-style-strength", "--photomaker-backend-device",
        "--vision-backend-device", "--image",
    ),
    "LoRA and embeddings": ("--lora-model-dir", "--lora-apply-mode", "--embd-dir"),
    "previews and small autoencoders": (
        "--taesd", "--tae", "--tae-backend-device", "--preview", "--preview-path", "--preview-interval",
        "--preview-noisy", "--taesd-preview-only",
    ),
    "upscaling and tiling": (
        "--upscale-model", "--upscale-repeats", "--upscale-tile-size", "--upscaler-backend-device", "--hires",
        "--hires-width", "--hires-height", "--hires-scale", "--hires-steps", "--hires-upscaler",
        "--hires-upscalers-dir", "--hires-denoising-strength", "--hires-upscale-tile-size", "--vae-tiling",
        "--vae-tile-size", "--vae-relative-tile-size", "--vae-tile-overlap", "--circular", "--circularx",
        "--circulary",
    ),
    "video": (
        "--video-frames", "--fps", "--end-img", "--control-video", "--high-noise-steps", "--high-noise-cfg-scale",
        "--high-noise-img-cfg-scale", "--high-noise-guidance", "--high-noise-slg-scale", "--high-noise-eta",
        "--high-noise-sampling-method", "--high-noise-skip-layers", "--high-noise-skip-layer-start",
        "--high-noise-skip-layer-end", "--moe-boundary", "--vace-strength",
    ),
    "weights in another type or another place": (
        "--tensor-type-rules", "--params-backend", "--offload-to-cpu", "--max-vram", "--auto-fit",
        "--split-mode", "--stream-layers", "--eager-load", "--convert-name", "--imat-in", "--imat-out",
    ),
    "kernels chosen by hand (sdrpc's devices choose their own)": (
        "--fa", "--diffusion-fa", "--diffusion-conv-direct", "--vae-conv-direct",
    ),
    "skipping and custom steps": ("--cache-mode", "--cache-option", "--scm-mask", "--scm-policy", "--sigmas"),
    "reading metadata": ("--metadata-format", "--metadata-raw", "--metadata-brief", "--metadata-all"),
    "prompts from a file": ("--prompt-file",),
}  # fmt: skip
"""Options of stable-diffusion.cpp's sd-cli that sdrpc refuses, grouped by what they belong to."""

ALWAYS_SO = frozenset({"--mmap"})
"""Native switches for what sdrpc does anyway (files are always mapped): taken, and nothing to be done about them."""

_REASONS = {option: reason for reason, options in NOT_HERE_YET.items() for option in options}


def canonical(arguments: Sequence[str], known: Iterable[str]) -> list[str]:
    """``arguments`` with every known option in the spelling that the command declares.

    ``known`` are the declared long options. Raises :class:`UsageError` for a native option that is not here yet.
    """
    options = (*_REASONS, *ALWAYS_SO, *known)
    spellings = {_folded(option): option for option in options if option.startswith("--")}
    result = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        option = spellings.get(_folded(name), name) if name.startswith("--") else name
        if option in _REASONS:
            raise UsageError(
                f"{option}: an option of stable-diffusion.cpp's sd-cli that sdrpc lacks ({_REASONS[option]})"
            )
        if option not in ALWAYS_SO:
            result.append(option + equals + value)
    return result


def _folded(option: str) -> str:
    return option.lower().replace("_", "-")

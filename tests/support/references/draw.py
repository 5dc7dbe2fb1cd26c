"""Pictures drawn by diffusers' own pipelines in this process, to compare ours with.

Everything that two programs could choose differently is given or fixed here, and everything is float32, so that a
picture of ours equals one of these but for rounding:

- Noise is given, as the sampler would draw it: normal, shape (channels, height / 8, width / 8). What is sampled first
  is noise · sigmas[0], also for flows (whose first sigma is 1 in most schedules).
- Sigmas are given: those of the steps and the last one, 0. The sampler is Euler's method: x += (σ' − σ) · (x − x₀) / σ.
- Timesteps that diffusion models are told: SD and SDXL get the (fractional) timestep of sigma among the 1000 that the
  model was trained with, interpolated in the logarithm; FLUX.1 gets sigma itself, SD 3 1000 times that.
- Guidance: e = e_negative + cfg · (e_prompt − e_negative), from 1 on without the negative prompt. FLUX.1-dev is told
  ``guidance`` besides.
- CLIP's hidden states are counted as stable-diffusion.cpp counts them: ``clip_skip`` 1 is the last layer, 2 the one
  before. Left at 0 it is 1 for SD 1.x and 2 for SD 2.x and SDXL. SD 1.x and 2.x put the final norm behind, SDXL does
  not. SD 2.x's class has one layer less than its files, so that 2 is its last one. It counts for the negative prompt as
  well (in diffusers' pipelines it doesn't). FLUX.1 takes CLIP's pooled vector, of the last layer behind its norm,
  whatever clip_skip is.
- Padding behind the prompt's end token: CLIP-L the end token, OpenCLIP (SD 2.x; the second of SDXL and SD 3) token 0,
  T5 token 0 up to 256 tokens (SD 3: 77). Nothing masks the padding.
- SDXL: the text is 77 × (768 + 1280), CLIP-L's first; the vector is OpenCLIP's projection of the last layer's normed
  state at the end token, beside the sizes (height, width, 0, 0, height, width). An empty negative prompt has all zeros
  for text, and its own vector: so does stable-diffusion.cpp. Diffusers' pipeline zeroes the vector as well when the
  negative prompt is None, and neither when it is ""; that is ``zeros``.
- FLUX.1: latents of 2 × 2 are packed into 64 numbers, channel first. Positions are (0, row, column) and zeros for text.
- SD 3: the text is 77 tokens × CLIP-L's and OpenCLIP's states beside each other, filled up with zeros to T5's width,
  then T5's 77 tokens, or as many of zeros without T5. The vector is CLIP-L's, of its last layer behind its norm and
  without the projection that files have (which published ones leave the identity), beside OpenCLIP's projected one.
  clip_skip is 2 when left at 0.
- Chroma: T5 has 512 tokens, and of its padding the transformer sees the first token alone. T5 itself reads padding, as
  with stable-diffusion.cpp; diffusers' pipeline masks it there, and gives the transformer a mask of floats, which
  attention adds to its scores instead of masking with it. Here the mask is one of bools.
- FLUX.2: the text is three of the language model's hidden states of 512 tokens, side by side: klein's Qwen3 is padded
  behind the text, dev's Mistral before it (ComfyUI does so too). Guidance by a negative prompt is the pipeline's for
  klein; its negative prompt is "" unless its embeddings are given.
- Z-Image: the text is Qwen3's last hidden states but one, of a user's message in Qwen3's template; the pipeline's
  ``guidance_scale`` is ``cfg`` less one, and its timesteps count backwards.
- Qwen-Image: the text is Qwen2.5-VL's last hidden states behind its norm, without the first 34 tokens of the template.
  Guidance does not change how long the prediction for a token is.
- Krea 2: the text is twelve of Qwen3-VL's hidden states, side by side; ``guidance_scale`` is ``cfg`` less one.
- Lumina 2: the text is Gemma's last hidden states but one, behind the pipeline's system prompt. Guidance does not
  change how long a prediction is.
- PixArt: T5 has 300 tokens (Alpha 120), which mask their padding. Betas are linear; Alpha is told the picture's size.
- Sana: the text is Gemma's last hidden states behind its norm, of the first token and those from the end of the
  pipeline's instruction on. Timesteps are 1000 sigma.
- Wan: UMT5 has 512 tokens, masks its padding, and what it gives for padding is zeros. Latents have frames. The
  transformer gets 1000 sigma. With ``high_cfg`` A14B's model for high noise is guided by that.
- LTX-Video: T5 has 128 tokens and reads its padding, which the transformer does not see; the transformer gets 1000
  sigma. A film has 25 pictures a second. VAEs that are told a level of noise are told 0. The picture that a film begins
  with is the VAE's mean.
- LTX-2: Gemma has 1024 tokens, with padding before the text that it does not see. Noise of sound stands behind that of
  pictures, in further frames. Guidance is by the negative prompt alone, for both; a film has 24 pictures a second.
- What the VAE decodes is latents / scale + shift: scale 0.18215 for SD, 0.13025 for SDXL, 0.3611 with shift 0.1159 for
  FLUX.1, Chroma and Z-Image, 1.5305 with shift 0.0609 for SD 3.
- With ``image`` and perhaps ``last`` a film of Wan's pipeline of pictures begins and ends with these. (TI2V-5B's is
  another one than that of texts, with the same parts.)
- With ``image`` a picture begins with that one: the VAE's mean and deviation times the same noise, then noise up to the
  first of the steps that are not ``left_out``. It is the family's Img2ImgPipeline, or with ``mask`` (white is drawn
  anew) its InpaintPipeline. What models that are made for inpainting are shown is encoded with ``masked_noise``.
- What FLUX.1's ControlNets are shown as latents is the VAE's mean.
- With ``skip`` SD 3 is guided away from what it predicts without layers: scale, layers, from where to where.
- With ``shown`` FLUX.1 Kontext's pipeline draws, which is shown the first picture.
- Qwen-Image-Edit is shown several. They are scaled as ours are, and to as many pixels as the picture has that is drawn.
  Qwen2.5-VL is told which tokens are pictures' (the pipeline doesn't, and transformers 5 then counts these as words,
  where it counted rows and columns, as the model was trained, before).
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any, NamedTuple
from unittest.mock import patch

import diffusers
import numpy as np
import torch
from diffusers import (
    AutoencoderKLLTX2Video,
    AutoencoderKLLTXVideo,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Krea2Pipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from numpy.typing import NDArray
from PIL import Image

from sdrpc.diffusion.pictures import fitted

F32 = NDArray[np.float32]


class Control(NamedTuple):
    """A ControlNet (diffusers' module), what it is shown (1, 3, height, width) of 0 … 1, how much it counts, and which
    kind of picture that is."""

    module: Any
    picture: torch.Tensor
    strength: float
    mode: int | None = None


@dataclass(frozen=True)
class Drawing:
    """What to draw. ``prediction`` (``epsilon``, ``v_prediction``) is the pipeline's own unless given.

    ``pixels``: on a side, that a latent stands for. ``zeros``: what of an empty negative prompt is zero for SDXL:
    ``text``, ``both`` (with the vector) or ``nothing``. ``control``: with a ControlNet. ``sound``: latents of it
    that stand behind those of a film.
    """

    prompt: str
    noise: F32
    sigmas: Sequence[float]
    negative: str = ""
    cfg: float = 7.0
    guidance: float = 3.5
    clip_skip: int = 0
    prediction: str | None = None
    zeros: str = "text"
    image: Image.Image | None = None
    last: Image.Image | None = None
    high_cfg: float | None = None
    mask: Image.Image | None = None
    skip: tuple[float, tuple[int, ...], float, float] | None = None
    masked_noise: F32 | None = None
    shown: tuple[Image.Image, ...] = ()
    left_out: int = 0
    pixels: int = 8
    control: Control | None = None
    sound: int = 0

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def height(self) -> int:
        return self.pixels * self.noise.shape[-2]

    @property
    def width(self) -> int:
        return self.pixels * self.noise.shape[-1]


class Picture(NamedTuple):
    """``pixels`` (height, width, 3) of 0 … 1, clipped, of a film (frames, height, width, 3); and the ``latents`` that
    they were decoded from, in the sampler's scale (FLUX.2: the VAE's own), shape (channels, height / 8, width / 8), of
    a film (channels, frames, …). ``sound``: of a film, (ears, samples) of -1 … 1."""

    pixels: F32
    latents: F32
    sound: F32 | None = None


def draw(pipeline: Any, drawing: Drawing) -> Picture:
    """Draw with a pipeline of float32 modules: for Stable Diffusion (1.x to 3.5, XL), FLUX.1, FLUX.2, Chroma,
    Z-Image, Qwen-Image, Wan or LTX-Video."""
    pipeline.set_progress_bar_config(disable=True)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "__array__", DeprecationWarning)  # diffusers' scheduler with numpy 2
        drawn = _FAMILIES[type(pipeline).__name__](pipeline, drawing)
        latents, sound = drawn if isinstance(drawn, tuple) else (drawn, None)
        decoded = _decoded(pipeline.vae, latents)
    if isinstance(pipeline, Krea2Pipeline | QwenImagePipeline | QwenImageEditPlusPipeline):
        decoded = decoded[:, :, 0]  # of a film of one picture
    pixels = (decoded[0].movedim(0, -1) / 2 + 0.5).clamp(0, 1)
    return Picture(pixels.numpy(), latents[0].numpy(), None if sound is None else sound[0].numpy())


def _decoded(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    if isinstance(vae, AutoencoderKLLTX2Video):
        return vae.decode(latents).sample
    if not isinstance(vae, AutoencoderKLLTXVideo):
        return vae.decode(_unscaled(vae.config, latents)).sample
    mean, deviation = (each[:, None, None, None] for each in (vae.latents_mean, vae.latents_std))
    level = torch.zeros(1) if vae.config["timestep_conditioning"] else None
    return vae.decode(latents * deviation + mean, level).sample


def _unscaled(config: Any, latents: torch.Tensor) -> torch.Tensor:
    """The VAE's latents; Wan's autoencoder has a mean and a standard deviation for each channel."""
    if config.get("latents_mean") is not None:
        mean, deviation = (torch.tensor(config[key])[:, None, None, None] for key in ("latents_mean", "latents_std"))
        return latents * deviation + mean
    return latents / getattr(config, "scaling_factor", 1.0) + (getattr(config, "shift_factor", None) or 0.0)


def psnr(one: NDArray[Any], other: NDArray[Any]) -> float:
    """Peak signal to noise ratio in dB: of bytes where both are, else of numbers of 0 … 1 (bytes become such)."""
    if one.shape != other.shape:
        raise ValueError(f"pictures of {one.shape} and {other.shape}")
    error = float(np.square(_unit(one) - _unit(other)).mean())
    return float("inf") if error == 0 else float(-10 * np.log10(error))


def _unit(pixels: NDArray[Any]) -> NDArray[np.float64]:
    return pixels.astype(np.float64) / (255 if pixels.dtype == np.uint8 else 1)


def _discrete(pipeline: Any, drawing: Drawing) -> None:
    """Euler's method over the betas of the pipeline's model. "linspace" makes the noise's factor sigmas[0]."""
    changes = {"timestep_spacing": "linspace"}
    if drawing.prediction is not None:
        changes["prediction_type"] = drawing.prediction
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config, **changes)


def _stable_diffusion(pipeline: Any, drawing: Drawing) -> torch.Tensor:
    _discrete(pipeline, drawing)
    skip = _hidden_layers_skipped(pipeline, drawing.clip_skip)

    def encoded(prompt: str) -> torch.Tensor:
        """As the pipeline's encode_prompt with clip_skip, which diffusers 0.42 breaks with transformers 5."""
        encoder = pipeline.text_encoder
        ids = pipeline.tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt").input_ids
        hidden = encoder(ids, output_hidden_states=True).hidden_states[-1 - skip]
        return getattr(encoder, "text_model", encoder).final_layer_norm(hidden)

    return _sampled(
        pipeline,
        drawing,
        prompt_embeds=encoded(drawing.prompt),
        negative_prompt_embeds=encoded(drawing.negative),
    )


def _hidden_layers_skipped(pipeline: Any, clip_skip: int) -> int:
    """SD 2.x is told by its encoder's activation: OpenCLIP's class lacks the last layer of its files."""
    lacking = pipeline.text_encoder.config.hidden_act == "gelu"
    skip = (clip_skip or (2 if lacking else 1)) - (2 if lacking else 1)
    if skip < 0:
        raise ValueError(f"clip_skip {clip_skip}: the class lacks that layer")
    return skip


def _stable_diffusion_xl(pipeline: Any, drawing: Drawing) -> torch.Tensor:
    _discrete(pipeline, drawing)
    skip = (drawing.clip_skip or 2) - 2

    def encoded(prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
        text, _, vector, _ = pipeline.encode_prompt(
            prompt, device="cpu", do_classifier_free_guidance=False, clip_skip=skip
        )
        return text, vector

    text, vector = encoded(drawing.prompt)
    negative_text, negative_vector = encoded(drawing.negative)
    if not drawing.negative:
        text_factor, vector_factor = {"text": (0, 1), "both": (0, 0), "nothing": (1, 1)}[drawing.zeros]
        negative_text, negative_vector = negative_text * text_factor, negative_vector * vector_factor
    return _sampled(
        pipeline,
        drawing,
        prompt_embeds=text,
        pooled_prompt_embeds=vector,
        negative_prompt_embeds=negative_text,
        negative_pooled_prompt_embeds=negative_vector,
    )


def _sampled(pipeline: Any, drawing: Drawing, **conditions: Any) -> torch.Tensor:
    """The scheduler multiplies the noise by its greatest sigma, and wants the last one, 0, among its sigmas."""
    return _call(
        pipeline,
        drawing,
        torch.from_numpy(drawing.noise)[None],
        **conditions,
        sigmas=[float(sigma) for sigma in drawing.sigmas],
        guidance_scale=drawing.cfg,
        output_type="latent",
    )


def _call(pipeline: Any, drawing: Drawing, latents: torch.Tensor, **arguments: Any) -> torch.Tensor:
    """What the pipeline draws from ``latents``, or its relative of the picture to begin with."""
    if drawing.shown:
        pipeline = diffusers.FluxKontextPipeline(**pipeline.components)
        arguments |= {"image": drawing.shown[0], "max_area": drawing.width * drawing.height, "_auto_resize": False}
    if drawing.control is not None:
        name = type(pipeline).__name__.replace("Pipeline", "ControlNetPipeline")
        pipeline = getattr(diffusers, name)(**pipeline.components, controlnet=drawing.control.module)
        arguments["controlnet_conditioning_scale"] = drawing.control.strength
        pipeline.set_progress_bar_config(disable=True)
        if name == "FluxControlNetPipeline":
            arguments |= {"control_image": drawing.control.picture * 2 - 1, "control_mode": drawing.control.mode}
            with drawn_noise(pipeline, torch.zeros_like(torch.from_numpy(drawing.noise)[None])):  # the VAE's mean
                return pipeline(height=drawing.height, width=drawing.width, latents=latents, **arguments).images
        arguments["image"] = drawing.control.picture
    if drawing.image is None:
        return pipeline(height=drawing.height, width=drawing.width, latents=latents, **arguments).images
    kind = getattr(diffusers, _relative(type(pipeline).__name__, drawing))
    relative = kind(**{name: each for name, each in pipeline.components.items() if name in signature(kind).parameters})
    relative.set_progress_bar_config(disable=True)
    if hasattr(relative, "_prepare_attention_mask"):  # Chroma's, whose own makes floats of bools
        relative._prepare_attention_mask = pipeline._prepare_attention_mask
    if drawing.mask is not None:
        arguments["mask_image"] = drawing.mask
    arguments["strength"] = (drawing.steps - drawing.left_out) / drawing.steps
    arguments |= {"height": drawing.height, "width": drawing.width}
    noise = torch.from_numpy(drawing.noise)[None]
    if drawing.masked_noise is not None:
        arguments["callback_on_step_end"] = _kept(pipeline, drawing, noise)
    takes = signature(relative.__call__).parameters
    arguments = {name: value for name, value in arguments.items() if name in takes}
    last = noise if drawing.masked_noise is None else torch.from_numpy(drawing.masked_noise)[None]
    with drawn_noise(relative, noise, noise, last):
        return relative(image=drawing.image, **arguments).images


def _relative(name: str, drawing: Drawing) -> str:
    """The pipeline of the same family that begins with a picture."""
    if drawing.mask is None:
        return name.replace("Pipeline", "Img2ImgPipeline")
    return "FluxFillPipeline" if name == "FluxPipeline" else name.replace("Pipeline", "InpaintPipeline")


def _kept(pipeline: Any, drawing: Drawing, noise: torch.Tensor) -> Any:
    """Puts back after each step what is outside the mask, as diffusers does with models that are not made for it."""
    pixels = torch.from_numpy(np.array(drawing.image)).permute(2, 0, 1)[None] / 127.5 - 1
    told, config = pipeline.vae.encode(pixels).latent_dist, pipeline.vae.config
    known = (told.mean + told.std * noise - (config.shift_factor or 0.0)) * config.scaling_factor
    anew = (torch.from_numpy(np.array(drawing.mask)) > 127).float()[None, None, ::8, ::8]
    flux = type(pipeline).__name__ == "FluxPipeline"

    def put_back(_: Any, index: int, __: Any, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        sigma = float(drawing.sigmas[drawing.left_out + index + 1])
        outside = known * (1 - sigma if flux else 1) + noise * sigma
        kept, everywhere = outside, anew.expand_as(noise)
        if flux:
            kept, everywhere = (pipeline._pack_latents(each, *noise.shape) for each in (kept, everywhere))
        return {"latents": given["latents"] * everywhere + kept * (1 - everywhere)}

    return put_back


@contextmanager
def drawn_noise(pipeline: Any, *noise: torch.Tensor) -> Iterator[None]:
    """Let the pipeline and its VAE draw these, one after the other."""
    modules = [sys.modules[type(pipeline).__module__], sys.modules[diffusers.AutoencoderKL.__module__]]
    modules.append(sys.modules["diffusers.models.autoencoders.vae"])
    modules = [module for module in modules if hasattr(module, "randn_tensor")]
    before = [module.randn_tensor for module in modules]
    left = list(noise)
    try:
        for module in modules:
            module.randn_tensor = lambda shape, **_: left.pop(0).reshape(shape)
        yield
    finally:
        for module, function in zip(modules, before, strict=True):
            module.randn_tensor = function


T5_LENGTH, CHROMA_T5_LENGTH = 256, 512


def _flux(pipeline: Any, drawing: Drawing) -> torch.Tensor:
    """The scheduler would shift the sigmas, but not with a shift of 1, and appends the last one, 0, itself."""
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    noise = _noise(drawing)
    packed = _call(
        pipeline,
        drawing,
        pipeline._pack_latents(noise, *noise.shape),
        prompt=drawing.prompt,
        negative_prompt=drawing.negative,
        true_cfg_scale=drawing.cfg,
        guidance_scale=drawing.guidance,
        sigmas=[float(sigma) for sigma in drawing.sigmas[:-1]],
        num_inference_steps=len(drawing.sigmas) - 1,
        max_sequence_length=T5_LENGTH,
        output_type="latent",
    )
    return pipeline._unpack_latents(packed, drawing.height, drawing.width, pipeline.vae_scale_factor)


SD3_T5_LENGTH = 77


def _stable_diffusion_3(pipeline: Any, drawing: Drawing) -> torch.Tensor:
    """Scheduler and sigmas as FLUX.1's."""
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    pipeline.text_encoder.text_projection = torch.nn.Identity()

    def encoded(prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
        text, _, vector, _ = pipeline.encode_prompt(
            prompt, prompt, prompt, device="cpu", do_classifier_free_guidance=False,
            clip_skip=(drawing.clip_skip or 2) - 2, max_sequence_length=SD3_T5_LENGTH,
        )  # fmt: skip
        return text, vector

    skipping = {}
    if drawing.skip is not None:
        scale, layers, start, stop = drawing.skip
        skipping = {
            "skip_guidance_layers": list(layers), "skip_layer_guidance_scale": scale,
            "skip_layer_guidance_start": start, "skip_layer_guidance_stop": stop,
        }  # fmt: skip
    text, vector = encoded(drawing.prompt)
    negative_text, negative_vector = encoded(drawing.negative)
    return _call(
        pipeline,
        drawing,
        _noise(drawing),
        **skipping,
        prompt_embeds=text,
        pooled_prompt_embeds=vector,
        negative_prompt_embeds=negative_text,
        negative_pooled_prompt_embeds=negative_vector,
        sigmas=[float(sigma) for sigma in drawing.sigmas[:-1]],
        num_inference_steps=len(drawing.sigmas) - 1,
        guidance_scale=drawing.cfg,
        output_type="latent",
    )


def _chroma(pipeline: Any, drawing: Drawing) -> torch.Tensor:
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    noise = _noise(drawing)

    def encoded(prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
        """As the pipeline's encode_prompt, but T5 reads padding as well, and the mask masks."""
        ids, used = pipeline.tokenizer(
            prompt, padding="max_length", max_length=CHROMA_T5_LENGTH, truncation=True, return_tensors="pt"
        ).values()
        mask = torch.arange(CHROMA_T5_LENGTH)[None] <= used.sum()
        return pipeline.text_encoder(ids)[0], mask

    text, mask = encoded(drawing.prompt)
    negative_text, negative_mask = encoded(drawing.negative)
    packed = _call(
        pipeline,
        drawing,
        pipeline._pack_latents(noise, *noise.shape),
        prompt_embeds=text,
        prompt_attention_mask=mask,
        negative_prompt_embeds=negative_text,
        negative_prompt_attention_mask=negative_mask,
        guidance_scale=drawing.cfg,
        sigmas=[float(sigma) for sigma in drawing.sigmas[:-1]],
        num_inference_steps=len(drawing.sigmas) - 1,
        output_type="latent",
    )
    return pipeline._unpack_latents(packed, drawing.height, drawing.width, pipeline.vae_scale_factor)


def _flow(pipeline: Any, drawing: Drawing, latents: torch.Tensor | None = None, **arguments: Any) -> torch.Tensor:
    """What a flow model's pipeline draws along the given sigmas, which a shift of 1 leaves as they are. ``latents``:
    the noise as the pipeline takes it, if not as it is."""
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    return pipeline(
        prompt=drawing.prompt,
        height=drawing.height,
        width=drawing.width,
        latents=_noise(drawing) if latents is None else latents,
        sigmas=[float(sigma) for sigma in drawing.sigmas[:-1]],
        num_inference_steps=len(drawing.sigmas) - 1,
        output_type="latent",
        **arguments,
    ).images


def _noise(drawing: Drawing) -> torch.Tensor:
    """At the first level."""
    return torch.from_numpy(drawing.noise)[None] * float(drawing.sigmas[0])


def _z_image(pipeline: Any, drawing: Drawing) -> torch.Tensor:
    return _flow(pipeline, drawing, negative_prompt=drawing.negative, guidance_scale=drawing.cfg - 1)


def _wan(pipeline: Any, drawing: Drawing) -> torch.Tensor:
    """Scheduler and sigmas as FLUX.1's; the pipeline does not take sigmas, so they are set where it asks for steps."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    given = [float(sigma) for sigma in drawing.sigmas[:-1]]
    set_timesteps = scheduler.set_timesteps
    scheduler.set_timesteps = lambda _, device: set_timesteps(sigmas=given, device=device)
    pipeline.scheduler = scheduler
    return pipeline(
        prompt=drawing.prompt,
        negative_prompt=drawing.negative,
        guidance_scale=drawing.cfg if drawing.high_cfg is None else drawing.high_cfg,
        guidance_scale_2=None if drawing.high_cfg is None else drawing.cfg,
        height=drawing.height,
        width=drawing.width,
        num_frames=4 * (drawing.noise.shape[1] - 1) + 1,
        latents=_noise(drawing),
        num_inference_steps=len(given),
        output_type="latent",
        **({} if drawing.image is None else {"image": drawing.image, "last_image": drawing.last}),
    ).frames


def _ltx(pipeline: Any, drawing: Drawing) -> torch.Tensor:
    """As :func:`_wan`. With a picture the pipeline wants to draw the noise itself."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    given = [float(sigma) for sigma in drawing.sigmas[:-1]]
    set_timesteps = scheduler.set_timesteps

    def as_given(*, device: str, sigmas: Any, mu: float) -> None:
        set_timesteps(sigmas=given, device=device)

    scheduler.set_timesteps = as_given
    pipeline.scheduler = scheduler
    noise = _noise(drawing)
    begun = {"latents": pipeline._pack_latents(noise)} if drawing.image is None else {"image": drawing.image}
    with drawn_noise(pipeline, torch.zeros_like(noise[:, :, :1]), noise):
        packed = pipeline(
            prompt=drawing.prompt,
            negative_prompt=drawing.negative,
            guidance_scale=drawing.cfg,
            height=drawing.height,
            width=drawing.width,
            num_frames=8 * (drawing.noise.shape[1] - 1) + 1,
            num_inference_steps=len(given),
            output_type="latent",
            **begun,
        ).frames
    return pipeline._unpack_latents(packed, *drawing.noise.shape[1:])


def _ltx2(pipeline: Any, drawing: Drawing) -> tuple[torch.Tensor, torch.Tensor]:
    """The pipeline gives the VAE's own latents, and those of the audio VAE. With a picture it wants to draw the noise
    of pictures itself."""
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    noise = _noise(drawing)
    _, _, frames, height, width = noise.shape
    frames -= -(-drawing.sound // (height * width))
    tokens = noise.flatten(2).transpose(1, 2)
    pictures = frames * height * width
    sound = tokens[:, pictures : pictures + drawing.sound]
    if drawing.image is None:
        begun: dict[str, Any] = {"latents": tokens[:, :pictures]}
    else:
        begun = {"image": drawing.image, "image_crf": 0}
    # it takes what it is given for the audio VAE's own numbers
    given = sound * pipeline.audio_vae.latents_std + pipeline.audio_vae.latents_mean
    with drawn_noise(pipeline, noise[:, :, :frames], sound):  # of what is given it takes 0 times more
        drawn = pipeline(
            prompt=drawing.prompt,
            negative_prompt=drawing.negative,
            height=drawing.height,
            width=drawing.width,
            num_frames=8 * (frames - 1) + 1,
            **begun,
            audio_latents=given,
            sigmas=[float(sigma) for sigma in drawing.sigmas[:-1]],
            num_inference_steps=len(drawing.sigmas) - 1,
            output_type="latent",
            use_cross_timestep=pipeline.transformer.config.cross_attn_mod,
            **{
                f"{side}{name}": value
                for side in ("", "audio_")
                for name, value in {
                    "guidance_scale": drawing.cfg,
                    "stg_scale": 0.0,
                    "modality_scale": 1.0,
                    "guidance_rescale": 0.0,
                }.items()
            },
        )
    return drawn.frames, pipeline.vocoder(pipeline.audio_vae.decode(drawn.audio).sample)


def _flux2_klein(pipeline: Any, drawing: Drawing) -> torch.Tensor:
    negative, _ = pipeline.encode_prompt(drawing.negative, device="cpu")
    return _flux2(pipeline, drawing, guidance_scale=drawing.cfg, negative_prompt_embeds=negative)


def _flux2_dev(pipeline: Any, drawing: Drawing) -> torch.Tensor:
    """The pipeline gives tokens, and makes the VAE's latents of them only to decode them."""
    tokens = _flux2(pipeline, drawing, guidance_scale=drawing.guidance)
    latents = tokens.transpose(1, 2).reshape(1, *drawing.noise.shape)
    normal = pipeline.vae.bn
    deviation = torch.sqrt(normal.running_var + pipeline.vae.config.batch_norm_eps)
    latents = latents * deviation[None, :, None, None] + normal.running_mean[None, :, None, None]
    return pipeline._unpatchify_latents(latents)


def _flux2(pipeline: Any, drawing: Drawing, **guidance: Any) -> torch.Tensor:
    return _flow(pipeline, drawing, image=list(drawing.shown) or None, **guidance)


def _qwen_image(pipeline: Any, drawing: Drawing, **pictures: Any) -> torch.Tensor:
    noise = _noise(drawing)
    latents = pipeline._pack_latents(noise, *noise.shape)
    guidance = {"negative_prompt": drawing.negative, "true_cfg_scale": drawing.cfg}
    packed = _flow(pipeline, drawing, latents, **guidance, **pictures)
    return pipeline._unpack_latents(packed, drawing.height, drawing.width, pipeline.vae_scale_factor)


def _krea2(pipeline: Any, drawing: Drawing) -> torch.Tensor:
    noise = _noise(drawing)
    latents = pipeline._pack_latents(noise, *noise.shape)
    packed = _flow(pipeline, drawing, latents, negative_prompt=drawing.negative, guidance_scale=drawing.cfg - 1)
    return pipeline._unpack_latents(packed, drawing.height, drawing.width)


def _lumina2(pipeline: Any, drawing: Drawing) -> torch.Tensor:
    guidance = {"negative_prompt": drawing.negative, "guidance_scale": drawing.cfg, "cfg_normalization": False}
    return _flow(pipeline, drawing, **guidance)


def _sana(pipeline: Any, drawing: Drawing) -> torch.Tensor:
    guidance = {"negative_prompt": drawing.negative, "guidance_scale": drawing.cfg}
    return _flow(pipeline, drawing, **guidance, use_resolution_binning=False)


def _pixart(pipeline: Any, drawing: Drawing) -> torch.Tensor:
    _discrete(pipeline, drawing)
    return _sampled(
        pipeline, drawing, prompt=drawing.prompt, negative_prompt=drawing.negative, use_resolution_binning=False,
    )  # fmt: skip


def _qwen_image_edit(pipeline: Any, drawing: Drawing) -> torch.Tensor:
    class Scaled(VaeImageProcessor):
        def resize(self, image: Image.Image, height: int, width: int, **_: Any) -> Image.Image:
            return Image.fromarray(fitted(np.asarray(image), width, height))

    def with_kinds(_: Any, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        kinds = (given["input_ids"] == pipeline.text_encoder.config.image_token_id).int()
        return args, {**given, "mm_token_type_ids": kinds}

    pipeline.image_processor = Scaled(vae_scale_factor=2 * drawing.pixels)
    hook = pipeline.text_encoder.register_forward_pre_hook(with_kinds, with_kwargs=True)
    with patch.object(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", drawing.width * drawing.height):
        latents = _qwen_image(pipeline, drawing, image=list(drawing.shown))
    hook.remove()
    return latents


_FAMILIES = {
    "StableDiffusionPipeline": _stable_diffusion,
    "StableDiffusionXLPipeline": _stable_diffusion_xl,
    "FluxPipeline": _flux,
    "StableDiffusion3Pipeline": _stable_diffusion_3,
    "ChromaPipeline": _chroma,
    "Flux2KleinPipeline": _flux2_klein,
    "Flux2Pipeline": _flux2_dev,
    "ZImagePipeline": _z_image,
    "WanPipeline": _wan,
    "WanImageToVideoPipeline": _wan,
    "LTX2Pipeline": _ltx2,
    "LTX2ImageToVideoPipeline": _ltx2,
    "LTXPipeline": _ltx,
    "LTXImageToVideoPipeline": _ltx,
    "QwenImagePipeline": _qwen_image,
    "Krea2Pipeline": _krea2,
    "QwenImageEditPlusPipeline": _qwen_image_edit,
    "Lumina2Pipeline": _lumina2,
    "SanaPipeline": _sana,
    "PixArtSigmaPipeline": _pixart,
    "PixArtAlphaPipeline": _pixart,
}

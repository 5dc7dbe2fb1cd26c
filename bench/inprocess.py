"""Sampling loops of diffusers in this process: its models with a checkpoint's weights, its schedulers, its kernels."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

from sdrpc.diffusion.drawable import latents_shape, predicts_with
from sdrpc.diffusion.pictures import from_pixels
from sdrpc.diffusion.predictions import TIMESTEPS, Prediction
from sdrpc.diffusion.request import Settings
from sdrpc.diffusion.rng import make_rng
from sdrpc.diffusion.schedules import make_sigmas
from sdrpc.families.base import Conditions
from sdrpc.families.model import Model
from sdrpc.ggml.weight import Weight
from sdrpc.lowering.capture import without_weights

from .recorded import now, recorded
from .sampling import DTYPES, Sampled

log = Console(stderr=True, highlight=False)

F32 = NDArray[np.float32]

Q8_0_BLOCK = 34
"""Bytes: a float16 factor and 32 small numbers."""

STORED = {
    **{name.upper(): dtype for name, dtype in DTYPES.items()},
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""torch's types of numbers that are stored plainly."""

LAYOUT_STEPS = 4
PATCH = 2
"""Latents on a side of which FLUX.1 makes one token."""


class Drawing(NamedTuple):
    """One picture or film that both sides draw. ``noise`` (1, c, h, w) or (1, c, frames, h, w) is standard normal,
    ``sigmas`` the levels of noise of the steps and the last one, 0, of what the model ``predicts``; ``conditions`` as
    :meth:`sdrpc.diffusion.conditioning.Conditioning.conditions` has them."""

    settings: Settings
    predicts: Prediction
    noise: F32
    sigmas: F32
    conditions: Sequence[Conditions]


def drawing(model: Model, settings: Settings, conditions: Sequence[Conditions]) -> Drawing:
    """What :meth:`Sampling.sample` draws with these arguments."""
    shape = latents_shape(model, settings)
    predicts = predicts_with(model, settings, settings.prediction or "eps")
    sigmas = make_sigmas(settings.scheduler, settings.steps, predicts, tokens=shape[-2] * shape[-1])
    noise = make_rng(settings.rng, settings.seed).normal(int(np.prod(shape))).reshape(shape)
    return Drawing(settings, predicts, noise, sigmas, conditions)


class Loop(NamedTuple):
    """A family's sampling loop as its pipeline in diffusers runs it.

    ``latents``: as the scheduler has them at first. ``enter``: latents and timestep → what the model is given that
    changes from step to step. ``model``: evaluates it. ``leave``: its answer → what the scheduler takes. ``result``:
    latents in the shape of the noise.
    """

    scheduler: Any
    latents: Tensor
    enter: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    model: Callable[[Tensor, Tensor], Tensor]
    leave: Callable[[Tensor], Tensor]
    result: Callable[[Tensor], Tensor]


class InProcess:
    """diffusers' model with the weights of ``model``'s diffusion model in ``dtype``, but those in float32 of which its
    class says so. Blocks and 8-bit floats become plain numbers. ``call``: the family's function of module and inputs.
    """

    def __init__(self, model: Model, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.module: Any
        self.call: Callable[..., tuple[Tensor, ...]]
        self.module, self.call = _built(model, "diffusion", device, dtype)
        self.control: Any = _built(model, "control", device, dtype)[0] if "control" in model.components else None
        self._loop = LOOPS[model.family.name]
        self._graphs: list[torch.cuda.CUDAGraph] = []

    def fuse(self, path: Path) -> None:
        """Add a LoRA with diffusers' names to the weights for good: so it costs nothing per step."""
        prefix = "unet."
        layers = {name.removeprefix(prefix): tensor for name, tensor in load_file(path).items()}
        self.module.load_lora_adapter(layers, prefix=None)
        self.module.fuse_lora()
        self.module.unload_lora()

    @property
    def _modules(self) -> list[Any]:
        return [module for module in (self.module, self.control) if module is not None]

    @property
    def convolves(self) -> bool:
        return any(isinstance(part, nn.Conv2d) for part in self.module.modules())

    def choose_layout(self, drawn: Drawing) -> str:
        """Keep the kernels of convolutions in the layout in which steps take less time, and name it."""
        layouts = {"channels first": torch.contiguous_format, "channels last": torch.channels_last}
        seconds = {}
        few = drawn._replace(sigmas=np.append(drawn.sigmas[:LAYOUT_STEPS], np.float32(0)))
        for name, layout in layouts.items():
            for module in self._modules:
                module.to(memory_format=layout)
            seconds[name] = min(self.sample(few).seconds for _ in range(2))
        best = min(seconds, key=lambda name: seconds[name])
        for module in self._modules:
            module.to(memory_format=layouts[best])
        return best

    def recorded(self, drawn: Drawing) -> list[Sampled]:
        """A picture with the model as a CUDA graph; none, and a line that says why, where torch can't record the model:
        some copy numbers to the device in every evaluation."""
        try:
            return [self.sample(drawn, graph=True)]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as refused:
            log.print(f"{type(self.module).__name__} can't be a CUDA graph: {str(refused).splitlines()[0]}")
            return []

    @contextmanager
    def compiled(self) -> Iterator[None]:
        """The model as Inductor makes it, for shapes that stay."""
        plain = self.module, self.control
        self.module, self.control = (None if each is None else torch.compile(each, dynamic=False) for each in plain)
        try:
            yield
        finally:
            self.module, self.control = plain

    @torch.inference_mode()
    def sample(self, drawn: Drawing, *, graph: bool = False) -> Sampled:
        """The picture up to its latents. ``graph``: with the model as a CUDA graph, recorded before the clock runs."""
        loop = self._loop(self, drawn)
        scheduler, latents = loop.scheduler, loop.latents
        model = self._recorded(loop) if graph else loop.model
        start = now(self.device)
        for timestep in scheduler.timesteps:
            predicted = loop.leave(model(*loop.enter(latents, timestep)))
            latents = scheduler.step(predicted, timestep, latents, return_dict=False)[0]
        result = loop.result(latents).float().cpu().numpy()
        return Sampled(result, (now(self.device) - start) / len(scheduler.timesteps))

    def close(self) -> None:
        """Give the memory back."""
        self._graphs.clear()
        del self.module, self.control
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def tensor(self, array: F32) -> Tensor:
        return torch.from_numpy(array).to(self.device, self.dtype)

    def _recorded(self, loop: Loop) -> Callable[..., Tensor]:
        given = tuple(each.clone() for each in loop.enter(loop.latents, loop.scheduler.timesteps[0]))
        self._graphs = [torch.cuda.CUDAGraph()]
        return recorded(loop.model, given, self._graphs[0])


def _built(model: Model, name: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, Callable[..., Any]]:
    """diffusers' module of a component with its weights, and the family's function of it and its inputs."""
    component = model[name]
    built: tuple[Any, Callable[..., tuple[Tensor, ...]]]
    with without_weights():
        built = component.module().build()
    module, call = built
    wide = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    weights = {
        name: _loaded(weight, device, torch.float32 if wide & set(name.split(".")) else dtype)
        for name, weight in component.found.tensors.items()
    }
    missing = module.load_state_dict(weights, strict=False, assign=True).missing_keys
    if missing:
        raise SystemExit(f"diffusers' model lacks {', '.join(missing[:3])}")
    return module.eval().to(device), call  # with the tables that the module computed for itself


def _loaded(weight: Weight, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A weight on the device, plain or in blocks of Q8_0."""
    stored = torch.frombuffer(bytearray(weight.data()), dtype=torch.uint8).to(device)
    if weight.type.name == "Q8_0":
        blocks = stored.reshape(-1, Q8_0_BLOCK)
        factors, small = blocks[:, :2].contiguous().view(torch.float16), blocks[:, 2:].contiguous().view(torch.int8)
        return (factors.float() * small).to(dtype).reshape(weight.shape)
    return stored.view(STORED[weight.type.name]).to(dtype).reshape(weight.shape)


# Families -------------------------------------------------------------------------------------------------------------


def _sdxl(side: InProcess, drawn: Drawing) -> Loop:
    """StableDiffusionXLPipeline: Euler's method over the betas, a batch of the negative prompt and the prompt."""
    from diffusers import EulerDiscreteScheduler

    make: Any = EulerDiscreteScheduler  # untyped
    scheduler = make(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="linspace")
    scheduler.set_timesteps(sigmas=drawn.sigmas.tolist(), device=side.device)
    told = _joined(drawn.conditions)
    text = side.tensor(told["context"])
    added = {"text_embeds": side.tensor(told["pooled"]), "time_ids": torch.from_numpy(told["sizes"]).to(side.device)}
    batch, scale = len(text), drawn.settings.cfg_scale
    hint = drawn.settings.control_image
    if hint is not None:
        picture = (
            side.tensor(from_pixels(hint) / np.float32(2) + np.float32(0.5)).expand(batch, -1, -1, -1).contiguous()
        )

    def enter(latents: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        return scheduler.scale_model_input(torch.cat([latents] * batch), timestep), timestep

    def model(latents: Tensor, timestep: Tensor) -> Tensor:
        given: dict[str, Any] = {}
        if hint is not None:
            down, middle = side.control(
                latents, timestep, text, picture, conditioning_scale=drawn.settings.control_strength,
                added_cond_kwargs=added, return_dict=False,
            )  # fmt: skip
            given = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        predicted: Tensor = side.module(latents, timestep, text, added_cond_kwargs=added, return_dict=False, **given)[0]
        return predicted

    def leave(predicted: Tensor) -> Tensor:
        if batch == 1:
            return predicted
        negative, positive = predicted.chunk(2)
        return negative + scale * (positive - negative)

    return Loop(scheduler, side.tensor(drawn.noise) * scheduler.init_noise_sigma, enter, model, leave, _same)


class _ExactTimes(nn.Module):
    """Stands before FLUX.1's embedding of timestep and guidance, and gives it both in float32.

    diffusers hands them over in the model's dtype; in bfloat16 a timestep of 953 is 952, which is another point of the
    schedule than ours. It takes no more time this way.
    """

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding
        self.exact: tuple[Tensor, ...] = ()

    def forward(self, *rounded: Tensor) -> Tensor:
        embedded: Tensor = self.embedding(*self.exact, rounded[-1])
        return embedded


class _ExactInTurn(nn.Module):
    """As :class:`_ExactTimes` before FLUX.2's projection of timestep and guidance, which sees one after the other."""

    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        self.projection = projection
        self.exact: Iterator[Tensor] = iter(())

    def forward(self, _rounded: Tensor) -> Tensor:
        projected: Tensor = self.projection(next(self.exact))
        return projected


def _flux1(side: InProcess, drawn: Drawing) -> Loop:
    """FluxPipeline: latents packed into tokens, no negative prompt."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    make: Any = FlowMatchEulerDiscreteScheduler  # untyped
    pipeline: Any = FluxPipeline
    scheduler = make(shift=1.0)
    scheduler.set_timesteps(sigmas=drawn.sigmas[:-1].tolist(), device=side.device)
    (told,) = drawn.conditions
    text, pooled = side.tensor(told["context"]), side.tensor(told["pooled"])
    guidance = torch.from_numpy(told["guidance"]).to(side.device) if "guidance" in told else None
    shape = drawn.noise.shape
    noise = side.tensor(drawn.noise) * float(drawn.sigmas[0])
    places = pipeline._prepare_latent_image_ids(1, shape[2] // PATCH, shape[3] // PATCH, side.device, side.dtype)
    no_places = torch.zeros(text.shape[1], 3, device=side.device, dtype=side.dtype)
    if not isinstance(side.module.time_text_embed, _ExactTimes):
        side.module.time_text_embed = _ExactTimes(side.module.time_text_embed)
    times = side.module.time_text_embed

    def enter(latents: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        return latents, timestep.expand(len(latents)) / 1000

    def model(latents: Tensor, timestep: Tensor) -> Tensor:
        times.exact = (timestep * 1000,) if guidance is None else (timestep * 1000, guidance * 1000)
        predicted: Tensor = side.module(
            hidden_states=latents, timestep=timestep, guidance=guidance, pooled_projections=pooled,
            encoder_hidden_states=text, img_ids=places, txt_ids=no_places, return_dict=False,
        )[0]  # fmt: skip
        return predicted

    def result(latents: Tensor) -> Tensor:
        unpacked: Tensor = pipeline._unpack_latents(latents, drawn.settings.height, drawn.settings.width, 8)
        return unpacked

    return Loop(scheduler, pipeline._pack_latents(noise, *shape), enter, model, _same, result)


def _flow(side: InProcess, drawn: Drawing) -> Loop:
    """The pipelines of flow models without a negative prompt: Euler's method, an evaluation a step. How latents become
    tokens and what the class calls its inputs, the family's own function knows, which is run here as it is."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    make: Any = FlowMatchEulerDiscreteScheduler  # untyped
    scheduler = make(shift=1.0)
    scheduler.set_timesteps(sigmas=drawn.sigmas[:-1].tolist(), device=side.device)
    (conditions,) = drawn.conditions
    told = {name: side.tensor(array) for name, array in conditions.items()}
    most = float(drawn.predicts.timestep(1.0))

    def enter(latents: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        return latents, timestep.expand(len(latents)) * (most / TIMESTEPS)

    times = _exact_in_turn(side.module)
    guidance = [torch.from_numpy(conditions["guidance"]).to(side.device)] if "guidance" in conditions else []

    def model(latents: Tensor, timestep: Tensor) -> Tensor:
        if times is not None:
            times.exact = iter([each * TIMESTEPS for each in (timestep, *guidance)])
        with side.device:  # where the function makes positions
            return side.call(side.module, latents, timestep, **told)[0].to(side.dtype)

    return Loop(scheduler, side.tensor(drawn.noise) * float(drawn.sigmas[0]), enter, model, _same, _same)


def _exact_in_turn(module: Any) -> _ExactInTurn | None:
    """What stands before FLUX.2's projection, put there if it is not; None for other models."""
    embedding = getattr(module, "time_guidance_embed", None)
    if embedding is not None and not isinstance(embedding.time_proj, _ExactInTurn):
        embedding.time_proj = _ExactInTurn(embedding.time_proj)
    return None if embedding is None else embedding.time_proj


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _joined(conditions: Sequence[Conditions]) -> Mapping[str, F32]:
    return {name: np.concatenate([each[name] for each in conditions]) for name in conditions[0]}


LOOPS: dict[str, Callable[[InProcess, Drawing], Loop]] = {
    "sdxl": _sdxl,
    "flux1": _flux1,
    **dict.fromkeys(("flux2", "flux2-klein", "qwen-image", "wan", "zimage"), _flow),
}
"""By sdrpc's names of families."""

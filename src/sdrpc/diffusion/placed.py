"""A model's parts on devices: captured or found in the cache, uploaded when they are first needed, run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..device import Device
from ..ggml.types import Type
from ..ggml.weight import Weight
from ..runtime.cache import Cache, key
from ..runtime.lowered import Lowered
from ..runtime.run import Executable, WeightStore
from .clock import Clock
from .model import Model, ModelPart
from .modules import ModuleSpec, spec

F32 = NDArray[np.float32]

Uploading = Callable[[str, int, int], None]
"""Called with a part's title, the bytes uploaded so far, and all of them."""

Capturing = Callable[[str], AbstractContextManager[None]]
"""Entered with a part's title while its graph is captured, which takes seconds and happens once."""


@dataclass(frozen=True)
class Placement:
    """The device of each part."""

    text_encoder: Device
    unet: Device
    vae: Device


class PlacedPart:
    """A part on a device. Each combination of module and input shapes is one graph; all share the uploaded weights."""

    def __init__(
        self, part: ModelPart, device: Device, cache: Cache, clock: Clock, uploading: Uploading, capturing: Capturing
    ) -> None:
        self.part, self.device = part, device
        self._cache, self._clock, self._capturing = cache, clock, capturing
        self._weights: dict[str, Weight] = {}
        title = part.part.title
        self._store = WeightStore(
            device, self._weights, lambda done, total: uploading(title, done, total), part.tensors.checkpoint.path
        )
        self._programs: dict[tuple[str, tuple[tuple[int, ...], ...]], Executable] = {}

    @property
    def taken(self) -> tuple[Weight, ...]:
        """The weights that were uploaded."""
        return tuple(self._weights.values())

    def run(self, module: ModuleSpec, **inputs: np.ndarray) -> F32:
        """The module's only output, float32. Raises :class:`CheckpointError` and what the device raises."""
        shapes = tuple(array.shape for array in inputs.values())
        name = (module.digest, shapes)
        if name not in self._programs:
            self._programs[name] = self._prepared(module, inputs)
        (output,) = self._programs[name](**inputs)
        return output.astype(np.float32, copy=False)

    def close(self) -> None:
        """Free what the part has on the device."""
        for program in self._programs.values():
            program.close()
        self._programs.clear()
        self._store.close()

    def _prepared(self, module: ModuleSpec, inputs: Mapping[str, np.ndarray]) -> Executable:
        def capture() -> Lowered:
            with self._capturing(self.part.part.title):
                return captured(module, inputs, self.device, types)

        with self._clock("capture"):
            types = {name: weight.type for name, weight in self.part.tensors.tensors.items()}
            lowered = self._cache.load(
                key(
                    self.device.target,
                    module=module.digest,
                    inputs={name: [str(array.dtype), *array.shape] for name, array in inputs.items()},
                    types={name: stored.name for name, stored in types.items()},
                ),
                capture,
            )
        with self._clock("upload"):
            self._weights |= self.part.tensors.take({p.name: p.shape for p in lowered.weights})
            return Executable(lowered, self.device, self._store)


def captured(
    module: ModuleSpec, inputs: Mapping[str, np.ndarray], device: Device, types: Mapping[str, Type]
) -> Lowered:
    """The module's graph for inputs of these shapes and dtypes. Nothing is computed and no weight exists."""
    import torch

    from ..lowering.capture import capture, without_weights
    from ..lowering.lower import lower

    with without_weights():
        built, call = module.build()
    examples = {
        name: torch.empty(array.shape, dtype=getattr(torch, str(array.dtype)), device="meta")
        for name, array in inputs.items()
    }
    return lower(capture(built.eval(), examples, call), device.target, types)


@dataclass
class PlacedModel:
    """A model with its parts on devices: :class:`sdrpc.diffusion.pipeline.Parts`. Close it when done."""

    model: Model
    placement: Placement
    clock: Clock
    cache: Cache = field(default_factory=Cache)
    uploading: Uploading = lambda *_: None
    capturing: Capturing = lambda _: nullcontext()

    def __post_init__(self) -> None:
        def placed(part: ModelPart, device: Device) -> PlacedPart:
            return PlacedPart(part, device, self.cache, self.clock, self.uploading, self.capturing)

        self._text_encoder = placed(self.model.text_encoder, self.placement.text_encoder)
        self._unet = placed(self.model.unet, self.placement.unet)
        self._vae = placed(self.model.vae, self.placement.vae)
        self._unet_module, self._vae_module = spec(self.model.unet), spec(self.model.vae)

    @property
    def token_length(self) -> int:
        return int(self.model.text_encoder.config["max_position_embeddings"])

    @property
    def latent_channels(self) -> int:
        return int(self.model.unet.config["in_channels"])

    @property
    def scaling_factor(self) -> float:
        return self.model.scaling_factor

    @property
    def prediction(self) -> str:
        return self.model.prediction

    def encode(self, ids: NDArray[np.int32], clip_skip: int) -> F32:
        return self._text_encoder.run(spec(self.model.text_encoder, clip_skip), ids=ids)

    def predict(self, latents: F32, timestep: F32, context: F32) -> F32:
        return self._unet.run(self._unet_module, latents=latents, timestep=timestep, context=context)

    def decode(self, latents: F32) -> F32:
        return self._vae.run(self._vae_module, latents=latents)

    def unused(self) -> dict[str, list[str]]:
        """Per file, the names of the tensors that no part uses; complete once a picture was drawn."""
        parts = (self._text_encoder, self._unet, self._vae)
        found = self.model.unused([weight for part in parts for weight in part.taken])
        return {str(path): names for path, names in found.items()}

    def close(self) -> None:
        """Free everything on the devices."""
        for part in (self._text_encoder, self._unet, self._vae):
            part.close()

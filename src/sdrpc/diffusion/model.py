"""A model as the files that a user named: its parts, their configurations, and whether they belong together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.checkpoint import Checkpoint, open_checkpoint
from ..errors import CheckpointError, UsageError
from ..ggml.weight import Weight
from . import config, names
from .names import Part, PartTensors


@dataclass(frozen=True)
class ModelFiles:
    """Where the parts of a model are: one file with all of them, and files of single parts that go before it."""

    model: Path | None = None
    diffusion_model: Path | None = None
    vae: Path | None = None
    clip_l: Path | None = None


@dataclass(frozen=True)
class ModelPart:
    """A part with the arguments that its module in diffusers or transformers is made with (JSON values only)."""

    tensors: PartTensors
    config: Mapping[str, Any]

    @property
    def part(self) -> Part:
        return self.tensors.part


@dataclass(frozen=True)
class Model:
    """An SD 1.x model. ``prediction``: ``eps`` or ``v``; ``scaling_factor``: the VAE's latents over the UNet's."""

    text_encoder: ModelPart
    unet: ModelPart
    vae: ModelPart
    prediction: str
    scaling_factor: float
    checkpoints: tuple[Checkpoint, ...]

    @property
    def parts(self) -> tuple[ModelPart, ...]:
        return self.text_encoder, self.unet, self.vae

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels of the pictures that the model was trained on."""
        sample_size = self.unet.config["sample_size"]
        height, width = sample_size if isinstance(sample_size, list) else (sample_size, sample_size)
        pixels = 2 ** (len(self.vae.config["block_out_channels"]) - 1)  # of a latent: each level but one halves
        return width * pixels, height * pixels

    def unused(self, taken: Iterable[Weight]) -> dict[Path, list[str]]:
        """Per file, the names of tensors that belong to no part, when ``taken`` are the weights in use."""
        ours = {weight.name for weight in taken}.union(*(part.tensors.idle for part in self.parts))
        found = {file.path: sorted({*file.tensors, *file.skipped} - ours) for file in self.checkpoints}
        return {path: unused for path, unused in found.items() if unused}


def open_model(files: ModelFiles) -> Model:
    """The model in the named files, which are mapped and not read.

    Raises :class:`CheckpointError` for files that can't be used or don't belong together, and :class:`UsageError` when
    a part is in none of them.
    """
    separate = {names.UNET: files.diffusion_model, names.VAE: files.vae, names.TEXT_ENCODER: files.clip_l}
    opened = {path: _opened(path) for path in (files.model, *separate.values()) if path is not None}
    found = {part: _found(part, path, files.model, opened) for part, path in separate.items()}
    said = {part: config.file_config(tensors.checkpoint) for part, tensors in found.items()}

    def model_part(part: Part, infer: Callable[[PartTensors, config.Arguments], dict[str, Any]]) -> ModelPart:
        return ModelPart(found[part], infer(found[part], said[part].parts.get(part.name, {})))

    scaling = said[names.VAE].scaling_factor
    model = Model(
        model_part(names.TEXT_ENCODER, config.text_encoder_config),
        model_part(names.UNET, config.unet_config),
        model_part(names.VAE, config.vae_config),
        said[names.UNET].prediction,
        config.SCALING_FACTOR if scaling is None else scaling,
        tuple(opened.values()),
    )
    _check_joints(model)
    return model


def _opened(path: Path) -> Checkpoint:
    checkpoint = open_checkpoint(path)
    config.refuse_strangers(checkpoint)
    return checkpoint


def _found(part: Part, own: Path | None, whole: Path | None, opened: Mapping[Path, Checkpoint]) -> PartTensors:
    path = own if own is not None else whole
    if path is None:
        raise UsageError(f"no {part.title}: give a whole model with -m, or this part with {part.option}")
    tensors = names.find(part, opened[path])
    if tensors is None:
        hint = f"; give it with {part.option}" if own is None else ""
        raise CheckpointError(path, f"has no {part.title} of the SD 1.x family{hint}")
    return tensors


def _check_joints(model: Model) -> None:
    """Whether what one part gives is what the next one takes."""
    text, unet, vae = model.parts
    for one, gives, other, takes in (
        (text, text.config["hidden_size"], unet, unet.config["cross_attention_dim"]),
        (unet, unet.config["out_channels"], unet, unet.config["in_channels"]),
        (unet, unet.config["out_channels"], vae, vae.config["latent_channels"]),
    ):
        if gives != takes:
            reason = f"its {one.part.title} gives {gives} channels, but the {other.part.title} takes {takes}"
            raise CheckpointError(one.tensors.checkpoint.path, reason)

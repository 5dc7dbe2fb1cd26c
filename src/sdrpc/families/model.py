"""A model as the files that a user named: its family, its components, and whether they belong together."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ..checkpoints.checkpoint import PIECES, WHOLE, Checkpoint, open_checkpoint
from ..errors import CheckpointError, InvalidValue, MissingComponent
from ..ggml.weight import Weight
from ..prompts import gguf_tokenizer, sentencepiece_tokenizer, tokenizer_from, whole_tokenizer
from .base import Colours, Component, Config, Defaults, Family, Found, Joint, ModuleSpec, find
from .components.tiny_autoencoder import TAESD
from .configs import Told, told_by
from .qwen_image import QWEN_IMAGE
from .registry import FAMILIES, GO_WITH, STRANGERS
from .weight_types import AS_STORED, WeightTypes, names_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelFiles:
    """Where the components of a model are: one file or directory with all of them, and files of single components,
    which go before it. The fields have the names of sd-cli's options. ``types``: in which types their weights are
    used, where that is not as they are. ``qwen_image_zero_cond_t``: that the diffusion model is Qwen-Image-Edit 2511,
    where its file does not say so: pictures that it is shown have the timestep 0."""

    model: Path | None = None
    diffusion_model: Path | None = None
    high_noise_diffusion_model: Path | None = None
    vae: Path | None = None
    clip_l: Path | None = None
    clip_g: Path | None = None
    t5xxl: Path | None = None
    llm: Path | None = None
    llm_vision: Path | None = None
    clip_vision: Path | None = None
    connectors: Path | None = None
    audio_vae: Path | None = None
    vocoder: Path | None = None
    taesd: Path | None = None
    control_net: Path | None = None
    types: WeightTypes = AS_STORED
    qwen_image_zero_cond_t: bool = False

    def of(self, component: Component) -> Path | None:
        """The component's own file."""
        path: Path | None = getattr(self, component.option)
        return path

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The fields that are files."""
        return tuple(entry.name for entry in fields(cls) if entry.name not in _BESIDE)

    @property
    def beside(self) -> dict[str, Any]:
        """The fields that are no files."""
        return {name: getattr(self, name) for name in _BESIDE}

    @property
    def named(self) -> dict[str, Path]:
        """The files that were named, by field."""
        paths = {name: getattr(self, name) for name in self.names()}
        return {name: path for name, path in paths.items() if path is not None}


_BESIDE = ("types", "qwen_image_zero_cond_t")


@dataclass(frozen=True)
class ModelComponent:
    """A component with the arguments that its module is made with."""

    found: Found
    config: Config

    @property
    def name(self) -> str:
        return self.found.component.name

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that its file brings along: a GGUF file's entries, a tensor, or a directory's tokenizer.json;
        None where there is none of these. Raises :class:`CheckpointError` for one that can't be read."""
        checkpoint, folder = self.found.checkpoint, self.found.component.told_as.replace("text_encoder", "tokenizer")
        brought = checkpoint.tokenizers.get(folder, checkpoint.tokenizers.get(""))
        if brought is None:
            return None
        if brought.entries is not None:
            return gguf_tokenizer(checkpoint.path, brought.entries())
        if (pieces := brought.tensor(PIECES)) is not None:
            return sentencepiece_tokenizer(checkpoint.path, bytes(pieces.data()))
        if (whole := brought.tensor(WHOLE)) is not None:
            return whole_tokenizer(checkpoint.path, bytes(whole.data()))
        file = brought.files.get("tokenizer.json")
        return None if file is None else tokenizer_from(file)

    @property
    def blocks(self) -> int:
        """How many blocks compute one after the other (:mod:`.blocks`); 0: it is not made of such."""
        return sum(int(self.config[count]) for count in self.found.component.blocks.values())

    def module(self, **options: Any) -> ModuleSpec:
        """Its module; ``options`` are added to its configuration."""
        return ModuleSpec(self.found.component, {**self.config, **options}) if options else self._plain

    @cached_property
    def _plain(self) -> ModuleSpec:
        """Without options. Each step asks for it, and for its digest."""
        return ModuleSpec(self.found.component, self.config)


@dataclass(frozen=True)
class Model:
    """A model whose files belong together. ``components``: by name, in the order in which they work. ``defaults``: what
    a request means where it says nothing."""

    family: Family
    components: Mapping[str, ModelComponent]
    defaults: Defaults
    scale: float
    shift: float
    colours: Colours | None
    checkpoints: tuple[Checkpoint, ...]

    @property
    def configs(self) -> dict[str, Config]:
        """Of the components, by name."""
        return {name: component.config for name, component in self.components.items()}

    def __getitem__(self, component: str) -> ModelComponent:
        return self.components[component]

    @property
    def pixels(self) -> int:
        """Pixels on a side that a latent stands for."""
        return self.family.autoencoder.pixels(self["vae"].config)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels of the pictures that the model was trained on."""
        latents = self["diffusion"].config.get("sample_size")
        if latents is None:
            size = self.defaults.size
            return (size, size) if isinstance(size, int) else size
        height, width = latents if isinstance(latents, list) else (latents, latents)
        return width * self.pixels, height * self.pixels

    @property
    def is_told_guidance(self) -> bool:
        """Whether its diffusion model was distilled with guidance, and so is told how much."""
        config = self["diffusion"].config
        return bool(config.get("guidance_embeds") or config.get("time_cond_proj_dim"))

    @property
    def latent_channels(self) -> int:
        return self.family.autoencoder.channels(self["vae"].config)

    @property
    def frames(self) -> int:
        """Frames of a film that a latent one stands for, but for the first, which is one; 0 where it draws no films."""
        return self.family.autoencoder.frames(self["vae"].config) if self.family.latents.films else 0

    def together(self, video: bool) -> int:
        """How many frames are drawn together behind the first one; 0 for pictures (not ``video``). Raises
        :class:`InvalidValue` where the model draws no films."""
        if video and not self.frames:
            raise InvalidValue("mode", "vid_gen", f"{self.family.title} draws pictures, no films")
        return self.frames if video else 0

    def unused(self, taken: Iterable[Weight]) -> dict[Path, list[str]]:
        """Per file, the names of tensors that belong to no component, when ``taken`` are the weights in use. Of a
        component that was not needed, such as what decodes sound, nobody knows."""
        used = {weight.name for weight in taken}
        ours = set(used)
        for component in self.components.values():
            kind, tensors = component.found.component, component.found.tensors
            needed = any(weight.name in used for weight in tensors.values())
            idle = (*kind.idle, *kind.sometimes) if needed else ("",)
            ours.update(weight.name for name, weight in tensors.items() if name.startswith(idle))
        found = {file.path: sorted({*file.tensors, *file.skipped} - ours) for file in self.checkpoints}
        return {path: unused for path, unused in found.items() if unused}


def open_model(files: ModelFiles) -> Model:
    """The model in the named files, which are mapped and not read.

    Raises :class:`CheckpointError` for files that can't be used or don't belong together, and
    :class:`MissingComponent` when a component is in none of them.
    """
    opened = {path: open_checkpoint(path) for path in dict.fromkeys(files.named.values())}
    family, diffusion = _family(files, opened)
    found = {"diffusion": diffusion}
    for component in family.components:
        if component.name != "diffusion" and not _left_out(component, family, files, opened):
            found[component.name] = _component(component, family, files, opened)
    found = {name: _retyped(each, files.types) for name, each in found.items()}
    told = {name: told_by(each.checkpoint) for name, each in found.items()}
    _check_zero_cond_t(files, family)
    asked = {"diffusion": {"zero_cond_t": True}} if files.qwen_image_zero_cond_t else {}
    components = {
        c.name: ModelComponent(
            found[c.name],
            c.configure(found[c.name], {**told[c.name].components.get(c.told_as, {}), **asked.get(c.name, {})}),
        )
        for c in family.components
        if c.name in found
    }
    if files.taesd is not None:
        tiny = _retyped(_component(TAESD, family, files, opened), files.types)
        components[TAESD.name] = ModelComponent(tiny, TAESD.configure(tiny, {}))
    _warn_of_idle_files(files, family, components)
    files.types.warn_of_idle_rules(
        (weight.name, *names_of(weight, name, one.found.component.prefixes))
        for name, one in components.items()
        for weight in one.found.tensors.values()
    )
    model = Model(
        family,
        components,
        _defaults(family.settings(found), told["diffusion"]),
        _or(told["vae"].scaling_factor, family.latents.scale),
        _or(told["vae"].shift_factor, family.latents.shift),
        told["vae"].colours or family.latents.colours,
        tuple(opened.values()),
    )
    _check_joints(model)
    own = told["vae"].colours
    if own is not None and len(own.factors) != model.latent_channels:
        reason = f"has latent_rgb_factors of {len(own.factors)} channels, but its latents have {model.latent_channels}"
        raise CheckpointError(found["vae"].checkpoint.path, reason)
    return model


def _warn_of_idle_files(files: ModelFiles, family: Family, components: Collection[str]) -> None:
    """Say which files of single components the model has no use for."""
    used = {component.option for component in (*family.components, TAESD) if component.name in components}
    for name, path in files.named.items():
        if name not in used | {"model", "diffusion_model"}:
            log.warning("%s: %s has no use for it (%s)", path, family.title, name)


def _check_zero_cond_t(files: ModelFiles, family: Family) -> None:
    if files.qwen_image_zero_cond_t and family.name != QWEN_IMAGE.name:
        reason = f"is for Qwen-Image-Edit 2511; this is {family.title}"
        raise InvalidValue("qwen_image_zero_cond_t", True, reason)


def _retyped(found: Found, types: WeightTypes) -> Found:
    """A component whose weights are made into the types that the user wants."""
    if types == AS_STORED:
        return found
    name, prefixes = found.component.name, found.component.prefixes
    once = {id(weight): weight for weight in found.tensors.values()}  # some have two names
    made = {key: types.applied(weight, *names_of(weight, name, prefixes)) for key, weight in once.items()}
    return replace(found, tensors={key: made[id(weight)] for key, weight in found.tensors.items()})


def _or(said: float | None, otherwise: float) -> float:
    return otherwise if said is None else said


def _defaults(defaults: Defaults, told: Told) -> Defaults:
    """What the family says, or the file where it says something else."""
    if told.prediction is not None:
        defaults = replace(defaults, prediction=told.prediction)
    return defaults


def _family(files: ModelFiles, opened: Mapping[Path, Checkpoint]) -> tuple[Family, Found]:
    """The family of the diffusion model, which is told from its tensors."""
    path = files.diffusion_model or files.model
    if path is None:
        raise MissingComponent("diffusion_model", "no diffusion model", "model")
    checkpoint = opened[path]
    for family in FAMILIES:
        diffusion = find(family.diffusion, checkpoint)
        if diffusion is not None and family.recognizes(diffusion):
            return family, diffusion
    raise CheckpointError(path, _not_a_diffusion_model(checkpoint))


def _not_a_diffusion_model(checkpoint: Checkpoint) -> str:
    names = [*checkpoint.tensors, *checkpoint.skipped]
    known = ", ".join(family.title for family in FAMILIES)
    for pattern, title in STRANGERS:
        if re.search(pattern, "\n".join(names)):
            instead = f"it goes with a model, by {GO_WITH[title]}" if title in GO_WITH else f"it draws with {known}"
            return f"this is {title}, which sdrpc does not draw with; {instead}"
    seen = seen_in(checkpoint)
    if seen:
        what = " and ".join(f"{component.title} ({component.name})" for component in seen)
        return f"has no diffusion model; what it has: {what}"
    listed = ", ".join(repr(name) for name in names[:3])
    return f"has no diffusion model of a known family ({known}); its tensors begin with {listed or 'none at all'}"


def seen_in(checkpoint: Checkpoint) -> list[Component]:
    """The known components that a file has, each name once: of several that look alike, the one known longest."""
    components: dict[str, Component] = {}
    for component in (each for family in FAMILIES for each in family.components):
        if component.name not in components and find(component, checkpoint) is not None:
            components[component.name] = component
    return list(components.values())


def _left_out(component: Component, family: Family, files: ModelFiles, opened: Mapping[Path, Checkpoint]) -> bool:
    """Whether the model does without the component: no file of its own was named, and no other one has it."""
    if component.name not in family.optional or files.of(component) is not None:
        return False
    return _found_elsewhere(component, family, files, opened) is None


def _found_elsewhere(
    component: Component, family: Family, files: ModelFiles, opened: Mapping[Path, Checkpoint]
) -> Found | None:
    """The component in the file of one that it may be within, or in the file of all; None where neither has it."""
    host = files.of(family.component(component.within)) if component.within else None
    found = None if host is None else find(component, opened[host])
    if found is None and files.model is not None:
        found = find(component, opened[files.model], alone=False)
    return found


def _component(component: Component, family: Family, files: ModelFiles, opened: Mapping[Path, Checkpoint]) -> Found:
    own = files.of(component)
    found = _found_elsewhere(component, family, files, opened) if own is None else find(component, opened[own])
    if found is not None:
        return found
    if own is None and files.model is None:
        raise MissingComponent(component.option, f"no {component.title}, which {family.title} needs", "model")
    if own is None:
        raise MissingComponent(component.option, f"{files.model}: has no {component.title}, which {family.title} needs")
    seen = seen_in(opened[own])
    what = " and ".join(f"{other.title} ({other.name})" for other in seen) or "none that sdrpc knows"
    raise CheckpointError(own, f"has no {component.title}, which {family.title} needs; what it has: {what}")


def _tiny_joint(model: Model) -> tuple[Joint, ...]:
    """That a tiny autoencoder, if there is one, decodes the model's latents."""
    if TAESD.name not in model.components:
        return ()
    return (Joint(TAESD.name, lambda c: c[TAESD.name]["latent_channels"], "vae", lambda _: model.latent_channels),)


def _check_joints(model: Model) -> None:
    """Whether what one component gives is what the next one takes; not of those that were left out."""
    configs: dict[str, Any] = {name: component.config for name, component in model.components.items()}
    left_out = model.family.optional - model.components.keys()
    for joint in (*model.family.joints, *_tiny_joint(model)):
        if left_out & {joint.one, joint.other}:
            continue
        gives, takes = joint.gives(configs), joint.takes(configs)
        if gives != takes:
            reason = f"{joint.one} gives {gives} {joint.what}, but {joint.other} takes {takes}"
            blamed = model.components.get(joint.one, model.components[joint.other])
            raise CheckpointError(
                blamed.found.checkpoint.path, f"{reason}: these components do not belong to one {model.family.title}"
            )

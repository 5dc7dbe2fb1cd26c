"""What a model family is: components, how they are found in files, and how a prompt becomes their inputs.

A family's file is a table of these values. Nothing here imports torch: modules are built by functions that are called
only when a graph has to be captured.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ..checkpoints.checkpoint import Checkpoint
from ..errors import CheckpointError
from ..ggml.types import Type
from ..ggml.weight import Before, Weight
from ..prompts.learned import NOTHING, Learned
from .blocks import BLOCKS, Span, spanning

if TYPE_CHECKING:
    import torch
    from torch import nn

    Call = Callable[..., tuple[torch.Tensor, ...]]

F32 = NDArray[np.float32]
Weights = Mapping[str, Weight]
Config = Mapping[str, Any]
"""Arguments of a component's module class: values of JSON."""

Backwards = Callable[[Iterable[str]], dict[str, tuple[str, ...]]]
"""From the names of a module's parameters to those that a file has, each with the parameters that are made of it."""

# Components ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Naming:
    """One way in which files name a component's tensors.

    ``anchor``: a name (without prefix) that only this naming has. ``convert``: from the file's tensors, without their
    prefix, to those of the module, by the names of its parameters; tensors it does not understand are left out.
    ``backwards``: the other way round; None: that of ``convert`` if it has one (:class:`sdrpc.families.keys.Table`).
    """

    anchor: str
    convert: Callable[[Weights], dict[str, Weight]]
    backwards: Backwards | None = None

    def originals(self, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """The names that a file has for parameters with ``names``, each with those that are made of it; none where that
        is not known."""
        backwards: Backwards | None = self.backwards or getattr(self.convert, "originals", None)
        return {} if backwards is None else backwards(names)


IMAGE_SIDE = ("clip_vision", "control", "high_noise_diffusion", "diffusion", "vae", "audio_vae", "vocoder")
"""Names of components that are no text encoders."""

OPTIONS = {
    "diffusion": "diffusion_model", "high_noise_diffusion": "high_noise_diffusion_model", "control": "control_net",
}  # fmt: skip
"""Options for files of single components, where they do not have the component's name."""


@dataclass(frozen=True)
class Component:
    """A network of a model.

    ``name``: what users call it (clip_l, t5xxl, diffusion, vae). ``title``: what it is, for messages. ``prefixes``:
    what may stand before its names in a file, in order of preference. ``configure``: the arguments of its module, from
    the shapes of its tensors and from what the file says of itself. ``build``: the module (parameters uninitialized, as
    the caller arranges it) and a function of its inputs; its arguments are a configuration as ``configure`` gives it.
    ``told_as``: how files that speak of their own configuration call the component; the folder of a diffusers
    directory. ``idle``: beginnings of names of tensors that no picture needs; ``sometimes``: of those that some need.
    ``whole``: what stands before its names in a file of all components, from the names there, where that is not to be
    told as in a file of its own. ``within``: another component whose file may have it as well. ``blocks``: of
    transformers, their module's lists of blocks in the order in which these compute, each with the name of the
    configuration's number of them.
    """

    name: str
    title: str
    prefixes: tuple[str, ...]
    namings: tuple[Naming, ...]
    configure: Callable[[Found, Config], dict[str, Any]]
    build: Callable[[Config], tuple[nn.Module, Call]]
    told_as: str
    idle: tuple[str, ...] = ()
    sometimes: tuple[str, ...] = ()
    whole: Callable[[Collection[str]], tuple[str, ...]] | None = None
    within: str = ""
    blocks: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def option(self) -> str:
        """The field of :class:`sdrpc.families.model.ModelFiles` for a file of its own."""
        return OPTIONS.get(self.name, self.name)


@dataclass(frozen=True, kw_only=True)
class VaeComponent(Component):
    """A component between pictures and latents. Of its configuration: ``channels`` of a latent, ``pixels`` on a side
    that a latent stands for, ``frames`` of a film that each latent one but the first stands for (0: it draws no
    films)."""

    channels: Callable[[Config], int]
    pixels: Callable[[Config], int]
    frames: Callable[[Config], int] = lambda _: 0


@dataclass(frozen=True)
class Found:
    """A component's tensors in a checkpoint, by the names of its module's parameters."""

    component: Component
    checkpoint: Checkpoint
    tensors: Weights

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: weight.shape for name, weight in self.tensors.items()}

    def error(self, reason: str, tensor: str = "") -> CheckpointError:
        """The error that says what is wrong with the file."""
        return CheckpointError(self.checkpoint.path, reason, tensor)

    def shape(self, name: str, dimensions: int) -> tuple[int, ...]:
        """The shape of a tensor that has to be there. Raises :class:`CheckpointError` if it isn't, or has another
        number of dimensions or none of its elements."""
        weight = self.tensors.get(name)
        if weight is None:
            raise self.error(f"the {self.component.title} has no such tensor", name)
        if len(weight.shape) != dimensions or 0 in weight.shape:
            raise self.error(f"is {list(weight.shape)}, not of {dimensions} dimensions", weight.name)
        return weight.shape

    def has(self, prefix: str) -> bool:
        """Whether any name begins with ``prefix``."""
        return any(name.startswith(prefix) for name in self.tensors)

    def count(self, prefix: str) -> int:
        """How many of ``prefix0.``, ``prefix1.`` … there are without a gap."""
        numbers = {name[len(prefix) :].partition(".")[0] for name in self.tensors if name.startswith(prefix)}
        return next(count for count in range(len(numbers) + 1) if str(count) not in numbers)

    def take(self, wanted: Mapping[str, tuple[int, ...]]) -> dict[str, Weight]:
        """The weights of a module whose parameters are ``wanted``, in its shapes.

        Dimensions of one element may be missing or too many: 1×1 convolutions that are stored as matrices, and the
        other way round. Raises :class:`CheckpointError` that names the first tensor that is missing or misshapen.
        """
        taken: dict[str, Weight] = {}
        for name, shape in wanted.items():
            weight = self.tensors.get(name)
            if weight is None:
                raise self.error(self._why_missing(name), name)
            if _squeezed(weight.shape) != _squeezed(shape):
                reason = f"is {list(weight.shape)}, but the rest of the model needs {list(shape)}"
                raise self.error(reason, weight.name)
            taken[name] = replace(weight, shape=shape)
        return taken

    def nbytes(self, held: Callable[[Type], Type] = lambda stored: stored) -> int:
        """Bytes of the weights that pictures need, in the types in which they are ``held``, for those as stored."""
        return sum(held(w.type).row_bytes(prod(w.shape)) for w in self._needed())

    def made_plain(self) -> list[tuple[Weight, Before]]:
        """The weights that pictures need of which plain numbers are made because no type holds what the file has, with
        what that is."""
        return [(weight, weight.before) for weight in self._needed() if weight.before is not None]

    def _needed(self) -> Collection[Weight]:
        idle = self.component.idle
        once = {id(weight): weight for name, weight in self.tensors.items() if not name.startswith(idle)}
        return once.values()  # some have two names

    def _why_missing(self, name: str) -> str:
        for skipped, dtype in self.checkpoint.skipped.items():
            if skipped.rsplit(".", 2)[-2:] == name.rsplit(".", 2)[-2:]:
                return f"is missing; the file has {skipped!r} as {dtype}, which sdrpc can't read: convert it to F16"
        return "is missing"


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def find(component: Component, checkpoint: Checkpoint, alone: bool = True) -> Found | None:
    """The component in a checkpoint, its own or (not ``alone``) one of all components, or None."""
    names = checkpoint.tensors.keys() | checkpoint.skipped.keys()
    prefixes = component.prefixes if alone or component.whole is None else component.whole(names)
    for prefix in prefixes:
        for naming in component.namings:
            if prefix + naming.anchor not in names:
                continue
            inside = {
                name[len(prefix) :]: weight for name, weight in checkpoint.tensors.items() if name.startswith(prefix)
            }
            return Found(component, checkpoint, naming.convert(inside))
    return None


@dataclass(frozen=True)
class ModuleSpec:
    """A component's module with its arguments: plain data that stands for a module without importing its library, so
    that a graph captured from it can be found again by ``digest``."""

    component: Component
    config: Config

    @cached_property
    def digest(self) -> str:
        """Equal for equal functions and arguments."""
        build = self.component.build
        text = json.dumps([build.__module__, build.__qualname__, dict(self.config)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def build(self) -> tuple[nn.Module, Call]:
        """The module and the function of its inputs."""
        config = dict(self.config)
        span = config.pop(BLOCKS, None)
        module, call = self.component.build(config)
        return module, call if span is None else spanning(list(self.component.blocks), call, Span(*span))


# Families ------------------------------------------------------------------------------------------------------------


class Prompt(NamedTuple):
    """A text and what else of a request decides what the diffusion model is told.

    ``width`` and ``height`` in pixels; ``clip_skip`` as sd-cli counts it (1: the last layer, 2: the one before, below
    1: the family's own); ``guidance``: of models that were distilled with it; ``negative``: whether the text says what
    not to draw; ``learned``: its learnt words; ``frames``: pictures of a film, ``fps``: how many of them make a second.
    """

    text: str
    width: int
    height: int
    clip_skip: int
    guidance: float
    negative: bool = False
    learned: Learned = NOTHING
    frames: int = 1
    fps: int = 1


class Encode(Protocol):
    """Runs a text encoder of the model."""

    def __call__(self, component: str, inputs: Mapping[str, NDArray[Any]], **options: Any) -> tuple[F32, ...]:
        """Inputs by name (``ids``: tokens, int32 (1, length)) → the module's outputs. ``options`` are added to its
        configuration: which outputs."""
        ...

    def config(self, component: str) -> Config:
        """The configuration of a component."""
        ...

    def tokenizer(self, component: str) -> Tokenizer | None:
        """The tokenizer that a component's file brings along, or None."""
        ...

    def has(self, component: str) -> bool:
        """Whether the model has a component: those that its family calls optional may be missing."""
        ...

    @property
    def pictures(self) -> tuple[F32, ...]:
        """The pictures that a request refers to, each (1, 3, height, width) of -1 … 1, in the sizes in which text
        encoders see them; none where they see none (:attr:`References.seen`)."""
        ...


Conditions = Mapping[str, F32]
"""The diffusion model's inputs besides latents and timestep, each with a first dimension of 1 (the batch)."""

AROUND = "around"
"""The condition that an inpainting model is given beside its latents: (1, channels, h, w)."""

REFERENCE = "reference_"
"""Conditions of this name and a number (from 0) are the latents of the pictures that a request refers to, (1, c, h, w)
each, in sizes of their own."""

Predict = Callable[[F32, F32, Conditions], F32]
"""A diffusion model: latents (1, c, h, w), timestep (1,), conditions of b prompts → the prediction (b, c, h, w)."""


class Colours(NamedTuple):
    """What latents look like without a network: of each channel red, green and blue, and what is added; -1 … 1."""

    factors: tuple[tuple[float, float, float], ...]
    bias: tuple[float, float, float] = (0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Latents:
    """The space that a family draws in.

    ``scale`` and ``shift``: the diffusion model's latents are (the VAE's - shift) · scale. ``multiple``: width and
    height in pixels are multiples of it, and at least ``least``. ``films``: whether latents have frames. ``colours``:
    of the diffusion model's latents, where they were published. ``sound``: of films of so many frames, so many of which
    make a second, how many latents of sound are drawn with those of pictures, as further frames behind these.
    """

    scale: float
    shift: float = 0.0
    multiple: int = 64
    least: int = 1
    films: bool = False
    colours: Colours | None = None
    sound: Callable[[int, int], int] = lambda _frames, _fps: 0


@dataclass(frozen=True)
class Defaults:
    """What a request means where it says nothing. ``size``: pixels on a side, or width and height, where neither file
    nor shapes tell. ``frames`` and ``fps``: of films. ``moe_boundary``: the level of noise from which on a model of its
    own predicts, where there is one. ``prediction``: None where only an evaluation tells (:attr:`Family.probe`).
    ``flow_shift``: None where the prediction has none or it follows from the size."""

    size: int | tuple[int, int]
    sampler: str = "euler_a"
    scheduler: str | None = None
    steps: int = 20
    cfg_scale: float = 7.0
    guidance: float = 3.5
    prediction: str | None = "eps"
    flow_shift: float | None = None
    frames: int = 1
    fps: int = 16
    moe_boundary: float = 0.875


class Joint(NamedTuple):
    """Two numbers that have to be equal for components to belong together: what ``one`` gives and ``other`` takes."""

    one: str
    gives: Callable[[Mapping[str, Config]], int]
    other: str
    takes: Callable[[Mapping[str, Config]], int]
    what: str = "channels"


@dataclass(frozen=True)
class Inpainting:
    """How inpainting models are shown what is around a mask, as the condition :data:`AROUND`.

    ``takes``: whether a diffusion model is one, from its configuration. ``around``: a mask (1, 1, height, width) of
    pixels, 1 where it is drawn anew, and the latents of the picture without what is there → the condition.
    """

    takes: Callable[[Config], bool]
    around: Callable[[F32, F32], F32]


CONTROL = "control_"
"""What the names of the diffusion model's inputs begin with that come from a ControlNet; their numbers follow."""


@dataclass(frozen=True)
class Controls:
    """How a family's ControlNets work, each from the ControlNet's configuration.

    ``reads``: those inputs of the diffusion model that it has as well. ``latents``: whether it is shown a picture as
    the VAE's latents, and not as pixels of 0 … 1. ``kinds``: how many kinds of pictures it tells apart by a number
    (``mode``), 0 where it knows one. ``options``: what the diffusion model's configuration gets for what it gives.
    """

    reads: Callable[[Config], Collection[str]]
    latents: Callable[[Config], bool] = lambda _: False
    kinds: Callable[[Config], int] = lambda _: 0
    options: Callable[[Config], dict[str, Any]] = lambda _: {}


Resize = Callable[[int, int], tuple[int, int]]
"""From a picture's width and height in pixels to those that it is scaled to."""


@dataclass(frozen=True)
class References:
    """How diffusion models are shown the pictures that a request refers to, as conditions called :data:`REFERENCE`.

    ``multiple``: width and height in pixels of what the VAE encodes are multiples of it. ``seen``: of what text
    encoders see of a picture, if they see any, by the component ``needs``. ``drawn``: of what is drawn where a request
    doesn't say, from the last picture; None: as without pictures.
    """

    multiple: int = 16
    seen: Resize | None = None
    needs: str = ""
    drawn: Resize | None = None


class EncodeFilm(Protocol):
    """What a model of films has for the pictures that a request begins and ends with: its VAE, and what sees them."""

    def __call__(self, first: F32, last: F32 | None, frames: int) -> F32:
        """A film of so many frames, grey but for the first and, if it is given, the last (1, 3, height, width) of
        -1 … 1 → latents of the diffusion model (1, c, frames, h, w)."""
        ...

    def see(self, component: str, side: int) -> F32:
        """What a component makes of the first picture and, behind it, of the last one if there is one, each cut and
        scaled to a square of ``side`` pixels: (1, tokens, width)."""
        ...


Configs = Mapping[str, Config]
"""Of components, by name."""


@dataclass(frozen=True)
class Begun:
    """How diffusion models are shown the pictures that a film begins and ends with.

    ``check``: raises :class:`InvalidValue` for what a model can't do: its configurations, the number of frames, whether
    there is a first picture and a last one. ``takes``: whether it is shown a first picture at all, for films of so many
    frames. ``conditions``: what it is told, from its configurations, the pictures and the number of frames.
    """

    check: Callable[[Configs, int, bool, bool], None]
    takes: Callable[[Configs, int], bool]
    conditions: Callable[[EncodeFilm, Configs, F32, F32 | None, int], Conditions]


@dataclass(frozen=True)
class Family:
    """A kind of model.

    ``components``: in the order in which they work, the diffusion model and the VAE last. ``recognizes``: whether a
    diffusion model belongs to the family, from its tensors. ``conditions``: what the diffusion model is told about
    a prompt. ``settings``: the defaults of one model, from its tensors. ``aligned``: which of Align Your Steps'
    published schedules is the family's. ``probe``: what a diffusion model predicts, from an evaluation and its
    configuration, where nothing else tells. ``optional``: names of components that may be missing. ``learns``: text
    encoders that know learnt words (textual inversion). ``references``: of families whose models can be shown
    pictures. ``inpainting``: of families with models that are made for it. ``controls``: of families with ControlNets.
    ``skips_clip``: whether CLIP's last layers can be left out. ``skips_layers``: whether the diffusion model has the
    option ``skip_layers``, numbers of blocks that it leaves out. ``tempered``: what becomes of a guided prediction,
    from it and the one with the prompt alone. ``begun``: of families with models that make films of pictures.
    ``betas``: the first and the last one of models that were trained with evenly spaced ones; None: Stable Diffusion's.
    """

    name: str
    title: str
    components: tuple[Component, ...]
    recognizes: Callable[[Found], bool]
    conditions: Callable[[Encode, Prompt], Conditions]
    latents: Latents
    settings: Callable[[Mapping[str, Found]], Defaults]
    joints: tuple[Joint, ...] = ()
    aligned: str | None = None
    probe: Callable[[Predict, Config], str] | None = None
    optional: frozenset[str] = frozenset()
    learns: tuple[str, ...] = ()
    references: References | None = None
    inpainting: Inpainting | None = None
    controls: Controls | None = None
    skips_clip: bool = False
    skips_layers: bool = False
    tempered: Callable[[F32, F32], F32] | None = None
    begun: Begun | None = None
    betas: tuple[float, float] | None = None

    @property
    def diffusion(self) -> Component:
        return self.component("diffusion")

    @property
    def autoencoder(self) -> VaeComponent:
        return next(component for component in self.components if isinstance(component, VaeComponent))

    def component(self, name: str) -> Component:
        return next(component for component in self.components if component.name == name)

    @property
    def text_encoders(self) -> tuple[Component, ...]:
        return tuple(c for c in self.components if c.name not in IMAGE_SIDE)


def joined(parts: Iterable[F32]) -> F32:
    """Chunks (1, length, width) one after the other along their length."""
    return np.concatenate(list(parts), axis=1)

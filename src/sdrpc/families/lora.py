"""Which parameters of a model a LoRA file changes.

Trainers name layers as the original code, diffusers or transformers do, with dots or with underscores for dots, behind
one of several beginnings. All of that follows from a model's components: the names that their files may have
(:meth:`sdrpc.families.base.Naming.originals`), and how each of these becomes parameters. What is added to a matrix that
is several parameters (queries, keys and values in one) is cut as the matrix is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from ..checkpoints import lora_file
from ..checkpoints.checkpoint import open_checkpoint
from ..checkpoints.deltas import Delta, Difference, LowRank
from ..errors import CheckpointError
from ..ggml.types import F32
from ..ggml.weight import Weight, Whole
from .base import Component, Found, Naming
from .keys import same
from .model import Model

_BEGINNINGS = re.compile(r"^(?:base_model_model_|lycoris_|lora_)+")

Changes = Mapping[str, Delta]
"""By the names of a module's parameters."""


@dataclass(frozen=True, eq=False)
class Lora:
    """A LoRA file on a model. ``components``: what it changes, by component. ``unknown``: what in the file belongs to
    no layer of the model."""

    path: Path
    components: Mapping[str, Changes]
    unknown: tuple[str, ...]


def open_lora(path: Path, model: Model) -> Lora:
    """The LoRA at ``path`` on ``model``; nothing is read but shapes and factors.

    Raises :class:`CheckpointError` for a file that is no LoRA, that is made for another kind of model, or whose
    tensors do not fit the model's.
    """
    file = lora_file.read(open_checkpoint(path))
    if not file.layers and not file.biases:
        listed = ", ".join(repr(name) for name in file.unknown[:3])
        raise CheckpointError(path, f"is no LoRA: none of its tensors adds to a layer (they begin with {listed})")
    layers = {name: ("weight", delta) for name, delta in file.layers.items()}
    biases = {f"{name} ": ("bias", delta) for name, delta in file.biases.items()}
    changed = {"diffusion", *(encoder.name for encoder in model.family.text_encoders)}
    spellings = {n: _spellings(c.found) for n, c in model.components.items() if n in changed}
    found: dict[str, dict[Naming, dict[str, Delta]]] = {}
    unknown = list(file.unknown)
    for name, (kind, delta) in (layers | biases).items():
        place = _place(name.strip(), kind, spellings)
        if place is None:
            unknown.append(name.strip())
        else:
            component, naming, original = place
            found.setdefault(component, {}).setdefault(naming, {})[original] = delta
    missed = len(unknown) - len(file.unknown)
    if 2 * missed > len(layers) + len(biases):
        listed = ", ".join(repr(name) for name in unknown[len(file.unknown) :][:3])
        reason = f"is a LoRA for another kind of model: {missed} of its {len(layers)} layers are none of this"
        raise CheckpointError(path, f"{reason} {model.family.title}'s ({listed} …)")
    components = {
        name: {
            parameter: change
            for naming, changes in by_naming.items()
            for parameter, change in _converted(model[name].found, naming, changes, path).items()
        }
        for name, by_naming in found.items()
    }
    return Lora(path, components, tuple(unknown))


# Names ----------------------------------------------------------------------------------------------------------------

_OWN = Naming("", same, lambda names: {name: (name,) for name in names})
"""The module's own names."""

Spellings = Mapping[str, tuple[Naming, str]]
"""A tensor's name with underscores for dots, behind any beginning → the naming that it belongs to, and the name."""


def _spellings(found: Found) -> Spellings:
    spelled: dict[str, tuple[Naming, str]] = {}
    beginnings = [_flat(beginning) for beginning in _beginnings(found.component)]
    for naming in (_OWN, *found.component.namings):
        for original in naming.originals(found.tensors):
            for beginning in beginnings:
                spelled.setdefault(beginning + _flat(original), (naming, original))
    return spelled


def _beginnings(component: Component) -> Iterator[str]:
    """What stands before a layer's name in LoRA files: what files of models have, and trainers' own."""
    yield from (prefix for prefix in component.prefixes if prefix)
    yield f"{component.told_as}."
    if component.name == "diffusion":
        yield from ("unet.", "transformer.", "diffusion_model.", "")
        return
    number = component.told_as.removeprefix("text_encoder").removeprefix("_") or "1"
    yield f"te{number}."
    if number == "1":
        yield "te."
    if component.name == "t5xxl":
        yield "te3."  # kohya's number for it in every family


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _place(layer: str, kind: str, spellings: Mapping[str, Spellings]) -> tuple[str, Naming, str] | None:
    """The component, the naming and the name in it of a layer's weight or bias."""
    flat = _flat(layer)
    for start in dict.fromkeys((flat, _BEGINNINGS.sub("", flat))):
        for end in (f"_{kind}", f"_0_{kind}"):  # old files of diffusers say to_out for to_out.0
            for component, spelled in spellings.items():
                if place := spelled.get(start + end):
                    return component, *place
    return None


# Shapes ---------------------------------------------------------------------------------------------------------------


def _converted(found: Found, naming: Naming, changes: Mapping[str, Delta], path: Path) -> dict[str, Delta]:
    """Changes by the names of ``naming`` as changes of the module's parameters.

    A file of that naming is imagined in which what has rows is the change, and converted as the model's is.
    """
    stand_ins = {
        original: _rows(changes[original], original) if original in changes else _empty(original, parts, found)
        for original, parts in naming.originals(found.tensors).items()
    }
    converted: dict[str, Delta] = {}
    for parameter, part in naming.convert(stand_ins).items():
        if part.name in changes and parameter in found.tensors:
            change = changes[part.name]
            whole = replace(change, up=part) if isinstance(change, LowRank) else replace(change, tensor=part)
            converted[parameter] = _fitting(whole, found.tensors[parameter], parameter, path)
    return converted


def _rows(change: Delta, original: str) -> Weight:
    """What of a change has the weight's rows."""
    rows = change.up if isinstance(change, LowRank) else change.tensor
    return replace(rows, name=original)


def _empty(original: str, parts: tuple[str, ...], found: Found) -> Weight:
    """A tensor of one column that nobody reads, for a weight that does not change."""
    shapes = [found.tensors[part].shape for part in parts if part in found.tensors]
    rows = sum(shape[0] for shape in shapes if shape)
    shape = (rows,) if shapes and len(shapes[0]) == 1 else (rows, 1)
    return Weight(original, F32, shape, Whole(lambda: b""))


def _fitting(change: Delta, weight: Weight, parameter: str, path: Path) -> Delta:
    """The change with the weight's own dimensions. Raises :class:`CheckpointError` where it has others."""
    rows, *columns = weight.shape or (0,)
    if isinstance(change, LowRank):
        given, rank = change.up.shape[0], change.down.shape[0]
        fits = change.up.shape == (rows, rank) and prod(change.down.shape[1:]) == prod(columns)
        shape: tuple[int, ...] = (given, *change.down.shape[1:])
    else:
        shape = change.tensor.shape
        fits = bool(shape) and shape[0] == rows and prod(shape) == prod(weight.shape)
    if not fits:
        reason = (
            f"is a LoRA for another model: it adds {list(shape)} to {parameter}, which is {list(weight.shape)} here"
        )
        raise CheckpointError(path, reason)
    if isinstance(change, Difference):
        return replace(change, tensor=replace(change.tensor, shape=weight.shape))
    return replace(change, down=_shaped(change.down, (change.down.shape[0], *columns)))


def _shaped(down: Weight, shape: tuple[int, ...]) -> Weight:
    """``down`` itself where it has the shape already, so that parameters that share it go on sharing it."""
    return down if down.shape == shape else replace(down, shape=shape)

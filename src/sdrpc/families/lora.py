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
from typing import NamedTuple

from ..checkpoints import lora_file
from ..checkpoints.checkpoint import open_checkpoint
from ..checkpoints.deltas import Delta, Difference, LowRank, Product
from ..checkpoints.dora import Magnitude, Part, with_columns, with_rows
from ..checkpoints.expressions import reshape
from ..errors import CheckpointError
from ..ggml.types import F32
from ..ggml.weight import Weight, Whole
from .base import Component, Found, Naming
from .keys import same
from .model import Model

_BEGINNINGS = re.compile(r"^(?:base_model_model_|lycoris_|lora_)+")

Changes = Mapping[str, tuple[Delta, ...]]
"""By the names of a module's parameters."""


class _Layer(NamedTuple):
    """What a file adds to a tensor of a model's file and, if it is a DoRA, the lengths that rows or columns get."""

    product: Product
    magnitude: Magnitude | None = None


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
    layers = {name: ("weight", _Layer(product, file.magnitudes.get(name))) for name, product in file.layers.items()}
    biases = {f"{name} ": ("bias", _Layer(product)) for name, product in file.biases.items()}
    changed = {"diffusion", *(encoder.name for encoder in model.family.text_encoders)}
    spellings = {n: _spellings(c.found) for n, c in model.components.items() if n in changed}
    found: dict[str, dict[Naming, dict[str, _Layer]]] = {}
    unknown = list(file.unknown)
    for name, (kind, layer) in (layers | biases).items():
        place = _place(name.strip(), kind, spellings)
        if place is None:
            unknown.append(name.strip())
        else:
            component, naming, original = place
            found.setdefault(component, {}).setdefault(naming, {})[original] = layer
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


def _converted(found: Found, naming: Naming, layers: Mapping[str, _Layer], path: Path) -> Changes:
    """Changes by the names of ``naming`` as changes of the module's parameters."""
    rows = {original: _rows(layer.product) for original, layer in layers.items()}
    parts: dict[str, dict[str, Part]] = {original: {} for original in layers}
    for parameter, (original, part) in _cut(found, naming, rows).items():
        weight, product = found.tensors[parameter], layers[original].product
        whole = replace(product, up=part) if isinstance(product, LowRank) else replace(product, tensor=part)
        parts[original][parameter] = weight, _fitting(whole, weight, parameter, path)
    magnitudes = {original: layer.magnitude for original, layer in layers.items() if layer.magnitude}
    by_row = {name: reshape(m.lengths, (*m.lengths.shape, 1)) for name, m in magnitudes.items() if not m.of_columns}
    lengths = {parameter: part for parameter, (_, part) in _cut(found, naming, by_row).items()}
    converted: dict[str, tuple[Delta, ...]] = {}
    for original, inside in parts.items():
        magnitude = magnitudes.get(original)
        if magnitude is None:
            converted |= {parameter: (product,) for parameter, (_, product) in inside.items()}
        elif magnitude.of_columns:
            converted |= zip(inside, with_columns(list(inside.values()), magnitude.lengths), strict=True)
        else:
            for parameter, each in inside.items():
                converted[parameter] = with_rows(each, reshape(lengths[parameter], lengths[parameter].shape[:1]))
    return converted


def _cut(found: Found, naming: Naming, rows: Mapping[str, Weight]) -> dict[str, tuple[str, Weight]]:
    """What has the rows of tensors of a file of that naming, cut into the rows of the module's parameters, by their
    names: each with the name of that tensor.

    A file is imagined in which ``rows`` are those tensors, and converted as the model's is.
    """
    stand_ins = {
        original: replace(rows[original], name=original) if original in rows else _empty(original, parts, found)
        for original, parts in naming.originals(found.tensors).items()
    }
    converted = naming.convert(stand_ins).items() if rows else ()
    return {name: (part.name, part) for name, part in converted if part.name in rows and name in found.tensors}


def _rows(product: Product) -> Weight:
    """What of a change has the weight's rows."""
    return product.up if isinstance(product, LowRank) else product.tensor


def _empty(original: str, parts: tuple[str, ...], found: Found) -> Weight:
    """A tensor of one column that nobody reads, for a weight that does not change."""
    shapes = [found.tensors[part].shape for part in parts if part in found.tensors]
    rows = sum(shape[0] for shape in shapes if shape)
    shape = (rows,) if shapes and len(shapes[0]) == 1 else (rows, 1)
    return Weight(original, F32, shape, Whole(lambda: b""))


def _fitting(change: Product, weight: Weight, parameter: str, path: Path) -> Product:
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

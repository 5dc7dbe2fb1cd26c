"""Which tensors of a file are numbers, and which scale them: the ways in which quantized checkpoints say so.

* fp8 with scales: ``X.weight`` in 8-bit floats, ``X.scale_weight``, ``X.weight_scale`` or ``X.weight_scale_inv``, which
  is what numbers are multiplied with all the same, one for the tensor, for each row, or for each 128×128 numbers (as
  DeepSeek and Qwen publish fp8); some have a marker ``scaled_fp8``.
* ComfyUI: JSON in a tensor ``X.comfy_quant``, or for all layers in the header's ``_quantization_metadata``, names the
  format of ``X.weight``; its scales are ``X.weight_scale`` and ``X.weight_scale_2`` (comfy/ops.py, comfy_kitchen).
* bitsandbytes: ``X.weight.quant_state.bitsandbytes__nf4`` (or fp4), JSON, with ``X.weight.absmax``, which may be
  quantized itself (functional.py, QuantState); 8 bits: ``X.SCB``, the largest number of each row.

Scales of activations are for computing in so few bits, and of no use here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any, NamedTuple

import numpy as np

from ..errors import CheckpointError
from ..ggml.types import F32, TYPES
from ..ggml.weight import Weight
from .expressions import cast, joined, whole_array
from .packing import CODEBOOKS, four_bits, mxfp8, nvfp4, plain8, rotated8, scaled8

AS_BYTES = {"U8": "I8", "F8_E4M3": "I8", "F8_E5M2": "I8", "F8_E8M0": "I8"}
"""Types of files that ggml does not have, as what their bytes are held until it is known what they mean."""
FLOATS = ("F8_E4M3", "F8_E5M2")

MARKER = "scaled_fp8"
"""A tensor whose presence says that the others have scales."""
SCALES = (".scale_weight", ".weight_scale", ".weight_scale_inv")
UNUSED = (".scale_input", ".input_scale", ".weight_format")
STATE = ".quant_state.bitsandbytes__"
CONFIG = ".comfy_quant"
METADATA = "_quantization_metadata"
MAX_JSON = 1 << 16
"""Bytes of what is said of one layer."""
MAX_SIZE = 1 << 20
"""Of a block of numbers that have a scale together: larger than anybody's."""


class Stored(NamedTuple):
    """A tensor as a file has it: the file's name of its type, and its bytes in a type of ggml's (:data:`AS_BYTES`)."""

    type: str
    weight: Weight


@dataclass(frozen=True)
class _Layer:
    """A quantized tensor ``name`` with what belongs to it in ``file``, by what follows the layer's name."""

    name: str
    stem: str
    codes: Stored
    file: Mapping[str, Stored]

    def part(self, ending: str) -> Stored | None:
        return self.file.get(self.stem + ending)

    def need(self, ending: str) -> Weight:
        found = self.part(ending)
        if found is None:
            raise self.error(f"has no {self.stem + ending!r}, which scales it")
        return found.weight

    def error(self, reason: str) -> CheckpointError:
        return CheckpointError(self.codes.weight.file, reason, self.name)


def opened(file: Mapping[str, Stored], metadata: Mapping[str, str]) -> tuple[dict[str, Weight], dict[str, str]]:
    """The tensors of a file by name, in its order, quantized ones together with their scales; and those that can't be
    read, with their types. F64 is F32, 8-bit floats are a type of our own, or F16 or BF16.

    Raises :class:`CheckpointError`, which names the tensor, for what does not belong together.
    """
    made: dict[str, Weight] = {}
    used: set[str] = set()
    for name, said in _said(file, metadata).items():
        stem = name.removesuffix(".weight")
        layer = _Layer(name, stem, file[name], file)
        made[name] = _comfy(layer, said)
        used |= {stem + end for end in (".weight_scale", ".weight_scale_2", CONFIG)}
    for state in [name for name in file if STATE in name]:
        name, _, kind = state.partition(STATE)
        if name not in file or kind not in CODEBOOKS:
            raise CheckpointError(file[state].weight.file, f"says how {name!r} is quantized, which is not there", state)
        made[name] = _bitsandbytes(_Layer(name, name, file[name], file), state, kind)
        used |= {other for other in file if other.startswith(name + ".")}
    for name, (kind, codes) in file.items():
        stem = name.removesuffix(".weight")
        if name in made or name in used or (kind not in FLOATS and kind != "I8") or _is_marker(name):
            continue
        scale, largest = next((end for end in SCALES if stem + end in file), None), file.get(stem + ".SCB")
        if scale is not None:
            made[name] = scaled8(codes, kind, file[stem + scale].weight)
            used.add(stem + scale)
        elif kind == "I8" and largest is not None and name.endswith(".weight"):
            made[name] = scaled8(codes, kind, _part_of_127(largest.weight))
            used.add(stem + ".SCB")
        elif kind in FLOATS:
            made[name] = plain8(codes, kind)
    quantized = bool(made)
    tensors: dict[str, Weight] = {}
    skipped: dict[str, str] = {}
    for name, (kind, weight) in file.items():
        if name in made:
            tensors[name] = made[name]
        elif name in used or (quantized and (_is_marker(name) or name.endswith(UNUSED))):
            continue
        elif kind in TYPES and kind not in AS_BYTES:
            tensors[name] = cast(weight, F32) if kind == "F64" else weight
        else:
            skipped[name] = kind
    return tensors, skipped


def _is_marker(name: str) -> bool:
    return name.rpartition(".")[2] == MARKER


# ComfyUI --------------------------------------------------------------------------------------------------------------


def _said(file: Mapping[str, Stored], metadata: Mapping[str, str]) -> dict[str, Mapping[str, Any]]:
    """What the file says of its quantized tensors, by name. Layers of the header may lack what stands before all names
    of the model."""
    said: dict[str, Mapping[str, Any]] = {}
    for name, layer in _of_header(file, metadata).items():
        if (found := _named(file, f"{name}.weight")) is not None:
            said[found] = layer
    for name, stored in file.items():
        if not name.endswith(CONFIG):
            continue
        target = name.removesuffix(CONFIG) + ".weight"
        if target not in file:
            raise CheckpointError(stored.weight.file, f"says how {target!r} is quantized, which is not there", name)
        said[target] = _object(stored.weight, name)
    return said


def _of_header(file: Mapping[str, Stored], metadata: Mapping[str, str]) -> dict[str, Mapping[str, Any]]:
    text = metadata.get(METADATA)
    if text is None:
        return {}
    source = next((stored.weight.file for stored in file.values()), "the model")
    try:
        layers = json.loads(text)["layers"]
        found = {str(name): {"format": layer} if isinstance(layer, str) else layer for name, layer in layers.items()}
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise CheckpointError(source, f"damaged: its {METADATA} is not understood ({error})") from error
    for name, layer in found.items():
        if not isinstance(layer, dict):
            raise CheckpointError(source, f"damaged: its {METADATA} says {str(layer)[:40]!r} of it", name)
    return found


def _named(file: Mapping[str, Stored], name: str) -> str | None:
    """The only tensor that has this name, or one that ends so."""
    if name in file:
        return name
    found = [other for other in file if other.endswith(f".{name}")]
    return found[0] if len(found) == 1 else None


def _comfy(layer: _Layer, said: Mapping[str, Any]) -> Weight:
    name = said.get("format")
    make = _FORMATS.get(name) if isinstance(name, str) else None
    if make is None:
        raise layer.error(f"is of the format {str(name)[:40]!r}; there are {', '.join(_FORMATS)}")
    if layer.part(".pre_quant_scale"):
        raise layer.error("has scales of its inputs (pre_quant_scale), which are not supported")
    return make(layer, said)


def _floats(kind: str, layer: _Layer, _said: Mapping[str, Any]) -> Weight:
    _check_type(layer, kind)
    scale = layer.part(".weight_scale")
    return plain8(layer.codes.weight, kind) if scale is None else scaled8(layer.codes.weight, kind, scale.weight)


def _mxfp8(layer: _Layer, _said: Mapping[str, Any]) -> Weight:
    _check_type(layer, "F8_E4M3")
    return mxfp8(layer.codes.weight, layer.need(".weight_scale"))


def _nvfp4(layer: _Layer, _said: Mapping[str, Any]) -> Weight:
    _check_type(layer, "U8", "I8")
    return nvfp4(layer.codes.weight, layer.need(".weight_scale"), layer.need(".weight_scale_2"))


def _int8(layer: _Layer, said: Mapping[str, Any]) -> Weight:
    """ConvRot is said beside the format, or among its ``params``."""
    _check_type(layer, "I8")
    params = said.get("params")
    both = {**(params if isinstance(params, dict) else {}), **said}
    if both.get("convrot") is True:
        group = both.get("convrot_groupsize", 256)
        if group.__class__ is not int:
            raise layer.error(f"has rotated groups of {str(group)[:40]!r} numbers")
        return rotated8(layer.codes.weight, layer.need(".weight_scale"), group)
    return scaled8(layer.codes.weight, "I8", layer.need(".weight_scale"))


_FORMATS: dict[str, Callable[[_Layer, Mapping[str, Any]], Weight]] = {
    "float8_e4m3fn": partial(_floats, "F8_E4M3"), "float8_e5m2": partial(_floats, "F8_E5M2"), "mxfp8": _mxfp8,
    "nvfp4": _nvfp4, "int8_tensorwise": _int8,
}  # fmt: skip
"""ComfyUI's names of formats → what makes a weight of them."""


def _check_type(layer: _Layer, *kinds: str) -> None:
    if layer.codes.type not in kinds:
        raise layer.error(f"is {layer.codes.type}, where its format has {' or '.join(kinds)}")


def _object(weight: Weight, name: str) -> dict[str, Any]:
    """The JSON object that a tensor of bytes holds."""
    if weight.nbytes > MAX_JSON:
        raise CheckpointError(weight.file, f"is {weight.nbytes:,} bytes of JSON; at most {MAX_JSON:,} are read", name)
    try:
        found = json.loads(bytes(weight.data()))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(weight.file, f"damaged: is no JSON ({error})", name) from error
    if not isinstance(found, dict):
        raise CheckpointError(weight.file, "damaged: is no JSON object", name)
    return found


# bitsandbytes ---------------------------------------------------------------------------------------------------------


def _bitsandbytes(layer: _Layer, state: str, kind: str) -> Weight:
    said = _object(layer.file[state].weight, state)
    shape, size = said.get("shape"), _size(said, "blocksize")
    if not isinstance(shape, list) or not 0 < len(shape) <= 8 or not all(_is_size(n, 1 << 40) for n in shape):
        raise CheckpointError(layer.codes.weight.file, f"gives {str(shape)[:40]!r} for a shape", state)
    if size is None:
        given = str(said.get("blocksize"))[:40]
        raise CheckpointError(layer.codes.weight.file, f"gives {given!r} for a block's size", state)
    book = _numbers(layer, ".quant_map", 16)
    count = -(-prod(shape) // size)
    absmax, sources = _absmax(layer, said, state, count)
    return four_bits(layer.codes.weight, kind, tuple(shape), size, absmax, book, sources)


def _absmax(
    layer: _Layer, said: Mapping[str, Any], state: str, count: int
) -> tuple[Callable[[int, int], np.ndarray], list[Weight]]:
    """The largest numbers of ``count`` blocks. They may be quantized, too: codes of a byte for numbers of another book,
    of which each block has its largest one, around an offset."""
    stored = layer.part(".absmax")
    nested = "nested_absmax" in said or layer.part(".nested_absmax") is not None
    if stored is None or prod(stored.weight.shape) != count or stored.type != ("U8" if nested else "F32"):
        there = "no" if stored is None else f"{stored.type} {list(stored.weight.shape)} as"
        raise layer.error(f"has {there} '.absmax', not {count} numbers {'U8' if nested else 'F32'}")
    absmax = stored.weight
    if not nested:
        return lambda first, last: joined(absmax.pieces, 4 * first, 4 * last).view("<f4"), [absmax]
    size, offset = _size(said, "nested_blocksize"), said.get("nested_offset")
    if size is None or not isinstance(offset, int | float) or not math.isfinite(offset):
        given = str(said.get("nested_blocksize"))[:40], str(offset)[:40]
        reason = f"gives {given[0]!r} and {given[1]!r} for a block's size and an offset"
        raise CheckpointError(layer.codes.weight.file, reason, state)
    book, largest = _numbers(layer, ".nested_quant_map", 256), _numbers(layer, ".nested_absmax", -(-count // size))

    def made(first: int, last: int) -> np.ndarray:
        codes = joined(absmax.pieces, first, last)
        found: np.ndarray = book[codes] * largest[np.arange(first, last) // size] + np.float32(offset)
        return found

    return made, [absmax, layer.need(".nested_absmax")]


def _numbers(layer: _Layer, ending: str, count: int) -> np.ndarray:
    weight = layer.need(ending)
    if weight.type != F32 or prod(weight.shape) != count:
        raise layer.error(f"has {ending!r} {weight.type} {list(weight.shape)}, not {count} numbers F32")
    numbers: np.ndarray = whole_array(weight).view("<f4")
    return numbers


def _size(said: Mapping[str, Any], key: str) -> int | None:
    """How many numbers have a scale together; None for what no file can mean."""
    value = said.get(key)
    return int(value) if _is_size(value, MAX_SIZE) else None  # type: ignore[arg-type]


def _is_size(value: Any, limit: int) -> bool:
    return value.__class__ is int and 0 < value <= limit


def _part_of_127(largest: Weight) -> Weight:
    """The largest numbers of rows as what one of 127 parts is."""
    if largest.type != F32:
        raise CheckpointError(largest.file, f"is {largest.type}, not F32", largest.name)

    def pieces(start: int = 0, stop: int | None = None, /) -> Any:
        made = (whole_array(largest).view("<f4") / np.float32(127)).view(np.uint8)
        yield made.data[start:stop]

    return replace(largest, pieces=pieces, origin=largest.origin and largest.origin.made("/ 127"))

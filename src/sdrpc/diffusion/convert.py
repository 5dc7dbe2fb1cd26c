"""A checkpoint as a GGUF file, its matrices in blocks of a quantized type.

What stays as it is, is what stable-diffusion.cpp's converter leaves: embeddings, biases, norms, and whatever has rows
that are no whole number of blocks, such as convolutions. Tensors keep their names, so that a program that reads the one
file reads the other.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_VERSION, GGMLQuantizationType
from gguf.quants import dequantize, quantize

from ..checkpoints.checkpoint import Checkpoint
from ..errors import CheckpointError, InvalidValue
from ..families.base import Family, find
from ..families.configs import METADATA_KEY, told_by
from ..families.registry import FAMILIES
from ..ggml.types import TYPES, Type
from ..ggml.weight import Weight

CONVERTIBLE = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
"""Types that the gguf library can write and that are of use to a diffusion model."""

ARCHITECTURES = {"flux1": "flux", "chroma": "flux", "flux2-klein": "flux", "flux2": "flux", "zimage": "lumina2"}
"""What GGUF files call a family (``general.architecture``), where it is not its name here."""

NOT_IN_BLOCKS = (
    "embedding", "time_embed.", "pos_embed", "x_embedder.", "t_embedder.", "y_embedder.", "context_embedder.",
    "pad_token",
)  # fmt: skip
"""In names of matrices that are not quantized: they are small, and everything depends on them."""

Progress = Callable[[int, int], None]
"""Called with the bytes written so far, and all of them."""


def type_named(text: str) -> Type:
    """The type that a user calls ``text``, in any case. Raises :class:`InvalidValue` when it can't be
    written."""
    if text.upper() not in CONVERTIBLE:
        raise InvalidValue("type", text, f"there are {', '.join(CONVERTIBLE).lower()}")
    return TYPES[text.upper()]


def type_of(weight: Weight, wanted: Type | None) -> Type:
    """The type that a tensor gets in a file of ``wanted`` ones: that one, or the one that it has."""
    other = weight.type.plain and weight.type.name not in CONVERTIBLE  # whole numbers, F64
    if wanted is None or other or len(weight.shape) < 2:
        return weight.type
    fits = weight.shape[-1] % wanted.block == 0 and not any(part in weight.name for part in NOT_IN_BLOCKS)
    return wanted if wanted.plain or fits else weight.type


def encoded(weight: Weight, wanted: Type) -> np.ndarray:
    """A tensor's bytes in a type, uint8; a view of the file's where it has that type already.

    Raises :class:`ValueError` when the type can't hold the values, or theirs can't be read.
    """
    raw = np.frombuffer(weight.data(), np.uint8)
    if weight.type == wanted:
        return raw
    rows = raw.reshape(*weight.shape[:-1], weight.type.row_bytes(weight.shape[-1]))
    try:
        with np.errstate(over="raise", invalid="raise"):
            values = dequantize(rows, GGMLQuantizationType[weight.type.name])
            return quantize(values, GGMLQuantizationType[wanted.name]).reshape(-1).view(np.uint8)
    except (FloatingPointError, NotImplementedError) as error:
        raise ValueError(f"can't be turned from {weight.type} into {wanted}: {error}") from error


def write_gguf(
    checkpoint: Checkpoint, path: Path, wanted: Type | None = None, progress: Progress = lambda *_: None
) -> list[str]:
    """Write a checkpoint's components to a GGUF file; gives the names of tensors that belong to none of them.

    ``wanted``: the type of matrices; None: all as they are. What the checkpoint says about itself goes along as
    metadata ``sdrpc.config``. One tensor at a time is in memory; the file is whole or not there. Raises
    :class:`CheckpointError` when there is nothing to convert, and for a tensor that can't be; :class:`OSError`.
    """
    family = _family(checkpoint)
    weights, said = _weights(checkpoint, family), _said(checkpoint, family)
    types = {weight.name: type_of(weight, wanted) for weight in weights}
    with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        unfinished = Path(folder) / path.name
        writer = GGUFWriter(unfinished, ARCHITECTURES.get(family.name, family.name))
        writer.add_quantization_version(GGML_QUANT_VERSION)
        if said:
            writer.add_string(METADATA_KEY, said)
        try:
            _write_tensors(writer, weights, types, checkpoint.path, progress)
        finally:
            writer.close()
        os.replace(unfinished, path)
    return sorted(checkpoint.tensors.keys() - types.keys())


def _family(checkpoint: Checkpoint) -> Family:
    """The family whose diffusion model the checkpoint has, or else the first of whose components it has any."""
    for family in FAMILIES:
        diffusion = find(family.diffusion, checkpoint)
        if diffusion is not None and family.recognizes(diffusion):
            return family
    for family in FAMILIES:
        if any(find(component, checkpoint) for component in family.components):
            return family
    known = ", ".join(family.title for family in FAMILIES)
    raise CheckpointError(checkpoint.path, f"has no component of a model that sdrpc knows ({known})")


def _weights(checkpoint: Checkpoint, family: Family) -> list[Weight]:
    """The tensors of all components that the checkpoint has, in its order."""
    for name, dtype in checkpoint.skipped.items():
        raise CheckpointError(checkpoint.path, f"is of type {dtype}, which ggml does not have", name)
    found = [each for component in family.components if (each := find(component, checkpoint)) is not None]
    ours = {weight.name for each in found for weight in each.tensors.values()}
    return [weight for name, weight in checkpoint.tensors.items() if name in ours]


def _said(checkpoint: Checkpoint, family: Family) -> str:
    """What a file says about itself beyond its tensors, as it says it; a directory's config.json files as one text."""
    told = told_by(checkpoint)
    if METADATA_KEY in checkpoint.metadata:
        return checkpoint.metadata[METADATA_KEY]
    names = [component.told_as for component in family.components]
    components = {name: dict(told.components[name]) for name in names if name in told.components}
    numbers = {"prediction": told.prediction, "scaling_factor": told.scaling_factor, "shift_factor": told.shift_factor}
    known = {name: value for name, value in numbers.items() if value is not None}
    return json.dumps({**known, **components}) if components else ""


class _Written(np.ndarray):
    """An array that writes itself as files do: numpy's own way does not say why a disk takes no more."""

    def tofile(self, fid: Any, *_: Any) -> None:
        fid.write(self.data)


def _write_tensors(
    writer: GGUFWriter, weights: Sequence[Weight], types: Mapping[str, Type], source: Path, progress: Progress
) -> None:
    sizes = [types[weight.name].row_bytes(prod(weight.shape)) for weight in weights]
    for weight, size in zip(weights, sizes, strict=True):
        kind = GGMLQuantizationType[types[weight.name].name]
        writer.add_tensor_info(weight.name, weight.shape, np.dtype(np.void), size, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    done = 0
    for weight, size in zip(weights, sizes, strict=True):
        try:
            writer.write_tensor_data(encoded(weight, types[weight.name]).view(_Written))
        except ValueError as error:
            raise CheckpointError(source, str(error), weight.name) from error
        done += size
        progress(done, sum(sizes))

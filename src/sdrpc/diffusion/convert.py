"""A checkpoint as another file, GGUF or safetensors, its matrices in another type.

Tensors keep their names, so that a program that reads the one file reads the other. They are made and written piece by
piece: a model of any size takes the memory of some pieces.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, Protocol

import numpy as np
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_VERSION, GGMLQuantizationType
from gguf.quants import quantize

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.expressions import NUMBERS, cast, joined
from ..checkpoints.numbers import unpacked
from ..errors import CheckpointError, InvalidValue
from ..families.base import Family, find
from ..families.configs import METADATA_KEY, told_by
from ..families.registry import FAMILIES
from ..families.weight_types import AS_STORED, WeightTypes, names_of
from ..ggml.types import F32, OF_GGML, Type
from ..ggml.weight import Weight

ARCHITECTURES = {"flux1": "flux", "chroma": "flux", "flux2-klein": "flux", "flux2": "flux", "zimage": "lumina2"}
"""What GGUF files call a family (``general.architecture``), where it is not its name here."""

SAFETENSORS = frozenset({"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "F8_E4M3", "F8_E5M2"})
"""The types that both safetensors and we have, under one name: of blocks none that ggml has."""

HOLDS = {".gguf": OF_GGML, ".safetensors": SAFETENSORS}
"""Suffix → the types that such a file holds."""

Progress = Callable[[int, int], None]
"""Called with the bytes written so far, and all of them."""


class Planned(NamedTuple):
    """A tensor that will be in the file, in a type of its own."""

    weight: Weight
    type: Type

    @property
    def size(self) -> int:
        """Bytes."""
        return self.type.row_bytes(prod(self.weight.shape))


def write_model(
    checkpoint: Checkpoint, path: Path, types: WeightTypes = AS_STORED, progress: Progress = lambda *_: None
) -> list[str]:
    """Write a checkpoint's components to a file, of the form that its suffix says; gives the names of tensors that
    belong to none of them.

    What the file can't hold as it is becomes F16 (of some types BF16). What the checkpoint says about itself goes along
    as metadata ``sdrpc.config``. The file is whole or not there. Raises :class:`InvalidValue` for types that such a
    file does not have, :class:`CheckpointError` when there is nothing to convert, and for a tensor that can't be;
    :class:`OSError`.
    """
    form = path.suffix.lower()
    for kind in (*filter(None, [types.wanted]), *(kind for _, kind in types.rules)):
        if kind.name not in HOLDS[form]:
            raise InvalidValue("type", kind.name.lower(), f"a {form} file has no such type; a .gguf file has")
    family = _family(checkpoint)
    planned, said = _planned(checkpoint, family, types, HOLDS[form]), _said(checkpoint, family)
    with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        unfinished = Path(folder) / path.name
        done, total = 0, sum(tensor.size for tensor in planned)

        def bytes_of(tensor: Planned) -> Iterator[Any]:
            nonlocal done
            for piece in encoded(tensor.weight, tensor.type):
                yield piece
                done += len(piece)
                progress(done, total)

        _WRITERS[form](unfinished, family, planned, said, bytes_of)
        os.replace(unfinished, path)
    return sorted(checkpoint.tensors.keys() - {tensor.weight.name for tensor in planned})


def encoded(weight: Weight, wanted: Type) -> Iterator[memoryview]:
    """A tensor's bytes in a type, in pieces; views of the file's where it has that type already.

    Raises :class:`CheckpointError` when the type can't hold the values, or theirs can't be read.
    """
    if weight.type == wanted:
        yield from weight.pieces()
        return
    numbers, total = cast(weight, F32), prod(weight.shape)
    for start in range(0, total, NUMBERS):
        values = joined(numbers.pieces, 4 * start, 4 * min(start + NUMBERS, total)).view("<f4")
        try:
            with np.errstate(over="raise", invalid="raise"):
                made = quantize(values.reshape(-1, wanted.block), GGMLQuantizationType[wanted.name])
        except (FloatingPointError, NotImplementedError) as error:
            reason = f"can't be turned from {weight.type} into {wanted}: {error}"
            raise CheckpointError(weight.file, reason, weight.name) from error
        yield np.ascontiguousarray(made).reshape(-1).view(np.uint8).data


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


def _planned(checkpoint: Checkpoint, family: Family, types: WeightTypes, holds: frozenset[str]) -> list[Planned]:
    """The tensors of all components that the checkpoint has, in its order."""
    for name, dtype in checkpoint.skipped.items():
        raise CheckpointError(checkpoint.path, f"is of type {dtype}, which ggml does not have", name)
    parts = [each for component in family.components if (each := find(component, checkpoint)) is not None]
    named = {
        weight.name: (weight.name, *names_of(weight, part.component.name, part.component.prefixes))
        for part in parts
        for weight in part.tensors.values()
    }
    types.warn_of_idle_rules(named.values())

    def planned(name: str, weight: Weight) -> Planned:
        kind = types.of(weight, *named[name][1:])
        return Planned(weight, kind if kind.name in holds else unpacked(kind))

    return [planned(name, weight) for name, weight in checkpoint.tensors.items() if name in named]


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


BytesOf = Callable[[Planned], Iterator[Any]]


class Write(Protocol):
    """Writes one form of file."""

    def __call__(
        self, path: Path, family: Family, planned: Sequence[Planned], said: str, bytes_of: BytesOf, /
    ) -> None: ...


def _write_gguf(path: Path, family: Family, planned: Sequence[Planned], said: str, bytes_of: BytesOf) -> None:
    writer = GGUFWriter(path, ARCHITECTURES.get(family.name, family.name))
    try:
        writer.add_quantization_version(GGML_QUANT_VERSION)
        if said:
            writer.add_string(METADATA_KEY, said)
        for tensor in planned:
            kind = GGMLQuantizationType[tensor.type.name]
            writer.add_tensor_info(tensor.weight.name, tensor.weight.shape, np.dtype(np.void), tensor.size, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None  # noqa: S101
        (file,) = writer.fout
        writer.write_padding(file, file.tell())
        for tensor in planned:
            for piece in bytes_of(tensor):
                file.write(piece)
            writer.write_padding(file, tensor.size)
    finally:
        writer.close()


def _write_safetensors(path: Path, _family: Family, planned: Sequence[Planned], said: str, bytes_of: BytesOf) -> None:
    """The header is 8 bytes of its length and JSON, filled up with spaces to a multiple of 8."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | ({METADATA_KEY: said} if said else {})}
    end = 0
    for tensor in planned:
        start, end = end, end + tensor.size
        entry = {"dtype": tensor.type.name, "shape": tensor.weight.shape, "data_offsets": [start, end]}
        header[tensor.weight.name] = entry
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in planned:
            for piece in bytes_of(tensor):
                file.write(piece)


_WRITERS: Mapping[str, Write] = {".gguf": _write_gguf, ".safetensors": _write_safetensors}

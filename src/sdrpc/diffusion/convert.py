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
from gguf.constants import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFValueType
from gguf.quants import quantize

from ..checkpoints.checkpoint import WHOLE, Checkpoint
from ..checkpoints.expressions import NUMBERS, cast, joined
from ..checkpoints.gguf_header import WHOLE as WHOLE_KEY
from ..checkpoints.gguf_header import Value
from ..checkpoints.numbers import in_rows, unpacked
from ..errors import CheckpointError, InvalidValue
from ..families.base import Family, Found, find
from ..families.components import llm
from ..families.configs import METADATA_KEY, told_by
from ..families.model import ModelComponent
from ..families.registry import FAMILIES
from ..families.weight_types import AS_STORED, WeightTypes, names_of
from ..ggml.types import F32, OF_GGML, Type
from ..ggml.weight import Weight

ARCHITECTURES = {
    "flux1": "flux", "chroma": "flux", "flux2-klein": "flux", "flux2": "flux", "zimage": "lumina2", "ltx-video": "ltxv",
    "ltx2": "ltxv",
}  # fmt: skip
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


class Beside(NamedTuple):
    """What goes along with the tensors. ``said``: what the model says about itself (``sdrpc.config``). Its vocabulary:
    ``entries`` of a GGUF file, or ``tensors`` of bytes of a safetensors file."""

    said: str
    entries: Mapping[str, Value]
    tensors: Mapping[str, bytes]


def write_model(
    checkpoint: Checkpoint, path: Path, types: WeightTypes = AS_STORED, progress: Progress = lambda *_: None
) -> list[str]:
    """Write a checkpoint's components to a file, of the form that its suffix says; gives the names of tensors that
    belong to none of them.

    What the file can't hold as it is becomes F16 (of some types BF16). What the checkpoint says about itself goes along
    as metadata ``sdrpc.config``, and so does the vocabulary that it brings. The file is whole or not there. Raises
    :class:`InvalidValue` for types that such a file does not have, :class:`CheckpointError` when there is nothing to
    convert, and for a tensor or a vocabulary that can't be; :class:`OSError`.
    """
    form = path.suffix.lower()
    for kind in (*filter(None, [types.wanted]), *(kind for _, kind in types.rules)):
        if kind.name not in HOLDS[form]:
            raise InvalidValue("type", kind.name.lower(), f"a {form} file has no such type; a .gguf file has")
    family = _family(checkpoint)
    parts = _parts(checkpoint, family)
    planned = _planned(checkpoint, parts, types, HOLDS[form])
    beside = Beside(_said(checkpoint, parts), *_vocabulary(checkpoint, parts, form))
    with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        unfinished = Path(folder) / path.name
        done, total = 0, sum(tensor.size for tensor in planned)

        def bytes_of(tensor: Planned) -> Iterator[Any]:
            nonlocal done
            for piece in encoded(tensor.weight, tensor.type):
                yield piece
                done += len(piece)
                progress(done, total)

        _WRITERS[form](unfinished, family, planned, beside, bytes_of)
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
                made = quantize(in_rows(values, wanted.block), GGMLQuantizationType[wanted.name])
        except (FloatingPointError, NotImplementedError) as error:
            reason = f"can't be turned from {weight.type} into {wanted}: {error}"
            raise CheckpointError(weight.file, reason, weight.name) from error
        yield np.ascontiguousarray(made).reshape(-1).view(np.uint8).data


def _family(checkpoint: Checkpoint) -> Family:
    """The family whose diffusion model the checkpoint has, or else the first of those that have the most use for its
    tensors."""
    for family in FAMILIES:
        diffusion = find(family.diffusion, checkpoint)
        if diffusion is not None and family.recognizes(diffusion):
            return family
    taken = [(len(_names(_parts(checkpoint, family))), family) for family in FAMILIES]
    most, family = max(taken, key=lambda each: each[0])  # components of several families may look alike
    if most:
        return family
    known = ", ".join(family.title for family in FAMILIES)
    raise CheckpointError(checkpoint.path, f"has no component of a model that sdrpc knows ({known})")


def _parts(checkpoint: Checkpoint, family: Family) -> list[Found]:
    """The family's components that the checkpoint has."""
    return [each for component in family.components if (each := find(component, checkpoint)) is not None]


def _names(parts: Sequence[Found]) -> set[str]:
    """Of the tensors that components consist of, in their file."""
    return {weight.name for part in parts for weight in part.tensors.values()}


def _planned(
    checkpoint: Checkpoint, parts: Sequence[Found], types: WeightTypes, holds: frozenset[str]
) -> list[Planned]:
    """The tensors of all components that the checkpoint has, in its order."""
    for name, dtype in checkpoint.skipped.items():
        raise CheckpointError(checkpoint.path, f"is of type {dtype}, which ggml does not have", name)
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


def _said(checkpoint: Checkpoint, parts: Sequence[Found]) -> str:
    """What a file says about itself beyond its tensors, as it says it; a directory's config.json files, and what
    llama.cpp's files have entries for, as one text."""
    told = told_by(checkpoint)
    if METADATA_KEY in checkpoint.metadata:
        return checkpoint.metadata[METADATA_KEY]
    components = {
        each.component.told_as: (llm.of_gguf(each) if each.component.name == llm.NAME else {})
        | dict(told.components.get(each.component.told_as, {}))
        for each in parts
    }
    components = {name: config for name, config in components.items() if config}
    numbers = {"prediction": told.prediction, "scaling_factor": told.scaling_factor, "shift_factor": told.shift_factor}
    known = {name: value for name, value in numbers.items() if value is not None}
    return json.dumps({**known, **components}) if components else ""


def _vocabulary(
    checkpoint: Checkpoint, parts: Sequence[Found], form: str
) -> tuple[Mapping[str, Value], Mapping[str, bytes]]:
    """What the vocabulary is in the file, as entries of GGUF and as tensors: as it is where the form has its like, else
    as a tokenizer.json."""
    brought = checkpoint.tokenizers.get("")
    if brought is not None and brought.stored is not None and form == ".gguf":
        return {key: each for key, each in brought.stored().items() if each.value != []}, {}
    if brought is not None and brought.tensors and form == ".safetensors":
        return {}, {name: bytes(weight.data()) for name, weight in brought.tensors.items()}
    reader = next((each for each in parts if each.component.name == llm.NAME), None)
    tokenizer = None if reader is None else ModelComponent(reader, {}).tokenizer
    if tokenizer is None:
        return {}, {}
    text = tokenizer.to_str().encode()
    return {WHOLE_KEY: Value(text, GGUFValueType.STRING)}, {WHOLE: text}


BytesOf = Callable[[Planned], Iterator[Any]]


class Write(Protocol):
    """Writes one form of file."""

    def __call__(
        self, path: Path, family: Family, planned: Sequence[Planned], beside: Beside, bytes_of: BytesOf, /
    ) -> None: ...


def _write_gguf(path: Path, family: Family, planned: Sequence[Planned], beside: Beside, bytes_of: BytesOf) -> None:
    writer = GGUFWriter(path, ARCHITECTURES.get(family.name, family.name))
    try:
        writer.add_quantization_version(GGML_QUANT_VERSION)
        if beside.said:
            writer.add_string(METADATA_KEY, beside.said)
        for key, entry in beside.entries.items():
            writer.add_key_value(key, entry.value, entry.kind, entry.each)
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


def _write_safetensors(
    path: Path, _family: Family, planned: Sequence[Planned], beside: Beside, bytes_of: BytesOf
) -> None:
    """The header is 8 bytes of its length and JSON, filled up with spaces to a multiple of 8."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | ({METADATA_KEY: beside.said} if beside.said else {})}
    entries = [(tensor.weight.name, tensor.type.name, tensor.weight.shape, tensor.size) for tensor in planned]
    entries += [(name, "U8", (len(data),), len(data)) for name, data in beside.tensors.items()]
    end = 0
    for name, kind, shape, size in entries:
        start, end = end, end + size
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in planned:
            for piece in bytes_of(tensor):
                file.write(piece)
        for data in beside.tensors.values():
            file.write(data)


_WRITERS: Mapping[str, Write] = {".gguf": _write_gguf, ".safetensors": _write_safetensors}

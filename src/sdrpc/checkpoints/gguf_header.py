"""The header of a GGUF file: text metadata and where each tensor lies.

The gguf library's reader believes the counts and lengths that a file states, and can be kept busy for ever by a few
bytes; here each is checked against what is left of the file before it is used. Numbers of types are the library's.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

MAGIC = b"GGUF"

TOKENIZER = "tokenizer."
"""How keys of a vocabulary begin."""
WHOLE = "tokenizer.huggingface.json"
"""The key of a tokenizer.json, by GGUF's specification."""

MAX_DIMS = 5
MAX_NAME = 4096
MAX_METADATA = 64 << 20
"""Bytes of one text entry that are kept; SD files carry a config or nothing."""

_SCALARS = {
    GGUFValueType.UINT8: "B", GGUFValueType.INT8: "b", GGUFValueType.UINT16: "H", GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I", GGUFValueType.INT32: "i", GGUFValueType.FLOAT32: "f", GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q", GGUFValueType.INT64: "q", GGUFValueType.FLOAT64: "d",
}  # fmt: skip
_SMALLEST = {GGUFValueType.STRING: 8, GGUFValueType.ARRAY: 12} | {
    kind: struct.calcsize("<" + code) for kind, code in _SCALARS.items()
}
"""Bytes that a value of each kind has at least."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: ggml's name of its type, shape in torch's order, and the bytes ``begin`` to ``end`` of the file."""

    name: str
    type: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Value(NamedTuple):
    """An entry's value as it is stored, texts as bytes. ``each``: of an array, the kind of its values."""

    value: bytes | int | float | list[bytes | int | float]
    kind: GGUFValueType
    each: GGUFValueType | None = None


@dataclass(frozen=True)
class Header:
    """What a GGUF file says about itself. ``metadata``: entries that are text or a number, as text. ``arrays``: where
    the tokenizer's are, for :func:`read_array`. ``vocabulary``: where all of the tokenizer's entries are, for
    :func:`read_value`."""

    metadata: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    tensors: tuple[TensorInfo, ...]
    arrays: Mapping[str, int]
    vocabulary: Mapping[str, int]

    def original_shape(self, tensor: TensorInfo) -> tuple[int, ...]:
        """The shape before a converter flattened it to fit into blocks (``comfy.gguf.orig_shape.NAME``)."""
        shape = self.shapes.get(f"comfy.gguf.orig_shape.{tensor.name}", tensor.shape)
        return shape if min(shape, default=0) > 0 and prod(shape) == prod(tensor.shape) else tensor.shape


class _Cursor:
    """Reads little-endian values from the mapped file, never past its end."""

    def __init__(self, data: memoryview, at: int = 0) -> None:
        self.data, self.at = data, at

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def take(self, size: int) -> memoryview:
        if size > self.left:
            raise ValueError(f"{size} bytes wanted at {self.at}, the file ends at {len(self.data)}")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, code: str) -> int | float:
        value: int | float = struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]
        return value

    def count(self, code: str, each: int, what: str) -> int:
        """A count of things that take at least ``each`` bytes."""
        count = int(self.number(code))
        if count * each > self.left:
            raise ValueError(f"{count} {what} do not fit into the file")
        return count

    def raw_text(self) -> bytes:
        return bytes(self.take(self.count("Q", 1, "bytes of text")))

    def text(self, limit: int) -> str:
        size = self.count("Q", 1, "bytes of text")
        if size > limit:
            raise ValueError(f"a text of {size} bytes (at most {limit})")
        return bytes(self.take(size)).decode("utf-8", "strict")

    def kind(self) -> GGUFValueType:
        return GGUFValueType(int(self.number("I")))


def parse(data: memoryview) -> Header:
    """The header of a mapped GGUF file of version 2 or 3. Raises :class:`ValueError` saying what is wrong with it."""
    cursor = _Cursor(data)
    if cursor.take(4) != MAGIC:
        raise ValueError("not a GGUF file")
    version = int(cursor.number("I"))
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3)
        what = "GGUF for big-endian machines" if swapped else f"GGUF version {version}"
        raise ValueError(f"{what} (versions 2 and 3 for little-endian ones are known)")
    tensor_count = cursor.count("Q", 8 + 4 + 8 + 4 + 8, "tensors")
    entry_count = cursor.count("Q", 8 + 4 + 1, "metadata entries")
    metadata: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    arrays: dict[str, int] = {}
    vocabulary: dict[str, int] = {}
    for _ in range(entry_count):
        key, at, kind = cursor.text(MAX_NAME), cursor.at, cursor.kind()
        if key.startswith(TOKENIZER):
            vocabulary[key] = at
        if kind is GGUFValueType.ARRAY:
            if key.startswith(TOKENIZER):
                arrays[key] = cursor.at
            shape = _array(cursor)
            if shape is not None:
                shapes[key] = shape
        elif kind is GGUFValueType.STRING:
            metadata[key] = cursor.text(MAX_METADATA)
        else:
            metadata[key] = str(cursor.number(_SCALARS[kind]))
    alignment = int(metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT))
    if alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"an alignment of {alignment}")
    infos = [_tensor(cursor) for _ in range(tensor_count)]
    start = -(-cursor.at // alignment) * alignment
    placed = tuple(_placed(*info, start, len(data)) for info in infos)
    return Header(metadata, shapes, placed, arrays, vocabulary)


def read_array(data: memoryview, at: int) -> list[str | int | float]:
    """The values of an array of :attr:`Header.arrays`. Bytes that are no UTF-8 become replacement characters: single
    bytes of some vocabularies are stored so."""
    _, values = _values(_Cursor(data, at))
    return [value.decode("utf-8", "replace") if isinstance(value, bytes) else value for value in values]


def read_value(data: memoryview, at: int) -> Value:
    """An entry of :attr:`Header.vocabulary`."""
    cursor = _Cursor(data, at)
    kind = cursor.kind()
    if kind is GGUFValueType.ARRAY:
        each, values = _values(cursor)
        return Value(values, kind, each)
    return Value(cursor.raw_text() if kind is GGUFValueType.STRING else cursor.number(_SCALARS[kind]), kind)


def _values(cursor: _Cursor) -> tuple[GGUFValueType, list[bytes | int | float]]:
    """An array: of what kind its values are, and they themselves."""
    kind = cursor.kind()
    count = cursor.count("Q", _SMALLEST[kind], "values of an array")
    if kind is GGUFValueType.STRING:
        return kind, [cursor.raw_text() for _ in range(count)]
    return kind, list(struct.unpack(f"<{count}{_SCALARS[kind]}", cursor.take(count * _SMALLEST[kind])))


def _array(cursor: _Cursor) -> tuple[int, ...] | None:
    """Skips an array; gives its values if it can be a shape (a few whole numbers)."""
    kind = cursor.kind()
    if kind is GGUFValueType.ARRAY:
        raise ValueError("an array of arrays")
    count = cursor.count("Q", _SMALLEST[kind], "values of an array")
    if kind is GGUFValueType.STRING:
        for _ in range(count):
            cursor.take(cursor.count("Q", 1, "bytes of text"))
        return None
    values = cursor.take(count * _SMALLEST[kind])
    if count > MAX_DIMS or _SCALARS[kind] not in "iIqQ":
        return None
    return struct.unpack(f"<{count}{_SCALARS[kind]}", values)


def _tensor(cursor: _Cursor) -> tuple[str, GGMLQuantizationType | int, tuple[int, ...], int]:
    name = cursor.text(MAX_NAME)
    dims = int(cursor.number("I"))
    if dims > MAX_DIMS:
        raise ValueError(f"tensor {name!r} has {dims} dimensions (at most {MAX_DIMS})")
    shape = tuple(int(cursor.number("Q")) for _ in range(dims))[::-1]
    number = int(cursor.number("I"))
    known = number in GGMLQuantizationType.__members__.values()
    return name, GGMLQuantizationType(number) if known else number, shape, int(cursor.number("Q"))


def _placed(
    name: str, kind: GGMLQuantizationType | int, shape: tuple[int, ...], offset: int, start: int, end: int
) -> TensorInfo:
    if not isinstance(kind, GGMLQuantizationType):
        return TensorInfo(name, f"type {kind}", shape, start, start)
    block, size = GGML_QUANT_SIZES[kind]
    nbytes = prod(shape) // block * size
    begin = start + offset
    if prod(shape) % block or begin + nbytes > end:
        raise ValueError(f"tensor {name!r} ({kind.name} {list(shape)}) does not fit into the file")
    return TensorInfo(name, kind.name, shape, begin, begin + nbytes)

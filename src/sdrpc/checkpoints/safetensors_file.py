"""A safetensors file: header read and checked by the safetensors library, tensors mapped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError
from .mapped import Mapped
from .quantized import AS_BYTES, Stored

TYPES = {name: name for name in ("F32", "F16", "BF16", "F64", "I64", "I32", "I16", "I8")} | AS_BYTES
"""safetensors' names of types → ggml's."""


@dataclass(frozen=True)
class Opened:
    """What one file holds. ``skipped``: tensors of types that are not read, with the type."""

    stored: Mapping[str, Stored]
    skipped: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)


def is_safetensors(data: memoryview) -> bool:
    """Whether a file begins as one: the size of a header that can be one, and a JSON object."""
    size = int.from_bytes(data[:8], "little")
    return len(data) > 9 and 2 <= size < 1 << 40 and bytes(data[8:9]) == b"{"


def read(file: Mapped) -> Opened:
    """All tensors as they are stored. Raises :class:`CheckpointError`."""
    path, data = file.path, file.data
    offset = 8 + int.from_bytes(data[:8], "little")
    header = _header(file, offset)
    try:
        # the library checks the header: sizes, overlaps, gaps, that the data ends with the file
        with safe_open(path, framework="np") as checked:
            metadata = dict(checked.metadata() or {})
            entries = [(name, checked.get_slice(name)) for name in checked.offset_keys()]
            shapes = {name: (entry.get_dtype(), tuple(entry.get_shape())) for name, entry in entries}
    except (SafetensorError, ValueError, OverflowError) as error:
        raise CheckpointError(path, f"damaged: {error}") from error
    stored: dict[str, Stored] = {}
    skipped: dict[str, str] = {}
    for name, (dtype, shape) in shapes.items():
        if dtype not in TYPES:
            skipped[name] = dtype
            continue
        begin, end = (offset + at for at in header[name]["data_offsets"])
        stored[name] = Stored(dtype, file.weight(name, TYPES[dtype], shape, begin, end))
    return Opened(stored, skipped, metadata)


def _header(file: Mapped, end: int) -> dict[str, Any]:
    """The header as it stands there; a file that ends before its header or its data does is told from other damage."""
    if end > len(file.data):
        raise _incomplete(file, end)
    try:
        header: dict[str, Any] = json.loads(bytes(file.data[8:end]))
        tensors = [entry for name, entry in header.items() if name != "__metadata__"]
        needed = end + max((int(entry["data_offsets"][1]) for entry in tensors), default=0)
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(file.path, f"damaged: its header is not understood ({error})") from error
    if needed > len(file.data):
        raise _incomplete(file, needed)
    return header


def _incomplete(file: Mapped, needed: int) -> CheckpointError:
    has = f"it has {len(file.data):,} of at least {needed:,} bytes"
    return CheckpointError(file.path, f"damaged or incomplete: {has}; download it again")

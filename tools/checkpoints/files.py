"""Writing files of checkpoints, one tensor at a time: a model of any size needs the memory of its largest tensor."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

from .names import Shape
from .numbers import Stored, stored_size


class Planned(NamedTuple):
    """A tensor that will be in a file: its name, format and shape, and what makes it."""

    name: str
    type: str
    shape: Shape
    make: Callable[[], Stored]

    @property
    def size(self) -> int:
        """Bytes."""
        return stored_size(self.type, self.shape)


def write_safetensors(
    path: Path, tensors: Sequence[Planned], metadata: Mapping[str, str] | None = None, zeros: bool = False
) -> None:
    """The header is 8 bytes of its length and JSON, filled up with spaces to a multiple of 8. ``zeros``: no number is
    made."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.size
        header[tensor.name] = {"dtype": tensor.type, "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if zeros:
            file.truncate(8 + len(text) + end)
            return
        for tensor in tensors:
            np.ascontiguousarray(tensor.make().data).tofile(file)


def write_gguf(
    path: Path,
    tensors: Sequence[Planned],
    architecture: str | None,
    original_shapes: Mapping[str, Shape] | None = None,
    numbers: Mapping[str, float] | None = None,
    entries: Mapping[str, Any] | None = None,
) -> None:
    """A GGUF file. Without ``architecture`` it says none, as those of stable-diffusion.cpp.

    ``original_shapes`` are those of tensors that are stored with another one; ``numbers`` further keys with integers
    and float32 numbers, ``entries`` with texts and lists.
    """
    writer = GGUFWriter(path, architecture or "")
    if architecture is None:
        writer.kv_data[0].clear()
    for key, number in (numbers or {}).items():
        if isinstance(number, int):
            writer.add_uint32(key, number)
        else:
            writer.add_float32(key, number)
    for key, value in (entries or {}).items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        else:
            writer.add_array(key, value)
    for name, shape in (original_shapes or {}).items():
        writer.add_array(f"comfy.gguf.orig_shape.{name}", list(shape))
    for tensor in tensors:
        kind = GGMLQuantizationType[tensor.type]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.size, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(np.ascontiguousarray(tensor.make().data))
    writer.close()


def write_shards(folder: Path, stem: str, tensors: Sequence[Planned], count: int) -> None:
    """``count`` files of about the same size with an index of which tensor is in which; one file without an index."""
    if count == 1:
        write_safetensors(folder / f"{stem}.safetensors", tensors, {"format": "pt"})
        return
    total = sum(tensor.size for tensor in tensors)
    shards: list[list[Planned]] = [[] for _ in range(count)]
    before = 0
    for tensor in tensors:
        shards[min(before * count // total, count - 1)].append(tensor)
        before += tensor.size
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"{stem}-{number:05}-of-{count:05}.safetensors"
        write_safetensors(folder / name, shard, {"format": "pt"})
        index |= {tensor.name: name for tensor in shard}
    write_json(folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})


def write_json(path: Path, values: Any) -> None:
    """Indented, as the libraries write their configurations."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def as_rows_of_256(shape: Shape) -> Shape | None:
    """The shape that ComfyUI's GGUF converter gives kernels, so that they can be stored in blocks of 256.

    None where it leaves a tensor as it is: vectors, small tensors, rows that are blocks already, and numbers that make
    no whole rows.
    """
    count = prod(shape)
    if len(shape) < 2 or count < 512 or count % 256 or shape[-1] % 256 == 0:
        return None
    return count // 256, 256

"""Model files as named, typed bytes that stay where they are: mapped into memory, never copied.

Three forms: ``.safetensors`` (header read and checked by the safetensors library), ``.gguf`` (read by
:mod:`sdrpc.checkpoints.gguf_header`), and a diffusers directory (``model_index.json`` and a folder for each part).
Pickles (``.ckpt``, ``.pt``) are refused: to open one is to run it.
"""

from __future__ import annotations

import json
import mmap
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf.constants import GGMLQuantizationType
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError
from ..ggml.types import F16, TYPES
from ..ggml.weight import Origin, Weight
from . import gguf_header

YOUNG = 2_000_000_000
"""Nanoseconds after a change in which a file system may give another change the same time."""

PICKLES = frozenset({".ckpt", ".pt", ".pth", ".bin", ".pkl"})

_DTYPES = {
    "F32": "F32",
    "F16": "F16",
    "BF16": "BF16",
    "F64": "F64",
    "I64": "I64",
    "I32": "I32",
    "I16": "I16",
    "I8": "I8",
}
"""safetensors' names of types → ggml's."""

_FOLDERS = ("unet", "vae", "text_encoder")
"""Parts of a diffusers directory, by the names of their folders."""


@dataclass(frozen=True)
class Checkpoint:
    """An opened model file or directory.

    ``tensors``: by the file's own names (a diffusers directory's with their folder: ``unet.conv_in.weight``).
    ``skipped``: tensors of types that ggml does not have (float8 …), with the type; ``metadata``: the file's text
    entries; ``configs``: a diffusers directory's config.json per part.
    """

    path: Path
    tensors: Mapping[str, Weight]
    skipped: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint at ``path``, mapped.

    Raises :class:`CheckpointError` when there is none, when its form is not supported, and when it is damaged.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _open_directory(path)
        if path.suffix.lower() in PICKLES:
            raise CheckpointError(
                path, "pickled checkpoints are not opened, because that runs their code; convert it to .safetensors"
            )
        with path.open("rb") as file:
            magic = file.read(4)
        return _open_gguf(path) if magic == gguf_header.MAGIC else _open_safetensors(path)
    except OSError as error:
        raise CheckpointError(path, error.strerror or str(error)) from error


def _open_safetensors(path: Path) -> Checkpoint:
    if path.suffix.lower() != ".safetensors":
        raise CheckpointError(path, "neither .safetensors nor .gguf nor a diffusers directory")
    tensors: dict[str, Weight] = {}
    skipped: dict[str, str] = {}
    try:
        # the library checks the header: sizes, overlaps, gaps, that the data ends with the file
        with safe_open(path, framework="np") as file:
            metadata = dict(file.metadata() or {})
            entries = [(name, file.get_slice(name)) for name in file.offset_keys()]
            shapes = {name: (entry.get_dtype(), tuple(entry.get_shape())) for name, entry in entries}
    except (SafetensorError, ValueError, OverflowError) as error:
        raise CheckpointError(path, f"damaged: {error}") from error
    mapped = _mapped(path)
    data = mapped.data
    offset = 8 + int.from_bytes(data[:8], "little")
    header = _header(path, bytes(data[8:offset]))
    for name, (dtype, shape) in shapes.items():
        begin, end = header[name]["data_offsets"]
        if dtype not in _DTYPES:
            skipped[name] = dtype
            continue
        tensors[name] = _weight(name, _DTYPES[dtype], shape, mapped, offset + begin, offset + end)
    return Checkpoint(path, tensors, skipped, metadata)


def _header(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header: dict[str, Any] = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"damaged: {error}") from error
    return header


def _open_gguf(path: Path) -> Checkpoint:
    mapped = _mapped(path)
    try:
        header = gguf_header.parse(mapped.data)
    except ValueError as error:
        raise CheckpointError(path, f"damaged: {error}") from error
    tensors: dict[str, Weight] = {}
    skipped: dict[str, str] = {}
    for info in header.tensors:
        if info.type not in TYPES:
            skipped[info.name] = info.type
            continue
        weight = _weight(info.name, info.type, info.shape, mapped, info.begin, info.end)
        tensors[info.name] = _unfolded(weight, header.original_shape(info))
    return Checkpoint(path, tensors, skipped, header.metadata)


def _unfolded(weight: Weight, shape: tuple[int, ...]) -> Weight:
    """A tensor that a converter folded into longer rows to fit into blocks, in its own shape again.

    Blocks that would cross its rows can't be left as they are: such a tensor is unpacked to F16 when it is read.
    """
    if shape == weight.shape or shape[-1] % weight.type.block == 0:
        return replace(weight, shape=shape)

    def unpacked() -> memoryview:
        from gguf.quants import dequantize

        kind = GGMLQuantizationType[weight.type.name]
        values = dequantize(np.frombuffer(weight.data(), np.uint8), kind)
        return memoryview(values.astype("<f2").tobytes())

    return Weight(weight.name, F16, shape, unpacked, weight.origin and weight.origin.made("F16"))


def _open_directory(path: Path) -> Checkpoint:
    if not (path / "model_index.json").is_file():
        raise CheckpointError(path, "a directory without model_index.json is no diffusers model")
    tensors: dict[str, Weight] = {}
    skipped: dict[str, str] = {}
    configs: dict[str, Mapping[str, Any]] = {"": _json(path / "model_index.json")}
    for folder in _FOLDERS:
        if not (path / folder).is_dir():
            continue
        configs[folder] = _json(path / folder / "config.json")
        for file in _weight_files(path / folder):
            opened = _open_safetensors(file)
            renamed = ((f"{folder}.{name}", weight) for name, weight in opened.tensors.items())
            tensors |= {name: replace(weight, name=name) for name, weight in renamed}
            skipped |= {f"{folder}.{name}": dtype for name, dtype in opened.skipped.items()}
    if (path / "scheduler" / "scheduler_config.json").is_file():
        configs["scheduler"] = _json(path / "scheduler" / "scheduler_config.json")
    return Checkpoint(path, tensors, skipped, {}, configs)


def _weight_files(folder: Path) -> list[Path]:
    """A part's files: those of its index, or its only one; the full-precision variant where there are several."""
    for stem in ("diffusion_pytorch_model", "model"):
        for variant in ("", ".fp16"):
            index = folder / f"{stem}.safetensors.index{variant}.json"
            if index.is_file():
                weight_map = _json(index).get("weight_map")
                if not isinstance(weight_map, dict):
                    raise CheckpointError(index, "its weight_map is no object that says which tensor is in which file")
                names = {str(name) for name in weight_map.values()}
                if any(Path(name).name != name for name in names):
                    raise CheckpointError(index, "names files outside of its folder")
                return [folder / name for name in sorted(names)]
            single = folder / f"{stem}{variant}.safetensors"
            if single.is_file():
                return [single]
    raise CheckpointError(folder, "has no .safetensors file")


def _json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"damaged: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(path, "is not a JSON object")
    return content


class _Mapped(NamedTuple):
    """A file's bytes, and a name for the state that it is in; "" when it is too young to tell the next change by its
    times."""

    path: Path
    data: memoryview
    state: str


def _mapped(path: Path) -> _Mapped:
    if not path.stat().st_size:
        raise CheckpointError(path, "is empty")
    with path.open("rb") as file:
        facts = os.fstat(file.fileno())
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    changed = max(facts.st_mtime_ns, facts.st_ctime_ns)
    state = [path.resolve(), facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns]
    return _Mapped(path, data, "" if time.time_ns() - changed < YOUNG else " ".join(map(str, state)))


def _weight(name: str, type_name: str, shape: tuple[int, ...], file: _Mapped, begin: int, end: int) -> Weight:
    path, data = file.path, file.data[begin:end]
    kind = TYPES[type_name]
    if shape and shape[-1] % kind.block:
        raise CheckpointError(path, f"rows of {shape[-1]} are no whole number of {kind}'s blocks of {kind.block}", name)
    expected = kind.row_bytes(prod(shape))
    if len(data) != expected:
        raise CheckpointError(path, f"{kind} {list(shape)} is {expected} bytes, the file has {len(data)}", name)
    return Weight(name, kind, shape, lambda: data, Origin(file.state, f"{begin}-{end}") if file.state else None)

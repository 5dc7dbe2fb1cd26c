"""Model files as named, typed tensors that stay where they are: mapped into memory, read while they are sent.

What a file is, its bytes say, never its name: safetensors (:mod:`sdrpc.checkpoints.safetensors_file`), GGUF
(:mod:`sdrpc.checkpoints.gguf_file`), or a checkpoint of torch.save (:mod:`sdrpc.checkpoints.pickled`). Several files
are opened as one where they belong together (:mod:`sdrpc.checkpoints.directory`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..ggml.weight import Weight
from . import directory, gguf_file, gguf_header, pickled, quantized, safetensors_file
from .absent import absent
from .mapped import ends_in_zeros, mapped, no_model
from .quantized import Stored

log = logging.getLogger(__name__)

PIECES, WHOLE, TEKKEN = "spiece_model", "tokenizer_json", "tekken_model"
"""How ComfyUI's files call tensors that are no numbers but a vocabulary: a model of sentencepiece's, a tokenizer.json,
Mistral's tekken.json."""
MAX_VOCABULARY = 64 << 20
"""The largest that is read, in bytes; Gemma's take 4 MB."""


@dataclass(frozen=True)
class Tokenizer:
    """The vocabulary that a model brings along. ``files``: of transformers, by name (``tokenizer.json``,
    ``spiece.model``, …). ``entries``: reads the ``tokenizer.…`` entries of a GGUF file, and ``stored`` reads them as
    they stand there; None for other forms. ``tensors``: those of the file that are a vocabulary, by their names."""

    files: Mapping[str, Path] = field(default_factory=dict)
    entries: Callable[[], Mapping[str, Any]] | None = None
    stored: Callable[[], Mapping[str, gguf_header.Value]] | None = None
    tensors: Mapping[str, Weight] = field(default_factory=dict)

    def tensor(self, kind: str) -> Weight | None:
        """The vocabulary of a kind (:data:`PIECES`, :data:`WHOLE`), whatever stands before its name."""
        return next((weight for name, weight in self.tensors.items() if _last(name) == kind), None)

    @property
    def whole(self) -> bool:
        """Whether a tokenizer can be made of it."""
        return bool(self.entries or self.tensor(PIECES) or self.tensor(WHOLE) or "tokenizer.json" in self.files)


@dataclass(frozen=True)
class Checkpoint:
    """An opened model file or directory.

    ``tensors``: by the file's own names (a pipeline's with their folder: ``unet.conv_in.weight``), in its order.
    ``skipped``: tensors of types that are not read (packed 4-bit formats, booleans …), with the type. ``metadata``: the
    file's text entries. ``configs``: folder → its config.json, "scheduler" → its scheduler_config.json; "" → a
    pipeline's model_index.json, or the config.json beside a component's files. ``tokenizers``: folder → vocabulary
    (``tokenizer``, ``tokenizer_2``); "" → that of a single file or component.
    """

    path: Path
    tensors: Mapping[str, Weight]
    skipped: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tokenizers: Mapping[str, Tokenizer] = field(default_factory=dict)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint at ``path``, mapped: a file, an index of shards or any of them, a component's directory, or a
    pipeline's, also by its model_index.json.

    Raises :class:`CheckpointError` when there is none, when its form is not supported, and when it is damaged.
    """
    path = Path(path)
    try:
        if path.name == directory.INDEX and path.is_file():
            path = path.parent
        if path.is_dir():
            is_pipeline = (path / directory.INDEX).is_file()
            return _pipeline(path) if is_pipeline else _component(path, path, directory.weight_files(path))
        if directory.is_index(path):
            return _component(path, path.parent, directory.indexed(path), path)
        files = directory.shards(path)
        return _joined(path, files) if files == [path] else _component(path, path.parent, files)
    except FileNotFoundError as error:
        missing = Path(error.filename or path)
        raise CheckpointError(missing, absent(missing)) from error
    except OSError as error:
        raise CheckpointError(error.filename or path, error.strerror or str(error)) from error


@dataclass(frozen=True)
class _Read:
    """One file as it is stored: ``tensors`` of ggml's types, or ``stored`` ones that may belong together."""

    stored: Mapping[str, Stored] = field(default_factory=dict)
    tensors: Mapping[str, Weight] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    tokenizers: Mapping[str, Tokenizer] = field(default_factory=dict)


def _read(path: Path) -> _Read:
    file = mapped(path)
    if ends_in_zeros(file.data):
        log.warning("%s: ends in zeros, as a download does that has not ended", path)
    if bytes(file.data[:4]) == gguf_header.MAGIC:
        tensors, skipped, header = gguf_file.read(file)
        entries, as_stored = partial(gguf_file.tokenizer, file, header), partial(gguf_file.vocabulary, file, header)
        brings = header.arrays or gguf_header.WHOLE in header.vocabulary
        tokenizers = {"": Tokenizer(entries=entries, stored=as_stored)} if brings else {}
        return _Read({}, tensors, skipped, header.metadata, tokenizers)
    if safetensors_file.is_safetensors(file.data):
        found = safetensors_file.read(file)
        vocabularies = {name: each.weight for name, each in found.stored.items() if _is_vocabulary(name, each)}
        numbers = {name: each for name, each in found.stored.items() if name not in vocabularies}
        tokenizers = {"": Tokenizer(tensors=vocabularies)} if vocabularies else {}
        return _Read(numbers, {}, found.skipped, found.metadata, tokenizers)
    if pickled.is_pickle(file.data):
        stored, skipped = pickled.read(file)
        return _Read(stored, {}, skipped)
    raise CheckpointError(path, no_model(file.data))


def _is_vocabulary(name: str, tensor: Stored) -> bool:
    known = _last(name) in (PIECES, WHOLE, TEKKEN)
    return known and tensor.type == "U8" and tensor.weight.nbytes <= MAX_VOCABULARY


def _last(name: str) -> str:
    """A tensor's name without what stands before it."""
    return name.rpartition(".")[2]


def _joined(path: Path, files: Sequence[Path]) -> Checkpoint:
    """Files with different tensors as one; what is said beside them is the first one's, and the vocabulary that of the
    first one that has any. A tensor and what scales it may be in two files."""
    parts = [_read(file) for file in files]
    stored = {name: tensor for part in parts for name, tensor in part.stored.items()}
    tensors = {name: weight for part in parts for name, weight in part.tensors.items()}
    skipped = {name: dtype for part in parts for name, dtype in part.skipped.items()}
    made, unread = quantized.opened(stored, parts[0].metadata)
    tokenizers = next((part.tokenizers for part in parts if part.tokenizers), {})
    return Checkpoint(path, {**tensors, **made}, {**skipped, **unread}, parts[0].metadata, {}, tokenizers)


def _component(path: Path, folder: Path, files: Sequence[Path], index: Path | None = None) -> Checkpoint:
    """The files of one component, with what lies beside them in its folder, or in the pipeline that it is part of."""
    joined = _joined(path, files)
    if index is not None:
        directory.check_index(index, {**joined.tensors, **joined.skipped})
    config = folder / "config.json"
    configs = {"": directory.read_json(config)} if config.is_file() else {}
    found = directory.tokenizer_files(folder)
    if not found and folder.name.startswith("text_encoder"):
        found = directory.tokenizer_files(folder.parent / folder.name.replace("text_encoder", "tokenizer"))
    tokenizers = {"": Tokenizer(found)} if found else joined.tokenizers
    return replace(joined, configs=configs, tokenizers=tokenizers)


def _pipeline(path: Path) -> Checkpoint:
    """All components of a diffusers directory."""
    tensors: dict[str, Weight] = {}
    skipped: dict[str, str] = {}
    configs: dict[str, Mapping[str, Any]] = {"": directory.read_json(path / directory.INDEX)}
    for folder in directory.components(path):
        configs[folder.name] = directory.read_json(folder / "config.json")
        opened = _joined(folder, directory.weight_files(folder))
        for name, weight in opened.tensors.items():
            tensors[f"{folder.name}.{name}"] = replace(weight, name=f"{folder.name}.{name}")
        skipped |= {f"{folder.name}.{name}": dtype for name, dtype in opened.skipped.items()}
    if (path / "scheduler" / "scheduler_config.json").is_file():
        configs["scheduler"] = directory.read_json(path / "scheduler" / "scheduler_config.json")
    found = {folder.name: directory.tokenizer_files(folder) for folder in sorted(path.glob("tokenizer*"))}
    return Checkpoint(path, tensors, skipped, {}, configs, {name: Tokenizer(files) for name, files in found.items()})

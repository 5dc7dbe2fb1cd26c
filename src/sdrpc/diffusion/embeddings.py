"""Learnt words of a session (textual inversion): files in a folder, found by their names in prompts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import numpy as np

from ..checkpoints.checkpoint import Checkpoint, open_checkpoint
from ..checkpoints.deltas import numbers
from ..errors import CheckpointError, InvalidValue
from ..families.base import F32
from ..families.model import Model
from ..ggml.weight import Weight
from ..prompts.learned import BEGINNING, FIRST, NOTHING, Learned, pattern
from .named_files import files_in

SUFFIXES = (".safetensors", ".pt", ".bin", ".ckpt", ".gguf")
"""Of files that are looked at, in order of preference where several have one name."""

MAX_VECTORS = 1000
"""Of one word; most have one to sixteen, and a chunk of a prompt has room for 75."""

MAX_TENSORS = 16
"""Of a file with one word: one for each text encoder, and what its training noted."""

_ASKED = re.compile(rf"{BEGINNING}(?P<word>[\w.-]+)", re.IGNORECASE)


class Embeddings:
    """The learnt words in ``folder`` for ``model``; none where there is no folder."""

    def __init__(self, model: Model, folder: Path | None) -> None:
        self._model, self._folder = model, folder
        self._known: dict[tuple[tuple[Path, int, int], ...], Learned] = {}

    @cached_property
    def files(self) -> dict[str, Path]:
        """The files, by the words that they are, in small letters. Raises :class:`InvalidValue` for a folder that is
        none."""
        if self._folder is None:
            return {}
        if not self._folder.is_dir():
            raise InvalidValue("embd_dir", self._folder, "is no folder")
        paths = files_in(self._folder, SUFFIXES)
        paths.sort(key=lambda path: SUFFIXES.index(path.suffix.lower()), reverse=True)
        return {path.stem.lower(): path for path in paths}

    def of(self, text: str) -> Learned:
        """The learnt words of a prompt.

        Raises :class:`InvalidValue` for one that is asked for and not there, or that the model's family has no use for,
        and :class:`CheckpointError` for a file that is none, or made for other text encoders.
        """
        found = [match["word"].lower() for match in pattern(self.files).finditer(text)] if self.files else []
        for match in _ASKED.finditer(text):
            self._check(match)
        used = list(dict.fromkeys(found))
        if not used:
            return NOTHING
        encoders = self._model.family.learns
        if not encoders:
            raise InvalidValue("embd_dir", used[0], f"{self._model.family.title} has no learnt words in sdrpc")
        paths = [self.files[word] for word in used]
        key = tuple((path, path.stat().st_mtime_ns, path.stat().st_size) for path in paths)
        if key not in self._known:
            self._known[key] = self._read(dict(zip(used, paths, strict=True)), encoders)
        return self._known[key]

    def _check(self, match: re.Match[str]) -> None:
        """Raises :class:`InvalidValue` where ``embedding:name`` names nothing."""
        if self.files and pattern(self.files).match(match.string, match.start()):
            return
        there = f"there are {', '.join(sorted(self.files))}" if self.files else "there is none"
        where = "" if self._folder is None else f" in {self._folder}"
        raise InvalidValue("prompt", match[0], f"no such embedding{where} (embd_dir); {there}", "embd_dir")

    def _read(self, paths: Mapping[str, Path], encoders: tuple[str, ...]) -> Learned:
        words: dict[str, tuple[int, ...]] = {}
        vectors: dict[str, list[F32]] = {encoder: [] for encoder in encoders}
        first = FIRST
        for word, path in paths.items():
            file = open_checkpoint(path)
            read = {encoder: self._vectors(file, encoder) for encoder in encoders}
            counts = {len(each) for each in read.values()}
            if len(counts) != 1:
                raise CheckpointError(path, f"has {' and '.join(map(str, sorted(counts)))} vectors for one word")
            count = counts.pop()
            words[word] = tuple(range(first, first + count))
            first += count
            for encoder, each in read.items():
                vectors[encoder].append(each)
        return Learned(words, {encoder: np.concatenate(each) for encoder, each in vectors.items()})

    def _vectors(self, file: Checkpoint, encoder: str) -> F32:
        """A word's vectors for a text encoder (vectors, width): the tensor with the encoder's name, or of its width."""
        if len(file.tensors) > MAX_TENSORS:
            raise CheckpointError(file.path, f"is no word: it has {len(file.tensors)} tensors, as models have")
        width = int(self._model[encoder].config["hidden_size"])
        tensors = [file.tensors[encoder]] if encoder in file.tensors else list(file.tensors.values())
        fitting = [tensor for tensor in tensors if _is_word(tensor) and tensor.shape[-1] == width]
        if not fitting:
            shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors[:3]) or "no tensor"
            title = self._model.family.title
            raise CheckpointError(
                file.path, f"is no word for this {title}, whose {encoder} has vectors of {width}: it has {shapes}"
            )
        values = numbers(fitting[0]).reshape(-1, width)
        if not np.isfinite(values).all():
            raise CheckpointError(file.path, "has values that are NaN or infinite", fitting[0].name)
        return values


def _is_word(tensor: Weight) -> bool:
    return len(tensor.shape) in (1, 2) and 0 < (tensor.shape[0] if len(tensor.shape) == 2 else 1) <= MAX_VECTORS

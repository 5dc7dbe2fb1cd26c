"""LoRAs of a session: their files, found by name in a folder and kept open."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path

import numpy as np

from ..checkpoints.checkpoint import open_checkpoint
from ..checkpoints.deltas import numbers
from ..errors import CheckpointError, InvalidValue
from ..families.lora import Lora, open_lora
from ..families.model import Model
from ..models import LORAS, LORAS_OF, SHIPPED
from .named_files import by_name, files_in
from .request import Applied

SUFFIXES = (".safetensors", ".gguf", ".ckpt", ".pt", ".pth", ".bin")
"""Of a LoRA's file, which its name need not have, in order of preference."""

KEPT = 8
"""LoRAs that stay open, so that the next picture with one of them finds it as it was."""


def names(folder: Path, models: Collection[Path | None] = ()) -> dict[str, Path]:
    """Name → file of the LoRAs directly in ``folder``, and of those that ship with sdrpc for one of ``models``."""
    files = files_in(folder, SUFFIXES) if folder.is_dir() else []
    shipped = LORAS if SHIPPED[LORAS_OF] in models else {}
    return {**shipped, **by_name(files)}


def find(folder: Path, name: str | Path) -> Path:
    """The file of a LoRA: in ``folder`` or below it, with or without its suffix, else one that ships with sdrpc; a
    :class:`Path` is the file itself.

    Raises :class:`InvalidValue`, which says what there is.
    """
    if isinstance(name, Path):
        return name
    relative = Path(name)
    if relative.is_absolute() or ".." in relative.parts or "\0" in name:
        raise InvalidValue("loras", name, f"is no name of a file in {folder} (lora_dir)", "lora_dir")
    for path in (folder / relative, *(folder / f"{name}{suffix}" for suffix in SUFFIXES)):
        if path.is_file():
            return path
    if name in LORAS:
        return LORAS[name]
    there = f"there are {', '.join(known)}" if (known := names(folder)) else "there is none"
    shipped = f"with sdrpc, for the model {LORAS_OF}, comes {', '.join(LORAS)}"
    raise InvalidValue("loras", name, f"no such LoRA in {folder} (lora_dir): {there}; {shipped}", "lora_dir")


class Loras:
    """The LoRA files of a model that were used last, open."""

    def __init__(self, model: Model, folder: Path) -> None:
        self._model, self._folder = model, folder
        self._open: OrderedDict[tuple[Path, int, int], Lora] = OrderedDict()

    def opened(self, applied: Applied) -> Lora:
        """The LoRA, opened if it is not yet or its file changed. Raises :class:`InvalidValue` and
        :class:`CheckpointError`."""
        path = find(self._folder, applied.name)
        try:
            state = path.stat()
        except OSError as error:
            raise InvalidValue("loras", path, error.strerror or str(error)) from error
        key = path, state.st_mtime_ns, state.st_size
        if key not in self._open:
            self._open[key] = open_lora(path, self._model)
        self._open.move_to_end(key)
        while len(self._open) > KEPT:
            self._open.popitem(last=False)
        return self._open[key]

    def check(self, loras: Collection[Applied]) -> None:
        """Read ``loras`` through. Raises :class:`CheckpointError` for values that are no finite numbers."""
        for applied in loras:
            file = open_checkpoint(find(self._folder, applied.name))
            for tensor in file.tensors.values():
                if not np.isfinite(numbers(tensor)).all():
                    raise CheckpointError(file.path, "has values that are NaN or infinite", tensor.name)

    def unknown(self) -> dict[str, list[str]]:
        """Per file, what in it belongs to no layer of the model."""
        return {str(lora.path): list(lora.unknown) for lora in self._open.values() if lora.unknown}

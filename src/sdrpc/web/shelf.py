"""The models that can be asked for by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from threading import Lock

from ..diffusion.named_files import by_name
from ..errors import InvalidValue, SdrpcError
from ..families.model import Model, ModelFiles, open_model

SUFFIXES = (".safetensors", ".gguf", ".ckpt", ".pt")
"""Of files that may be whole models. A folder with a model_index.json is one as well."""


class Shelf:
    """``first``: name and files of the model that is meant where none is named; ``folder``: whole models, each under
    its name without the suffix (with it where two share the rest). What is no model (a VAE, a LoRA) is not on the
    shelf."""

    def __init__(self, first: tuple[str, ModelFiles], folder: Path | None = None) -> None:
        self.default = first[0]
        self._first, self._folder = first, folder
        self._judged: dict[tuple[Path, float], bool] = {}
        self._opened: dict[str, tuple[ModelFiles, object, Model]] = {}
        self._lock = Lock()

    def models(self) -> Mapping[str, ModelFiles]:
        """Name → files, as they are now: files come and go."""
        found = {} if self._folder is None else by_name(filter(self._is, sorted(self._folder.iterdir())))
        return {self.default: self._first[1]} | {
            name: ModelFiles(path, types=self._first[1].types) for name, path in found.items() if name != self.default
        }

    def find(self, name: str | None) -> tuple[str, ModelFiles]:
        """The model called ``name``, with or without its file's suffix; the default for None. Names are looked up,
        never joined to a path. Raises :class:`InvalidValue`."""
        models = self.models()
        wanted = name or self.default
        for known in (wanted, *(wanted.removesuffix(suffix) for suffix in SUFFIXES)):
            if known in models:
                return known, models[known]
        raise InvalidValue("model", name, f"there is no such model; there are {', '.join(models)}")

    def open(self, name: str | None) -> tuple[str, Model]:
        """The model called ``name`` and its name. Raises :class:`InvalidValue`, and :class:`CheckpointError`."""
        known = self.known(name)
        if known is not None:
            return name or self.default, known
        found, files = self.find(name)
        stamp = _stamp(files)
        with self._lock:
            opened = self._opened.get(found)
            if opened is None or opened[:2] != (files, stamp):
                opened = self._opened[found] = files, stamp, open_model(files)
            return found, opened[2]

    def known(self, name: str | None) -> Model | None:
        """The model called ``name`` where :meth:`open` has read it and its files are what they were then: no file is
        read, and no folder."""
        opened = self._opened.get(name or self.default)
        return opened[2] if opened is not None and opened[1] == _stamp(opened[0]) else None

    def _is(self, path: Path) -> bool:
        if path.name.startswith(".") or not (path.suffix in SUFFIXES or (path / "model_index.json").exists()):
            return False
        key = path, path.stat().st_mtime
        if key not in self._judged:
            self._judged[key] = _is_model(path)
        return self._judged[key]


def _stamp(files: ModelFiles) -> object:
    """What changes when the files do."""
    return tuple((path, path.stat().st_mtime) for path in files.named.values() if path.exists())


def _is_model(path: Path) -> bool:
    try:
        open_model(ModelFiles(path))
    except (SdrpcError, OSError):
        return False
    return True

"""Directories of model files: diffusers pipelines, single components of them or of transformers, sharded files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

INDEX = "model_index.json"
"""What tells a pipeline's directory from a component's."""

IGNORED = frozenset({"safety_checker", "feature_extractor"})
"""Folders of a pipeline that no picture needs."""

STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
VARIANTS = ("", ".fp16", ".bf16")
"""In order of preference: full precision first."""
SUFFIXES = (".safetensors", ".bin")

TOKENIZER_FILES = (
    "added_tokens.json", "chat_template.jinja", "merges.txt", "special_tokens_map.json", "spiece.model",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt",
)  # fmt: skip

_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.[A-Za-z]+)")


def components(path: Path) -> list[Path]:
    """The folders of a pipeline that hold weights, in the order of their names."""
    folders = [inner for inner in sorted(path.iterdir()) if inner.is_dir() and inner.name not in IGNORED]
    return [inner for inner in folders if (inner / "config.json").is_file() or any(_candidates(inner))]


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """The files of a tokenizer in a folder, by their names."""
    return {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}


def weight_files(folder: Path) -> list[Path]:
    """A component's files: those of its index, or its only one."""
    for suffix in SUFFIXES:
        for variant in VARIANTS:
            for stem in STEMS:
                for index in (f"{stem}{suffix}.index{variant}.json", f"{stem}{variant}{suffix}.index.json"):
                    if (folder / index).is_file():
                        return indexed(folder / index)
                if (folder / f"{stem}{variant}{suffix}").is_file():
                    return [folder / f"{stem}{variant}{suffix}"]
    found = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.gguf"))
    if not found:
        raise CheckpointError(folder, "has no .safetensors file (nor a model_index.json, as whole models have)")
    files = shards(found[0])
    if set(found) - set(files):
        names = ", ".join(file.name for file in found[:4])
        raise CheckpointError(folder, f"has several files of weights ({names} …): name the one that is meant")
    return files


def is_index(path: Path) -> bool:
    return path.name.endswith(".index.json") or re.search(r"\.index\.\w+\.json$", path.name) is not None


def indexed(index: Path) -> list[Path]:
    """The shards that an index names. Raises :class:`CheckpointError` that says which are missing."""
    entries = read_json(index).get("weight_map")
    names = sorted({str(name) for name in entries.values()}) if isinstance(entries, dict) else []
    if not names:
        raise CheckpointError(index, "names no files of weights")
    if any(Path(name).name != name or "\\" in name for name in names):
        raise CheckpointError(index, "names files outside of its folder")
    return _present(index, [index.parent / name for name in names])


def shards(path: Path) -> list[Path]:
    """All files of the set that a file called ``…-00001-of-00003.…`` belongs to; the file alone if it has no such
    name. Raises :class:`CheckpointError` that says which are missing."""
    match = _SHARD.fullmatch(path.name)
    if match is None:
        return [path]
    stem, _, count, suffix = match.groups()
    return _present(path, [path.with_name(f"{stem}-{i:05}-of-{count}{suffix}") for i in range(1, int(count) + 1)])


def _present(source: Path, files: list[Path]) -> list[Path]:
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CheckpointError(source, f"of {len(files)} files these are missing: {', '.join(missing[:3])}{more}")
    return files


def check_index(index: Path, names: Mapping[str, Any]) -> None:
    """Whether the shards have all tensors that the index promises."""
    for name, file in read_json(index)["weight_map"].items():
        if name not in names:
            raise CheckpointError(index.parent / str(file), "is missing, though the index has it here", name)


def read_json(path: Path) -> Mapping[str, Any]:
    """A JSON object; a byte order mark, which editors of Windows write, is read over."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise CheckpointError(path, error.strerror or str(error)) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"damaged: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(path, "is not a JSON object")
    return content


def _candidates(folder: Path) -> Iterator[Path]:
    for suffix in SUFFIXES:
        yield from folder.glob(f"*{suffix}")

"""Python values as data: what a value is made of, apart from the tensors in it.

A description is a nested tuple. It is hashable, so that two calls with the same structure use the same graph; a value
can be built from it with other tensors; and where it holds nothing but data it has a form as JSON, so that another
process can build the value.
"""

from __future__ import annotations

import enum
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import Any, TypeVar

import numpy as np
import torch

Description = tuple[Any, ...]
T = TypeVar("T")

PACKAGES = frozenset({"torch", "diffusers", "transformers", "huggingface_hub"}) | sys.stdlib_module_names
"""Whose classes and functions may be named in a description that leaves the process: their versions are known."""

SCALARS: dict[str, Callable[[str], Any]] = {
    "bool": lambda text: text == "True", "int": int, "float": float, "complex": complex, "str": str,
    "bytes": bytes.fromhex, "dtype": lambda text: getattr(torch, text), "device": torch.device,
}  # fmt: skip
"""Kind of a plain value → how it is read from its text."""


class Same:
    """Something that is used as it is. It equals what has the same ``value``, by default only itself."""

    __slots__ = ("it", "value")

    def __init__(self, it: Any, value: Any = None) -> None:
        self.it = it
        self.value = id(it) if value is None else value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.value == self.value

    def __hash__(self) -> int:
        return hash(self.value)


@dataclass(frozen=True, eq=False)
class Parts:
    """What a value is made of: its description, and its tensors in order."""

    description: Description
    tensors: tuple[torch.Tensor, ...]


def take_apart(value: Any) -> Parts:
    """Describe ``value``; build it again, with its or other tensors, by :func:`build`."""
    walk = Walk()
    description = walk.describe(value)
    return Parts(description, tuple(walk.tensors))


def objects(description: Any) -> Iterator[Any]:
    """The objects in a description that are used as they are."""
    if isinstance(description, Same):
        yield description.it
    elif isinstance(description, tuple):
        for part in description:
            yield from objects(part)


class Walk:
    """Describes values. ``tensors`` are those that were met, ``containers`` the objects that may change in place."""

    ignored: frozenset[str] = frozenset()
    """Keys and attributes that are left out."""

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        self.containers: list[Any] = []
        self._positions: dict[int, int] = {}
        self._open: set[int] = set()
        self._described: dict[int, tuple[Any, Description]] = {}
        """By id; with the object itself, so that the id stays its own."""

    def describe(self, value: Any) -> Description:
        plain = _scalar(value)
        if plain is not None:
            return plain
        if isinstance(value, torch.Tensor):
            return self.tensor(value)
        if id(value) in self._described:
            return self._described[id(value)][1]
        if id(value) in self._open:
            return "same", Same(value)  # part of itself
        self._open.add(id(value))
        description = self._describe(value)
        self._open.remove(id(value))
        self._described[id(value)] = value, description
        return description

    def tensor(self, value: torch.Tensor) -> Description:
        position = self._positions.setdefault(id(value), len(self.tensors))
        if position == len(self.tensors):
            self.tensors.append(value)
        return "tensor", position

    def _describe(self, value: Any) -> Description:
        kind = type(value)
        if kind in (list, tuple):
            if kind is list:
                self.containers.append(value)
            return (kind.__name__, *map(self.describe, value))
        if isinstance(value, enum.Enum):
            return "enum", kind, value.name
        if isinstance(value, torch.Size):
            return ("size", *value)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return ("named", kind, *map(self.describe, value))
        if isinstance(value, tuple) and hasattr(kind, "n_sequence_fields"):  # torch.return_types
            return ("sequence", kind, *map(self.describe, value))
        if kind is set or kind is frozenset:
            self.containers.append(value)
            return (kind.__name__, *sorted(map(self.describe, value), key=repr))
        if isinstance(value, np.ndarray) and value.dtype != object:
            digest = blake2b(np.ascontiguousarray(value).tobytes(), digest_size=16).hexdigest()
            return "same", Same(value, (str(value.dtype), value.shape, digest))
        if isinstance(value, type | types.FunctionType | types.BuiltinFunctionType):
            return ("name", value) if _found_by_name(value) else ("same", Same(value))
        if kind is partial:
            return "partial", *map(self.describe, (value.func, value.args, value.keywords))
        return self._object(value)

    def _object(self, value: Any) -> Description:
        """A mapping, or an object that is made of its attributes; anything else has no value of its own."""
        kind = type(value)
        state = attributes(value)
        opaque = isinstance(value, torch.nn.Module | types.ModuleType) or callable(getattr(value, "acquire", None))
        mapping = isinstance(value, dict)
        if opaque or not (mapping or isinstance(state, dict)) or (not mapping and not _made_of_attributes(kind)):
            return "same", Same(value)
        items: Description = ()
        if mapping:
            self.containers.append(value)
            items = tuple((self.describe(k), self.describe(v)) for k, v in dict.items(value) if not self._ignores(k))
        if state is not None:
            self.containers.append(Slotted(value) if _slots(kind) else state)
        described = tuple((name, self.describe(v)) for name, v in (state or {}).items() if name not in self.ignored)
        return "object", kind, mapping, items, described

    def _ignores(self, key: Any) -> bool:
        return isinstance(key, str) and key in self.ignored


class Slotted:
    """The attributes of an object that has slots, as they are now."""

    def __init__(self, it: Any) -> None:
        self.it = it

    def __len__(self) -> int:
        return len(attributes(self.it) or ())

    def __iter__(self) -> Iterator[Any]:
        return iter((attributes(self.it) or {}).values())


def attributes(value: Any) -> dict[str, Any] | None:
    """An object's own attributes, those in slots too; None where it can't have any."""
    slots, state = _slots(type(value)), getattr(value, "__dict__", None)
    if not slots:
        return state
    return {**{name: getattr(value, name) for name in slots if hasattr(value, name)}, **(state or {})}


def _slots(kind: type) -> tuple[str, ...]:
    return tuple(
        name
        for base in kind.__mro__
        if "__slots__" in vars(base)
        for name, member in vars(base).items()
        if isinstance(member, types.MemberDescriptorType)
    )


def build(description: Description, tensors: Sequence[torch.Tensor]) -> Any:
    """The value that ``description`` is of, with these tensors. A note of the meta device, which is what a module saw
    while it was captured, becomes one of the tensors' device."""
    kind, *rest = description
    if tuple(description) == ("device", "meta") and tensors:
        return tensors[0].device
    if kind in SCALARS:
        return SCALARS[kind](rest[0])
    return _BUILDERS[kind](rest, tensors)


def _many(rest: Sequence[Any], tensors: Sequence[torch.Tensor]) -> Iterator[Any]:
    return (build(part, tensors) for part in rest)


def _build_named(rest: Sequence[Any], tensors: Sequence[torch.Tensor]) -> Any:
    kind, *fields = rest
    return tuple.__new__(kind, _many(fields, tensors))


def _build_object(rest: Sequence[Any], tensors: Sequence[torch.Tensor]) -> Any:
    kind, mapping, items, own = rest
    made = (dict if mapping else object).__new__(kind) if not issubclass(kind, OrderedDict) else kind.__new__(kind)
    put = OrderedDict.__setitem__ if mapping and issubclass(kind, OrderedDict) else dict.__setitem__
    for key, value in items:
        put(made, build(key, tensors), build(value, tensors))
    slots = _slots(kind)
    for name, value in own:
        if name in slots:
            object.__setattr__(made, name, build(value, tensors))  # it may be frozen
        else:
            made.__dict__[name] = build(value, tensors)
    return made


def _build_partial(rest: Sequence[Any], tensors: Sequence[torch.Tensor]) -> Any:
    function, args, keywords = _many(rest, tensors)
    return partial(function, *args, **keywords)


_BUILDERS: dict[str, Callable[[Sequence[Any], Sequence[torch.Tensor]], Any]] = {
    "none": lambda *_: None,
    "tensor": lambda rest, tensors: tensors[rest[0]],
    "list": lambda rest, tensors: list(_many(rest, tensors)),
    "tuple": lambda rest, tensors: tuple(_many(rest, tensors)),
    "set": lambda rest, tensors: set(_many(rest, tensors)),
    "frozenset": lambda rest, tensors: frozenset(_many(rest, tensors)),
    "named": _build_named,
    "sequence": lambda rest, tensors: rest[0](_many(rest[1:], tensors)),
    "size": lambda rest, *_: torch.Size(rest),
    "enum": lambda rest, *_: rest[0][rest[1]],
    "name": lambda rest, *_: rest[0],
    "same": lambda rest, *_: rest[0].it,
    "partial": _build_partial,
    "object": _build_object,
}


def _scalar(value: Any) -> Description | None:
    if value is None:
        return ("none",)
    kind = type(value).__name__
    if type(value) in (bool, int, float, complex, str):
        return kind, str(value) if kind == "str" else repr(value)
    if type(value) is bytes:
        return kind, value.hex()
    if isinstance(value, torch.dtype):
        return "dtype", str(value).removeprefix("torch.")
    return ("device", str(value)) if isinstance(value, torch.device) else None


def _made_of_attributes(kind: type) -> bool:
    """Whether an object of a class is its attributes: nothing in C."""
    inherited: Any = kind.__new__
    return inherited is object.__new__


def _found_by_name(value: Any) -> bool:
    """Whether a class or function is what its module and name lead to (no closure, no class made on the way)."""
    found: Any = sys.modules.get(getattr(value, "__module__", None) or "")
    for name in getattr(value, "__qualname__", "").split("."):
        found = getattr(found, name, None)
    return found is value


# JSON


def to_json(description: Description) -> Any:
    """A description as JSON's types; None where it names something that another process may not find."""
    try:
        return _encoded(description, {})
    except LookupError:
        return None


def from_json(data: Any) -> Description:
    """What :func:`to_json` gave. Raises :class:`LookupError` for anything else."""
    found = _decoded(data)
    if not isinstance(found, tuple):
        raise LookupError("no description")
    return found


_PLAIN = (str, int, float)


def _encoded(value: Any, before: dict[int, Any]) -> Any:
    """``before``: what came of parts by their ids, since a module's parts share most of what they are made of."""
    if isinstance(value, _PLAIN):
        return value
    if id(value) not in before:
        before[id(value)] = [_encoded(part, before) for part in value] if isinstance(value, tuple) else _named(value)
    return before[id(value)]


def _named(value: Any) -> Any:
    """Anything but a tuple, a number or a text."""
    if isinstance(value, type) or callable(value):
        if not from_packages(value):
            raise LookupError(repr(value))
        return {"module": value.__module__, "name": value.__qualname__}
    if isinstance(value, Same):
        raise LookupError("an object without a value")
    return value


def _decoded(data: Any) -> Any:
    if isinstance(data, list):
        return tuple(map(_decoded, data))
    if not isinstance(data, dict):
        return data
    module, name = str(data.get("module")), str(data.get("name"))
    found: Any = sys.modules.get(module) if module.partition(".")[0] in PACKAGES else None
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is None:
        raise LookupError(f"{module}.{name}")
    return found


def from_packages(value: Any) -> bool:
    """Whether a class or function is code of a package with a version, as it was released."""
    return str(getattr(value, "__module__", "")).partition(".")[0] in PACKAGES and _found_by_name(value)

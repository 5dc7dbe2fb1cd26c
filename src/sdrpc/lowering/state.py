"""What of a module decides its graph, and whether it changed.

Modules are changed in many ways between two calls: attention processors and slicing, fused projections, FreeU,
adapters, hooks, ``half()``, weights merged in place, methods of classes that are replaced. :class:`ModuleState` looks
at everything that is reachable from the module's attributes, and at what functions that no package released read:
their closures, and the globals that they name. Looking costs a few milliseconds a call: containers are compared by the
identity of what they hold, parts by their class, tensors by version, memory and dtype, and by their numbers as well,
since changes through ``tensor.data`` leave no other trace: all of them in a small module, some of them in a large one.
What it can't see: single numbers of a large module changed through ``.data``, and objects that keep their state outside
Python.
"""

from __future__ import annotations

import dis
import functools
import json
import operator
import types
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from hashlib import blake2b
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import CaptureError
from .capture import is_weight, not_saved, tensors_of
from .structure import PACKAGES, Description, Same, Walk, attributes, from_packages, to_json

LOOKED_AT = 1 << 17
"""Numbers of a module that are looked at before each call, some of each tensor where it has more."""

SAMPLES = 8
"""Numbers of each tensor that are looked at, however many there are."""

DIGESTED = 1 << 20
"""Numbers up to which a tensor of a module that is no part of the one described counts by all of them."""

STRUCTURE = frozenset({"_parameters", "_buffers", "_modules"})
"""Attributes of a module that are described by the tensors' and parts' own entries."""

_GLOBAL_HOOKS = tuple(
    getattr(nn.modules.module, f"_global_{name}", {})
    for name in ("forward_pre_hooks", "forward_hooks", "forward_hooks_always_called", "forward_hooks_with_kwargs")
)
"""Hooks of all modules, which torch keeps by number."""


_RELEASED = PACKAGES | {__name__.partition(".")[0]}


def released(function: types.FunctionType) -> bool:
    """Whether some package released a function's code, or it is ours: by the module that it was compiled in, which a
    decorator can't change."""
    return str(function.__globals__.get("__name__")).partition(".")[0] in _RELEASED


class Reads:
    """What a function reads that is not passed to it: its closure, the globals that it names, its defaults and
    attributes; and its code."""

    def __init__(self, function: types.FunctionType) -> None:
        self._function = function
        self._names = tuple(name for name in _names_in(function.__code__)[0] if name in function.__globals__)

    def __len__(self) -> int:
        return len(tuple(iter(self)))

    def __iter__(self) -> Iterator[Any]:
        it = self._function
        yield from (it.__code__, it.__defaults__, it.__kwdefaults__, it.__dict__)
        for cell in it.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # it is empty
                yield None
        yield from map(it.__globals__.get, self._names)


class Mentioned:
    """The attributes of an object, or of one of Python's modules, that have one of ``names``, as they are now."""

    def __init__(self, owner: Any, names: Sequence[str]) -> None:
        self._owner, self._names = owner, names

    def __len__(self) -> int:
        return len(tuple(iter(self)))

    def __iter__(self) -> Iterator[Any]:
        own = vars(self._owner)
        return (own[name] for name in self._names if name in own)


@functools.lru_cache(1024)
def _names_in(code: types.CodeType) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The globals, and the attributes, that a function and those within it name."""
    lines = list(dis.get_instructions(code))
    read = {line.argval for line in lines if line.opname == "LOAD_GLOBAL"}
    mentioned = {line.argval for line in lines if line.opname in ("LOAD_ATTR", "LOAD_METHOD")}
    for part in code.co_consts:
        if isinstance(part, types.CodeType):
            globals_within, attributes_within = _names_in(part)
            read.update(globals_within)
            mentioned.update(attributes_within)
    return tuple(sorted(read)), tuple(sorted(mentioned))


class _StateWalk(Walk):
    """Describes the state of modules: tensors, which become constants of the graph, by their numbers."""

    ignored = frozenset({"_use_default_values", "_name_or_path", "_diffusers_version"})
    """What diffusers notes of a configuration's origin: a path, and a list whose order changes from run to run."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.guests: list[nn.Module] = []
        """The modules that were met and are no parts."""
        self.kinds: list[tuple[nn.Module, type]] = []
        """The parts that were met, and their classes; not the module itself, which nothing here keeps alive."""
        self._module = id(module)
        self._own = {id(part) for part in module.modules()}
        self._owners: dict[Any, Description] = {}
        self._functions: list[types.FunctionType] = []
        """Those whose code no package released."""
        self._package: str | None = None
        """Of the function whose reads are described; None among a module's attributes."""

    def tensor(self, value: torch.Tensor) -> Description:
        if value.layout is not torch.strided or value.is_quantized:
            raise CaptureError(f"a tensor of {value.dtype} that is sparse or quantized: keep it as a dense one")
        super().tensor(value)
        about = "numbers", str(value.dtype), tuple(value.shape)
        if value.is_meta:
            return about
        raw = value.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy()
        return *about, blake2b(raw.data, digest_size=16).hexdigest()

    def parts(self, module: nn.Module) -> Description:
        """The parts of a module, without their tensors."""
        described = []
        for path, part in module.named_modules():
            if isinstance(part, torch.jit.ScriptModule):
                raise CaptureError(
                    f"{path or 'the module'} was compiled by torch.jit, and runs outside Python: take the original"
                )
            attributes = {name: value for name, value in vars(part).items() if name not in STRUCTURE}
            described.append((path, self.kind(original(type(part))), self.describe(attributes)))
            self.containers += [vars(part), part._parameters, part._buffers, part._modules]
            if id(part) != self._module:
                self.kinds.append((part, type(part)))
        return tuple(described)

    def _guest(self, module: nn.Module) -> Description:
        """A module that is no part of the one described, such as a LoRA's whose method was set on one: its parts, and
        its weights, which are constants of the graph."""
        self.guests.append(module)
        weights = tuple((name, self._weight(tensor)) for name, tensor in tensors_of(module).items())
        return "module", Same(module), self.parts(module), weights

    def _weight(self, tensor: torch.Tensor) -> Description:
        if tensor.numel() <= DIGESTED:
            return self.tensor(tensor)
        super().tensor(tensor)
        return "some numbers", str(tensor.dtype), tuple(tensor.shape), _version(tensor), _sampled(_samples([tensor]))

    def kind(self, kind: type) -> Description:
        """A class, and what was set on it."""
        return kind, *chain.from_iterable(map(self.names, kind.__mro__))

    def names(self, owner: Any) -> Description:
        """What a class, or one of Python's modules, has under its names that no package released."""
        if owner not in self._owners:
            self.containers.append(vars(owner))
            own = isinstance(owner, type) and not from_packages(owner)
            self._owners[owner] = tuple(
                (name, self.describe(value))
                for name, value in vars(owner).items()
                if (not released(value) if isinstance(value, types.FunctionType) else own and name[:2] != "__")
            )
        return self._owners[owner]

    def reads(self) -> Description:
        """What the functions that were met read, and those that are met there. Objects of the package that a function
        is from count by all their attributes, a script's own; others, such as its pipeline, and Python's modules by
        those that the function names."""
        found: list[Description] = []
        for function in self._functions:  # which grows meanwhile
            reads, (_, names) = Reads(function), _names_in(function.__code__)
            self.containers.append(reads)
            self._package, met = _package(function), set[int]()
            found.append(tuple((self.describe(value), self._mentioned(value, names, met)) for value in reads))
        self._package = None
        return tuple(found)

    def _mentioned(self, owner: Any, names: Sequence[str], met: set[int]) -> Description:
        """What an object that does not count as a whole has under ``names``, and what lies there."""
        known = isinstance(owner, nn.Module | torch.Tensor | type | types.FunctionType | dict)
        if known or id(owner) in met or not hasattr(owner, "__dict__") or not self._foreign(owner):
            return ()
        met.add(id(owner))
        mentioned = Mentioned(owner, names)
        self.containers.append(mentioned)
        return tuple((self.describe(value), self._mentioned(value, names, met)) for value in mentioned)

    def _foreign(self, value: Any) -> bool:
        return isinstance(value, types.ModuleType) or self._package not in (None, _package(type(value)))

    def _describe(self, value: Any) -> Description:
        if isinstance(value, types.MethodType):
            return "method", self.describe(value.__func__), self.describe(value.__self__)
        if isinstance(value, types.FunctionType) and not released(value):
            if self._package in (None, _package(value)):
                self._functions.append(value)
            return "same", Same(value)
        if isinstance(value, type) and not from_packages(value) and self._package in (None, _package(value)):
            return "class", *self.kind(value)
        if isinstance(value, np.ndarray) and value.flags.writeable:
            with suppress(TypeError, ValueError):  # of what torch has no dtype or strides
                super().tensor(torch.from_numpy(value))
        if isinstance(value, list | set | deque) and type(value) not in (list, set):
            self.containers.append(value)
            return "items", type(value), tuple(map(self.describe, value)), self.describe(attributes(value) or {})
        if isinstance(value, types.SimpleNamespace):
            return "attributes", type(value), self.describe(vars(value))
        return super()._describe(value)

    def _object(self, value: Any) -> Description:
        if isinstance(value, nn.Module):
            return ("same", Same(value)) if id(value) in self._own else self._guest(value)
        whole = isinstance(value, dict) or not self._foreign(value)
        description = super()._object(value) if whole else ("same", Same(value))
        return (*description, self.kind(original(type(value)))) if description[0] == "object" else description


class ModuleState:
    """The state of ``module`` as of the last :meth:`look`.

    ``description`` decides the graph. ``guests`` are modules that can be reached and are no parts.
    """

    def __init__(self, module: nn.Module) -> None:
        self.description: Description = ()
        self.guests: list[nn.Module] = []
        self._digested: tuple[Description, str | None] = (), None
        self._weights: list[torch.Tensor] = []
        self._refresh(module)

    @property
    def digest(self) -> str | None:
        """Of ``description``, the same in each process; None where it depends on code whose version is not known."""
        if self._digested[0] is not self.description:
            data = to_json(self.description)
            found = None if data is None else blake2b(json.dumps(data).encode(), digest_size=20).hexdigest()
            self._digested = self.description, found
        return self._digested[1]

    def look(self, module: nn.Module) -> tuple[bool, bool]:
        """Whether anything that decides the graph, and whether weights' numbers changed since the last look."""
        if (
            type(module) is self._kind
            and not self._changed()
            and self._numbers == _numbers(self._weights, self._samples)
        ):
            return False, False
        before, numbers = self.description, self._numbers
        self._refresh(module)
        return self.description != before, self._numbers != numbers

    def _refresh(self, module: nn.Module) -> None:
        walk, unsaved, tensors = _StateWalk(module), not_saved(module), tensors_of(module)
        strange = next((name for name, t in tensors.items() if t.layout is not torch.strided or t.is_quantized), None)
        if strange is not None:
            raise CaptureError(f"{strange} is sparse or quantized: devices have dense tensors; call to_dense()")
        weights = {name: tensor for name, tensor in tensors.items() if is_weight(name, tensor, unsaved)}
        first = {id(weight): name for name, weight in reversed(weights.items())}
        self.description = (
            walk.parts(module),
            tuple((name, str(w.dtype), tuple(w.shape), first[id(w)]) for name, w in weights.items()),
            tuple((name, walk.tensor(tensor)) for name, tensor in tensors.items() if name not in weights),
            tuple(map(walk.describe, _GLOBAL_HOOKS)),
            walk.names(nn.functional),
            walk.reads(),
        )
        self._kind = type(module)
        self._watch(walk, list(weights.values()), _tables_of_rows(module))

    def _watch(self, walk: _StateWalk, weights: list[torch.Tensor], rows: set[int]) -> None:
        self.guests, self._kinds = walk.guests, walk.kinds
        self._empty = [container for container in walk.containers if not container]
        self._filled = [(container, tuple(_values(container))) for container in walk.containers if container]
        self._tables = walk.tensors
        self._weights = list({id(weight): weight for weight in weights}.values())
        self._samples, self._table_samples = _samples(self._weights, rows), _samples(self._tables)
        self._numbers = _numbers(self._weights, self._samples)
        self._table_numbers = _numbers(self._tables, self._table_samples)

    def _changed(self) -> bool:
        return (
            any(type(part) is not kind for part, kind in self._kinds)
            or any(map(len, self._empty))
            or any(len(container) != len(saved) for container, saved in self._filled)
            or not all(all(map(operator.is_, _values(c), saved)) for c, saved in self._filled)
            or self._table_numbers != _numbers(self._tables, self._table_samples)
        )


def described(values: Iterable[Any], module: nn.Module) -> Description:
    """The state of functions and modules that a call of ``module`` is given, and of what they read."""
    walk = _StateWalk(module)
    return tuple(map(walk.describe, values)), walk.reads()


_OF_THE_CLASS = frozenset({"__dict__", "__weakref__", "__getstate__"})
"""Names that a class made like another leaves out; the last one is how parametrizations refuse to be pickled, which
offloaded modules do by themselves."""


def original(kind: type) -> type:
    """A module's class; one that :func:`sdrpc.offload` made stands for the class that it was made of, also where
    another was derived from it since, as torch's parametrizations do."""
    if not hasattr(kind, "_sdrpc_original"):
        return kind
    if "_sdrpc_original" not in vars(kind):
        bases = tuple(map(original, kind.__bases__))
        names = {name: value for name, value in vars(kind).items() if name not in _OF_THE_CLASS}
        kind._sdrpc_original = type(bases[0])(kind.__name__, bases, names)
    found: type = vars(kind)["_sdrpc_original"]
    return found


def _tables_of_rows(module: nn.Module) -> set[int]:
    """The weights, by id, whose rows are changed one by one: those of embeddings, as for a learnt word."""
    return {id(part._parameters.get("weight")) for part in module.modules() if isinstance(part, nn.Embedding)}


def _package(value: Any) -> str:
    """The first name of the module that a class or function is from."""
    return str(value.__module__).partition(".")[0]


def _values(container: Any) -> Iterator[Any]:
    return iter(container.values() if isinstance(container, dict | types.MappingProxyType) else container)


def _numbers(tensors: Sequence[torch.Tensor], samples: Sequence[Sequence[torch.Tensor]]) -> tuple[Any, ...]:
    """What changes when the numbers of tensors do."""
    return (*map(_facts, tensors), *_sampled(samples))


def _sampled(samples: Sequence[Sequence[torch.Tensor]]) -> tuple[bytes, ...]:
    return tuple(torch.cat(list(group)).cpu().numpy().tobytes() for group in samples)


def _facts(tensor: torch.Tensor) -> tuple[int, int, torch.dtype]:
    """The version that in-place operations count, where the numbers are, and what they are."""
    return _version(tensor), 0 if tensor.is_meta else tensor.data_ptr(), tensor.dtype


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _samples(tensors: Sequence[torch.Tensor], rows: Collection[int] = ()) -> list[list[torch.Tensor]]:
    """Views of numbers of each tensor, as bytes; together those that can be joined. All numbers where they are few,
    some otherwise; at least one of each row of those whose ids are ``rows``."""
    few = sum(tensor.numel() for tensor in tensors) <= LOOKED_AT
    many = max(SAMPLES, LOOKED_AT // max(1, len(tensors)))
    groups: dict[tuple[torch.device, int], list[torch.Tensor]] = {}
    for tensor in tensors:
        as_they_lie = tensor.layout is torch.strided and not (tensor.is_meta or tensor.is_conj() or tensor.is_neg())
        if as_they_lie and tensor.numel():
            numbers = tensor.detach()
            while numbers.ndim > 1:  # a view, whatever the strides
                numbers = numbers.view(-1) if numbers.is_contiguous() else numbers.select(-1, 0)
            numbers = numbers.reshape(-1)
            row = tensor.shape[-1] - 1 if id(tensor) in rows else numbers.numel()
            step = 1 if few else max(1, min(row, numbers.numel() // many | 1))  # odd, so that it meets all columns
            picked = numbers[::step].unsqueeze(-1)
            groups.setdefault((tensor.device, tensor.element_size()), []).append(picked.view(torch.uint8))
    return list(groups.values())

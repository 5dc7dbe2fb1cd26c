"""What of a module decides its graph, and whether it changed.

Modules are changed in many ways between two calls: attention processors and slicing, fused projections, FreeU,
adapters, hooks, ``half()``, weights merged in place. :class:`ModuleState` looks at everything that is reachable from
the module's attributes. Looking costs a few milliseconds a call: containers are compared by the identity of what they
hold, tensors by version, memory and dtype, and weights by samples of their numbers as well, since changes through
``tensor.data`` leave no other trace. What it can't see: a weight changed through ``.data`` in places that are not
sampled, and objects that keep their state outside Python.
"""

from __future__ import annotations

import operator
import types
from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

import torch
from torch import nn

from .capture import is_weight, not_saved, tensors_of
from .structure import PACKAGES, Description, Walk, from_packages, to_json

SAMPLES = 8
"""Numbers of each weight that are looked at before each call."""

_STRUCTURE = frozenset({"_parameters", "_buffers", "_modules"})
"""Attributes of a module that are described by the tensors' and parts' own entries."""


class _StateWalk(Walk):
    """Describes the state of modules: tensors, which become constants of the graph, by their numbers."""

    ignored = frozenset({"_use_default_values", "_name_or_path", "_diffusers_version"})
    """What diffusers notes of a configuration's origin: a path, and a list whose order changes from run to run."""

    def tensor(self, value: torch.Tensor) -> Description:
        super().tensor(value)
        about = "numbers", str(value.dtype), tuple(value.shape)
        if value.is_meta:
            return about
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return *about, blake2b(raw.data, digest_size=16).hexdigest()


class ModuleState:
    """The state of ``module`` as of the last :meth:`look`.

    ``description`` decides the graph.
    """

    def __init__(self, module: nn.Module) -> None:
        self.description: Description = ()
        self._classes: set[type] = set()
        self._weights: list[torch.Tensor] = []
        self._refresh(module)

    @property
    def data(self) -> Any:
        """``description`` as JSON; None where it depends on code whose version is not known."""
        return to_json(self.description) if all(map(_released, self._classes)) else None

    def look(self, module: nn.Module) -> tuple[bool, bool]:
        """Whether anything that decides the graph, and whether weights' numbers changed since the last look."""
        if not self._changed() and self._numbers == self._numbers_now():
            return False, False
        before, numbers = self.description, self._numbers
        self._refresh(module)
        return self.description != before, self._numbers != numbers

    def _refresh(self, module: nn.Module) -> None:
        walk, unsaved, tensors = _StateWalk(), not_saved(module), tensors_of(module)
        weights = {name: tensor for name, tensor in tensors.items() if is_weight(name, tensor, unsaved)}
        parts = []
        for path, part in module.named_modules():
            attributes = {name: value for name, value in vars(part).items() if name not in _STRUCTURE}
            parts.append((path, _original(type(part)), walk.describe(attributes)))
            walk.containers += [vars(part), part._parameters, part._buffers, part._modules]
        self.description = (
            tuple(parts),
            tuple((name, str(weight.dtype), tuple(weight.shape)) for name, weight in weights.items()),
            tuple((name, walk.tensor(tensor)) for name, tensor in tensors.items() if name not in weights),
        )
        self._classes = {_original(type(part)) for part in module.modules()}
        self._watch(walk, list(weights.values()))

    def _watch(self, walk: Walk, weights: list[torch.Tensor]) -> None:
        self._empty = [container for container in walk.containers if not container]
        self._filled = [(container, tuple(_values(container))) for container in walk.containers if container]
        self._tensors = walk.tensors
        self._weights = list({id(weight): weight for weight in weights}.values())
        self._facts = list(map(_facts, self._tensors))
        self._samples = _samples(self._weights)
        self._numbers = self._numbers_now()

    def _changed(self) -> bool:
        return (
            any(map(len, self._empty))
            or any(len(container) != len(saved) for container, saved in self._filled)
            or not all(all(map(operator.is_, _values(c), saved)) for c, saved in self._filled)
            or self._facts != list(map(_facts, self._tensors))
        )

    def _numbers_now(self) -> tuple[Any, ...]:
        """What changes when a weight's numbers do."""
        return (*map(_facts, self._weights), *(torch.cat(group).cpu().numpy().tobytes() for group in self._samples))


def _original(kind: type) -> type:
    """A module's class; one that :func:`sdrpc.offload` made stands for the class that it was made of."""
    original: type = getattr(kind, "_sdrpc_original", kind)
    return original


def _released(kind: type) -> bool:
    """Whether a class and all of its methods, as they are now, are code that some package released."""
    return all(
        from_packages(base)
        and all(_is_package_code(f) for f in vars(base).values() if isinstance(f, types.FunctionType))
        for base in kind.__mro__
    )


def _is_package_code(function: types.FunctionType) -> bool:
    """By the module that it was compiled in, which a decorator can't change."""
    return str(function.__globals__.get("__name__")).partition(".")[0] in PACKAGES


def _values(container: Any) -> Iterator[Any]:
    return iter(container.values() if isinstance(container, dict) else container)


def _facts(tensor: torch.Tensor) -> tuple[int, int, torch.dtype]:
    """The version that in-place operations count, where the numbers are, and what they are."""
    version = 0 if tensor.is_inference() else tensor._version
    return version, 0 if tensor.is_meta else tensor.data_ptr(), tensor.dtype


def _samples(weights: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Views of some numbers of each weight, as bytes; together those that can be joined."""
    groups: dict[tuple[torch.device, int], list[torch.Tensor]] = {}
    for weight in weights:
        if not weight.is_meta and weight.numel():
            numbers = weight.detach()
            while numbers.ndim > 1:  # a view, whatever the strides
                numbers = numbers.view(-1) if numbers.is_contiguous() else numbers.select(-1, 0)
            numbers = numbers.reshape(-1)
            picked = numbers[:: max(1, numbers.numel() // SAMPLES)].unsqueeze(-1)
            groups.setdefault((weight.device, weight.element_size()), []).append(picked.view(torch.uint8))
    return list(groups.values())

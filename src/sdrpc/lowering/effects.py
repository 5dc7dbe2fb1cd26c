"""What a call leaves in its module: a device keeps none of it.

A module is captured in a copy, whose code runs once for many calls. What it counts stays in that copy, and what it
makes of its inputs, such as maps of attention or features that a hook collects, has no numbers here.
"""

from __future__ import annotations

import functools
import random
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import UsageError
from .capture import of_inputs
from .state import STRUCTURE, Reads, released

WEIGHT_HOOKS = {
    "group_offloading": "diffusers' enable_group_offload",
    "layerwise_casting": "diffusers' enable_layerwise_casting",
}
"""Hooks of diffusers that change weights around each call → what sets them."""


def kept(module: nn.Module) -> str | None:
    """The attribute of a module (``mid_block.features``) from which a tensor can be reached that is made of the inputs
    of a call, while it is captured; None without one. What weights alone decide, each call makes anew."""
    seen = {id(part) for part in module.modules()}
    for path, part in module.named_modules():
        for name, value in _attributes(part).items():
            if any(map(of_inputs, _tensors(value, seen))):
                return f"{path}.{name}".lstrip(".")
    return None


def counted(before: nn.Module, after: nn.Module) -> str | None:
    """The attribute of a module, or what lies within it, whose number, text or table a call has changed; None without
    one. What is there only after a call (tables that were made for a size) is none."""
    parts, seen = dict(after.named_modules()), set[int]()
    for path, part in before.named_modules():
        if path in parts:
            for name, (old, new) in _pairs(_attributes(part), _attributes(parts[path])):
                within = None if name.startswith(_OF_TORCH) else _changed(old, new, seen)
                if within is not None:
                    return ".".join(filter(None, (path, name, within)))
    return None


def random_state() -> Any:
    """Where Python's and numpy's random numbers are."""
    numpys: Any = np.random.get_state()
    return random.getstate(), numpys[1].tobytes(), *numpys[2:]


_OF_TORCH = "_torchdynamo"
"""How names begin that torch.compile gives to what it counts for itself."""


def _changed(old: Any, new: Any, seen: set[int]) -> str | None:
    """Where something differs from what it was; "" where it does as a whole."""
    if type(old) is not type(new) or old is new:
        return None
    if isinstance(old, torch.Tensor):
        known = not (old.is_meta or new.is_meta or of_inputs(new)) and (old.shape, old.dtype) == (new.shape, new.dtype)
        return "" if known and not torch.equal(old, new) else None
    if type(old) in (bool, int, float, str):
        return "" if old != new and old == old else None  # not what is NaN
    if id(old) in seen:
        return None
    seen.add(id(old))
    if isinstance(old, list | tuple) and len(old) != len(new):
        return ""
    found = ((name, _changed(*pair, seen)) for name, pair in _pairs(_named(old), _named(new)))
    return next((".".join(filter(None, (name, within))) for name, within in found if within is not None), None)


def _named(value: Any) -> dict[str, Any]:
    """What an object is made of that a call may change, by name."""
    if isinstance(value, dict):
        return {str(name): part for name, part in value.items()}
    if isinstance(value, list | tuple):
        return {str(position): part for position, part in enumerate(value)}
    opaque = isinstance(value, nn.Module | type | types.ModuleType | types.FunctionType | types.MethodType)
    of_torch = type(value).__module__.partition(".")[0] == "torch"  # such as the graph of a torch.fx module
    return {} if opaque or of_torch or not hasattr(value, "__dict__") else vars(value)


def _attributes(part: nn.Module) -> dict[str, Any]:
    """A module's attributes, and its tensors by their own names."""
    own = {name: value for name, value in vars(part).items() if name not in STRUCTURE}
    return {**own, **part._parameters, **part._buffers}


def _pairs(old: dict[str, Any], new: dict[str, Any]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """What both have."""
    yield from ((name, (value, new[name])) for name, value in old.items() if name in new)


def _tensors(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """The tensors that can be reached, not through what was ``seen``."""
    if isinstance(value, torch.Tensor):
        yield value
    elif id(value) not in seen and (inside := _inside(value)):
        seen.add(id(value))
        for part in inside:
            yield from _tensors(part, seen)


def _inside(value: Any) -> Any:
    """What an object is made of."""
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, list | tuple | set):
        return value
    if isinstance(value, types.FunctionType):
        return () if released(value) else Reads(value)
    if isinstance(value, types.MethodType):
        return value.__func__, value.__self__
    if isinstance(value, functools.partial):
        return value.func, value.args, value.keywords
    opaque = isinstance(value, type | types.ModuleType) or not hasattr(value, "__dict__")
    return () if opaque else list(vars(value).values())


def check_hooks(module: nn.Module) -> None:
    """Refuse what of diffusers keeps weights in another form or place between calls than in them, or results."""
    hooks = [getattr(getattr(part, "_diffusers_hook", None), "hooks", {}) for part in module.modules()]
    for name, hook in (item for part in hooks for item in part.items()):
        if name in WEIGHT_HOOKS:
            raise UsageError(
                f"{WEIGHT_HOOKS[name]} and sdrpc.offload exclude each other: the device has the weights as they "
                "are, and this machine needs no room for them; load the model anew and leave it out"
            )
        if getattr(hook, "_is_stateful", False):
            raise UsageError(
                f"diffusers' {name} and sdrpc.offload exclude each other: it takes from one call what the next one "
                "leaves out, and here each call is computed whole; call disable_cache()"
            )

"""What a call leaves in its module: a device keeps none of it.

A module is captured in a copy, whose code runs once for many calls. Numbers that it counts stay in that copy, and
tensors that it keeps, such as maps of attention or features that a hook collects, have no numbers here.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..errors import UsageError
from .state import STRUCTURE, Reads, released

WEIGHT_HOOKS = {
    "group_offloading": "diffusers' enable_group_offload",
    "layerwise_casting": "diffusers' enable_layerwise_casting",
}
"""Hooks of diffusers that change weights around each call → what sets them."""


def kept(module: nn.Module) -> dict[int, str]:
    """The tensors without numbers that can be reached from a module's attributes, by id, each with the attribute
    (``mid_block.features``); not its weights."""
    found: dict[int, str] = {}
    seen: set[int] = set()
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            if name not in STRUCTURE:
                for tensor in _without_numbers(value, seen):
                    found.setdefault(id(tensor), f"{path}.{name}".lstrip("."))
    return found


def counted(before: nn.Module, after: nn.Module) -> str | None:
    """The attribute of a module, or of an object that is one, whose number a call has changed; None without one."""
    parts = dict(after.named_modules())
    for path, part in before.named_modules():
        for name, (old, new) in _pairs(part, parts.get(path)):
            pairs = [("", (old, new)), *_pairs(old, new)] if type(old) is type(new) else []
            for within, (a, b) in pairs:
                if type(a) is type(b) and type(a) in (int, float) and a != b:
                    return ".".join(filter(None, (path, name, within)))
    return None


def _pairs(old: Any, new: Any) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """The attributes that both have."""
    if isinstance(old, type) or not (hasattr(old, "__dict__") and hasattr(new, "__dict__")):
        return
    mine, others = vars(old), vars(new)
    yield from ((name, (value, others[name])) for name, value in mine.items() if name in others)


def _without_numbers(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """The tensors without numbers that can be reached, not through other modules."""
    if isinstance(value, torch.Tensor):
        if value.is_meta:
            yield value
    elif id(value) not in seen and (inside := _inside(value)):
        seen.add(id(value))
        for part in inside:
            yield from _without_numbers(part, seen)


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
    opaque = isinstance(value, nn.Module | type | types.ModuleType) or not hasattr(value, "__dict__")
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

"""A torch module that computes on a device: ``pipe.unet = sdrpc.offload(pipe.unet, device)``."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..device import Device
from ..errors import InvalidValue, UsageError
from ..runtime.lost import RETRY_SECONDS
from .remote_module import RemoteModule, sharing
from .state import original

ENTRY_POINTS = ("forward", "encode", "decode")
"""Methods that run on the device, where the module's class has them: what diffusers' pipelines call."""

MATMUL_PRECISIONS = ("highest", "high", "medium")
"""What :func:`torch.set_float32_matmul_precision` takes."""


def offload(
    module: nn.Module,
    device: Device,
    retry: float = RETRY_SECONDS,
    float32_matmul_precision: str | None = None,
) -> nn.Module:
    """``module`` with its computing done by ``device``.

    The result is a module of the same class: it has the same attributes, configuration, signatures, results and
    errors, and shares parameters with ``module``. Its ``forward`` (and ``encode`` and ``decode``, where the class has
    them; also where they were replaced on the instance) is captured once for each signature of inputs, or found in
    the cache on disk; the weights are uploaded with the first.

    It can be used as a module: from several threads (calls wait for each other), under ``torch.compile`` (a graph
    break), copied (a copy has its own memory on the device). What is changed in it afterwards counts from the next
    call on, weights too, within the limits that :mod:`sdrpc.lowering.state` states. It can't be pickled. What it has on
    the device is freed by ``close()``, or when it is garbage.

    What the module multiplies in float32 the device does, too, also one that is faster in a narrower dtype, as under
    torch's own default. With :func:`torch.set_float32_matmul_precision` at "medium" the device's precision decides
    (``rpc-server --precision``: bfloat16 where it has units for that); ``float32_matmul_precision`` says so for this
    module alone. Modules in float16 or bfloat16 are always computed as the device prefers.

    A server that is lost, between calls or in the middle of one, is waited for up to ``retry`` seconds (0: that is an
    error at once); the weights are uploaded again then, and the call's result is the same.

    Calls raise :class:`sdrpc.errors.CaptureError` for what can't be turned into a graph, the module's own errors for
    inputs that it refuses, and what the device raises. There are no gradients. :func:`torch.autocast` decides dtypes
    as it does for the module itself (on a CPU, and on a CUDA device), and with them what the device may narrow.
    """
    if not isinstance(module, nn.Module):
        raise UsageError(f"offload takes a torch module, not an object of {type(module).__name__}")
    if isinstance(module, torch.jit.ScriptModule):
        raise UsageError("offload takes a module of Python code, not one that torch.jit compiled: take the original")
    if not isinstance(device, Device):
        kind = type(device).__name__
        raise UsageError(f'offload takes a device, such as sdrpc.devices()["CPU"], not an object of {kind}')
    if not retry >= 0:
        raise InvalidValue("retry", retry, "it is a number of seconds")
    if float32_matmul_precision not in (None, *MATMUL_PRECISIONS):
        there_are = ", ".join(MATMUL_PRECISIONS)
        raise InvalidValue("float32_matmul_precision", float32_matmul_precision, f"there are {there_are}")
    again = functools.partial(offload, device=device, retry=retry, float32_matmul_precision=float32_matmul_precision)
    made = original(type(module))
    remote = RemoteModule(made.__name__, device, retry, float32_matmul_precision, again)
    result = sharing(_offloaded(made, remote), module)
    weakref.finalize(result, device.turns.later, remote.memory.forget).atexit = False
    weakref.finalize(result, _forget, weakref.ref(remote)).atexit = False
    return result


def _forget(remote: weakref.ref[RemoteModule]) -> None:
    """A module that is gone keeps no weights here: its class, which leads to them, waits for the collector."""
    it = remote()
    if it is not None:
        it.forget()


def _offloaded(original: type[nn.Module], remote: RemoteModule) -> type[nn.Module]:
    """The class of a module that ``remote`` computes, which is otherwise ``original``."""
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    entries = {name: _Entry(name, remote, original) for name in ENTRY_POINTS if callable(getattr(original, name, None))}
    behaviour = {
        "_sdrpc_original": original,
        "__class__": property(type, lambda self, kind: _change_class(self, kind, remote)),
        "close": lambda _: remote.close(),
        "__copy__": lambda self: remote.again(remote.plain(self)),
        "__deepcopy__": lambda self, memo: remote.deep_copy(self, memo),
        "__reduce_ex__": _refuse_to_pickle,
        "__prepare_scriptable__": _refuse_to_script,
    }
    return _passing_for(original)(original.__name__, (original,), {**names, **entries, **behaviour})


def _change_class(module: nn.Module, kind: type, remote: RemoteModule) -> None:
    """What is set as ``module.__class__``, as ToMe and torch's parametrizations do, is computed on the device, too."""
    offloaded = kind if hasattr(kind, "_sdrpc_original") else _offloaded(kind, remote)
    vars(object)["__class__"].__set__(module, offloaded)


def _passing_for(original: type[nn.Module]) -> type[type]:
    """The class of a class that equals ``original``: diffusers compares classes (``from_pipe``)."""

    def equals(_: type, other: object) -> bool:
        return getattr(other, "_sdrpc_original", other) is original

    def digest(_: type) -> int:
        return hash(original)

    return type("Offloaded", (type(original),), {"__eq__": equals, "__hash__": digest})


def _refuse_to_pickle(self: nn.Module, _: object) -> Any:
    name = type(self).__name__
    raise UsageError(f"an offloaded {name} can't be pickled: save its state_dict(), and offload the module again")


def _refuse_to_script(self: nn.Module) -> Any:
    """torch.jit.script asks for this; else it would compile the original, and compute here."""
    raise UsageError(f"an offloaded {type(self).__name__} can't be scripted: script the original")


class _Entry:
    """A method that runs on the device. It goes before what was set on the instance under the same name: that is
    what is captured."""

    def __init__(self, name: str, remote: RemoteModule, original: type[nn.Module]) -> None:
        self.name = name
        method = getattr(original, name)

        @functools.wraps(method)
        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return remote.call(module, name, args, kwargs)

        # torch.compile leaves it alone
        self.function: Callable[..., Any] = torch.compiler.disable(call)  # type: ignore[no-untyped-call]  # torch's

    def __get__(self, module: nn.Module | None, kind: type) -> Any:
        return self.function if module is None else types.MethodType(self.function, module)

    def __set__(self, module: nn.Module, value: Any) -> None:
        module.__dict__[self.name] = value

    def __delete__(self, module: nn.Module) -> None:
        if self.name not in module.__dict__:
            raise AttributeError(self.name)
        del module.__dict__[self.name]

"""The device's side of an offloaded module: which graph a call needs, and where that is found or made."""

from __future__ import annotations

import copy
import itertools
import logging
import sys
import threading
import types
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from ..device import Device
from ..errors import CaptureError
from ..runtime.cache import Cache
from ..runtime.cache import key as cache_key
from .calls import (
    Call,
    array_of,
    check_surroundings,
    check_tensors,
    check_traced,
    with_numbers_as_tensors,
    without_gradients,
)
from .capture import capture, is_capturing
from .effects import check_hooks, counted, kept, random_state
from .lower import lower
from .module_memory import Bound, ModuleMemory
from .state import ModuleState, described, original
from .structure import Description, build, from_json, objects, take_apart, to_json
from .tracer import DataDependent
from .weights import weights_of

log = logging.getLogger(__name__)

GRAPHS = 16
"""Signatures of inputs (method, shapes, dtypes, flags) whose graphs a module keeps on its device."""

REMEMBERED = 64
"""Signatures, and states of a module, of which something is remembered without their graphs."""


class RemoteModule:
    """What computes a module, whose class is called ``name``, on ``device``. ``again`` offloads another one in the same
    way."""

    def __init__(
        self,
        name: str,
        device: Device,
        retry: float,
        float32_matmul_precision: str | None,
        again: Callable[[nn.Module], nn.Module],
    ) -> None:
        self._name, self._float32_matmul_precision = name, float32_matmul_precision
        self.device, self.again = device, again
        self.cache = Cache()
        self.memory = ModuleMemory(device, name, retry)
        self._lock = threading.RLock()
        self._graphs: OrderedDict[Any, Bound] = OrderedDict()
        self._needed: dict[Any, tuple[str, ...]] = {}
        """Signature → the inputs whose numbers decide what is computed."""
        self._state: ModuleState | None = None
        self._states: dict[Description, int] = {}
        self._counter = itertools.count()
        self._number = 0
        """Of the module's state now, in ``_states``."""
        self._tracing = threading.local()
        self._said: set[str] = set()

    # calls

    def call(self, module: nn.Module, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if getattr(self._tracing, "on", False):  # something set on the instance calls what was there before
            return getattr(original(type(module)), method)(self._tracing.copy, *args, **kwargs)
        if is_capturing():  # a part of another module
            return getattr(original(type(module)), method)(module, *args, **kwargs)
        check_traced(self._name, args, kwargs)
        args, kwargs = with_numbers_as_tensors(self._function(module, method), args, kwargs)
        arguments = take_apart((tuple(args), dict(kwargs)))
        check_tensors(self._name, arguments.tensors)
        with self._lock:
            self._look(module)
            precision = self._float32_matmul_precision or torch.get_float32_matmul_precision()
            strange = [it for it in objects(arguments.description) if not isinstance(it, np.ndarray)]
            given = described(strange, module) if strange else ()
            request = Call(method, arguments, precision != "medium", self._number, given)
            check_surroundings(self._name, request.device.type)
            bound = self._bound(module, request)
            arrays = self.memory.run(bound, {name: array_of(tensor) for name, tensor in request.inputs.items()})
        dtypes = [getattr(torch, output.dtype) for output in bound.lowered.outputs]
        results = [torch.from_numpy(a).to(request.device, d) for a, d in zip(arrays, dtypes, strict=True)]
        return build(bound.result, without_gradients(self._name, module, results))

    def _function(self, module: nn.Module, method: str) -> Callable[..., Any]:
        """The method as it would run in this process: the instance's own, or the class's."""
        own = vars(module).get(method)
        function = getattr(original(type(module)), method) if own is None else own
        return types.MethodType(function, module) if own is None else function

    # the module's changes

    def _look(self, module: nn.Module) -> None:
        """Notice changes; weights whose numbers changed are given up, to be uploaded again."""
        if self._state is None:
            self._state = ModuleState(module)
        else:
            changed, numbers_changed = self._state.look(module)
            if not changed and not numbers_changed:
                return
            if numbers_changed:
                self.memory.close()
        if self._state.description not in self._states:
            check_hooks(module)
            self._states[self._state.description] = next(self._counter)
            _forget_oldest(self._states)
        self._number = self._states[self._state.description]
        self.memory.weights.clear()  # of what the module has no more
        self.memory.weights.update({weight.name: weight for weight in weights_of(module)})

    # graphs

    def _bound(self, module: nn.Module, request: Call) -> Bound:
        signature = (request.state, *request.signature)
        known = self._needed.get(signature, ())
        bound = self._graphs.get((signature, request.numbers(known)))
        if bound is None:
            known, bound = self._found(request) or self._captured(module, request)
            self._needed[signature] = known
            _forget_oldest(self._needed)
        key = (signature, request.numbers(known))
        self._graphs[key] = bound
        self._graphs.move_to_end(key)
        while len(self._graphs) > GRAPHS:
            self.memory.drop(self._graphs.popitem(last=False)[1])
        return bound

    def _captured(self, module: nn.Module, request: Call) -> tuple[tuple[str, ...], Bound]:
        known: tuple[str, ...] = ()
        while True:
            try:
                bound = self._capture(module, request, known)
                break
            except DataDependent as error:
                more = tuple(name for name in error.inputs if name not in known)
                if not more:
                    raise
                known += more
        if known:
            log.info("%s: captured for the numbers of %s", self._name, ", ".join(known))
        self._keep(request, known, bound)
        return known, bound

    def _capture(self, module: nn.Module, request: Call, known: Sequence[str]) -> Bound:
        results: list[Description] = []

        def flat(copy: nn.Module, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            given = build(request.arguments.description, tensors)
            with self._traced(copy):
                result = take_apart(self._function(copy, request.method)(*given[0], **given[1]))
            attribute = kept(copy)
            if attribute is not None:
                raise CaptureError(
                    f"{attribute} keeps a tensor of each call, as hooks that collect features and stores of "
                    "attention do: a device returns nothing but results; have the module return it"
                )
            changed = counted(plain, copy)
            if changed is not None:
                self._say(
                    f"{changed} changes when the module is called: on a device it keeps its value, and each call has "
                    "the same one"
                )
            after = take_apart(given)
            if after.description != request.arguments.description or any(
                a is not b for a, b in zip(after.tensors, tensors, strict=True)
            ):
                raise CaptureError(
                    f"{self._name}.{request.method} changes its arguments, such as a cache of earlier "
                    "calls: a device can't do that for you; call it without (use_cache=False)"
                )
            strange = next(filter(_is_beyond, objects(result.description)), None)
            if strange is not None:
                raise CaptureError(
                    f"{self._name}.{request.method} returns an object of {type(strange).__name__}, which "
                    "can't be filled with numbers: return tensors in tuples, lists, dicts or objects of a class"
                )
            results.append(result.description)
            return result.tensors

        self._tracing.plain, before = self.plain(module), random_state()
        plain = self._tracing.plain
        guests = () if self._state is None else self._state.guests
        graph = capture(plain, request.inputs, flat, known, request.device.type, guests)
        del self._tracing.plain
        if random_state() != before:
            self._say("draws random numbers of Python's or numpy's: each call has the same ones; pass them as an input")
        types = {name: weight.type for name, weight in self.memory.weights.items()}
        return Bound(lower(graph, self.device.target, types, request.float32), results[0])

    def _say(self, what: str) -> None:
        """Say once what a device does not do."""
        if what not in self._said:
            self._said.add(what)
            log.warning("%s: %s", self._name, what)

    @contextmanager
    def _traced(self, module: nn.Module) -> Iterator[None]:
        self._tracing.on, self._tracing.copy = True, module
        try:
            yield
        finally:
            self._tracing.on = False
            del self._tracing.copy

    # the cache on disk

    def _key(self, request: Call, known: Sequence[str]) -> str | None:
        """The name under which other processes find a graph; None where they might mean another one by it."""
        signature = to_json(request.signature)
        state = None if self._state is None else self._state.digest
        if state is None or signature is None:
            return None
        return cache_key(
            self.device.target,
            python=sys.version_info[:2],
            state=state,
            call=signature,
            known=list(zip(known, request.numbers(known), strict=True)),
        )

    def _found(self, request: Call) -> tuple[tuple[str, ...], Bound] | None:
        """A graph that was captured before, perhaps by another process."""
        key = self._key(request, ())
        note: Any = None if key is None else self.cache.note(key)
        try:
            known = tuple(str(name) for name in note["known"])
            full = str(self._key(request, known))
            details: Any = self.cache.note(full) if known else note
            result, lowered = from_json(details["result"]), self.cache.get(full)
            if lowered is None:
                return None
            build(result, [torch.empty(0)] * len(lowered.outputs))
        except (LookupError, TypeError, AttributeError, ValueError):  # none there, or damaged
            return None
        return known, Bound(lowered, result)

    def _keep(self, request: Call, known: Sequence[str], bound: Bound) -> None:
        key, full = self._key(request, ()), self._key(request, known)
        result = to_json(bound.result)
        if key is None or full is None or result is None:
            return
        try:
            self.cache.put(full, bound.lowered)
            self.cache.put_note(full, {"known": list(known), "result": result})
            if known:
                self.cache.put_note(key, {"known": list(known)})
        except OSError as error:
            log.warning("%s: graphs are not kept: %s", self.cache.folder, error.strerror)

    # copies and the end

    def plain(self, module: nn.Module) -> nn.Module:
        """``module`` as an object of its own class, sharing everything."""
        return sharing(original(type(module)), module)

    def deep_copy(self, module: nn.Module, memo: dict[int, Any]) -> nn.Module:
        """A copy with its own memory. While the module is captured, what was set on it finds the copy that is traced
        in its place; as a part of another one that is captured it is what it was made of."""
        traced: nn.Module | None = memo.get(id(getattr(self._tracing, "plain", None)))
        if traced is not None:
            return traced
        plain = self.plain(module)
        made = self.plain(module) if is_capturing() else self.again(module)
        memo[id(module)] = made  # which its own attributes may lead to: a method that was set on it, a hook
        made.__dict__ = vars(copy.deepcopy(plain, memo))
        return made

    def close(self) -> None:
        """Free everything on the device; the next call uploads again."""
        with self._lock:
            self.memory.close()

    def forget(self) -> None:
        """Let go of everything here that is of the module, which is gone."""
        self._state = None
        self._states.clear()
        self._graphs.clear()


def sharing(kind: type[nn.Module], module: nn.Module) -> nn.Module:
    """An object of a class with the attributes of ``module``."""
    made: nn.Module = object.__new__(kind)
    made.__dict__.update(vars(module))
    return made


def _forget_oldest(remembered: dict[Any, Any]) -> None:
    while len(remembered) > REMEMBERED:
        del remembered[next(iter(remembered))]


def _is_beyond(it: Any) -> bool:
    """Whether there may be tensors in an object that is used as it is: a generator, a deque, a coroutine, a module, a
    function."""
    inside = isinstance(it, Iterable | Coroutine | nn.Module | types.FunctionType)
    return inside and not isinstance(it, np.ndarray | type)

"""A torch module that computes on a device: ``pipe.unet = sdrpc.offload(pipe.unet, device)``."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import logging
import re
import sys
import threading
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, get_args

import numpy as np
import torch
from torch import nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses import FakeTensor

from ..device import Device
from ..errors import CaptureError, InvalidValue, SdrpcError, UsageError
from ..ggml.types import BF16, F16, F32
from ..ggml.weight import Weight, Whole
from ..runtime.cache import Cache
from ..runtime.cache import key as cache_key
from ..runtime.lost import RETRY_SECONDS, first_back, surviving
from ..runtime.lowered import Lowered
from ..runtime.run import Executable, WeightStore
from .capture import capture, is_capturing, tensors_of
from .effects import counted, kept
from .lower import lower
from .state import ModuleState
from .structure import Description, Parts, build, from_json, objects, take_apart, to_json
from .tracer import DataDependent

log = logging.getLogger(__name__)

ENTRY_POINTS = ("forward", "encode", "decode")
"""Methods that run on the device, where the module's class has them: what diffusers' pipelines call."""

GRAPHS = 16
"""Signatures of inputs (method, shapes, dtypes, flags) whose graphs a module keeps on its device."""

REMEMBERED = 64
"""Signatures, and states of a module, of which something is remembered without their graphs."""

TYPES = {torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16}
"""Dtypes that weights keep; others are sent as F32."""


WEIGHT_HOOKS = {
    "group_offloading": "diffusers' enable_group_offload",
    "layerwise_casting": "diffusers' enable_layerwise_casting",
}
"""Hooks of diffusers that change weights around each call → what sets them."""

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
    inputs that it refuses, and what the device raises. There are no gradients, and :func:`torch.autocast` has no part
    in it: dtypes of weights and inputs decide.
    """
    if not isinstance(module, nn.Module):
        raise UsageError(f"offload takes a torch module, not an object of {type(module).__name__}")
    if not isinstance(device, Device):
        kind = type(device).__name__
        raise UsageError(f'offload takes a device, such as sdrpc.devices()["CPU"], not an object of {kind}')
    original = getattr(type(module), "_sdrpc_original", type(module))
    if not retry >= 0:
        raise InvalidValue("retry", retry, "it is a number of seconds")
    if float32_matmul_precision not in (None, *MATMUL_PRECISIONS):
        there_are = ", ".join(MATMUL_PRECISIONS)
        raise InvalidValue("float32_matmul_precision", float32_matmul_precision, f"there are {there_are}")
    remote = _Remote(original, device, retry, float32_matmul_precision)
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    entries = {name: _Entry(name, remote) for name in ENTRY_POINTS if callable(getattr(original, name, None))}
    behaviour = {
        "_sdrpc_original": original,
        "close": lambda _: remote.close(),
        "__copy__": lambda self: remote.offloaded(remote.plain(self)),
        "__deepcopy__": lambda self, memo: remote.deep_copy(self, memo),
        "__reduce_ex__": _refuse_to_pickle,
        "__prepare_scriptable__": _refuse_to_script,
    }
    kind = _passing_for(original)(original.__name__, (original,), {**names, **entries, **behaviour})
    result = _sharing(kind, module)
    weakref.finalize(result, device.turns.later, remote.memory.forget).atexit = False
    return result


def _passing_for(original: type[nn.Module]) -> type[type]:
    """The class of a class that equals ``original``: diffusers compares classes (``from_pipe``)."""

    def equals(_: type, other: object) -> bool:
        return getattr(other, "_sdrpc_original", other) is original

    def digest(_: type) -> int:
        return hash(original)

    return type("Offloaded", (type(original),), {"__eq__": equals, "__hash__": digest})


def _sharing(kind: type[nn.Module], module: nn.Module) -> nn.Module:
    """An object of a class with the attributes of ``module``."""
    made: nn.Module = object.__new__(kind)
    made.__dict__.update(vars(module))
    return made


def _refuse_to_pickle(self: nn.Module, _: object) -> Any:
    name = type(self).__name__
    raise UsageError(f"an offloaded {name} can't be pickled: save its state_dict(), and offload the module again")


def _refuse_to_script(self: nn.Module) -> Any:
    """torch.jit.script asks for this; else it would compile the original, and compute here."""
    raise UsageError(f"an offloaded {type(self).__name__} can't be scripted: script the original")


class _Entry:
    """A method that runs on the device. It goes before what was set on the instance under the same name: that is
    what is captured."""

    def __init__(self, name: str, remote: _Remote) -> None:
        self.name = name
        method = getattr(remote.original, name)

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


@dataclass(eq=False)
class _Bound:
    """A method for one signature of inputs: its graph, and how its results are put together."""

    lowered: Lowered
    result: Description


class _Memory:
    """What an offloaded module has on the device. It holds no reference to the module, which it survives shortly."""

    def __init__(self, device: Device, source: str, retry: float) -> None:
        self.device, self.retry = device, retry
        self._life = device.life
        self.weights: dict[str, Weight] = {}
        self._store = WeightStore(device, self.weights, source=source)
        self._executables: dict[_Bound, Executable] = {}

    def run(self, bound: _Bound, arrays: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        """The graph's results; a device that is lost, now or since the last call, is waited for."""

        def work() -> tuple[np.ndarray, ...]:
            with self.device.turns:
                if self._life != self.device.life:
                    self._free()
                    self._life = self.device.life
                if bound not in self._executables:
                    self._executables[bound] = Executable(bound.lowered, self.device, self._store)
                return self._executables[bound](**arrays)

        return surviving(work, lambda lost: first_back([self.device], lost, self.retry))

    def drop(self, bound: _Bound) -> None:
        """Free what a graph has; the weights stay."""
        with self.device.turns:
            executable = self._executables.pop(bound, None)
            if executable is not None:
                executable.close()

    def close(self) -> None:
        """Free everything; what runs next uploads again."""
        with self.device.turns:
            self._free()

    def forget(self) -> None:
        """Free everything, in the device's turn; what is lost with the device is no error."""
        with suppress(SdrpcError):
            self._free()

    def _free(self) -> None:
        while self._executables:
            self._executables.popitem()[1].close()
        self._store.close()


@dataclass(frozen=True)
class _Request:
    """One call: what decides its graph. ``float32``: whether products of float32 are. ``state`` numbers the module's
    states."""

    method: str
    arguments: Parts
    float32: bool
    state: int

    @functools.cached_property
    def inputs(self) -> dict[str, torch.Tensor]:
        return {f"input{i}": tensor for i, tensor in enumerate(self.arguments.tensors)}

    @functools.cached_property
    def signature(self) -> tuple[Any, ...]:
        """Without the state."""
        facts = tuple((str(t.dtype), tuple(t.shape)) for t in self.arguments.tensors)
        return self.method, self.arguments.description, facts, self.float32, str(torch.get_default_dtype())

    def numbers(self, known: Sequence[str]) -> tuple[str, ...]:
        """Digests of the inputs named in ``known``."""
        return tuple(blake2b(_array(self.inputs[name]).tobytes(), digest_size=16).hexdigest() for name in known)


class _Remote:
    """The device's side of an offloaded module."""

    def __init__(
        self, original: type[nn.Module], device: Device, retry: float, float32_matmul_precision: str | None
    ) -> None:
        self.original, self.float32_matmul_precision = original, float32_matmul_precision
        self.device, self.retry = device, retry
        self.cache = Cache()
        self.memory = _Memory(device, original.__name__, retry)
        self._lock = threading.RLock()
        self._graphs: OrderedDict[Any, _Bound] = OrderedDict()
        self._needed: dict[Any, tuple[str, ...]] = {}
        """Signature → the inputs whose numbers decide what is computed."""
        self._state: ModuleState | None = None
        self._states: dict[Description, int] = {}
        self._counter = itertools.count()
        self._number = 0
        """Of the module's state now, in ``_states``."""
        self._tracing = threading.local()
        self._counted: set[str] = set()

    # calls

    def call(self, module: nn.Module, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if getattr(self._tracing, "on", False):  # something set on the instance calls what was there before
            return getattr(self.original, method)(self._tracing.copy, *args, **kwargs)
        if is_capturing():  # a part of another module
            return getattr(self.original, method)(module, *args, **kwargs)
        args, kwargs = _with_numbers_as_tensors(self._function(module, method), args, kwargs)
        arguments = take_apart((tuple(args), dict(kwargs)))
        traced = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]  # torch's
        if traced or any(isinstance(tensor, FakeTensor) for tensor in arguments.tensors):
            raise UsageError(f"an offloaded {self.original.__name__} can't be traced or exported: take the original")
        if any(map(is_functorch_wrapped_tensor, arguments.tensors)):
            what = "has no part in torch.func (vmap, jvp, grad …): call it with the whole batch, or take the original"
            raise UsageError(f"an offloaded {self.original.__name__} {what}")
        if any(tensor.is_meta for tensor in arguments.tensors):
            raise UsageError(f"an offloaded {self.original.__name__} needs numbers: an input is on the meta device")
        if not all(map(_is_dense, arguments.tensors)):
            raise UsageError(
                f"an offloaded {self.original.__name__} takes dense tensors: call to_dense() or dequantize()"
            )
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in arguments.tensors):
            raise UsageError(f"an offloaded {self.original.__name__} has no gradients: call it under torch.no_grad()")
        with self._lock:
            self._look(module)
            precision = self.float32_matmul_precision or torch.get_float32_matmul_precision()
            request = _Request(method, arguments, precision != "medium", self._number)
            bound = self._bound(module, request)
            arrays = self.memory.run(bound, {name: _array(tensor) for name, tensor in request.inputs.items()})
        where = arguments.tensors[0].device if arguments.tensors else torch.device("cpu")
        dtypes = [getattr(torch, output.dtype) for output in bound.lowered.outputs]
        results = [torch.from_numpy(a).to(where, d) for a, d in zip(arrays, dtypes, strict=True)]
        return build(bound.result, _without_gradients(self.original.__name__, module, results))

    def _function(self, module: nn.Module, method: str) -> Callable[..., Any]:
        """The method as it would run in this process: the instance's own, or the class's."""
        own = vars(module).get(method)
        function = getattr(self.original, method) if own is None else own
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
            _check_hooks(module)
            self._states[self._state.description] = next(self._counter)
            _forget_oldest(self._states)
        self._number = self._states[self._state.description]
        self.memory.weights.update({weight.name: weight for weight in weights_of(module)})

    # graphs

    def _bound(self, module: nn.Module, request: _Request) -> _Bound:
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

    def _captured(self, module: nn.Module, request: _Request) -> tuple[tuple[str, ...], _Bound]:
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
            log.info("%s: captured for the numbers of %s", self.original.__name__, ", ".join(known))
        self._keep(request, known, bound)
        return known, bound

    def _capture(self, module: nn.Module, request: _Request, known: Sequence[str]) -> _Bound:
        results: list[Description] = []

        def flat(copy: nn.Module, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            given = build(request.arguments.description, tensors)
            before = kept(copy)
            with self._traced(copy):
                result = take_apart(self._function(copy, request.method)(*given[0], **given[1]))
            for tensor, attribute in kept(copy).items():
                if tensor not in before:
                    raise CaptureError(
                        f"{attribute} keeps a tensor of each call, as hooks that collect features and stores of "
                        "attention do: a device returns nothing but results; have the module return it"
                    )
            self._count(counted(plain, copy))
            after = take_apart(given)
            if after.description != request.arguments.description or any(
                a is not b for a, b in zip(after.tensors, tensors, strict=True)
            ):
                raise CaptureError(
                    f"{self.original.__name__}.{request.method} changes its arguments, such as a cache of earlier "
                    "calls: a device can't do that for you; call it without (use_cache=False)"
                )
            strange = next(filter(_is_beyond, objects(result.description)), None)
            if strange is not None:
                raise CaptureError(
                    f"{self.original.__name__}.{request.method} returns an object of {type(strange).__name__}, which "
                    "can't be filled with numbers: return tensors in tuples, lists, dicts or objects of a class"
                )
            results.append(result.description)
            return result.tensors

        self._tracing.plain = plain = self.plain(module)
        graph = capture(plain, request.inputs, flat, known)
        del self._tracing.plain
        types = {name: weight.type for name, weight in self.memory.weights.items()}
        return _Bound(lower(graph, self.device.target, types, request.float32), results[0])

    def _count(self, attribute: str | None) -> None:
        """Say, once, that a number does not count calls."""
        if attribute is not None and attribute not in self._counted:
            self._counted.add(attribute)
            what = "changes when the module is called: on a device it keeps its value, and each call has the same one"
            log.warning("%s: %s %s", self.original.__name__, attribute, what)

    @contextmanager
    def _traced(self, module: nn.Module) -> Iterator[None]:
        self._tracing.on, self._tracing.copy = True, module
        try:
            yield
        finally:
            self._tracing.on = False
            del self._tracing.copy

    # the cache on disk

    def _key(self, request: _Request, known: Sequence[str]) -> str | None:
        """The name under which other processes find a graph; None where they might mean another one by it."""
        signature = to_json(request.signature)
        state = None if self._state is None else self._state.data
        if state is None or signature is None:
            return None
        return cache_key(
            self.device.target,
            python=sys.version_info[:2],
            state=state,
            call=signature,
            known=list(zip(known, request.numbers(known), strict=True)),
        )

    def _found(self, request: _Request) -> tuple[tuple[str, ...], _Bound] | None:
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
        return known, _Bound(lowered, result)

    def _keep(self, request: _Request, known: Sequence[str], bound: _Bound) -> None:
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
        return _sharing(self.original, module)

    def deep_copy(self, module: nn.Module, memo: dict[int, Any]) -> nn.Module:
        """A copy with its own memory. While the module is captured, what was set on it finds the copy that is traced
        in its place; as a part of another one that is captured it is what it was made of."""
        traced: nn.Module | None = memo.get(id(getattr(self._tracing, "plain", None)))
        if traced is not None:
            return traced
        plain = self.plain(module)
        made = self.plain(module) if is_capturing() else self.offloaded(module)
        memo[id(module)] = made  # which its own attributes may lead to: a method that was set on it, a hook
        made.__dict__ = vars(copy.deepcopy(plain, memo))
        return made

    def offloaded(self, module: nn.Module) -> nn.Module:
        """Another module on the same device, in the same way."""
        return offload(module, self.device, self.retry, self.float32_matmul_precision)

    def close(self) -> None:
        """Free everything on the device; the next call uploads again."""
        with self._lock:
            self.memory.close()


class _NoGradients(torch.autograd.Function):
    """Results that seem to depend on a parameter, as those of a module do; who asks for gradients is told.

    They come in a list: what is passed as a tensor comes out as a view, which nobody may write to."""

    @staticmethod
    def forward(ctx: Any, name: str, _: torch.Tensor, results: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        ctx.name = name
        ctx.mark_non_differentiable(*(r for r in results if not (r.is_floating_point() or r.is_complex())))
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise UsageError(f"an offloaded {ctx.name} has no gradients: train the original")


def _without_gradients(name: str, module: nn.Module, results: list[torch.Tensor]) -> Sequence[torch.Tensor]:
    """The results as a module with parameters to train gives them: who trains it must not find that it does not
    learn."""
    trained = (parameter for parameter in module.parameters() if parameter.requires_grad)
    parameter = next(trained, None) if torch.is_grad_enabled() and results else None
    if parameter is None:
        return results
    given: tuple[torch.Tensor, ...] = _NoGradients.apply(name, parameter, results)  # type: ignore[no-untyped-call]
    return given


def _forget_oldest(remembered: dict[Any, Any]) -> None:
    while len(remembered) > REMEMBERED:
        del remembered[next(iter(remembered))]


def _check_hooks(module: nn.Module) -> None:
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


_WORD_INT = re.compile(r"\bint\b")
"""In an annotation."""


def _with_numbers_as_tensors(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """Numbers where tensors are welcome (UNet's ``timestep``) become tensors: a graph is not made for each number.

    Not where it is an integer or a tensor, which then mean two things (``logits_to_keep``). Arguments that don't fit
    are left to the function, which raises its own error.
    """
    try:
        inputs = inspect.signature(function).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return args, kwargs
    for name, value in inputs.arguments.items():
        annotation = inputs.signature.parameters[name].annotation
        takes_tensor = torch.Tensor in (annotation, *get_args(annotation)) or "Tensor" in str(annotation)
        integer = _WORD_INT.search(str(annotation)) and "float" not in str(annotation)
        if isinstance(value, int | float) and not isinstance(value, bool) and takes_tensor and not integer:
            inputs.arguments[name] = torch.tensor(value)
    return inputs.args, inputs.kwargs


def _is_dense(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not (tensor.is_nested or tensor.is_quantized)


def _is_beyond(it: Any) -> bool:
    """Whether there may be tensors in an object that is used as it is: a generator, a deque, a coroutine."""
    return isinstance(it, Iterable | Coroutine) and not isinstance(it, np.ndarray | type | nn.Module)


def _array(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu().resolve_neg().resolve_conj()
    return tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()


def weights_of(module: nn.Module) -> Iterator[Weight]:
    """A module's parameters and buffers as weights; floats narrower or wider than F32, F16 and BF16 become F32."""
    for name, tensor in tensors_of(module).items():
        data = Whole(functools.partial(_data, name, tensor))
        yield Weight(name, TYPES.get(tensor.dtype, F32), tuple(tensor.shape), data)


def _data(name: str, tensor: torch.Tensor) -> memoryview:
    if tensor.is_meta:
        raise UsageError(
            f"parameter {name} has no numbers: it is on the meta device, as after enable_sequential_cpu_offload(), "
            "which an offloaded module does not need"
        )
    kept = tensor.detach().resolve_neg()
    kept = kept if tensor.dtype in TYPES else kept.float()
    return kept.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data

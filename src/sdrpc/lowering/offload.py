"""A torch module that computes on a device: ``pipe.unet = sdrpc.offload(pipe.unet, device)``."""

from __future__ import annotations

import copy
import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..device import Device
from ..errors import UsageError
from ..ggml.types import BF16, F16, F32
from ..ggml.weight import Weight, Whole
from ..runtime.run import Executable, WeightStore
from .capture import capture
from .lower import lower

ENTRY_POINTS = ("forward", "encode", "decode")
"""Methods that run on the device, where the module's class has them: what diffusers' pipelines call."""

GRAPHS = 16
"""Signatures of inputs (method, shapes, dtypes, flags) whose graphs a module keeps on its device."""

PACKED = {"DiagonalGaussianDistribution": ("parameters", "deterministic")}
"""Result classes that torch's pytrees don't know: the tensor that each is made of, and what else it is made with."""

TYPES = {torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16}
"""Dtypes that weights keep; others are sent as F32."""


def offload(module: nn.Module, device: Device) -> nn.Module:
    """``module`` with its computing done by ``device``.

    The result is a module of the same class: it has the same attributes, configuration, signatures, results and
    errors, and shares parameters with ``module``. Its ``forward`` (and ``encode`` and ``decode``, where the class has
    them) is captured once for each signature of inputs; the weights are uploaded with the first. What is changed in
    the module after that does not reach the device. ``close()`` frees everything on the device.

    Calls raise :class:`sdrpc.errors.CaptureError` for what can't be turned into a graph, the module's own errors for
    inputs that it refuses, and what the device raises. There are no gradients.
    """
    kind = type(module)
    remote = _Remote(module, device)
    methods = {
        name: _entry(remote, getattr(kind, name)) for name in ENTRY_POINTS if callable(getattr(kind, name, None))
    }
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    result = copy.copy(module)
    result.__class__ = type(kind.__name__, (kind,), {**names, **methods, "close": lambda _: remote.close()})
    return result


def _entry(remote: _Remote, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(_: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return remote.call(method, args, kwargs)

    return call


@dataclass(frozen=True)
class _Bound:
    """A method for one signature of inputs: the program, and how its results are put together."""

    executable: Executable
    restore: Callable[[Sequence[torch.Tensor]], Any]


class _Remote:
    """The device's side of an offloaded module."""

    def __init__(self, module: nn.Module, device: Device) -> None:
        self.module = module
        self.device = device
        self.weights = {weight.name: weight for weight in weights_of(module)}
        self.store = WeightStore(device, self.weights, source=type(module).__name__)
        self.graphs: OrderedDict[Any, _Bound] = OrderedDict()

    def call(self, method: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        try:
            inputs = inspect.signature(method).bind(self.module, *args, **kwargs)
        except TypeError:
            return method(self.module, *args, **kwargs)  # raises its own
        _numbers_as_tensors(inputs)
        leaves, spec = pytree.tree_flatten((inputs.args[1:], inputs.kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            raise UsageError(
                f"an offloaded {type(self.module).__name__} has no gradients: call it under torch.no_grad()"
            )
        key = (method.__name__, str(spec), tuple(map(_signature, leaves)))
        bound = self.graphs.get(key)
        if bound is None:
            bound = self.graphs[key] = self._capture(method, leaves, spec)
        self.graphs.move_to_end(key)
        while len(self.graphs) > GRAPHS:
            self.graphs.popitem(last=False)[1].executable.close()
        arrays = bound.executable(**{_name(i): _array(tensor) for i, tensor in enumerate(tensors)})
        where = tensors[0].device if tensors else torch.device("cpu")
        dtypes = [getattr(torch, output.dtype) for output in bound.executable.lowered.outputs]
        return bound.restore([torch.from_numpy(a).to(where, d) for a, d in zip(arrays, dtypes, strict=True)])

    def close(self) -> None:
        for bound in self.graphs.values():
            bound.executable.close()
        self.graphs.clear()
        self.store.close()

    def _capture(self, method: Callable[..., Any], leaves: Sequence[Any], spec: pytree.TreeSpec) -> _Bound:
        results: list[Callable[[Sequence[torch.Tensor]], Any]] = []

        def flat(module: nn.Module, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            left = iter(tensors)
            filled = [next(left) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
            args, kwargs = pytree.tree_unflatten(filled, spec)
            numbers, restore = _flatten(method(module, *args, **kwargs))
            results.append(restore)
            return numbers

        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        inputs = {_name(i): tensor for i, tensor in enumerate(tensors)}
        exported = capture(self.module, inputs, flat)
        types = {name: weight.type for name, weight in self.weights.items()}
        lowered = lower(exported, self.device.target, types)
        return _Bound(Executable(lowered, self.device, self.store), results[0])


def _name(i: int) -> str:
    return f"input{i}"


def _numbers_as_tensors(inputs: inspect.BoundArguments) -> None:
    """Numbers where tensors are welcome (UNet's ``timestep``) become tensors: a graph is not made for each number."""
    for name, value in inputs.arguments.items():
        annotation = inputs.signature.parameters[name].annotation
        takes_tensor = torch.Tensor in (annotation, *get_args(annotation)) or "Tensor" in str(annotation)
        if isinstance(value, int | float) and not isinstance(value, bool) and takes_tensor:
            inputs.arguments[name] = torch.tensor(value)


def _signature(leaf: Any) -> Any:
    """What of an input decides the graph. Objects that have no value of their own (generators) count by their class."""
    if isinstance(leaf, torch.Tensor):
        return tuple(leaf.shape), leaf.dtype
    return (type(leaf), leaf) if isinstance(leaf, int | float | str | None) else type(leaf)


def _flatten(result: Any) -> tuple[tuple[torch.Tensor, ...], Callable[[Sequence[torch.Tensor]], Any]]:
    """A result's tensors, and a function that puts a result together from such tensors."""
    leaves, spec = pytree.tree_flatten(result)
    pairs = [_unpack(leaf) for leaf in leaves]

    def restore(tensors: Sequence[torch.Tensor]) -> Any:
        left = iter(tensors)
        return pytree.tree_unflatten([make(left) for _, make in pairs], spec)

    return tuple(tensor for tensor, _ in pairs if tensor is not None), restore


def _unpack(leaf: Any) -> tuple[torch.Tensor | None, Callable[[Iterator[torch.Tensor]], Any]]:
    if isinstance(leaf, torch.Tensor):
        return leaf, next
    if type(leaf).__name__ in PACKED:
        tensor, *rest = PACKED[type(leaf).__name__]
        kind, options = type(leaf), {name: getattr(leaf, name) for name in rest}
        return getattr(leaf, tensor), lambda left: kind(next(left), **options)
    return None, lambda _: leaf


def _array(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()


def weights_of(module: nn.Module) -> Iterator[Weight]:
    """A module's parameters and buffers as weights; floats narrower or wider than F32, F16 and BF16 become F32."""
    for name, tensor in [*module.named_parameters(remove_duplicate=False), *module.named_buffers()]:
        data = Whole(functools.partial(_data, name, tensor))
        yield Weight(name, TYPES.get(tensor.dtype, F32), tuple(tensor.shape), data)


def _data(name: str, tensor: torch.Tensor) -> memoryview:
    if tensor.is_meta:
        raise UsageError(f"parameter {name} has no numbers: it is on the meta device")
    kept = tensor.detach() if tensor.dtype in TYPES else tensor.detach().float()
    return kept.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data

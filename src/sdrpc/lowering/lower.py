"""From captured ATen operations to a ggml graph, for one target."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import fx

from ..device import Target
from ..errors import CaptureError, GraphError
from ..ggml import build
from ..ggml.ops import ALIASES
from ..ggml.params import PREC_F32
from ..ggml.tensor import OUTPUT, Graph, Tensor, rewrite, sources
from ..ggml.types import F32, I32, Type
from ..runtime.lowered import Constant, Input, Lowered, Output, Parameter
from .capture import Captured, Node, operation, place
from .emitter import Complex, Emitter, Kind, Value, dims_of
from .rules import RULES, Out
from .rules.complex_numbers import COMPLEX_RULES, complex_rule, has_complex

IGNORED = frozenset({"memory_format", "device", "layout", "pin_memory", "non_blocking", "copy"})
"""Keyword arguments about where and how numbers are stored: here that is ggml's business."""


WIDE = (torch.float32, torch.float64)
"""Dtypes whose products are float32's on a device: ggml computes in nothing wider."""

VOCABULARY = RULES.keys() | COMPLEX_RULES.keys() | {"getitem"}
"""Operations that can be lowered."""


def lower(captured: Captured, target: Target, types: Mapping[str, Type], float32: bool = False) -> Lowered:
    """The graph of a captured module. ``types`` are the stored types of weights by name (F32 where none is given).

    ``float32``: what torch multiplies in float32 is marked GGML_PREC_F32; without it a device's precision decides.

    Weights of one dimension are F32 whatever their stored type, as everything is that no matrix product reads. Raises
    :class:`CaptureError` with all operations that have no rule, or with the place of one that can't be expressed.
    """
    _check_vocabulary(captured)
    emitter = Emitter(target)
    inputs = {node: _input(emitter, node) for node in captured.inputs}
    weights = {node: _weight(node, types.get(name, F32)) for node, name in captured.weights.items()}
    values: dict[Node, Any] = {**inputs, **weights}
    for node in captured.nodes:
        if node not in values and node not in captured.known:
            emitter.prec = PREC_F32 if float32 and _meta(node).dtype in WIDE else 0
            values[node] = _apply(emitter, node, values, captured.known)
    results = [_output(emitter, node, values, captured.known) for node in captured.outputs]
    return _lowered(captured, emitter, inputs, weights, results)


def _check_vocabulary(captured: Captured) -> None:
    calls = [node for node in captured.nodes if node.op == "call_function" and node not in captured.known]
    foreign = [node for node in calls if rule_name(node) not in VOCABULARY]
    if foreign:
        counts = Counter(operation(node) for node in foreign)
        first = {operation(node): place(node) for node in reversed(foreign)}
        listed = "; ".join(f"{op} ({n}×, first in {first[op]})" for op, n in sorted(counts.items()))
        raise CaptureError(f"no rule for {listed}")


def rule_name(node: Node) -> str:
    """``conv2d`` of ``aten.conv2d.default``; an in-place operation is named as its result (``add`` of ``add_``)."""
    packet = getattr(node.target, "overloadpacket", None)
    name: str = getattr(packet or node.target, "__name__", str(node.target))
    if packet is not None and not str(packet).startswith("aten."):
        return str(node.target)
    return name if name in RULES else name.removesuffix("_")


def kind_of(dtype: torch.dtype) -> Kind:
    """What numbers of a dtype are; a complex number is two floats."""
    return "f" if dtype.is_floating_point or dtype.is_complex else "b" if dtype == torch.bool else "i"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _meta(node: Node) -> torch.Tensor:
    """The shape and dtype of a node's (first) result, as a meta tensor."""
    value = node.meta["val"]
    first: torch.Tensor = value[0] if isinstance(value, tuple | list) else value
    return first


def _input(emitter: Emitter, node: Node) -> Value:
    meta = _meta(node)
    if meta.dtype.is_complex:
        raise CaptureError(f"an input of {dtype_name(meta.dtype)}")
    shape, kind = tuple(meta.shape), kind_of(meta.dtype)
    leaf = build.leaf(I32 if kind == "i" else F32, *dims_of(shape))
    if kind == "i":
        emitter.floats[leaf] = build.leaf(F32, *dims_of(shape))
    return Value(leaf, shape, kind)


def _weight(node: Node, type: Type) -> Value:
    """Blocks of a quantized type lie along the input channels: a kernel of one tap is stored as a matrix."""
    shape = stored = tuple(_meta(node).shape)
    if _meta(node).dtype.is_complex:
        raise CaptureError(f"a weight of {dtype_name(_meta(node).dtype)}: keep its real and imaginary parts")
    kept = type if len(shape) > 1 else F32
    while stored and stored[-1] == 1 and not kept.plain:
        stored = stored[:-1]
    return Value(build.leaf(kept, *dims_of(stored)), shape)


def _numbers(tensor: torch.Tensor) -> np.ndarray:
    """A known tensor's numbers; where all are the same, an array without memory for each of them."""
    tensor = tensor.detach().cpu().resolve_conj()
    shape = tuple(tensor.shape)
    if tensor.numel() > 1 and all(step == 0 for n, step in zip(shape, tensor.stride(), strict=True) if n > 1):
        return np.broadcast_to(_numbers(tensor[(0,) * len(shape)]), shape)
    array = tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()
    if array.size > 1 and (array == array.flat[0]).all():
        return np.broadcast_to(array.flat[0], array.shape)
    return array


def _constant(emitter: Emitter, tensor: torch.Tensor) -> Value | Complex:
    numbers = _numbers(tensor)
    if tensor.is_complex():
        parts = [np.ascontiguousarray(part, np.float32) for part in (numbers.real, numbers.imag)]
        return Complex(*map(emitter.constant, parts))
    return emitter.constant(numbers, kind_of(tensor.dtype))


def _apply(emitter: Emitter, node: Node, values: dict[Node, Any], known: Mapping[Node, torch.Tensor]) -> Any:
    def operand(source: Node) -> Any:
        if source not in values:
            values[source] = _constant(emitter, known[source])
        return values[source]

    name = rule_name(node)
    if name == "getitem":
        source, position = node.args
        return values[source][position]  # type: ignore[index]
    given = {key: value for key, value in node.kwargs.items() if key not in IGNORED}
    arguments: Any = fx.node.map_aggregate((node.args, given), lambda x: _argument(x, operand))
    args, kwargs = arguments
    meta = _meta(node)
    try:
        out = Out(tuple(meta.shape), kind_of(meta.dtype))
        make = complex_rule(name) if has_complex((args, kwargs)) else RULES[name]
        result = make(emitter, out, *args, **kwargs)
    except (CaptureError, GraphError, TypeError, ValueError) as error:  # the last two: arguments that no rule expects
        raise CaptureError(f"{place(node)}: {operation(node)}: {error}") from error
    return _as_declared(node, result)


def _argument(x: Any, operand: Any) -> Any:
    if isinstance(x, Node):
        return operand(x)
    return kind_of(x) if isinstance(x, torch.dtype) else x


def _as_declared(node: Node, result: Any) -> Any:
    """The result with the shapes and kinds that torch worked out, which a rule has to have met."""
    if isinstance(result, tuple):
        metas = node.meta["val"]
        return tuple(_declared(node, value, meta) for value, meta in zip(result, metas, strict=True))
    return _declared(node, result, _meta(node))


def _declared(node: Node, value: Value | Complex, meta: torch.Tensor) -> Value | Complex:
    if value.shape != tuple(meta.shape):
        raise CaptureError(f"{place(node)}: {operation(node)}: lowered to {value.shape}, not {tuple(meta.shape)}")
    if isinstance(value, Complex):
        return value
    return Value(value.tensor, value.shape, kind_of(meta.dtype), value.array)


def _output(emitter: Emitter, node: Node, values: Mapping[Node, Any], known: Mapping[Node, torch.Tensor]) -> Output:
    if node in known:
        return Output(dtype_name(known[node].dtype), tuple(known[node].shape), _numbers(known[node]))
    value = values[node]
    if isinstance(value, Complex):
        raise CaptureError(f"{place(node)}: a result of complex numbers")
    tensor = value.tensor
    while tensor.op == "RESHAPE" and tensor.src[0] is not None:
        tensor = tensor.src[0]
    if tensor.op in ALIASES:
        tensor = emitter.node("CONT", emitter.f32(value).tensor if value.kind == "f" else value.tensor)
    return Output(dtype_name(_meta(node).dtype), value.shape, tensor)


def _lowered(
    captured: Captured,
    emitter: Emitter,
    inputs: Mapping[Node, Value],
    weights: Mapping[Node, Value],
    outputs: list[Output],
) -> Lowered:
    """Only what the outputs need, the outputs flagged."""
    results = {output.source for output in outputs if isinstance(output.source, Tensor)}
    unflagged = Graph(_needed(emitter.nodes, results))
    graph = rewrite(unflagged, lambda tensor: {"flags": OUTPUT} if tensor in results else {})
    new = dict(zip(unflagged.tensors, graph.tensors, strict=True))
    return Lowered(
        graph,
        tuple(
            Input(name, dtype_name(_meta(node).dtype), inputs[node].shape, _present(new, emitter, inputs[node].tensor))
            for node, name in captured.inputs.items()
        ),
        tuple(
            Parameter(name, weights[node].shape, new[weights[node].tensor])
            for node, name in captured.weights.items()
            if weights[node].tensor in new
        ),
        tuple(Constant(new[leaf], array) for leaf, array in emitter.arrays.items() if leaf in new),
        tuple(
            Output(
                output.dtype, output.shape, new[output.source] if isinstance(output.source, Tensor) else output.source
            )
            for output in outputs
        ),
    )


def _present(new: Mapping[Tensor, Tensor], emitter: Emitter, leaf: Tensor) -> tuple[Tensor, ...]:
    both = (leaf, emitter.floats.get(leaf))
    return tuple(new[tensor] for tensor in both if tensor is not None and tensor in new)


def _needed(nodes: Iterable[Tensor], results: Iterable[Tensor]) -> tuple[Tensor, ...]:
    wanted = set(results)
    kept = []
    for node in reversed(list(nodes)):
        if node in wanted:
            kept.append(node)
            wanted.update(sources(node))
    return tuple(reversed(kept))

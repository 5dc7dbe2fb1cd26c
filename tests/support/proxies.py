"""diffusers' own single-file converters, run without reading a byte of the file.

A converter gets tensors that have a shape and a dtype and stand for weights. What it does to them (splits, joins,
transpositions) becomes expressions over the weights (:mod:`sdrpc.checkpoints.expressions`), so that its result is what
the model needs, and is evaluated when it is sent. Operations that compute something are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch

from sdrpc.checkpoints import expressions
from sdrpc.errors import CheckpointError
from sdrpc.ggml.types import BF16, F32, TYPES, Type
from sdrpc.ggml.weight import View, Weight

aten = torch.ops.aten

_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
}
"""Types → torch's dtypes; blocks and all others are float16 to a converter, which asks for nothing but floats."""


def converted(
    convert: Callable[..., Mapping[str, Any]], weights: Mapping[str, Weight], **options: Any
) -> dict[str, Weight]:
    """What ``convert(tensors, **options)`` makes of the weights, by the names that it gives.

    Raises :class:`CheckpointError` where the file lacks a tensor that the converter takes, has one of another shape, or
    where the converter computes with one.
    """
    file = next((weight.file for weight in weights.values()), "the model")
    try:
        made = convert({name: _Proxy(weight) for name, weight in weights.items()}, **options)
    except KeyError as error:
        raise CheckpointError(file, "is missing", str(error.args[0])) from error
    except (RuntimeError, ValueError, IndexError) as error:
        raise CheckpointError(file, f"does not have the shapes of this family: {error}") from error
    return {name: _weight(name, tensor) for name, tensor in made.items()}


class _Proxy(torch.Tensor):
    """A tensor without numbers that stands for a weight; it looks contiguous, as the weight's bytes are."""

    weight: Weight

    @staticmethod
    def __new__(cls, weight: Weight) -> _Proxy:
        dtype = _DTYPES.get(weight.type.name, torch.float16)
        proxy: _Proxy = torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=dtype)
        proxy.weight = weight
        return proxy

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch calls it so, whatever its own annotations say
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        first = args[0][0] if isinstance(args[0], list | tuple) else args[0]
        rule = _RULES.get(func.overloadpacket)
        if not isinstance(first, _Proxy):
            raise CheckpointError("the converter", f"{func} of a file's tensor and another one has no expression")
        if rule is None:
            raise CheckpointError(first.weight.file, f"{func} has no expression", first.weight.name)
        made = rule(*map(_weights, args), **(kwargs or {}))
        return _Proxy(made) if isinstance(made, Weight) else [_Proxy(weight) for weight in made]


def _weights(argument: Any) -> Any:
    """An argument with weights in place of proxies."""
    if isinstance(argument, list | tuple):
        return [_weights(inner) for inner in argument]
    return argument.weight if isinstance(argument, _Proxy) else argument


def _weight(name: str, tensor: Any) -> Weight:
    """What became of a proxy; a tensor that the converter made has its numbers already."""
    if isinstance(tensor, _Proxy):
        return tensor.weight
    type_of = {dtype: TYPES[type_name] for type_name, dtype in _DTYPES.items()} | {torch.float16: TYPES["F16"]}
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return Weight(name, type_of[tensor.dtype], tuple(tensor.shape), View(data.data), None, "the converter")


# one rule per operation ----------------------------------------------------------------------------------------------


def _same(w: Weight, *_: Any, **__: Any) -> Weight:
    return w


def _to_copy(w: Weight, dtype: torch.dtype | None = None, **_: Any) -> Weight:
    """Only what changes the dtype that a converter sees is a cast."""
    if dtype is None or dtype == _DTYPES.get(w.type.name, torch.float16):
        return w
    wanted: dict[torch.dtype, Type] = {torch.float32: F32, torch.bfloat16: BF16, torch.float16: TYPES["F16"]}
    if dtype not in wanted:
        raise CheckpointError(w.file, f"a cast to {dtype} has no expression", w.name)
    return expressions.cast(w, wanted[dtype])


def _split(w: Weight, sizes: int | Sequence[int], dim: int = 0) -> tuple[Weight, ...]:
    whole = w.shape[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, whole - start) for start in range(0, whole, sizes)]
    return expressions.split(w, sizes, dim)


def _slice(w: Weight, dim: int = 0, start: int | None = None, stop: int | None = None, step: int = 1) -> Weight:
    first, last, step = slice(start, stop, step).indices(w.shape[dim])
    if step != 1:
        raise CheckpointError(w.file, f"every {step}th element has no expression", w.name)
    sizes = (first, max(last, first) - first, w.shape[dim] - max(last, first))
    return expressions.split(w, sizes, dim)[1]


def _select(w: Weight, dim: int, index: int) -> Weight:
    dim, index = dim % len(w.shape), index % w.shape[dim]
    return expressions.reshape(_slice(w, dim, index, index + 1), w.shape[:dim] + w.shape[dim + 1 :])


def _unbind(w: Weight, dim: int = 0) -> list[Weight]:
    return [_select(w, dim, i) for i in range(w.shape[dim])]


def _stack(ws: Sequence[Weight], dim: int = 0) -> Weight:
    return expressions.concat([_unsqueeze(w, dim) for w in ws], dim)


def _transpose(w: Weight, one: int = 0, other: int = 1) -> Weight:
    order = list(range(len(w.shape)))
    if len(order) > 1:
        order[one], order[other] = order[other], order[one]
    return expressions.permute(w, order)


def _view(w: Weight, shape: Sequence[int]) -> Weight:
    known = prod(size for size in shape if size != -1)
    return expressions.reshape(w, [prod(w.shape) // known if size == -1 else size for size in shape])


def _unsqueeze(w: Weight, dim: int) -> Weight:
    dim %= len(w.shape) + 1
    return expressions.reshape(w, (*w.shape[:dim], 1, *w.shape[dim:]))


def _squeeze(w: Weight, dims: int | Sequence[int] | None = None) -> Weight:
    every = range(len(w.shape)) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {dim % len(w.shape) for dim in every}
    return expressions.reshape(w, [size for dim, size in enumerate(w.shape) if dim not in gone or size != 1])


_RULES: dict[Any, Callable[..., Weight | Sequence[Weight]]] = {
    aten.clone: _same, aten.detach: _same, aten.alias: _same, aten.lift_fresh: _same, aten._to_copy: _to_copy,
    aten.cat: expressions.concat, aten.stack: _stack, aten.unbind: _unbind,
    aten.split: _split, aten.split_with_sizes: _split, aten.slice: _slice,
    aten.select: _select, aten.t: _transpose, aten.transpose: _transpose, aten.permute: expressions.permute,
    aten.view: _view, aten._unsafe_view: _view, aten.unsqueeze: _unsqueeze, aten.squeeze: _squeeze,
}  # fmt: skip
"""torch's operation → the function of weights that takes the same arguments."""

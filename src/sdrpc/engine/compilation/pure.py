"""A bound program as a function without memory: what a compiler can be given.

A program reads and writes buffers. Where nothing is read that it has written before, all reads can come first and all
writes last; between them is a pure function of what was read and of converted weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ..intervals import Intervals
from ..last_resort import LastResort
from ..operations import EngineOp
from ..ops import KERNELS
from ..program import Bound
from ..values import Place, Value, ordered


class Pure(NamedTuple):
    """``function(*inputs)`` gives what belongs to ``stores``, in their shapes and dtypes; ``nodes`` made it. Inputs are
    views of buffers and weights that are kept."""

    function: Callable[..., list[Tensor]]
    inputs: list[Tensor]
    stores: list[Tensor]
    nodes: list[str]


def is_pure(roots: Iterable[Value]) -> bool:
    """Whether the program that computes ``roots`` reads none of the bytes that it has written."""
    written: dict[int, Intervals] = {}

    def reads_written(place: Place | None) -> bool:
        ranges = None if place is None else written.get(place.memory)
        return place is not None and ranges is not None and ranges.touches(place.offset, place.end)

    for value in ordered(roots):
        if value.op is EngineOp.LEAF:
            continue
        kernel = KERNELS.get(value.op)
        if kernel is not None and kernel.in_place:
            return False
        if any(reads_written(s.place) for s in value.src if s is not None and s.op is EngineOp.LEAF):
            return False
        if value.store is not None:
            place = value.store
            written.setdefault(place.memory, Intervals()).assign(place.offset, place.end, value.at)
    return True


def pure(bound: Bound, kept: Mapping[int, Tensor]) -> Pure:
    """The program of ``bound``, which :func:`is_pure`. ``kept`` are converted weights by their register; the function
    converts the others itself."""
    given = {step.out for step in bound.program if step.out in kept}
    steps = [step for step in bound.program if step.out not in given]
    read = sorted({i for step in steps for i in step.args if bound.fixed[i] is not None} | given)
    inputs = [kept[i] if i in given else bound.fixed[i] for i in read]
    stored = [(step.store, step.node) for step in steps if step.store is not None]

    def function(*values: Tensor) -> list[Tensor]:
        registers: list[Tensor | None] = [None] * len(bound.fixed)
        for i, value in zip(read, values, strict=True):
            registers[i] = value
        results = []
        for step, args, out, dtype, store, _, _ in steps:
            run = step.there if isinstance(step, LastResort) else step  # what has no kernel there is not compiled
            weight = bound.weights.get(out)
            operands: list[Any] = [registers[i] for i in args]
            result = run(*operands) if weight is None else weight.alone(*operands)
            if dtype is not None:
                result = result.to(dtype)
            if store is not None:
                results.append(result.to(store.dtype))
            registers[out] = result
        return results

    return Pure(
        function,
        [each for each in inputs if each is not None],
        [store for store, _ in stored],
        [node for _, node in stored],
    )

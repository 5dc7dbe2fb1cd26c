"""What in-place operations mean in a graph of values.

Tensors that share memory are views of one tensor, each by a path of view operations. A write makes a new value of the
whole: what was written is put back along the path, step by step (a slice by ``slice_scatter``, a transposition by its
inverse). Other views of the same memory are taken again from the new whole when they are read next. So a tensor always
reads what torch would read, however it was written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..errors import CaptureError

Node = fx.Node
aten = torch.ops.aten


@dataclass(frozen=True)
class Step:
    """A view operation without its operand: from ``whole`` to ``result``, or to number ``index`` of its results where
    it has several. Both are meta tensors (shapes)."""

    operation: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    index: int | None
    whole: torch.Tensor
    result: Any


@dataclass(eq=False)
class Memory:
    """What tensors share: the node of the value as a whole, and how often it was written."""

    node: Node
    version: int = 0


@dataclass(eq=False)
class View:
    """A tensor: a part of a memory, by a path. ``node`` is its value as of ``version``."""

    memory: Memory
    path: tuple[Step, ...]
    node: Node
    version: int


Emit = Callable[[Any, tuple[Any, ...], dict[str, Any], torch.Tensor], Node]
"""Records an operation: its target, arguments (nodes), keyword arguments and the meta tensor of its result."""


def read(view: View, apply: Callable[[Step, Node], Node]) -> Node:
    """The node of a view's value now; ``apply`` records a step."""
    if view.version != view.memory.version:
        node = view.memory.node
        for step in view.path:
            node = apply(step, node)
        view.node, view.version = node, view.memory.version
    return view.node


def write(view: View, value: Node, apply: Callable[[Step, Node], Node], emit: Emit) -> None:
    """``value`` becomes what ``view``, and all that shares its memory, reads."""
    wholes = [view.memory.node]
    for step in view.path[:-1]:
        wholes.append(apply(step, wholes[-1]))
    changed = value
    for step, whole in zip(reversed(view.path), reversed(wholes), strict=False):
        changed = put_back(step, whole, changed, emit)
    view.memory.node = changed
    view.memory.version += 1
    view.node, view.version = value, view.memory.version


def put_back(step: Step, whole: Node, part: Node, emit: Emit) -> Node:
    """``whole`` with ``part`` in the place where ``step`` took it from. Raises :class:`CaptureError` for views that
    have no inverse here."""
    name = step.operation.overloadpacket.__name__
    make = _INVERSE.get(name)
    if make is None:
        raise CaptureError(f"writes into a view made by {name}")
    operation, args = make(step)
    operands = (whole, part) if operation in _SCATTERS else (part,)
    return emit(operation, (*operands, *args), {}, step.whole)


Inverse = tuple[Any, tuple[Any, ...]]
"""An operation and its arguments after the operands."""


def _slice(step: Step) -> Inverse:
    return aten.slice_scatter.default, step.args


def _select(step: Step) -> Inverse:
    return aten.select_scatter.default, step.args


def _unbind(step: Step) -> Inverse:
    dim = step.args[0] if step.args else step.kwargs.get("dim", 0)
    return aten.select_scatter.default, (dim, step.index)


def _split(step: Step) -> Inverse:
    """Parts of one size, or of the sizes given: where this one begins."""
    sizes, index = step.args[0], step.index or 0
    part = step.result[index]
    dim = step.args[1] if len(step.args) > 1 else step.kwargs.get("dim", 0)
    start = sizes * index if isinstance(sizes, int) else sum(sizes[:index])
    return aten.slice_scatter.default, (dim, start, start + part.shape[dim])


def _reshaped(step: Step) -> Inverse:
    return aten.view.default, (list(step.whole.shape),)


def _transposed(step: Step) -> Inverse:
    return aten.transpose.int, step.args


def _matrix_transposed(_: Step) -> Inverse:
    return aten.t.default, ()


def _permuted(step: Step) -> Inverse:
    order = [dim % len(step.args[0]) for dim in step.args[0]]
    return aten.permute.default, ([order.index(dim) for dim in range(len(order))],)


_SCATTERS = frozenset({aten.slice_scatter.default, aten.select_scatter.default})
_INVERSE: dict[str, Callable[[Step], Inverse]] = {
    "slice": _slice, "select": _select, "unbind": _unbind, "split": _split, "split_with_sizes": _split,
    "view": _reshaped, "_unsafe_view": _reshaped, "unsqueeze": _reshaped, "squeeze": _reshaped, "alias": _reshaped,
    "detach": _reshaped, "transpose": _transposed, "t": _matrix_transposed, "permute": _permuted,
}  # fmt: skip
"""View operation → how a part goes back into the whole."""

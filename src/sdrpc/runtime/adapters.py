"""Adapters on a lowered graph: y = W x + strength · up (down x), for the weights that they change. A DoRA scales, too:
y = W x + strength · a ∘ (W x), or W (x + strength · a ∘ x).

The module is captured and lowered without them. Here its graph is rewritten: what reads a changed weight is followed by
the change's own product, whose matrices are further leaves and whose strength is an input. So the weights stay as they
are, quantized ones too; another strength sends some bytes, another adapter of the same shapes its own matrices, and
neither of them the model or a graph.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import chain
from math import prod

import numpy as np

from ..checkpoints.deltas import ColumnScaling, Delta, Difference, Product, RowScaling
from ..errors import UnsupportedOperation
from ..ggml import build
from ..ggml.params import Conv2D
from ..ggml.tensor import Graph, Tensor, sources
from ..ggml.types import F32
from ..ggml.weight import Weight
from .lowered import Input, Lowered, Parameter

STRENGTHS = "adapter strengths"
"""The input that an adapted graph has besides its own: float32 (changes,)."""

Changes = Mapping[str, Sequence[Delta]]
"""What an adapter adds, by the names of a module's parameters."""


@dataclass(frozen=True, eq=False)
class Adapters:
    """Adapters of one module, each with its strength.

    ``weights``: their matrices by the names that adapted graphs have for them. ``strengths``: what the input
    :data:`STRENGTHS` gets, float32 (changes,). ``shape``: equal where the adapted graphs are the same.
    """

    changes: tuple[tuple[str, Delta], ...]
    names: Mapping[int, str]
    strengths: np.ndarray

    @property
    def weights(self) -> dict[str, Weight]:
        return {self.names[id(weight)]: weight for _, change in self.changes for weight in change.weights}

    @property
    def shape(self) -> Hashable:
        return tuple(
            (parameter, type(change), *((self.names[id(w)], w.shape, w.type) for w in change.weights))
            for parameter, change in self.changes
        )


def adapters(applied: Sequence[tuple[Changes, float]]) -> Adapters:
    """The changes of all adapters, in order, with each one's strength."""
    every = [(parameter, change, strength) for each, strength in applied for parameter, those in each.items()
             for change in those]  # fmt: skip
    names: dict[int, str] = {}
    for number, (parameter, change, _) in enumerate(every):
        for part, weight in enumerate(change.weights):
            names.setdefault(id(weight), f"{parameter} + {number}.{part}")
    strengths = [strength * change.factor for _, change, strength in every]
    changes = tuple((parameter, change) for parameter, change, _ in every)
    return Adapters(changes, names, np.array(strengths, np.float32))


def adapted(lowered: Lowered, added: Adapters) -> Lowered:
    """``lowered`` with the changes of those weights that it reads, whose matrices are parameters of it, too.

    Raises :class:`UnsupportedOperation` for a weight that is read otherwise than by a product, a convolution or, with
    one dimension, a sum.
    """
    return _Rewriting(lowered, added).result()


class _Rewriting:
    def __init__(self, lowered: Lowered, added: Adapters) -> None:
        self._lowered, self._added = lowered, added
        self._read = {parameter.leaf: parameter for parameter in lowered.weights}
        by_name = {parameter.name: parameter.leaf for parameter in lowered.weights}
        self._changes: dict[Tensor, list[tuple[int, Delta]]] = {}
        for number, (name, change) in enumerate(added.changes):
            if name in by_name:
                self._changes.setdefault(by_name[name], []).append((number, change))
        self._weight_of = {leaf: leaf for leaf in self._changes if len(self._read[leaf].shape) > 1}
        """Tensors of the old graph that are a changed weight, in whatever shape → that weight's leaf."""
        self._strengths = build.leaf(F32, max(1, len(added.changes)))
        self._new: dict[Tensor, Tensor] = {leaf: leaf for leaf in lowered.graph.leaves}
        self._nodes: list[Tensor] = []
        self._parameters: list[Parameter] = []
        self._leaves: dict[tuple[int, tuple[int, ...]], Tensor] = {}
        self._views: dict[int, Tensor] = {}
        self._products: dict[tuple[Tensor, Tensor], Tensor] = {}

    def result(self) -> Lowered:
        lowered = self._lowered
        if not self._changes:
            return lowered
        for leaf in self._changes:
            if leaf not in self._weight_of:
                self._new[leaf] = self._summed(leaf)
        for node in lowered.graph.nodes:
            self._new[node] = self._followed(node)
        strengths = Input(STRENGTHS, "float32", (len(self._added.changes),), (self._strengths,))
        return replace(
            lowered,
            graph=Graph(tuple(self._nodes)),
            inputs=(*lowered.inputs, strengths),
            weights=(*lowered.weights, *self._parameters),
            outputs=tuple(
                replace(output, source=self._new[output.source]) if isinstance(output.source, Tensor) else output
                for output in lowered.outputs
            ),
        )

    def _followed(self, node: Tensor) -> Tensor:
        """What stands for ``node`` in the new graph: itself, or the sum of it and its changes."""
        src = tuple(source and self._new[source] for source in node.src)
        new = replace(node, src=src, view_src=node.view_src and self._new[node.view_src])
        first = next((source for source in sources(node) if source in self._weight_of), None)
        if first is None or node.op == "IM2COL":  # which reads no more of a kernel than its shape
            return self._put(new)
        leaf = self._weight_of[first]
        if node.op in ("RESHAPE", "CONT"):
            self._weight_of[node] = leaf
            return self._put(new)
        x = src[1] if len(src) > 1 else None
        if node.op not in ("MUL_MAT", "CONV_2D") or node.src[0] is not first or x is None:
            raise self._unsupported(leaf, node.op)
        total = self._total(self._terms(node, replace(new, flags=0), x, self._changes[leaf]))
        self._nodes[-1] = total = replace(total, flags=node.flags)
        return total

    def _terms(self, node: Tensor, new: Tensor, x: Tensor, changes: Sequence[tuple[int, Delta]]) -> Iterator[Tensor]:
        """The summands of a changed product: ``new``, which is ``node`` in the new graph, and what each change adds."""
        rows = [(number, change) for number, change in changes if isinstance(change, RowScaling)]
        columns = [(number, change) for number, change in changes if isinstance(change, ColumnScaling)]
        scaled = (self._by_columns(node, x, number, change) for number, change in columns)

        def of(x: Tensor) -> Tensor:
            return self._put(replace(new, src=(new.src[0], x, *new.src[2:])))

        if not rows:  # one product does for the input and what is added to it
            yield of(self._total(chain((x,), scaled)))
        else:
            yield (base := of(x))
            yield from (self._by_rows(node, base, number, change) for number, change in rows)
            if columns:
                yield of(self._total(scaled))
        for number, change in changes:
            if isinstance(change, Product):
                yield self._product(node, x, number, change)

    def _total(self, terms: Iterable[Tensor]) -> Tensor:
        return reduce(lambda one, other: self._put(build.node("ADD", one, other)), terms)

    def _by_rows(self, node: Tensor, base: Tensor, number: int, change: RowScaling) -> Tensor:
        """What scaled rows add to ``base``, the result of ``node``: each row gives a channel of it."""
        by = self._leaf(change.by, (*change.by.shape, 1, 1) if node.op == "CONV_2D" else change.by.shape)
        return self._put(build.node("MUL", base, self._put(build.node("MUL", by, self._strength(number)))))

    def _by_columns(self, node: Tensor, x: Tensor, number: int, change: ColumnScaling) -> Tensor:
        """What scaled columns add to ``x``, which ``node`` multiplies the weight with. The windows of a convolution
        have several numbers of each channel side by side."""
        (channels,) = change.by.shape
        taps = 1 if node.op == "CONV_2D" else x.ne[0] // channels
        shape = (channels, 1, 1) if node.op == "CONV_2D" else (channels,) if taps == 1 else (channels, 1)
        by = self._leaf(change.by, shape)
        scaled = self._put(build.node("MUL", by, self._strength(number)))
        if taps == 1:
            return self._put(build.node("MUL", x, scaled))
        windows = self._put(build.reshape(x, taps, channels, x.ne[1], x.ne[2] * x.ne[3]))
        return self._put(build.reshape(self._put(build.node("MUL", windows, scaled)), *x.ne))

    def _product(self, node: Tensor, x: Tensor, number: int, change: Product) -> Tensor:
        """What a change adds to the result of ``node``, a product of the weight and ``x``."""
        if isinstance(change, Difference):
            return self._put(build.node("MUL", self._applied(node, change.tensor, x), self._strength(number)))
        scaled = self._put(build.node("MUL", self._applied(node, change.down, x), self._strength(number)))
        if node.op == "MUL_MAT":
            return self._put(build.mul_mat(self._leaf(change.up, change.up.shape), scaled))
        up = self._leaf(change.up, (*change.up.shape, 1, 1))
        return self._put(build.node("CONV_2D", up, scaled, params=Conv2D(1, 1, 0, 0, 1, 1)))

    def _applied(self, node: Tensor, matrix: Weight, x: Tensor) -> Tensor:
        """``matrix`` in the weight's place; once where several weights share it and read the same."""
        rows, columns = matrix.shape[0], prod(matrix.shape[1:])
        kernel = node.src[0] if node.op == "CONV_2D" else None
        leaf = self._leaf(matrix, (rows, columns) if kernel is None else (rows, *reversed(kernel.ne[:3])))
        if (leaf, x) not in self._products:
            self._products[leaf, x] = self._put(build.node(node.op, leaf, x, params=node.params))
        return self._products[leaf, x]

    def _summed(self, leaf: Tensor) -> Tensor:
        """A weight of one dimension with its changes."""
        total = leaf
        for number, change in self._changes[leaf]:
            if not isinstance(change, Difference):
                raise self._unsupported(leaf, "a sum")
            vector = self._leaf(change.tensor, change.tensor.shape)
            total = self._put(build.node("ADD", total, self._put(build.node("MUL", vector, self._strength(number)))))
        return total

    def _strength(self, number: int) -> Tensor:
        """A change's strength, a tensor of one element."""
        if number not in self._views:
            self._views[number] = self._put(build.view(self._strengths, 1, offset=number * F32.size))
        return self._views[number]

    def _leaf(self, weight: Weight, shape: tuple[int, ...]) -> Tensor:
        """The leaf for an adapter's matrix in ``shape``. As everywhere, one of one dimension is F32."""
        key = id(weight), shape
        if key not in self._leaves:
            leaf = self._leaves[key] = build.leaf(weight.type if len(shape) > 1 else F32, *reversed(shape))
            self._parameters.append(Parameter(self._added.names[id(weight)], weight.shape, leaf))
        return self._leaves[key]

    def _put(self, node: Tensor) -> Tensor:
        self._nodes.append(node)
        return node

    def _unsupported(self, leaf: Tensor, op: str) -> UnsupportedOperation:
        return UnsupportedOperation(
            f"{self._read[leaf].name} is read by {op}, to which a LoRA can't be added; merge it into the weights "
            "(immediately)"
        )

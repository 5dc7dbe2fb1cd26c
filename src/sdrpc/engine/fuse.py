"""Fusion: what many small nodes of a ggml graph mean as few operations of torch.

A pass is a table of rules. A rule looks at one value, whose operands have been rewritten already, and returns what may
stand in its place, or None. It may swallow an operand only if nobody else reads that and it need not be stored
(:meth:`Readers.alone`). Passes run in the order of :data:`PASSES`; how often each rule fired is reported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple

from sdrpc.ggml.params import Conv2D, Params
from sdrpc.ggml.tensor import Dims, contiguous_strides
from sdrpc.ggml.types import F16, F32

from .layout import Group, Strided, compose, groups_of
from .values import Value, ordered, reshaped, view

Report = Mapping[str, int]


class Readers:
    """How many operands name each value."""

    def __init__(self, effects: Sequence[Value]) -> None:
        self.count: Counter[Value] = Counter()
        for value in ordered(effects):
            self.count.update(s for s in value.src if s is not None)

    def alone(self, value: Value | None) -> bool:
        """Whether a rule may swallow ``value``: it is computed for one reader only."""
        return value is not None and value.store is None and self.count[value] <= 1


Rule = Callable[[Value, Readers], "Value | None"]


class Attention(NamedTuple):
    """softmax(scale · q kᵀ + mask) v"""

    scale: float
    max_bias: float = 0.0


class Norm(NamedTuple):
    """A norm with weight and bias; ``groups`` are zero where it goes over rows. ``silu``: followed by that."""

    eps: float
    groups: int = 0
    silu: bool = False


# copies and views


def no_copy(value: Value, readers: Readers) -> Value | None:
    """A dense copy is the same value: only its layout differs, and values have none. It is kept where several readers
    are better served by a copy than by strides."""
    if value.op not in ("CONT", "DUP") or value.store is not None:
        return None
    source = value.src[0]
    if source is None or source.type is not value.type or not source.type.plain:
        return None
    strided = source.op == "VIEW" and not source.params.dense
    if strided and readers.count[value] > 1:
        return None
    return reshaped(source, value.ne, value.at)


def view_of_view(value: Value, _readers: Readers) -> Value | None:
    """Two views in a row are one, where strides can say it."""
    inner = value.src[0] if value.op == "VIEW" else None
    if inner is None or inner.op != "VIEW" or inner.src[0] is None:
        return None
    outer: Any = value.params
    strided = compose(groups_of(inner.params), outer)
    return None if strided is None else view(inner.src[0], strided, value.at, value.node)


def no_scale(value: Value, _readers: Readers) -> Value | None:
    """x · 1 + 0"""
    p: Any = value.params
    if value.op == "SCALE" and value.store is None and p.scale == 1 and p.bias == 0:
        return value.src[0]
    return None


# convolutions


class _Product(NamedTuple):
    """A convolution said as a matrix product: the value to compute, and how the product's elements lie in it."""

    conv: Value
    lies: tuple[tuple[Group, ...], int]


class _Unrolled(NamedTuple):
    """What unrolls patches of ``batch`` images for a convolution, and how that is said for a number of outputs:
    shape of the kernel, shape of the result, parameters."""

    op: str
    batch: int
    kernel: Callable[[int], Dims]
    result: Callable[[int], Dims]
    params: Callable[[int], Params]


def _unrolled(columns: Value, kernel: Dims, image: Dims) -> _Unrolled | None:
    p: Any = columns.params
    (k0, k1, k2, _), (_, width, height, outer) = kernel, columns.ne
    if columns.op == "IM2COL" and p.is_2d:
        return _Unrolled("CONV_2D", outer, lambda n: (k0, k1, k2, n), lambda n: (width, height, n, outer),
                         lambda _: Conv2D(*p[:6]))  # fmt: skip
    if columns.op == "IM2COL_3D":
        batch = image[3] // p.channels
        depth = outer // batch
        return _Unrolled("CONV_3D", batch, lambda n: (k0, k1, k2, p.channels * n),
                         lambda n: (width, height, depth, n * batch),
                         lambda n: p._replace(batch=batch, outputs=n))  # fmt: skip
    return None


def _convolution(product: Value) -> _Product | None:
    """MUL_MAT of unrolled patches and a kernel, in either order."""
    if product.op != "MUL_MAT" or product.store is not None:
        return None
    for patches, kernel in (product.src, product.src[::-1]):
        columns = _dense_source(patches)
        if columns is None or kernel is None or patches is None or columns.store is not None or len(columns.src) < 2:
            continue
        shape, image = columns.src[:2]
        if shape is None or image is None or (kind := _unrolled(columns, shape.ne, image.ne)) is None:
            continue
        taps, batch, channels = columns.ne[0], kind.batch, kernel.ne[1]
        places = prod(columns.ne[1:]) // batch
        if patches.ne != (taps, places * batch, 1, 1) or kernel.ne[0] != taps or kernel.ne[2:] != (1, 1):
            continue
        weight = _reshaped_leaf(kernel, kind.kernel(channels))
        if weight is None:
            continue
        if columns.type is F16 and image.type is F32:  # ggml rounds what it unrolls
            image = Value("CPY", F16, image.ne, (image,), at=columns.at, node=columns.node)
        conv = Value(kind.op, F32, kind.result(channels), (weight, image), kind.params(channels), product.at,
                     node=product.node)  # fmt: skip
        step = places * channels
        if patches is product.src[0]:
            lies = Group(1, places, 1), Group(places, batch, step), Group(places * batch, channels, places)
        else:
            lies = Group(1, channels, places), Group(channels, places, 1), Group(channels * places, batch, step)
        return _Product(conv, (lies, 0))
    return None


def convolution(value: Value, readers: Readers) -> Value | None:
    """IM2COL or IM2COL_3D, MUL_MAT and what brings the product into an image's shape."""
    product = value.src[0] if value.op == "VIEW" else value
    if product is None or (product is not value and not readers.alone(product)):
        return None
    found = _convolution(product)
    if found is None:
        return None
    wanted: Any = value.params if product is not value else _dense(value.ne)
    strided = compose(found.lies, wanted)
    return None if strided is None else view(found.conv, strided, value.at, value.node)


def _dense(ne: Dims) -> Strided:
    return Strided(ne, (1, ne[0], ne[0] * ne[1], ne[0] * ne[1] * ne[2]))


def _dense_source(value: Value | None) -> Value | None:
    """What ``value`` is, but for its shape."""
    if value is not None and value.op == "VIEW" and value.src[0] is not None and value.params.dense:
        return value.src[0] if prod(value.src[0].ne) == prod(value.ne) else None
    return value


def _reshaped_leaf(value: Value, ne: Dims) -> Value | None:
    """A leaf that lies densely, or any other value whose elements stand alone, as ``ne``."""
    if value.op != "LEAF":
        return reshaped(value, ne, value.at) if value.type.plain else None
    place = value.place
    if place is None or place.nb != contiguous_strides(place.type, place.ne) or ne[0] % place.type.block:
        return None
    return replace(value, ne=ne, place=place._replace(ne=ne, nb=contiguous_strides(place.type, ne)))


def conv_bias(value: Value, readers: Readers) -> Value | None:
    """CONV_2D and an ADD of one number a channel."""
    conv, bias = _added(value, "CONV_2D", readers)
    if conv is None or bias is None or len(conv.src) != 2 or bias.ne != (1, 1, conv.ne[2], 1):
        return None
    return replace(value, op="CONV_2D", src=(*conv.src, bias), params=conv.params)


def linear(value: Value, readers: Readers) -> Value | None:
    """MUL_MAT with a matrix and an ADD of a row."""
    product, bias = _added(value, "MUL_MAT", readers)
    if product is None or bias is None or bias.ne != (value.ne[0], 1, 1, 1) or product.ne != value.ne:
        return None
    weight = product.src[0]
    if weight is None or weight.ne[2:] != (1, 1):
        return None
    return replace(value, op="LINEAR", src=(*product.src, bias), params=product.params)


def _added(value: Value, op: str, readers: Readers) -> tuple[Value | None, Value | None]:
    """The operands of an ADD whose first one is an ``op`` of its own."""
    if value.op != "ADD" or value.type is not F32:
        return None, None
    first, second = value.src
    if first is None or first.op != op or not readers.alone(first):
        return None, None
    return first, second


# norms


def layer_norm(value: Value, readers: Readers) -> Value | None:
    """NORM, MUL by a row, ADD of a row."""
    return _affine(value, readers, "NORM", (value.ne[0], 1, 1, 1))


def group_norm(value: Value, readers: Readers) -> Value | None:
    """GROUP_NORM, MUL and ADD of one number a channel."""
    return _affine(value, readers, "GROUP_NORM", (1, 1, value.ne[2], 1))


def _affine(value: Value, readers: Readers, op: str, ne: Dims) -> Value | None:
    scaled, bias = _added(value, "MUL", readers)
    if scaled is None or bias is None:
        return None
    norm, weight = scaled.src
    if norm is None or weight is None or norm.op != op or not readers.alone(norm):
        return None
    if bias.ne != ne or weight.ne != ne or norm.ne != value.ne:
        return None
    p: Any = norm.params
    return replace(
        value, op=f"{op}_AFFINE", src=(norm.src[0], weight, bias), params=Norm(p.eps, getattr(p, "groups", 0))
    )


def rms_norm(value: Value, readers: Readers) -> Value | None:
    """RMS_NORM and MUL by a row."""
    if value.op != "MUL":
        return None
    norm, weight = value.src
    if norm is None or weight is None or norm.op != "RMS_NORM" or not readers.alone(norm):
        return None
    if weight.ne != (value.ne[0], 1, 1, 1) or norm.ne != value.ne:
        return None
    return replace(value, op="RMS_NORM_AFFINE", src=(norm.src[0], weight), params=norm.params)


def norm_silu(value: Value, readers: Readers) -> Value | None:
    """GROUP_NORM with weights, then SILU."""
    source = value.src[0] if value.op == "UNARY" and value.params.op == "SILU" else None
    if source is None or source.op != "GROUP_NORM_AFFINE" or not readers.alone(source):
        return None
    return replace(value, op=source.op, src=source.src, params=source.params._replace(silu=True))


# attention


def attention(value: Value, readers: Readers) -> Value | None:
    """MUL_MAT, SCALE, ADD of a mask, SOFT_MAX, MUL_MAT."""
    if value.op != "MUL_MAT":
        return None
    turned, weights = value.src
    if turned is None or weights is None or weights.op != "SOFT_MAX" or not readers.alone(weights):
        return None
    if any(weights.src[2:]):  # attention sinks
        return None
    p: Any = weights.params
    scores, mask, scale = weights.src[0], weights.src[1] if len(weights.src) > 1 else None, p.scale
    if scores is not None and scores.op == "ADD" and mask is None and scale == 1 and readers.alone(scores):
        scores, mask = scores.src
    if scores is not None and scores.op == "SCALE" and readers.alone(scores) and not scores.params.bias:
        scale, scores = scale * scores.params.scale, scores.src[0]
    if scores is None or scores.op != "MUL_MAT" or not readers.alone(scores) or turned.type is not F32:
        return None
    key, query = scores.src
    if key is None or query is None or turned.ne[2:] != key.ne[2:] or key.ne[3] != query.ne[3]:
        return None
    if mask is not None and (mask.ne[0] != scores.ne[0] or mask.ne[1] < scores.ne[1]):
        return None
    keys, size = turned.ne[:2]
    step = keys * size
    straight = view(turned, Strided((size, keys, *turned.ne[2:]), (keys, 1, step, step * turned.ne[2])), value.at)
    if straight.op == "VIEW":
        straight = view_of_view(straight, readers) or straight
    src = (query, key, straight) if mask is None else (query, key, straight, mask)
    return replace(value, op="ATTENTION", src=src, params=Attention(scale, p.max_bias))


class Pass(NamedTuple):
    name: str
    rules: tuple[Rule, ...]


PASSES = (
    Pass("copies", (no_copy, view_of_view, no_scale)),
    Pass("convolutions", (convolution, view_of_view)),
    # convolutions bring images that are views of images: their copies can only go now
    Pass("copies again", (no_copy, view_of_view)),
    Pass("attention", (attention,)),
    Pass("weights and biases", (conv_bias, linear, layer_norm, group_norm, rms_norm)),
    Pass("activations", (norm_silu,)),
)
RULES = tuple(dict.fromkeys(rule.__name__ for step in PASSES for rule in step.rules))


def fuse(effects: Sequence[Value]) -> tuple[tuple[Value, ...], Report]:
    """``effects`` said with fewer values, and how often each rule fired."""
    fired: Counter[str] = Counter()
    for step in PASSES:
        effects = _rewrite(effects, step.rules, fired)
    return tuple(effects), dict(fired)


def _rewrite(effects: Sequence[Value], rules: Sequence[Rule], fired: Counter[str]) -> list[Value]:
    readers = Readers(effects)
    new: dict[Value, Value] = {}
    for old in ordered(effects):
        value = old
        src = tuple(None if s is None else new[s] for s in old.src)
        if src != old.src:
            value = replace(old, src=src)
            readers.count[value] = readers.count[old]
        while True:
            for rule in rules:
                better = rule(value, readers)
                if better is not None and better is not value:
                    fired[rule.__name__] += 1
                    # who read the old value reads the new one; one that was there before has lost a reader
                    readers.count[better] = readers.count[value] + max(readers.count[better] - 1, 0)
                    value = better
                    break
            else:
                break
        new[old] = value
    return [new[value] for value in effects]

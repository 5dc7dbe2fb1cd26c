"""Fusion: many small nodes of a ggml graph as few operations of torch.

A pass is a table of rewrite rules. A rule looks at one value, whose operands have been rewritten already, and returns a
value to compute in its place, or None. It may absorb an operand only if nothing else reads that and it need not be
stored (:meth:`Readers.alone`). Passes run in the order of :data:`PASSES`; how often each rule fired is reported.

Shapes here are ggml's, the fastest dimension first: an image is [width, height, channels, batch].
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import NamedTuple

from sdrpc.ggml.params import Conv2D, Eps, GroupNorm, Im2Col, MulMat, Scale, SoftMax, Unary, Window3D
from sdrpc.ggml.tensor import Dims, contiguous_strides
from sdrpc.ggml.types import F16, F32

from .layout import Group, Strided, compose, groups_of
from .operations import AffineNorm, Attention, EngineOp, OpName
from .values import Value, ordered, reshaped, view

Report = Mapping[str, int]


class Readers:
    """How many operands, of all values, each value is."""

    def __init__(self, roots: Sequence[Value]) -> None:
        self.count: Counter[Value] = Counter()
        for value in ordered(roots):
            self.count.update(s for s in value.src if s is not None)

    def alone(self, value: Value | None) -> bool:
        """Whether a rule may absorb ``value``: it is computed for one reader only."""
        return value is not None and value.store is None and self.count[value] <= 1


Rule = Callable[[Value, Readers], "Value | None"]


# copies and views


def no_copy(value: Value, readers: Readers) -> Value | None:
    """A dense copy is the same value: only its layout in memory differs, and values have none. A copy of a strided view
    stays if several values read it: each of them would walk the strides again."""
    if value.op not in ("CONT", "DUP") or value.store is not None:
        return None
    source = value.src[0]
    if source is None or source.type is not value.type or not source.type.plain:
        return None
    strided = _strides(source)
    if strided is not None and not strided.dense and readers.count[value] > 1:
        return None
    return reshaped(source, value.ne, value.at)


def view_of_view(value: Value, _readers: Readers) -> Value | None:
    """Two views in a row are one, where strides can say it."""
    inner, outer = value.src[0] if value.src else None, _strides(value)
    if inner is None or outer is None or (first := _strides(inner)) is None or inner.src[0] is None:
        return None
    strided = compose(groups_of(first), outer)
    return None if strided is None else view(inner.src[0], strided, value.at, value.node)


def _strides(value: Value | None) -> Strided | None:
    """Which elements of its operand ``value`` is, if it is a view."""
    return value.params if value is not None and isinstance(value.params, Strided) else None


def no_scale(value: Value, _readers: Readers) -> Value | None:
    """x · 1 + 0"""
    return value.src[0] if value.params == Scale(1, 0) and value.op == "SCALE" and value.store is None else None


# convolutions: stable-diffusion.cpp and its like say them as IM2COL, which unrolls the patch under each place of the
# window into a row of ``taps`` numbers, and a matrix product of these rows with the kernel


class _Product(NamedTuple):
    """A convolution that a matrix product stands for. ``conv`` is the value to compute instead, an image; ``lies`` says
    where each element of the product, taken in order, lies in that image."""

    conv: Value
    lies: tuple[tuple[Group, ...], int]


class _Unrolled(NamedTuple):
    """Patches that were unrolled from ``batch`` images, and the convolution that they belong to, which is known but for
    its number of output channels: from that follow the shape of the kernel, the shape of the result, the parameters."""

    op: str
    batch: int
    kernel: Callable[[int], Dims]
    result: Callable[[int], Dims]
    params: Callable[[int], Conv2D | Window3D]


def _unrolled(columns: Value, kernel: Dims, image: Dims) -> _Unrolled | None:
    """What ``columns`` is, if it is IM2COL or IM2COL_3D of an image under a kernel of these shapes.

    IM2COL: kernel [k0, k1, channels, outputs], image [width, height, channels, batch] → [taps, across, down, batch].
    IM2COL_3D: kernel [k0, k1, k2, channels · outputs], image [width, height, depth, channels · batch] → [taps, across,
    down, deep · batch]. The convolutions give [across, down, outputs, batch] and [across, down, deep, outputs · batch].
    """
    (k0, k1, k2, _), (_, across, down, outer), p = kernel, columns.ne, columns.params
    if isinstance(p, Im2Col) and columns.op == "IM2COL" and p.is_2d:
        window = Conv2D(*p[:6])
        return _Unrolled("CONV_2D", outer, lambda n: (k0, k1, k2, n), lambda n: (across, down, n, outer),
                         lambda _: window)  # fmt: skip
    if isinstance(p, Window3D) and columns.op == "IM2COL_3D" and image[3] % p.channels == 0:
        volume, channels, batch = p, p.channels, image[3] // p.channels
        deep = outer // batch
        return _Unrolled("CONV_3D", batch, lambda n: (k0, k1, k2, channels * n),
                         lambda n: (across, down, deep, n * batch),
                         lambda n: volume._replace(batch=batch, outputs=n))  # fmt: skip
    return None


def _convolution(product: Value) -> _Product | None:
    """The convolution that ``product`` stands for: a MUL_MAT of unrolled patches [taps, places · batch] and a kernel
    [taps, outputs], in either order, where ``places`` are the places of the window in one image.

    The convolution's result has, from the fastest: places (across, then down, then deep), outputs, images. The product
    has the places of all images together, then the outputs, if the patches come first, and outputs, places, images if
    the kernel does. Of each group of dimensions ``lies`` says how far apart its elements are in the product, how many
    they are, and how far apart they are in the image.
    """
    if product.op != "MUL_MAT" or product.store is not None:
        return None
    for patches, kernel in (product.src, product.src[::-1]):
        columns = _dense_source(patches)
        if columns is None or kernel is None or patches is None or columns.store is not None or len(columns.src) < 2:
            continue
        shape, image = columns.src[:2]
        if shape is None or image is None or (kind := _unrolled(columns, shape.ne, image.ne)) is None:
            continue
        taps, batch, outputs = columns.ne[0], kind.batch, kernel.ne[1]
        places = prod(columns.ne[1:]) // batch
        if patches.ne != (taps, places * batch, 1, 1) or kernel.ne[0] != taps or kernel.ne[2:] != (1, 1):
            continue
        weight = _reshaped_leaf(kernel, kind.kernel(outputs))
        if weight is None:
            continue
        if columns.type is F16 and image.type is F32:  # ggml rounds what it unrolls
            image = Value("CPY", F16, image.ne, (image,), at=columns.at, node=columns.node)
        conv = Value(kind.op, F32, kind.result(outputs), (weight, image), kind.params(outputs), product.at,
                     node=product.node)  # fmt: skip
        step = places * outputs
        if patches is product.src[0]:
            lies = Group(1, places, 1), Group(places, batch, step), Group(places * batch, outputs, places)
        else:
            lies = Group(1, outputs, places), Group(outputs, places, 1), Group(outputs * places, batch, step)
        return _Product(conv, (lies, 0))
    return None


def convolution(value: Value, readers: Readers) -> Value | None:
    """IM2COL or IM2COL_3D, MUL_MAT and a view that brings the product into an image's shape: a view of CONV_2D or
    CONV_3D, which is the convolution itself where that view only undoes the product's order."""
    product = value.src[0] if value.op is EngineOp.VIEW else value
    if product is None or (product is not value and not readers.alone(product)):
        return None
    found = _convolution(product)
    if found is None:
        return None
    strided = compose(found.lies, _strides(value) or _dense(value.ne))
    return None if strided is None else view(found.conv, strided, value.at, value.node)


def _dense(ne: Dims) -> Strided:
    return Strided(ne, (1, ne[0], ne[0] * ne[1], ne[0] * ne[1] * ne[2]))


def _dense_source(value: Value | None) -> Value | None:
    """What ``value`` is a reshape of, or itself; None if it is only the beginning of a value."""
    strides = _strides(value)
    if value is not None and strides is not None and strides.dense and value.src[0] is not None:
        return value.src[0] if prod(value.src[0].ne) == prod(value.ne) else None
    return value


def _reshaped_leaf(value: Value, ne: Dims) -> Value | None:
    """A leaf that lies densely, or any other value whose elements stand alone, as ``ne``."""
    if value.op is not EngineOp.LEAF:
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
    return replace(value, op=EngineOp.LINEAR, src=(*product.src, bias), params=product.params)


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
    return _affine(value, readers, EngineOp.NORM_AFFINE, (value.ne[0], 1, 1, 1))


def group_norm(value: Value, readers: Readers) -> Value | None:
    """GROUP_NORM, MUL and ADD of one number a channel."""
    return _affine(value, readers, EngineOp.GROUP_NORM_AFFINE, (1, 1, value.ne[2], 1))


_NORMS: dict[OpName, str] = {EngineOp.NORM_AFFINE: "NORM", EngineOp.GROUP_NORM_AFFINE: "GROUP_NORM"}


def _affine(value: Value, readers: Readers, op: EngineOp, ne: Dims) -> Value | None:
    """``op``, if ``value`` is its norm, MUL and ADD, both with operands of shape ``ne``."""
    scaled, bias = _added(value, "MUL", readers)
    if scaled is None or bias is None:
        return None
    norm, weight = scaled.src
    if norm is None or weight is None or norm.op != _NORMS[op] or not readers.alone(norm):
        return None
    if bias.ne != ne or weight.ne != ne or norm.ne != value.ne:
        return None
    if isinstance(norm.params, GroupNorm):
        params = AffineNorm(norm.params.eps, norm.params.groups)
    elif isinstance(norm.params, Eps):
        params = AffineNorm(norm.params.eps)
    else:
        return None
    return replace(value, op=op, src=(norm.src[0], weight, bias), params=params)


def rms_norm(value: Value, readers: Readers) -> Value | None:
    """RMS_NORM and MUL by a row."""
    if value.op != "MUL":
        return None
    norm, weight = value.src
    if norm is None or weight is None or norm.op != "RMS_NORM" or not readers.alone(norm):
        return None
    if weight.ne != (value.ne[0], 1, 1, 1) or norm.ne != value.ne:
        return None
    return replace(value, op=EngineOp.RMS_NORM_AFFINE, src=(norm.src[0], weight), params=norm.params)


def norm_silu(value: Value, readers: Readers) -> Value | None:
    """GROUP_NORM with weights, then SILU."""
    source = value.src[0] if isinstance(value.params, Unary) and value.params.op == "SILU" else None
    if source is None or source.op is not EngineOp.GROUP_NORM_AFFINE or not readers.alone(source):
        return None
    if not isinstance(source.params, AffineNorm):
        return None
    return replace(value, op=source.op, src=source.src, params=source.params._replace(silu=True))


# attention


def attention(value: Value, readers: Readers) -> Value | None:
    """MUL_MAT, SCALE, ADD of a mask, SOFT_MAX, MUL_MAT.

    The first product is of keys [head, keys, groups, batch] and queries [head, queries, heads, batch]; the second one
    of values [keys, head, groups, batch], which have to be transposed for torch, and the weights [keys, queries, …].
    """
    if value.op != "MUL_MAT":
        return None
    turned, weights = value.src[:2]
    if turned is None or weights is None or not readers.alone(weights):
        return None
    p = weights.params
    if not isinstance(p, SoftMax) or weights.op != "SOFT_MAX" or any(weights.src[2:]):  # attention sinks
        return None
    scores, mask, scale = weights.src[0], weights.src[1] if len(weights.src) > 1 else None, p.scale
    if scores is not None and scores.op == "ADD" and mask is None and scale == 1 and readers.alone(scores):
        scores, mask = scores.src
    if scores is not None and isinstance(scores.params, Scale) and readers.alone(scores) and not scores.params.bias:
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
    straight = view_of_view(straight, readers) or straight
    src = (query, key, straight) if mask is None else (query, key, straight, mask)
    # native clients mark the first one, which is added up in float32 anyway; ours both
    prec = min(each.params.prec for each in (scores, value) if isinstance(each.params, MulMat))
    return replace(value, op=EngineOp.ATTENTION, src=src, params=Attention(scale, p.max_bias, prec))


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


def fuse(roots: Sequence[Value]) -> tuple[tuple[Value, ...], Report]:
    """The same ``roots``, computed with fewer values, and how often each rule fired."""
    fired: Counter[str] = Counter()
    for step in PASSES:
        roots = _rewrite(roots, step.rules, fired)
    return tuple(roots), dict(fired)


def _rewrite(roots: Sequence[Value], rules: Sequence[Rule], fired: Counter[str]) -> list[Value]:
    """``roots`` after one pass: every value, operands before their readers, is rewritten by the first rule that fires,
    and what comes of it again, until none does. ``fired`` counts them.

    Values never change: one with rewritten operands is a new value, and ``new`` maps each to what stands for it.
    """
    readers = Readers(roots)
    new: dict[Value, Value] = {}
    for old in ordered(roots):
        value = old
        src = tuple(None if s is None else new[s] for s in old.src)
        if src != old.src:
            value = replace(old, src=src)
            readers.count[value] = readers.count[old]
        while (better := _better(value, rules, readers, fired)) is not None:
            # Whoever reads ``value`` will read ``better``. If ``better`` is not new but was an operand of ``value`` (a
            # copy went away, say), it has lost that reader, for nothing computes ``value`` any more.
            readers.count[better] = readers.count[value] + max(readers.count[better] - 1, 0)
            value = better
        new[old] = value
    return [new[value] for value in roots]


def _better(value: Value, rules: Sequence[Rule], readers: Readers, fired: Counter[str]) -> Value | None:
    """What the first rule that fires puts in the place of ``value``."""
    for rule in rules:
        better = rule(value, readers)
        if better is not None and better is not value:
            fired[rule.__name__] += 1
            return better
    return None

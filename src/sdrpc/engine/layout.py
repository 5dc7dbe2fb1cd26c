"""A strided view of a dense array as reshape, slice and permute.

ggml describes a view by byte strides into its source's memory. A torch value may lie in memory in any order (channels
last, a permuted view), so a view can't be expressed by strides of memory for it; it is expressed by logical steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from sdrpc.ggml.tensor import Dims

from .dtypes import Shape, shape_of

WAYS = 1 << 12
"""Views whose steps are remembered, since each run of a program needs them again."""


class Strided(NamedTuple):
    """Elements of a dense array: sizes and strides in ggml's order (fastest first), all counted in elements."""

    ne: Dims
    strides: Dims
    offset: int = 0

    @property
    def dense(self) -> bool:
        """Whether these are consecutive elements, in order, from the first on."""
        step = 1
        for n, stride in zip(self.ne, self.strides, strict=True):
            if n != 1 and stride != step:
                return False
            step *= n
        return self.offset == 0


class Steps(NamedTuple):
    """``x.reshape(full)[slices].permute(order).reshape(shape)``; ``slices`` and ``order`` are None where they would do
    nothing. The last reshape only adds or drops dimensions of one element."""

    full: tuple[int, ...]
    slices: tuple[slice, ...] | None
    order: tuple[int, ...] | None
    shape: Shape


@lru_cache(WAYS)
def steps(elements: int, view: Strided) -> Steps | None:
    """How ``view`` of a dense array of ``elements`` is said without strides; None when it can't be (overlapping rows,
    strides that do not divide each other)."""
    axes = [i for i in range(4) if view.ne[i] != 1]
    if any(view.strides[i] <= 0 for i in axes):
        return None
    by_stride = sorted(axes, key=lambda i: view.strides[i], reverse=True)
    strides = [view.strides[i] for i in by_stride]
    sizes = [view.ne[i] for i in by_stride]
    if not strides or strides[-1] != 1:  # a picked column, or a single element: the rest of the row is sliced away
        strides.append(1)
        sizes.append(1)
    full: list[int] = []
    slices: list[slice] = []
    outer, rest = elements, view.offset
    for stride, size in zip(strides, sizes, strict=True):
        if outer % stride:
            return None
        start, rest = divmod(rest, stride)
        full.append(outer // stride)
        if start + size > full[-1]:
            return None
        slices.append(slice(start, start + size))
        outer = stride
    wanted = [by_stride.index(i) for i in sorted(axes, reverse=True)]
    if len(sizes) > len(by_stride):
        wanted.append(len(by_stride))
    sliced = any(s.stop - s.start != n for s, n in zip(slices, full, strict=True))
    permuted = wanted != sorted(wanted)
    return Steps(tuple(full), tuple(slices) if sliced else None, tuple(wanted) if permuted else None, shape_of(view.ne))


def take(x: torch.Tensor, way: Steps | None, view: Strided) -> torch.Tensor:
    """The elements of ``x``, seen as dense, that ``view`` names; no copy where ``x`` lies so that none is needed."""
    if way is None:
        dense = x.contiguous()
        return dense.as_strided(shape_of(view.ne), shape_of(view.strides), dense.storage_offset() + view.offset)
    if way.slices is None and way.order is None:
        return x.reshape(way.shape)
    x = x.reshape(way.full)
    if way.slices is not None:
        x = x[way.slices]
    if way.order is not None:
        x = x.permute(way.order)
    return x.reshape(way.shape)


class Group(NamedTuple):
    """``size`` consecutive elements of a dense array, ``step`` apart in it, that lie ``stride`` apart elsewhere."""

    step: int
    size: int
    stride: int


def groups_of(view: Strided) -> tuple[tuple[Group, ...], int]:
    """The elements of ``view``, taken as a dense array of their own: how they lie in the view's source, in as few
    groups as can be, fastest first, and where the first one lies."""
    groups: list[Group] = []
    step = 1
    for n, stride in zip(view.ne, view.strides, strict=True):
        if n == 1:
            continue
        if groups and stride == groups[-1].stride * groups[-1].size:
            groups[-1] = groups[-1]._replace(size=groups[-1].size * n)
        else:
            groups.append(Group(step, n, stride))
        step *= n
    return tuple(groups), view.offset


def compose(lies: tuple[Sequence[Group], int], outer: Strided) -> Strided | None:
    """A view of a view as one view: ``outer`` is a view of a dense array, whose elements really lie elsewhere as
    ``lies`` says (groups of consecutive elements, and where the first one lies); the result is a view of there.

    Each dimension of ``outer`` steps over the dense array by its stride. If the stride is a multiple of a group's
    ``step``, and all its steps stay within that group, it is a walk over the real places as well, by as many times the
    group's ``stride``. ``start`` says where in each group the view begins, ``reach`` how far its dimensions get:
    several may walk over one group. None where a dimension would go from one group into the next: no stride says that.
    """
    groups = [group for group in lies[0] if group.size > 1]
    base = lies[1]
    strides = []
    start = {group.step: outer.offset // group.step % group.size for group in groups}
    reach = dict(start)
    for n, stride in zip(outer.ne, outer.strides, strict=True):
        if n == 1:
            strides.append(0)
            continue
        group = next((g for g in groups if g.step <= stride < g.step * g.size), None)
        if group is None or stride % group.step:
            return None
        inside = stride // group.step
        reach[group.step] += (n - 1) * inside
        if reach[group.step] >= group.size:
            return None
        strides.append(inside * group.stride)
    offset = base + sum(start[group.step] * group.stride for group in groups)
    filled = _filled(outer.ne, strides)
    return Strided(outer.ne, filled, offset)


def _filled(ne: Dims, strides: list[int]) -> Dims:
    """Strides with those of one-element dimensions, which are arbitrary, as in a dense array."""
    last = 1
    result = []
    for n, stride in zip(ne, strides, strict=True):
        result.append(stride if n != 1 else last)
        last = result[-1] * n
    return result[0], result[1], result[2], result[3]

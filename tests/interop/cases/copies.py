"""Names for bytes, and bytes that move: views, copies, conversions, rows picked and set."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from tests.interop.cases.base import (
    ANY_VIEW,
    FLOATS,
    ODD,
    QUANTIZED,
    ROWS_DENSE,
    WRITTEN,
    Builder,
    Case,
    draws,
    order,
    shapes,
    sweep,
)
from tests.support import ggml

Shape = tuple[int, ...]

INTEGERS = ("I8", "I16", "I32", "I64")
WIDE = (512, 3, 2, 2)
"""A shape whose rows are whole blocks of any type."""
FEW_VIEWS = ("dense", "offset", "part", "0213")
INSIDE = ("dense", "part", "0213")
"""Where something is written: a tensor of its own, a part of a larger one, across its order."""


def _leaf(b: Builder, *ne: int, type: str) -> Any:
    """A leaf of random numbers of any type."""
    return b.put(type, b.rng.integers(-100, 100, ne[::-1])) if type in INTEGERS else b.x(*ne, type=type)


def _any(b: Builder, *ne: int, type: str, view: str = "dense") -> Any:
    return b.operand(*ne, view=view, make=partial(_leaf, b), type=type)


def _shaped(type: str, ne: Shape = ODD) -> Shape:
    return WIDE if type in QUANTIZED else ne


# Names


def _reshaped(b: Builder, ne: Shape, of: Shape = (33, 5, 3, 2)) -> Any:
    return b.scale(b.reshape_4d(b.x(*of), *ne), 1.0)


def _viewed(b: Builder, ne: Shape, nb: Shape, offset: int, of: str) -> Any:
    """A view at strides and an offset in elements, of which rows may overlap."""
    size = 4 if of == "F32" else 2
    return b.cont(b.view_4d(b.x(1408, type=of), *ne, *(size * n for n in nb), size * offset))


def _view_of_view(b: Builder, of: str) -> Any:
    view = b.part(32, 4, 3, type=of)
    nb = view.contents.nb
    return b.cont(b.view_4d(view, 8, 2, 2, 1, nb[2], nb[1], nb[3], 4 * nb[0]))


def _permuted_twice(b: Builder, axes: Shape, again: Shape, ne: Shape = ODD) -> Any:
    return b.cont(b.permute(b.permute(b.x(*ne), *axes), *again))


def _transposed(b: Builder, of: str, ne: Shape = ODD) -> Any:
    return b.cont(b.transpose(_any(b, *ne, type=of)))


def _names() -> Iterator[Case]:
    orders = ((0, 2, 1, 3), (1, 0, 2, 3), (2, 0, 1, 3), (3, 1, 2, 0), (1, 2, 3, 0))
    yield from sweep("RESHAPE", _reshaped, "exact", ne=((165, 6, 1, 1), (990, 1, 1, 1), (3, 2, 5, 33), (1, 1, 1, 990)))
    yield from sweep(
        "VIEW", _viewed, "exact", ne=((16, 3, 1, 1), (8, 20, 1, 1), (5, 4, 3, 2), (1, 7, 2, 1)),
        nb=((64, 0, 0), (2, 160, 160), (20, 70, 150), (1, 9, 30)), offset=(0, 1, 33), of=("F32", "F16"),
        where=lambda ne, nb, **_: nb[1] or ne[2:] == (1, 1),
    )  # fmt: skip
    yield from sweep("VIEW", _view_of_view, "exact", of=FLOATS)
    yield from sweep("PERMUTE", _permuted_twice, "exact", axes=orders, again=orders)
    yield from sweep("TRANSPOSE", _transposed, "exact", of=(*FLOATS, *INTEGERS))


# The same type


def _copy(b: Builder, of: str, view: str, op: str = "", ne: Shape = ODD) -> Any:
    return getattr(b, op.lower())(_any(b, *_shaped(of, ne), type=of, view=view))


def _same() -> Iterator[Case]:
    plain = (*FLOATS, "F64", *INTEGERS)
    for op in ("DUP", "CONT"):
        yield from sweep(
            op, partial(_copy, op=op), "exact", of=(*plain, *QUANTIZED), view=ANY_VIEW,
            where=lambda of, view: of in plain or view in FEW_VIEWS,
        )  # fmt: skip
    yield from sweep(
        "CONT", lambda b, of, view, ne: b.cont_4d(_any(b, *ODD, type=of, view=view), *ne), "exact",
        of=("F32", "F16", "I32"), view=("dense", "part", "1023", "2013"),
        ne=((22, 63, 1, 1), (1386, 1, 1, 1), (3, 2, 77, 3)),
    )  # fmt: skip
    yield from sweep(
        "CPY", _copied, "exact", kind=("same",), of=(*plain, *WRITTEN), view=("dense", "part"), into=INSIDE,
        where=lambda of, into, **_: of in plain or into != "0213",
    )  # fmt: skip


def _copied(b: Builder, of: str, view: str, into: str, to: str = "", ne: Shape = (), kind: str = "") -> Any:
    """Into a tensor that is there, of another type and shape; what lies around it must stay as it is."""
    source = _any(b, *_shaped(of, WIDE if to in QUANTIZED else ODD), type=of, view=view)
    target = _any(b, *(ne or tuple(source.contents.ne)), type=to or of, view=into)
    written = b.cpy(source, target)
    b.first.append(written)
    whole = written
    while whole.contents.view_src:
        whole = whole.contents.view_src
    return whole


# Floats and integers


def _cast(b: Builder, of: str, to: str, view: str, ne: Shape = ODD) -> Any:
    return b.cast(_any(b, *_shaped(of, ne), type=of, view=view), ggml.TYPES[to])


def _floats() -> Iterator[Case]:
    yield from sweep("CPY", _cast, "exact", of=FLOATS, to=FLOATS, view=ANY_VIEW)
    yield from sweep(
        "CPY", _copied, "exact", of=FLOATS, view=("dense", "part", "1023"), into=(*INSIDE, "1023"), to=FLOATS,
        where=lambda of, to, **_: of != to,
    )  # fmt: skip
    yield from sweep(
        "CPY", _copied, "exact", of=FLOATS, view=("dense", "2013"), into=("dense", "part"), to=FLOATS,
        ne=((22, 63, 1, 1), (3, 2, 77, 3)),
    )  # fmt: skip
    yield from sweep(
        "CPY", lambda b, to, view, low: b.cast(b.operand(*ODD, view=view, low=low, high=99.0), ggml.TYPES[to]), "exact",
        to=("I32",), view=ANY_VIEW, low=(-99.0, 0.0),
    )  # fmt: skip
    yield from sweep("CPY", _cast, "exact", of=("I32",), to=("F32",), view=ANY_VIEW)


# Blocks


def _blocks() -> Iterator[Case]:
    yield from sweep(
        "CPY", _cast, "exact",
        of=FLOATS, to=WRITTEN, view=FEW_VIEWS, ne=((256, 3, 2, 2), (1024, 2, 1, 1)),
        where=lambda of, view, **_: of == "F32" or view != "offset",
    )  # fmt: skip
    yield from sweep(
        "CPY", _copied, "exact", of=("F32", "F16"), view=("dense", "part"), into=("dense", "offset"), to=WRITTEN,
        ne=((256, 6, 2, 2), (1024, 6, 1, 1)),
    )  # fmt: skip
    yield from sweep("CPY", _cast, "exact", of=QUANTIZED, to=("F32",), view=("dense", "part", "0213", "0321"))
    yield from sweep(
        "CPY", _copied, "exact", of=QUANTIZED, view=("dense",), into=("dense", "part"), to=("F32",),
        ne=((512, 3, 2, 2), (256, 12, 2, 1)),
    )  # fmt: skip


# Joined and repeated


def _concat(b: Builder, of: str, dim: int, view: str) -> Any:
    ne = _shaped(of, (11, 6, 4, 3))
    other = tuple((256 if of in QUANTIZED else 5) if i == 0 == dim else 4 if i == dim else n for i, n in enumerate(ne))
    return b.concat(_any(b, *ne, type=of, view=view), _any(b, *other, type=of, view=view), dim)


def _joined() -> Iterator[Case]:
    plain = (*FLOATS, *INTEGERS)
    yield from sweep(
        "CONCAT", _concat, "exact", of=(*plain, *QUANTIZED), dim=range(4), view=("dense", "part", "0213", "1023"),
        where=lambda of, view, **_: view in ("dense", "part") or of in ("F32", "F16", "I32"),
    )  # fmt: skip
    yield from sweep(
        "REPEAT", lambda b, ne, of, view: b.repeat_4d(_any(b, 11, 3, 4, 2, type=of, view=view), *ne), "exact",
        ne=((22, 3, 4, 2), (11, 9, 4, 2), (11, 3, 8, 6), (33, 6, 8, 2), (11, 3, 4, 2)), view=("dense", "part", "0213"),
        of=("F32", "F16", "BF16", "I16", "I32"),
    )  # fmt: skip


# Rows


def _get_rows(b: Builder, of: str, view: str, batch: Shape, numbers: str) -> Any:
    ne = (512 if of in QUANTIZED else 33, 11, *batch)
    rows = b.operand(7, *batch, view=numbers, make=partial(b.indices, 11))
    return b.get_rows(_any(b, *ne, type=of, view=view), rows)


def _picked() -> Iterator[Case]:
    yield from sweep(
        "GET_ROWS", _get_rows, "exact", of=(*FLOATS, "I32", *QUANTIZED), view=FEW_VIEWS,
        batch=((), (3,), (3, 2)), numbers=("dense", "strided"),
        where=lambda view, batch, numbers, **_: (view == "dense") == (numbers == "strided") or len(batch) == 2,
    )  # fmt: skip
    yield from sweep("GET_ROWS", lambda b, n: b.get_rows(b.x(n, 9), b.indices(9, 5)), "exact", n=(1, 2, 1025))


def _set_rows(b: Builder, to: str, of: str, number: str, spread: Shape, view: str = "dense") -> Any:
    """Rows of numbers, the same for all (``spread`` 1) or not; what else there is must stay."""
    width = 256 if to in QUANTIZED else 48
    into = _any(b, width, 11, 4, 2, type=to)
    low, high = (-99.0, 99.0) if to == "I32" else (-1.0, 1.0)
    values = b.operand(width, 6, 4, 2, view=view, type=of, low=low, high=high)
    b.first.append(b.set_rows(into, values, b.indices(11, 6, *spread, type=number, unique=True)))
    return into


def _set() -> Iterator[Case]:
    yield from sweep(
        "SET_ROWS", _set_rows, "exact", to=(*FLOATS, "I32", *WRITTEN), of=("F32", "F16"), number=("I64", "I32"),
        spread=((1, 1), (2, 1), (4, 2)), view=("dense", "part", "0213"),
        where=lambda view, number, spread, **_: view == "dense" or (number, spread) == ("I64", (1, 1)),
    )  # fmt: skip
    yield from sweep(
        "SET_ROWS",
        lambda b, to, view: b.set_rows(
            b.operand(48, 11, 3, 2, view=view, type=to), b.x(48, 6, 3, 2), b.indices(11, 6, type="I64", unique=True)
        ),
        "exact", to=FLOATS, view=("offset", "part", "strided", "0213"),
    )  # fmt: skip
    for op, types in (("SET", ("F32", "I32")), ("ACC", ("F32",))):
        yield from sweep(
            op, partial(_set_part, op=op), "exact" if op == "SET" else "f32", of=types,
            ne=((4, 3, 2, 1), (10, 1, 1, 1), (1, 8, 3, 2), (7, 5, 1, 2)), at=((0, 0, 0, 0), (3, 2, 1, 0), (0, 0, 0, 1)),
            inplace=(False, True), view=("dense", "part"),
            where=lambda ne, at, **_: all(n + a <= most for n, a, most in zip(ne, at, (10, 8, 3, 2), strict=True)),
        )  # fmt: skip


def _set_part(b: Builder, op: str, of: str, ne: Shape, at: Shape, inplace: bool, view: str) -> Any:
    into, part = _any(b, 10, 8, 3, 2, type=of), _any(b, *ne, type=of, view=view)
    nb = list(into.contents.nb)
    call = getattr(b, f"{op.lower()}_inplace" if inplace else op.lower())
    return call(into, part, *nb[1:], sum(a * n for a, n in zip(at, nb, strict=True)))


def _padded(b: Builder, amounts: tuple[int, ...], circular: bool, view: str) -> Any:
    return (b.pad_ext_circular if circular else b.pad_ext)(b.operand(9, 8, 5, 3, view=view), *amounts)


def _reflected(b: Builder, n: int, left: int, right: int, view: str, outer: Shape = (5, 2)) -> Any:
    return b.pad_reflect_1d(b.operand(n, *outer, view=view), left, right)


def _inside(*, n: int, left: int, right: int, **_: Any) -> bool:
    return left < n and right < n


def _paddings() -> Iterator[Case]:
    amounts = ((0, 1, 0, 1, 0, 0, 0, 0), (2, 3, 1, 0, 0, 4, 1, 1), (9, 20, 8, 0, 5, 7, 0, 3))
    yield from sweep("PAD", _padded, "exact", amounts=amounts, circular=(False, True), view=ANY_VIEW)
    yield from sweep(
        "PAD_REFLECT_1D", _reflected, "exact", _inside, n=(1, 4, 33), left=(0, 1, 3, 32), right=(0, 2, 3),
        view=("dense", "offset"),
    )  # fmt: skip
    yield from sweep(
        "ROLL", lambda b, shifts, view: b.roll(b.operand(*ODD, view=view), *shifts), "exact",
        shifts=((1, 0, 0, 0), (-32, 6, -1, 2), (5, -3, 1, -1), (0, 0, 0, 0)), view=ROWS_DENSE,
    )  # fmt: skip


CASES = [*_names(), *_same(), *_floats(), *_blocks(), *_joined(), *_picked(), *_set(), *_paddings()]


def _within(*, ne: Shape, nb: Shape, offset: int, **_: Any) -> bool:
    """Whether the view ends within the 1,408 elements that there are."""
    dense: int = math.prod(ne)  # what ggml asks for before it knows the strides
    return (
        offset + dense <= 1408
        and offset + ne[0] + sum((n - 1) * step for n, step in zip(ne[1:], nb, strict=True)) <= 1408
    )


def _factors(rng: np.random.Generator) -> Shape:
    """A shape of 3,960 elements."""
    ne = [1, 1, 1, 1]
    for prime in (2, 2, 2, 3, 3, 5, 11):
        ne[int(rng.integers(4))] *= prime
    return tuple(ne)


def _convertible(*, of: str, to: str, view: str, ne: Shape) -> bool:
    return to in FLOATS or (ne[0] % 256 == 0 and (of == "F32" or view != "offset"))


PLAIN = (*FLOATS, "F64", *INTEGERS)
DRAWN = {
    "RESHAPE": draws(_reshaped, "exact", of=_factors, ne=_factors),
    "VIEW": draws(
        _viewed, "exact", _within, ne=shapes(first=range(1, 40)),
        nb=lambda rng: tuple(int(n) for n in rng.integers(1, (40, 200, 400))), offset=range(100), of=("F32", "F16"),
    ),
    "PERMUTE": draws(_permuted_twice, "exact", axes=order, again=order, ne=shapes(empty=True)),
    "TRANSPOSE": draws(_transposed, "exact", of=(*FLOATS, *INTEGERS), ne=shapes(empty=True)),
    **{
        op: draws(partial(_copy, op=op), "exact", of=PLAIN, view=ANY_VIEW, ne=shapes(empty=True))
        for op in ("DUP", "CONT")
    },
    "CPY": draws(
        _cast, "exact", _convertible, of=FLOATS, to=(*FLOATS, *WRITTEN), view=FEW_VIEWS,
        ne=shapes(first=(1, 7, 33, 256, 256, 256, 512, 768)),
    ),
    "PAD_REFLECT_1D": draws(
        _reflected, "exact", _inside, n=range(1, 20), left=range(20), right=range(20), outer=shapes(3),
        view=("dense", "offset"),
    ),
}  # fmt: skip

"""Names for bytes, and bytes that move: views, copies, conversions, rows picked and set."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from tests.interop.cases.base import (
    ANY_VIEW,
    F16,
    F32,
    FLOATS,
    ODD,
    QUANTIZED,
    ROWS_DENSE,
    Builder,
    Case,
    shape,
    sweep,
)
from tests.support import ggml

PERMUTATIONS = ((0, 2, 1, 3), (1, 0, 2, 3), (2, 0, 1, 3), (3, 1, 2, 0), (1, 2, 3, 0))


def _copies() -> Iterator[Case]:
    for axes in PERMUTATIONS:
        label = "".join(map(str, axes))
        for kind in ("F32", "F16"):
            yield Case(
                "CONT", f"{label}-{kind}", lambda b, a=axes, t=kind: b.cont(b.shuffled(*ODD, axes=a, type=t)), "exact"
            )
        yield Case("PERMUTE", label, lambda b, a=axes: b.cont(b.permute(b.permute(b.x(*ODD), *a), *a)), "exact")
        yield Case("CPY", f"F32-F16-{label}", lambda b, a=axes: b.cast(b.shuffled(*ODD, axes=a), F16), "exact")
    yield Case("TRANSPOSE", "F32", lambda b: b.cont(b.transpose(b.x(*ODD))), "exact")
    yield Case("CONT", "I32", lambda b: b.cont(b.transpose(b.indices(99, 12, 5))), "exact")
    yield Case("CONT", "reshape", lambda b: b.cont_4d(b.transpose(b.x(12, 10, 3)), 4, 15, 6, 1), "exact")
    yield Case("CONT", "view", lambda b: b.cont(b.part(*ODD)), "exact")
    yield Case("DUP", "F32", lambda b: b.dup(b.part(*ODD)), "exact")
    yield Case("DUP", "F16", lambda b: b.dup(b.shuffled(*ODD, axes=(1, 0, 2, 3), type="F16")), "exact")
    for source, to in itertools.product(FLOATS, FLOATS):
        yield Case(
            "CPY", f"{source}-{to}", lambda b, s=source, t=to: b.cast(b.part(*ODD, type=s), ggml.TYPES[t]), "exact"
        )
    for source in QUANTIZED:
        yield Case("CPY", f"{source}-F32", lambda b, s=source: b.cast(b.x(256, 5, 2, type=s), F32), "f32")
    yield Case("CPY", "F32-I32", lambda b: b.cast(b.x(*ODD, low=-99, high=99), ggml.TYPES["I32"]), "exact")
    yield Case("CPY", "I32-F32", lambda b: b.cast(b.indices(1000, *ODD), F32), "exact")

    def into_view(b: Builder, type: str) -> Any:
        whole = b.x(40, 9, 3, type=type)
        nb = whole.contents.nb
        written = b.cpy(b.x(32, 6, 2), b.view_4d(whole, 32, 6, 2, 1, nb[1], nb[2], nb[3], 4 * nb[0] + nb[1]))
        return written, whole

    for kind in FLOATS:
        yield Case("CPY", f"into-view-{kind}", lambda b, t=kind: into_view(b, t), "exact")
    yield Case(
        "CPY",
        "into-transposed",
        lambda b: (lambda whole: (b.cpy(b.x(7, 5), b.transpose(whole)), whole))(b.x(5, 7)),
        "exact",
    )
    yield Case("CPY", "other-shape", lambda b: b.cpy(b.shuffled(6, 5, 4, 1, axes=(1, 0, 2, 3)), b.x(10, 12)), "exact")
    for ne in ((165, 6, 1, 1), (990, 1, 1, 1), (3, 2, 5, 33)):
        yield Case("RESHAPE", shape(*ne), lambda b, n=ne: b.scale(b.reshape_4d(b.x(33, 5, 3, 2), *n), 1.0), "exact")
    yield Case("VIEW", "offset", lambda b: b.cont(b.view_4d(b.x(64, 8), 16, 3, 1, 1, 512, 0, 0, 256 + 40)), "exact")
    yield Case("VIEW", "overlapping", lambda b: b.cont(b.view_4d(b.x(256), 8, 20, 1, 1, 8, 160, 160, 4)), "exact")

    def of_view(b: Builder) -> Any:
        view = b.part(32, 4, 3)
        nb = view.contents.nb
        return b.cont(b.view_4d(view, 8, 2, 2, 1, nb[2], nb[1], nb[3], 16))

    yield Case("VIEW", "of-view", of_view, "exact")
    yield Case("VIEW", "F16", lambda b: b.cont(b.part(*ODD, type="F16")), "exact")

    for ne in ((66, 7, 2, 3), (33, 21, 2, 3), (33, 7, 4, 6), (99, 14, 6, 6)):
        yield Case("REPEAT", shape(*ne), lambda b, n=ne: b.repeat_4d(b.x(*ODD), *n), "exact")
    for kind in ("F16", "I32", "I16"):
        yield Case(
            "REPEAT",
            kind,
            lambda b, t=kind: b.repeat_4d(b.put(t, np.arange(60).reshape(1, 3, 4, 5)), 10, 4, 6, 2),
            "exact",
        )
    yield Case("REPEAT", "view", lambda b: b.repeat(b.part(8, 3, 2), b.x(16, 3, 4)), "exact")
    for dim in range(4):

        def concat(b: Builder, d: int = dim, type: str = "F32", part: bool = False) -> Any:
            ne = [11, 6, 4, 3]
            ne[d] = 5
            make = b.part if part else b.x
            return b.concat(make(11, 6, 4, 3, type=type), make(*ne, type=type), d)

        yield Case("CONCAT", f"dim{dim}", concat, "exact")
        yield Case("CONCAT", f"dim{dim}-views", lambda b, c=concat: c(b, part=True), "exact")
        yield Case("CONCAT", f"dim{dim}-F16", lambda b, c=concat: c(b, type="F16"), "exact")
    yield Case("CONCAT", "I32", lambda b: b.concat(b.indices(9, 4, 5), b.indices(9, 3, 5), 0), "exact")
    for call in ("set", "set_inplace", "acc", "acc_inplace"):
        op, bound = call.split("_")[0].upper(), "exact" if call.startswith("set") else "f32"
        yield Case(op, f"{call}-block", lambda b, c=call: getattr(b, c)(
            b.x(10, 8, 3, 2), b.x(4, 3, 2), 40, 320, 960, 40 + 12), bound)  # fmt: skip
        yield Case(op, f"{call}-rows", lambda b, c=call: getattr(b, c)(b.x(12, 6), b.x(12, 2), 48, 96, 96, 96), bound)
    yield Case("SET", "I32", lambda b: b.set(b.indices(50, 10, 4), b.indices(50, 3, 2), 40, 160, 160, 44), "exact")

    for kind in (*FLOATS, *QUANTIZED):
        yield Case("GET_ROWS", kind, lambda b, t=kind: b.get_rows(b.x(256, 11, type=t), b.indices(11, 7)))
        yield Case(
            "GET_ROWS", f"{kind}-batch", lambda b, t=kind: b.get_rows(b.x(256, 5, 3, 2, type=t), b.indices(5, 4, 3, 2))
        )
    yield Case("GET_ROWS", "I32", lambda b: b.get_rows(b.indices(1000, 16, 9), b.indices(9, 12)), "exact")
    yield Case("GET_ROWS", "narrow", lambda b: b.get_rows(b.x(1, 9), b.indices(9, 5)), "exact")
    yield Case("GET_ROWS", "view", lambda b: b.get_rows(b.part(33, 9), b.indices(9, 5)), "exact")
    for kind, index in itertools.product(FLOATS, ("I64", "I32")):

        def set_rows(b: Builder, t: str = kind, i: str = index) -> Any:
            into = b.x(48, 11, 4, 3, type=t)
            return b.set_rows(into, b.x(48, 6, 4, 3), b.indices(11, 6, 2, 1, type=i, unique=True)), into

        yield Case("SET_ROWS", f"{kind}-{index}", set_rows, "exact")
    yield Case(
        "SET_ROWS",
        "into-view",
        lambda b: b.set_rows(b.part(48, 11), b.x(48, 6), b.indices(11, 6, type="I64", unique=True)),
        "exact",
    )
    yield Case("ARANGE", "0-10", lambda b: b.arange(0.0, 10.0, 1.0), "exact")
    yield Case("ARANGE", "step", lambda b: b.arange(-1.5, 2.0, 0.3))
    for dim, period in ((320, 10000), (16, 100), (33, 10000)):
        yield Case(
            "TIMESTEP_EMBEDDING",
            f"{dim}-{period}",
            lambda b, d=dim, p=period: b.timestep_embedding(b.x(5, low=0, high=999), d, p),
        )


def _padded(b: Builder, amounts: tuple[int, ...], circular: bool, view: str) -> Any:
    return (b.pad_ext_circular if circular else b.pad_ext)(b.operand(9, 8, 5, 3, view=view), *amounts)


def _paddings() -> Iterator[Case]:
    amounts = ((0, 1, 0, 1, 0, 0, 0, 0), (2, 3, 1, 0, 0, 4, 1, 1), (9, 20, 8, 0, 5, 7, 0, 3))
    yield from sweep("PAD", _padded, "exact", amounts=amounts, circular=(False, True), view=ANY_VIEW)
    yield from sweep(
        "PAD_REFLECT_1D", lambda b, n, left, right, view: b.pad_reflect_1d(b.operand(n, 5, 2, view=view), left, right),
        "exact", n=(1, 4, 33), left=(0, 1, 3, 32), right=(0, 2, 3), view=("dense", "offset"),
        where=lambda n, left, right, **_: left < n and right < n,
    )  # fmt: skip
    yield from sweep(
        "ROLL", lambda b, shifts, view: b.roll(b.operand(*ODD, view=view), *shifts), "exact",
        shifts=((1, 0, 0, 0), (-32, 6, -1, 2), (5, -3, 1, -1), (0, 0, 0, 0)), view=ROWS_DENSE,
    )  # fmt: skip


CASES = [*_copies(), *_paddings()]

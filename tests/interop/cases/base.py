"""What cases are made of: tensors through ggml's own C API, and the bounds of errors."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from tests.support import ggml

Build = Callable[["Builder"], Any]
BOUNDS = {
    "exact": 0.0,  # copies, indices, integers
    "f32": 1e-7,  # both sides in f32: ggml's own bound between its backends
    "f16": 1e-6,  # ggml's CPU rounds an operand to f16 (2^-11), or reads a function from a table of f16
    "f16 sums": 5e-5,  # ggml's CPU accumulates attention over f16 values in f16
    "bf16": 5e-5,  # ggml's CPU rounds activations to bf16 (2^-8) for bf16 weights
    "quantized": 5e-4,  # ggml's CPU quantizes activations to 8 bits for quantized weights: its own bound
}
"""The largest normalized mean square error, ‖theirs - ours‖² / ‖theirs‖², by what limits it."""


class Case(NamedTuple):
    """One operation, or one graph (``op`` is "graph"), to be computed here and there."""

    op: str  # ggml's name
    label: str  # tells it from the operation's other cases
    build: Build  # gives the tensors (one or a tuple) whose values are compared
    bound: str = "f32"  # a key of BOUNDS

    @property
    def name(self) -> str:
        return f"{self.op}-{self.label}"


def sweep(
    op: str,
    build: Callable[..., Any],
    /,
    bound: str | Callable[..., str] = "f32",
    where: Callable[..., bool] = lambda **_: True,
    most: int | None = None,
    **choices: Sequence[Any],
) -> Iterator[Case]:
    """A case for every combination of ``choices``, or for ``most`` of them, drawn by a seed that the operation gives.

    ``build`` gets the builder and the chosen values by keyword; so do ``where``, which says whether a combination makes
    sense, and ``bound`` unless it is the same for all. The label lists the values that were chosen.
    """
    combinations = [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
    chosen = [combination for combination in combinations if where(**combination)]
    if most is not None and most < len(chosen):
        picked = np.random.default_rng(zlib.crc32(op.encode())).permutation(len(chosen))[:most]
        chosen = [chosen[i] for i in sorted(picked)]
    for combination in chosen:
        label = "-".join(filter(None, (_say(name, value) for name, value in combination.items())))
        limit = bound if isinstance(bound, str) else bound(**combination)
        yield Case(op, label, partial(build, **combination), limit)


Choice = Sequence[Any] | Callable[[np.random.Generator], Any]
"""Values of which one is drawn, or what draws one."""


class Drawn(NamedTuple):
    """An operation of which cases are drawn at random: ``build`` and ``bound`` as :func:`sweep` has them, of values
    drawn from ``choices`` until they make sense."""

    build: Callable[..., Any]
    bound: str | Callable[..., str]
    where: Callable[..., bool]
    choices: Mapping[str, Choice]

    def case(self, op: str, label: str) -> Case:
        """The case with this label: the same each time, since it gives the seed."""
        rng = np.random.default_rng(zlib.crc32(f"the choices of {op}-{label}".encode()))
        chosen = self._choose(rng)
        while not self.where(**chosen):
            chosen = self._choose(rng)
        limit = self.bound if isinstance(self.bound, str) else self.bound(**chosen)
        return Case(op, label, partial(self.build, **chosen), limit)

    def _choose(self, rng: np.random.Generator) -> dict[str, Any]:
        return {
            name: choice(rng) if callable(choice) else choice[int(rng.integers(len(choice)))]
            for name, choice in self.choices.items()
        }


def draws(
    build: Callable[..., Any],
    /,
    bound: str | Callable[..., str] = "f32",
    where: Callable[..., bool] = lambda **_: True,
    **choices: Choice,
) -> Drawn:
    """As :func:`sweep`, of single draws. What ``choices`` and ``where`` let through is what ggml's constructors and CPU
    backend assert, not what sdrpc's shape rules say."""
    return Drawn(build, bound, where, choices)


SIZES = (1, 1, 2, 3, 4, 5, 8, 33)


def shapes(dims: int = 4, empty: bool = False, first: Sequence[int] = SIZES) -> Callable[[np.random.Generator], Any]:
    """Draws ``dims`` sizes, the first one from ``first``; ``empty``: one shape in ten has no elements."""

    def shape(rng: np.random.Generator) -> tuple[int, ...]:
        ne = [int(rng.choice(first)), *(int(n) for n in rng.choice(SIZES, dims - 1))]
        if empty and rng.random() < 0.1:
            ne[int(rng.integers(dims))] = 0
        return tuple(ne)

    return shape


def several(count: int, low: int, high: int) -> Callable[[np.random.Generator], Any]:
    """Draws ``count`` numbers between ``low`` and ``high``."""
    return lambda rng: tuple(int(n) for n in rng.integers(low, high + 1, count))


def uniform(low: float, high: float) -> Callable[[np.random.Generator], Any]:
    return lambda rng: float(rng.uniform(low, high))


def order(rng: np.random.Generator) -> tuple[int, ...]:
    """Draws an order of the four dimensions."""
    return tuple(int(axis) for axis in rng.permutation(4))


def _say(name: str, value: Any) -> str:
    """How a label says what was chosen: nothing for a choice that was not taken."""
    if value is None or value is False:
        return ""
    if value is True:
        return name
    if isinstance(value, str):
        return value
    if isinstance(value, tuple):
        return "x".join(str(item).replace(" ", "") for item in value)
    return f"{name}{value:g}" if isinstance(value, float) else f"{name}{value}"


class Builder:
    """Makes a case's tensors in ggml's contexts: leaves with values, seeded by the case's name, in ``leaves``;
    operations (``b.add(x, y)``) in ``nodes``."""

    def __init__(self, name: str, leaves: ggml.Context, nodes: ggml.Context) -> None:
        self.leaves, self.nodes = leaves, nodes
        self.data: list[tuple[Any, bytes]] = []
        self.first: list[Any] = []  # nodes to compute before the results, in this order
        self.rng = np.random.default_rng(zlib.crc32(name.encode()))

    def __getattr__(self, operation: str) -> Callable[..., Any]:
        return getattr(self.nodes, operation)

    def put(self, type: str, values: np.ndarray) -> Any:
        """A leaf that holds ``values`` (shape: ne reversed)."""
        return self.bytes(type, values.shape[::-1], ggml.encode(type, values))

    def bytes(self, type: str, ne: tuple[int, ...], data: bytes) -> Any:
        """A leaf of ``data``."""
        tensor = self.leaves.tensor(type, *ne)
        self.data.append((tensor, data))
        return tensor

    def x(self, *ne: int, type: str = "F32", low: float = -1.0, high: float = 1.0) -> Any:
        """A leaf of random numbers."""
        if type in ggml.SLOW_TO_MAKE:
            return self.bytes(type, ne, ggml.noise(type, int(np.prod(ne)), self.rng))
        return self.put(type, self.rng.uniform(low, high, ne[::-1]).astype(np.float32))

    def distinct(self, *ne: int, type: str = "F32") -> Any:
        """A leaf without equal numbers, so that orders are unique."""
        return self.put(type, self.rng.permutation(int(np.prod(ne))).reshape(ne[::-1]) - 7)

    def indices(self, below: int, *ne: int, type: str = "I32", unique: bool = False) -> Any:
        """A leaf of row numbers; ``unique``: none twice along the first dimension."""
        if not unique:
            return self.put(type, self.rng.integers(0, below, ne[::-1]))
        rows = [self.rng.permutation(below)[: ne[0]] for _ in range(int(np.prod(ne[1:])))]
        return self.put(type, np.reshape(rows, ne[::-1]))

    def mask(self, *ne: int, type: str = "F32") -> Any:
        """A leaf that is -inf in a third of its places, but nowhere in the first column."""
        values = self.rng.uniform(-1, 1, ne[::-1])
        hidden = self.rng.uniform(0, 1, ne[::-1]) < 1 / 3
        hidden[..., 0] = False
        return self.put(type, np.where(hidden, -np.inf, values))

    def part(self, *ne: int, type: str = "F32", margin: tuple[int, ...] = (4, 1, 1, 1), **range: float) -> Any:
        """A view of ``ne`` elements inside a larger leaf: rows are dense, everything else is not."""
        whole = self.x(*(n + m for n, m in zip((*ne, 1, 1, 1)[:4], margin, strict=True)), type=type, **range)
        nb = whole.contents.nb
        return self.view_4d(whole, *(*ne, 1, 1, 1)[:4], nb[1], nb[2], nb[3], nb[0] * margin[0])

    def shuffled(self, *ne: int, axes: tuple[int, int, int, int], type: str = "F32", **range: float) -> Any:
        """A leaf whose dimensions were permuted to come out as ``ne``."""
        return self.permute(self.x(*(ne[axis] for axis in axes), type=type, **range), *axes)

    def operand(self, *ne: int, view: str = "dense", make: Callable[..., Any] | None = None, **how: Any) -> Any:
        """An operand of shape ``ne`` that is the view ``view`` of a leaf: "dense" (the leaf itself), "offset" (behind
        others, nothing between its elements), "part" (a part in every dimension; rows are dense), "strided" (every
        second row) or a permutation of axes as in "0213". ``make`` (default: :meth:`x`) makes the leaf."""
        make = make or self.x
        n0, n1, n2, n3 = (*ne, 1, 1, 1)[:4]
        if view == "dense":
            return make(n0, n1, n2, n3, **how)
        if view.isdigit():
            axes = tuple(map(int, view))
            return self.permute(make(*((n0, n1, n2, n3)[axis] for axis in axes), **how), *axes)
        block = ggml.library().ggml_get_type_traits(ggml.TYPES[how.get("type", "F32")]).contents.block
        larger = {
            "offset": (n0, n1, n2, n3 + 1),
            "strided": (n0, 2 * n1, n2, n3),
            "part": (n0 + (3 if block == 1 else block), n1 + 1, n2 + 1, n3 + 1),
        }
        whole = make(*larger[view], **how)
        nb0, nb1, nb2, nb3 = whole.contents.nb
        row, offset = {"offset": (nb1, nb3), "strided": (2 * nb1, nb1), "part": (nb1, nb0 + nb1 + nb2 + nb3)}[view]
        return self.view_4d(whole, n0, n1, n2, n3, row, nb2, nb3, offset)

    def prec_f32(self, tensor: Any) -> Any:
        ggml.library().ggml_prec_set_acc(tensor, ggml.PREC_F32)
        return tensor


F32, F16 = ggml.TYPES["F32"], ggml.TYPES["F16"]
SMALL, ODD = (64, 5, 3, 2), (33, 7, 2, 3)
FLOATS = ("F32", "F16", "BF16")
ROWS_DENSE = ("dense", "offset", "part", "strided", "0213", "0132", "0321", "0231")
"""Views whose rows lie together: what most of ggml's operations ask of their operands."""
PACKED = ("dense", "offset", "strided")
"""Views whose rows follow one another at one stride."""
ANY_VIEW = (*ROWS_DENSE, "1023", "2013", "3120", "1230")
BROADCASTS = (
    ((16, 1, 1, 1), (16, 1, 1, 1)), ((16, 5, 4, 3), (16, 5, 4, 3)), ((16, 5, 4, 3), (1, 1, 1, 1)),
    ((16, 5, 4, 3), (16, 1, 1, 1)), ((16, 5, 4, 3), (1, 5, 1, 1)), ((16, 5, 4, 3), (1, 1, 4, 1)),
    ((16, 5, 4, 3), (16, 5, 1, 3)), ((16, 5, 4, 3), (16, 1, 4, 1)), ((16, 6, 4, 2), (8, 3, 2, 1)),
)  # fmt: skip
"""Shapes of two operands of which the second one is repeated."""
WRITTEN = (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4", "NVFP4", "Q1_0", "Q2_0", "TQ1_0", "TQ2_0",
    "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS",
)  # fmt: skip
"""Types of blocks that ggml's CPU makes of floats."""
QUANTIZED = (*WRITTEN, "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
"""Types of blocks that ggml's CPU makes floats of."""

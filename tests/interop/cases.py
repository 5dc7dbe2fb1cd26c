"""What ggml's RPC client asks our server to compute: a table of single operations and whole graphs.

Each case builds its graph with ggml's own C API; the worker computes it twice, on ggml's CPU backend and on our server,
and compares what the case returns. Cases are found by name, so that a process of its own can run them.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable
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
    op: str
    build: Build  # gives the tensors (one or a tuple) whose values are compared
    bound: str  # a key of BOUNDS


class Builder:
    """Makes tensors in ggml's contexts: leaves with seeded values here, operations (``b.add(x, y)``) in ``nodes``."""

    def __init__(self, name: str) -> None:
        self.leaves, self.nodes = ggml.Context(), ggml.Context()
        self.nodes.tensor("I8", 1)  # ggml does not look at a context that holds nothing but views
        self.data: list[tuple[Any, bytes]] = []
        self.first: list[Any] = []  # nodes to compute before the results, in this order
        self.rng = np.random.default_rng(zlib.crc32(name.encode()))

    def __getattr__(self, operation: str) -> Callable[..., Any]:
        return getattr(self.nodes, operation)

    def put(self, type: str, values: np.ndarray) -> Any:
        """A leaf that holds ``values`` (shape: ne reversed)."""
        tensor = self.leaves.tensor(type, *values.shape[::-1])
        self.data.append((tensor, ggml.encode(type, values)))
        return tensor

    def x(self, *ne: int, type: str = "F32", low: float = -1.0, high: float = 1.0) -> Any:
        """A leaf of random numbers."""
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

    def prec_f32(self, tensor: Any) -> Any:
        ggml.library().ggml_prec_set_acc(tensor, ggml.PREC_F32)
        return tensor


def shape(*ne: int) -> str:
    return "x".join(map(str, ne))


TABLE: list[tuple[str, Case]] = []


def case(op: str, label: object, build: Build, bound: str = "f32") -> None:
    TABLE.append((f"{op}-{label}", Case(op, build, bound)))


# Element by element

F32, F16 = ggml.TYPES["F32"], ggml.TYPES["F16"]
SMALL, ODD = (64, 5, 3, 2), (33, 7, 2, 3)
TABLED = {"GELU", "GELU_QUICK"}  # ggml's CPU looks these up by f16
FLOATS = ("F32", "F16", "BF16")


def _unary() -> None:
    for number, op in enumerate(ggml.UNARY):
        if op == "XIELU":
            continue
        bound = "f16" if op in TABLED else "f32"
        for kind in ("F32", "F16"):
            case(
                "UNARY",
                f"{op}-{kind}",
                lambda b, n=number, t=kind: b.unary(b.x(*ODD, type=t, low=-6, high=6), n),
                bound,
            )
        case("UNARY", f"{op}-view", lambda b, n=number: b.unary(b.part(*SMALL, low=-3, high=3), n), bound)
        case("UNARY", f"{op}-inplace", lambda b, n=number: b.unary_inplace(b.x(*SMALL, low=-3, high=3), n), bound)
    number = ggml.UNARY.index("ROUND")
    case("UNARY", "ROUND-halves", lambda b: b.unary(b.put("F32", np.arange(-8, 8)[None] / 2), number), "exact")
    for op in ("sqr", "sqrt", "log", "sin", "cos"):
        for suffix in ("", "_inplace"):
            call = op + suffix
            case(op.upper(), f"F32{suffix}", lambda b, c=call: getattr(b, c)(b.x(*ODD, low=0.01, high=9)))
        case(op.upper(), "F16", lambda b, c=op: getattr(b, c)(b.x(*ODD, type="F16", low=0.01, high=9)))
        case(op.upper(), "view", lambda b, c=op: getattr(b, c)(b.part(*ODD, low=0.01, high=9)))
    case("LEAKY_RELU", "F32", lambda b: b.leaky_relu(b.x(*ODD), 0.1, False))
    case("LEAKY_RELU", "inplace", lambda b: b.leaky_relu(b.x(*ODD), -0.3, True))
    case("SCALE", "F32", lambda b: b.scale(b.x(*ODD), 2.5))
    case("SCALE", "inplace", lambda b: b.scale_inplace(b.x(*ODD), -0.125))
    case("SCALE", "bias", lambda b: b.scale_bias(b.x(*ODD), 0.5, 3.0))
    case("SCALE", "bias-inplace", lambda b: b.scale_bias_inplace(b.x(*ODD), 0.0, -1.5))
    case("CLAMP", "F32", lambda b: b.clamp(b.x(*ODD), -0.5, 0.25))
    case("CLAMP", "F16", lambda b: b.clamp(b.x(*ODD, type="F16"), -0.5, 0.25))
    case("CLAMP", "inplace", lambda b: b.clamp_inplace(b.x(*ODD), 0.0, float("inf")))
    case("FILL", "F32", lambda b: b.fill(b.x(*ODD), -3.25))
    case("FILL", "F16", lambda b: b.fill(b.x(*ODD, type="F16"), 1.5))
    case("FILL", "inf", lambda b: b.fill_inplace(b.x(*ODD), float("-inf")))


BROADCASTS = (
    ((16, 1, 1, 1), (16, 1, 1, 1)), ((16, 5, 4, 3), (16, 5, 4, 3)), ((16, 5, 4, 3), (1, 1, 1, 1)),
    ((16, 5, 4, 3), (16, 1, 1, 1)), ((16, 5, 4, 3), (1, 5, 1, 1)), ((16, 5, 4, 3), (1, 1, 4, 1)),
    ((16, 5, 4, 3), (16, 5, 1, 3)), ((16, 5, 4, 3), (16, 1, 4, 1)), ((16, 6, 4, 2), (8, 3, 2, 1)),
)  # fmt: skip


def _binary() -> None:
    for op in ("add", "sub", "mul", "div"):
        low = 0.5 if op == "div" else -1.0
        for large, small in BROADCASTS:
            label = f"{shape(*large)}-{shape(*small)}"
            case(op.upper(), label, lambda b, c=op, m=large, n=small, v=low: getattr(b, c)(b.x(*m), b.x(*n, low=v)))
        for types in (("F16", "F16"), ("F16", "F32"), ("BF16", "BF16"), ("BF16", "F32")):
            label = "-".join(types)
            case(op.upper(), label, lambda b, c=op, t=types, v=low: getattr(b, c)(
                b.x(*ODD, type=t[0]), b.x(33, 7, type=t[1], low=v)), "bf16" if "BF16" in types else "f16")  # fmt: skip
        case(op.upper(), "inplace", lambda b, c=op, v=low: getattr(b, f"{c}_inplace")(b.x(*ODD), b.x(33, low=v)))
        case(op.upper(), "views", lambda b, c=op, v=low: getattr(b, c)(b.part(*ODD), b.part(*ODD, low=v)))
        case(op.upper(), "permuted", lambda b, c=op, v=low: getattr(b, c)(
            b.shuffled(*ODD, axes=(0, 2, 1, 3)), b.shuffled(*ODD, axes=(0, 3, 1, 2), low=v)))  # fmt: skip
        case(op.upper(), "transposed", lambda b, c=op, v=low: getattr(b, c)(
            b.x(*ODD), b.shuffled(*ODD, axes=(1, 0, 2, 3), low=v)))  # fmt: skip
        case(op.upper(), "itself", lambda b, c=op: (lambda x: getattr(b, c)(x, x))(b.x(*ODD, low=0.5)))
    case("ADD", "cast", lambda b: b.add_cast(b.x(64, 5, type="F16"), b.x(64, 5), F32))


def _glu() -> None:
    for number, op in enumerate(ggml.GLU):
        bound = "f16" if op in ("GEGLU", "GEGLU_QUICK") else "f32"
        if op == "SWIGLU_OAI":
            case("GLU", op, lambda b: b.swiglu_oai(b.x(*ODD, low=-9, high=9), b.x(*ODD, low=-9, high=9), 1.702, 7.0))
            continue
        if op == "SWIGLU_CLAMP":
            case("GLU", op, lambda b: b.swiglu_clamp(b.x(*ODD, low=-9, high=9), b.x(*ODD, low=-9, high=9), 4.0))
            continue
        for swapped, kind in ((False, "F32"), (True, "F32"), (False, "F16")):
            label = f"{op}-{kind}{'-swapped' if swapped else ''}"
            case(
                "GLU",
                label,
                lambda b, n=number, s=swapped, t=kind: b.glu(b.x(*SMALL, type=t, low=-3, high=3), n, s),
                bound,
            )
        case("GLU", f"{op}-split", lambda b, n=number: b.glu_split(b.x(*ODD), b.x(*ODD), n), bound)
        case("GLU", f"{op}-view", lambda b, n=number: b.glu(b.part(*SMALL, margin=(4, 0, 0, 0)), n, False), bound)


# Rows and reductions


def _rows() -> None:
    for op in ("norm", "rms_norm", "l2_norm"):
        for width, eps in itertools.product((64, 1025), (0.0, 1e-6, 0.1)):
            case(op.upper(), f"{width}-eps{eps}", lambda b, c=op, w=width, e=eps: getattr(b, c)(b.x(w, 5, 4, 3), e))
        case(op.upper(), "view", lambda b, c=op: getattr(b, c)(b.part(64, 5, 4, 3), 1e-5))
        case(op.upper(), "permuted", lambda b, c=op: getattr(b, c)(b.shuffled(64, 5, 4, 3, axes=(0, 2, 1, 3)), 1e-5))
        case(op.upper(), "offset", lambda b, c=op: getattr(b, c)(b.x(320, 4, low=30, high=31), 1e-5), "f16")
        case(op.upper(), "inplace", lambda b, c=op: getattr(b, f"{c}_inplace")(b.x(*ODD), 1e-5))
    for ne, groups in (((8, 8, 64, 1), 32), ((9, 7, 32, 2), 4), ((4, 4, 6, 3), 1), ((5, 3, 12, 1), 12)):
        case("GROUP_NORM", f"{shape(*ne)}-{groups}", lambda b, n=ne, g=groups: b.group_norm(b.x(*n), g, 1e-6))
    case("GROUP_NORM", "inplace", lambda b: b.group_norm_inplace(b.x(8, 8, 64, 2), 32, 1e-5))
    case("SUM", "F32", lambda b: b.sum(b.x(*ODD)))
    case("SUM", "F16", lambda b: b.sum(b.x(*SMALL, type="F16", low=0)), "f16")
    for op in ("sum_rows", "mean", "cumsum"):
        case(op.upper(), "F32", lambda b, c=op: getattr(b, c)(b.x(*ODD)))
        case(op.upper(), "one", lambda b, c=op: getattr(b, c)(b.x(1, 4, 3, 2)))
        case(op.upper(), "view", lambda b, c=op: getattr(b, c)(b.part(*ODD)))
    case("SUM_ROWS", "permuted", lambda b: b.sum_rows(b.shuffled(*ODD, axes=(0, 3, 2, 1))))
    case("ARGMAX", "F32", lambda b: b.argmax(b.distinct(100, 12)), "exact")
    case("ARGMAX", "one", lambda b: b.argmax(b.distinct(1, 9)), "exact")
    for order in (0, 1):
        case("ARGSORT", f"order{order}", lambda b, o=order: b.argsort(b.distinct(60, 7, 3, 2), o), "exact")
        case("ARGSORT", f"odd-order{order}", lambda b, o=order: b.argsort(b.distinct(17, 3), o), "exact")
    case("DIAG_MASK_INF", "past0", lambda b: b.diag_mask_inf(b.x(9, 9, 3, 2), 0))
    case("DIAG_MASK_INF", "past5", lambda b: b.diag_mask_inf(b.x(12, 7, 2), 5))
    case("DIAG_MASK_INF", "inplace", lambda b: b.diag_mask_inf_inplace(b.x(12, 12), 0))
    case("DIAG_MASK_ZERO", "past2", lambda b: b.diag_mask_zero(b.x(12, 7, 2), 2))
    case("DIAG_MASK_ZERO", "inplace", lambda b: b.diag_mask_zero_inplace(b.x(9, 9), 0))


def _soft_max() -> None:
    for ne in ((16, 2, 3, 2), (77, 77, 2, 1), (1, 5, 1, 1), (1025, 3, 1, 1)):
        case("SOFT_MAX", shape(*ne), lambda b, n=ne: b.soft_max(b.x(*n, low=-9, high=9)))
    for kind, scale, bias in itertools.product(("F32", "F16"), (1.0, 0.125), (0.0, 8.0)):
        case("SOFT_MAX", f"mask{kind}-scale{scale}-bias{bias}", lambda b, t=kind, s=scale, m=bias: b.soft_max_ext(
            b.x(24, 6, 12, 2, low=-4, high=4), b.mask(24, 6, type=t), s, m))  # fmt: skip
    case("SOFT_MAX", "mask-heads", lambda b: b.soft_max_ext(b.x(16, 4, 4, 2), b.mask(16, 4, 2, 1), 1.0, 0.0))
    case("SOFT_MAX", "mask-batch", lambda b: b.soft_max_ext(b.x(16, 4, 4, 2), b.mask(16, 4, 1, 2), 0.5, 0.0))
    case("SOFT_MAX", "mask-rows", lambda b: b.soft_max_ext(b.x(16, 4, 3), b.mask(16, 8, type="F16"), 1.0, 0.0))
    case("SOFT_MAX", "scale", lambda b: b.soft_max_ext(b.x(*ODD, low=-9, high=9), None, 0.3, 0.0))
    case("SOFT_MAX", "inplace", lambda b: b.soft_max_inplace(b.x(*ODD, low=-9, high=9)))
    case("SOFT_MAX", "mask-inplace", lambda b: b.soft_max_ext_inplace(b.x(16, 4, 3), b.mask(16, 4), 2.0, 0.0))


def _rope() -> None:
    def rope(b: Builder, x: Any, dims: int, mode: int, call: str = "rope_ext", factors: Any = None, base: float = 1e4,
             scale: float = 1.0, attention: float = 1.0) -> Any:  # fmt: skip
        positions = b.indices(512, x.contents.ne[2])
        return getattr(b, call)(x, positions, factors, dims, mode, 512, base, scale, 0.0, attention, 32.0, 1.0)

    for mode, label in ((0, "normal"), (2, "neox")):
        case("ROPE", f"{label}-all", lambda b, m=mode: rope(b, b.x(64, 4, 10, 2), 64, m))
        case("ROPE", f"{label}-part", lambda b, m=mode: rope(b, b.x(80, 4, 7), 32, m))
        case("ROPE", f"{label}-scaled", lambda b, m=mode: rope(b, b.x(64, 4, 7), 64, m, base=5e5, scale=0.25))
        case("ROPE", f"{label}-attention", lambda b, m=mode: rope(b, b.x(64, 4, 7), 64, m, attention=1.25))
        case("ROPE", f"{label}-factors", lambda b, m=mode: rope(
            b, b.x(64, 4, 7), 64, m, factors=b.x(32, low=0.9, high=2)))  # fmt: skip
        case("ROPE", f"{label}-F16", lambda b, m=mode: rope(b, b.x(64, 4, 7, type="F16"), 64, m), "f16")
        case("ROPE", f"{label}-view", lambda b, m=mode: rope(b, b.part(64, 4, 7, 2), 64, m))
        case("ROPE", f"{label}-inplace", lambda b, m=mode: rope(b, b.x(64, 4, 7), 64, m, "rope_ext_inplace"))


# Bytes

QUANTIZED = (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS",
)  # fmt: skip
PERMUTATIONS = ((0, 2, 1, 3), (1, 0, 2, 3), (2, 0, 1, 3), (3, 1, 2, 0), (1, 2, 3, 0))


def _copies() -> None:
    for axes in PERMUTATIONS:
        label = "".join(map(str, axes))
        for kind in ("F32", "F16"):
            case("CONT", f"{label}-{kind}", lambda b, a=axes, t=kind: b.cont(b.shuffled(*ODD, axes=a, type=t)), "exact")
        case("PERMUTE", label, lambda b, a=axes: b.cont(b.permute(b.permute(b.x(*ODD), *a), *a)), "exact")
        case("CPY", f"F32-F16-{label}", lambda b, a=axes: b.cast(b.shuffled(*ODD, axes=a), F16), "exact")
    case("TRANSPOSE", "F32", lambda b: b.cont(b.transpose(b.x(*ODD))), "exact")
    case("CONT", "I32", lambda b: b.cont(b.transpose(b.indices(99, 12, 5))), "exact")
    case("CONT", "reshape", lambda b: b.cont_4d(b.transpose(b.x(12, 10, 3)), 4, 15, 6, 1), "exact")
    case("CONT", "view", lambda b: b.cont(b.part(*ODD)), "exact")
    case("DUP", "F32", lambda b: b.dup(b.part(*ODD)), "exact")
    case("DUP", "F16", lambda b: b.dup(b.shuffled(*ODD, axes=(1, 0, 2, 3), type="F16")), "exact")
    for source, to in itertools.product(FLOATS, FLOATS):
        case("CPY", f"{source}-{to}", lambda b, s=source, t=to: b.cast(b.part(*ODD, type=s), ggml.TYPES[t]), "exact")
    for source in QUANTIZED:
        case("CPY", f"{source}-F32", lambda b, s=source: b.cast(b.x(256, 5, 2, type=s), F32), "f32")
    case("CPY", "F32-I32", lambda b: b.cast(b.x(*ODD, low=-99, high=99), ggml.TYPES["I32"]), "exact")
    case("CPY", "I32-F32", lambda b: b.cast(b.indices(1000, *ODD), F32), "exact")

    def into_view(b: Builder, type: str) -> Any:
        whole = b.x(40, 9, 3, type=type)
        nb = whole.contents.nb
        written = b.cpy(b.x(32, 6, 2), b.view_4d(whole, 32, 6, 2, 1, nb[1], nb[2], nb[3], 4 * nb[0] + nb[1]))
        return written, whole

    for kind in FLOATS:
        case("CPY", f"into-view-{kind}", lambda b, t=kind: into_view(b, t), "exact")
    case(
        "CPY",
        "into-transposed",
        lambda b: (lambda whole: (b.cpy(b.x(7, 5), b.transpose(whole)), whole))(b.x(5, 7)),
        "exact",
    )
    case("CPY", "other-shape", lambda b: b.cpy(b.shuffled(6, 5, 4, 1, axes=(1, 0, 2, 3)), b.x(10, 12)), "exact")
    for ne in ((165, 6, 1, 1), (990, 1, 1, 1), (3, 2, 5, 33)):
        case("RESHAPE", shape(*ne), lambda b, n=ne: b.scale(b.reshape_4d(b.x(33, 5, 3, 2), *n), 1.0), "exact")
    case("VIEW", "offset", lambda b: b.cont(b.view_4d(b.x(64, 8), 16, 3, 1, 1, 512, 0, 0, 256 + 40)), "exact")
    case("VIEW", "overlapping", lambda b: b.cont(b.view_4d(b.x(256), 8, 20, 1, 1, 8, 160, 160, 4)), "exact")

    def of_view(b: Builder) -> Any:
        view = b.part(32, 4, 3)
        nb = view.contents.nb
        return b.cont(b.view_4d(view, 8, 2, 2, 1, nb[2], nb[1], nb[3], 16))

    case("VIEW", "of-view", of_view, "exact")
    case("VIEW", "F16", lambda b: b.cont(b.part(*ODD, type="F16")), "exact")

    for ne in ((66, 7, 2, 3), (33, 21, 2, 3), (33, 7, 4, 6), (99, 14, 6, 6)):
        case("REPEAT", shape(*ne), lambda b, n=ne: b.repeat_4d(b.x(*ODD), *n), "exact")
    for kind in ("F16", "I32", "I16"):
        case(
            "REPEAT",
            kind,
            lambda b, t=kind: b.repeat_4d(b.put(t, np.arange(60).reshape(1, 3, 4, 5)), 10, 4, 6, 2),
            "exact",
        )
    case("REPEAT", "view", lambda b: b.repeat(b.part(8, 3, 2), b.x(16, 3, 4)), "exact")
    for dim in range(4):

        def concat(b: Builder, d: int = dim, type: str = "F32", part: bool = False) -> Any:
            ne = [11, 6, 4, 3]
            ne[d] = 5
            make = b.part if part else b.x
            return b.concat(make(11, 6, 4, 3, type=type), make(*ne, type=type), d)

        case("CONCAT", f"dim{dim}", concat, "exact")
        case("CONCAT", f"dim{dim}-views", lambda b, c=concat: c(b, part=True), "exact")
        case("CONCAT", f"dim{dim}-F16", lambda b, c=concat: c(b, type="F16"), "exact")
    case("CONCAT", "I32", lambda b: b.concat(b.indices(9, 4, 5), b.indices(9, 3, 5), 0), "exact")
    for amounts in ((0, 1, 0, 1, 0, 0, 0, 0), (2, 3, 1, 0, 0, 4, 1, 1), (0, 0, 0, 0, 3, 0, 0, 2)):
        label = "".join(map(str, amounts))
        case("PAD", label, lambda b, a=amounts: b.pad_ext(b.x(*ODD), *a), "exact")
        case("PAD", f"{label}-circular", lambda b, a=amounts: b.pad_ext_circular(b.x(9, 8, 5, 3), *a), "exact")
    case("PAD", "view", lambda b: b.pad_ext(b.part(*ODD), 1, 2, 0, 1, 0, 0, 0, 0), "exact")
    for call in ("set", "set_inplace", "acc", "acc_inplace"):
        op, bound = call.split("_")[0].upper(), "exact" if call.startswith("set") else "f32"
        case(op, f"{call}-block", lambda b, c=call: getattr(b, c)(
            b.x(10, 8, 3, 2), b.x(4, 3, 2), 40, 320, 960, 40 + 12), bound)  # fmt: skip
        case(op, f"{call}-rows", lambda b, c=call: getattr(b, c)(b.x(12, 6), b.x(12, 2), 48, 96, 96, 96), bound)
    case("SET", "I32", lambda b: b.set(b.indices(50, 10, 4), b.indices(50, 3, 2), 40, 160, 160, 44), "exact")

    for kind in (*FLOATS, *QUANTIZED):
        case("GET_ROWS", kind, lambda b, t=kind: b.get_rows(b.x(256, 11, type=t), b.indices(11, 7)))
        case(
            "GET_ROWS", f"{kind}-batch", lambda b, t=kind: b.get_rows(b.x(256, 5, 3, 2, type=t), b.indices(5, 4, 3, 2))
        )
    case("GET_ROWS", "I32", lambda b: b.get_rows(b.indices(1000, 16, 9), b.indices(9, 12)), "exact")
    case("GET_ROWS", "narrow", lambda b: b.get_rows(b.x(1, 9), b.indices(9, 5)), "exact")
    case("GET_ROWS", "view", lambda b: b.get_rows(b.part(33, 9), b.indices(9, 5)), "exact")
    for kind, index in itertools.product(FLOATS, ("I64", "I32")):

        def set_rows(b: Builder, t: str = kind, i: str = index) -> Any:
            into = b.x(48, 11, 4, 3, type=t)
            return b.set_rows(into, b.x(48, 6, 4, 3), b.indices(11, 6, 2, 1, type=i, unique=True)), into

        case("SET_ROWS", f"{kind}-{index}", set_rows, "exact")
    case(
        "SET_ROWS",
        "into-view",
        lambda b: b.set_rows(b.part(48, 11), b.x(48, 6), b.indices(11, 6, type="I64", unique=True)),
        "exact",
    )
    case("ARANGE", "0-10", lambda b: b.arange(0.0, 10.0, 1.0), "exact")
    case("ARANGE", "step", lambda b: b.arange(-1.5, 2.0, 0.3))
    for dim, period in ((320, 10000), (16, 100), (33, 10000)):
        case(
            "TIMESTEP_EMBEDDING",
            f"{dim}-{period}",
            lambda b, d=dim, p=period: b.timestep_embedding(b.x(5, low=0, high=999), d, p),
        )


# Products


def _products() -> None:
    bounds = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
    for kind in (*FLOATS, *QUANTIZED):
        bound = bounds.get(kind, "quantized")
        for k, m, n, batch, repeat in (
            (256, 16, 1, (1, 1), (1, 1)), (512, 33, 9, (1, 1), (1, 1)), (256, 7, 5, (3, 2), (1, 1)),
            (256, 16, 8, (2, 1), (2, 3)),
        ):  # fmt: skip
            label = f"{kind}-{k}x{m}x{n}-{shape(*batch)}-{shape(*repeat)}"
            case("MUL_MAT", label, lambda b, t=kind, k=k, m=m, n=n, s=batch, r=repeat: b.mul_mat(
                b.x(k, m, *s, type=t), b.x(k, n, s[0] * r[0], s[1] * r[1])), bound)  # fmt: skip
    case("MUL_MAT", "F16-F16", lambda b: b.mul_mat(b.x(64, 9, type="F16"), b.x(64, 5, type="F16")), "f16")
    case("MUL_MAT", "BF16-BF16", lambda b: b.mul_mat(b.x(64, 9, type="BF16"), b.x(64, 5, type="BF16")), "bf16")
    for k in (1, 33, 77):
        case("MUL_MAT", f"F32-odd{k}", lambda b, k=k: b.mul_mat(b.x(k, 5, 2), b.x(k, 3, 2)))
        case("MUL_MAT", f"F16-odd{k}", lambda b, k=k: b.mul_mat(b.x(k, 5, 2, type="F16"), b.x(k, 3, 2)), "f16")
    for kind, axes in itertools.product(("F32", "F16"), ((0, 2, 1, 3), (0, 1, 3, 2), (0, 3, 2, 1))):
        label = f"permuted-{kind}-{''.join(map(str, axes))}"
        case("MUL_MAT", label, lambda b, t=kind, a=axes: b.mul_mat(
            b.shuffled(32, 6, 4, 2, axes=a, type=t), b.shuffled(32, 5, 4, 2, axes=a)), bounds[kind])  # fmt: skip
    case("MUL_MAT", "views", lambda b: b.mul_mat(b.part(32, 6, 2), b.part(32, 5, 2)))
    case(
        "MUL_MAT",
        "weight-view",
        lambda b: b.mul_mat(b.part(256, 6, type="Q8_0", margin=(0, 2, 0, 0)), b.x(256, 5)),
        "quantized",
    )
    case("MUL_MAT", "f32-wanted", lambda b: b.prec_f32(b.mul_mat(b.x(64, 9, type="F16"), b.x(64, 5))), "f16")
    for kind in ("F32", "F16", "Q4_0", "Q8_0"):
        case("OUT_PROD", kind, lambda b, t=kind: b.out_prod(b.x(32, 6, type=t), b.x(8, 6)), bounds.get(kind, "f32"))
    case("OUT_PROD", "batch", lambda b: b.out_prod(b.x(16, 6, 2, 3), b.x(8, 6, 2, 3)))
    case("OUT_PROD", "repeat", lambda b: b.out_prod(b.x(16, 6), b.x(8, 6, 2, 3)))


def _attention() -> None:
    def flash(
        b: Builder,
        head: int = 64,
        to: int = 0,
        heads: int = 4,
        kv_heads: int = 0,
        queries: int = 5,
        keys: int = 77,
        batch: int = 1,
        type: str = "F16",
        masked: bool = False,
        bias: float = 0.0,
        softcap: float = 0.0,
        permuted: bool = False,
        precise: bool = True,
    ) -> Any:
        to, kv_heads = to or head, kv_heads or heads
        make = (lambda *ne, **o: b.shuffled(*ne, axes=(0, 2, 1, 3), **o)) if permuted else b.x
        q = make(head, queries, heads, batch)
        k, v = make(head, keys, kv_heads, batch, type=type), make(to, keys, kv_heads, batch, type=type)
        mask = b.mask(keys, -(-queries // 32) * 32, type="F16") if masked else None
        result = b.flash_attn_ext(q, k, v, mask, head**-0.5, bias, softcap)
        return b.prec_f32(result) if precise else result

    for kind, bound in (
        ("F32", "f16"),
        ("F16", "f16 sums"),
        ("BF16", "bf16"),
        ("Q8_0", "quantized"),
        ("Q4_0", "quantized"),
    ):
        case("FLASH_ATTN_EXT", kind, lambda b, t=kind: flash(b, type=t), bound)
        case("FLASH_ATTN_EXT", f"{kind}-mask", lambda b, t=kind: flash(b, type=t, masked=True, keys=64), bound)
    for head in (32, 40, 80, 128, 160, 256):
        case("FLASH_ATTN_EXT", f"head{head}", lambda b, h=head: flash(b, head=h, heads=2), "f16 sums")
    case("FLASH_ATTN_EXT", "grouped", lambda b: flash(b, heads=8, kv_heads=2, queries=3), "f16 sums")
    case("FLASH_ATTN_EXT", "alibi", lambda b: flash(b, heads=12, masked=True, bias=8.0, keys=32), "f16 sums")
    case("FLASH_ATTN_EXT", "softcap", lambda b: flash(b, softcap=10.0), "f16 sums")
    case("FLASH_ATTN_EXT", "batch", lambda b: flash(b, batch=3), "f16 sums")
    case("FLASH_ATTN_EXT", "permuted", lambda b: flash(b, permuted=True, batch=2), "f16 sums")
    case("FLASH_ATTN_EXT", "permuted-F32", lambda b: flash(b, permuted=True, type="F32"), "f16")
    case("FLASH_ATTN_EXT", "values-wider", lambda b: flash(b, head=64, to=128), "f16 sums")
    case("FLASH_ATTN_EXT", "one-query", lambda b: flash(b, queries=1, keys=512), "f16 sums")
    case("FLASH_ATTN_EXT", "default-precision", lambda b: flash(b, precise=False), "f16 sums")


# Images


def _images() -> None:
    windows = (
        (1, 1, 0, 0, 1, 1), (1, 1, 1, 1, 1, 1), (2, 2, 1, 1, 1, 1), (2, 1, 0, 2, 1, 1), (1, 3, 2, 1, 2, 1),
    )  # fmt: skip
    for window, to in itertools.product(windows, ("F32", "F16")):
        label = f"{''.join(map(str, window))}-{to}"
        case("IM2COL", label, lambda b, w=window, t=to: b.im2col(
            b.x(3, 3, 4, 5, type="F16"), b.x(12, 11, 4, 2), *w, True, ggml.TYPES[t]), "exact")  # fmt: skip
    case(
        "IM2COL",
        "F32-kernel",
        lambda b: b.im2col(b.x(3, 2, 4, 5), b.x(9, 8, 4, 3), 1, 1, 1, 1, 1, 1, True, F32),
        "exact",
    )
    case("IM2COL", "1d", lambda b: b.im2col(b.x(3, 6, 5), b.x(20, 6, 2), 1, 0, 1, 0, 1, 0, False, F32), "exact")
    case(
        "IM2COL",
        "1d-stride",
        lambda b: b.im2col(b.x(4, 6, 5, type="F16"), b.x(20, 6, 2), 3, 0, 0, 0, 2, 0, False, F16),
        "exact",
    )
    case(
        "IM2COL",
        "view",
        lambda b: b.im2col(b.x(3, 3, 4, 5), b.part(9, 8, 4, 2, margin=(0, 0, 1, 1)), 1, 1, 1, 1, 1, 1, True, F32),
        "exact",
    )
    for window, kernel in itertools.product(windows, ("F32", "F16")):
        label = f"{''.join(map(str, window))}-{kernel}"
        bound = {"F32": "f32", "F16": "f16"}[kernel]
        case(
            "CONV_2D",
            label,
            lambda b, w=window, t=kernel: b.conv_2d_direct(b.x(3, 3, 4, 6, type=t), b.x(12, 11, 4, 2), *w),
            bound,
        )
    case("CONV_2D", "1x1", lambda b: b.conv_2d_direct(b.x(1, 1, 8, 6), b.x(5, 4, 8, 2), 1, 1, 0, 0, 1, 1))
    case("CONV_2D", "view", lambda b: b.conv_2d_direct(b.x(3, 3, 4, 6), b.part(9, 8, 4, 2), 1, 1, 1, 1, 1, 1))
    for window in windows:
        label = "".join(map(str, window))
        case("CONV_2D_DW", label, lambda b, w=window: b.conv_2d_dw_direct(b.x(3, 3, 1, 6), b.x(12, 11, 6, 2), *w))
    case(
        "CONV_2D_DW",
        "channels-first",
        lambda b: b.conv_2d_dw_direct(
            b.shuffled(3, 3, 1, 6, axes=(3, 2, 0, 1)), b.shuffled(12, 11, 6, 2, axes=(2, 0, 1, 3)), *windows[1]
        ),
    )
    for stride, kernel in itertools.product((1, 2, 3), ("F16", "F32")):
        case("CONV_TRANSPOSE_2D", f"{stride}-{kernel}", lambda b, s=stride, t=kernel: b.conv_transpose_2d_p0(
            b.x(3, 2, 4, 5, type=t), b.x(7, 6, 5, 1), s), "f16" if kernel == "F16" else "f32")  # fmt: skip
    for op, (k0, k1, s0, s1, p0, p1) in itertools.product(
        (0, 1), ((2, 2, 2, 2, 0, 0), (3, 3, 1, 1, 0, 0), (3, 2, 2, 1, 1, 0), (3, 3, 2, 2, 1, 1))
    ):
        label = f"{('max', 'mean')[op]}-{k0}{k1}{s0}{s1}{p0}{p1}"
        case("POOL_2D", label, lambda b, o=op, w=(k0, k1, s0, s1), p=(p0, p1): b.pool_2d(b.x(10, 9, 3, 2), o, *w, *p))
    case("POOL_2D", "F16", lambda b: b.pool_2d(b.x(10, 9, 3, 2, type="F16"), 1, 2, 2, 2, 2, 0, 0))
    for mode, label in ((0, "nearest"), (1, "bilinear"), (1 | 256, "corners")):
        for to in ((16, 10, 3, 2), (24, 15, 3, 2), (11, 7, 3, 2), (4, 3, 3, 2)):
            case("UPSCALE", f"{label}-{shape(*to)}", lambda b, m=mode, n=to: b.interpolate(b.x(8, 5, 3, 2), *n, m))
    case("UPSCALE", "channels", lambda b: b.interpolate(b.x(8, 5, 3, 1), 16, 10, 6, 2, 0))
    case("UPSCALE", "view", lambda b: b.interpolate(b.part(8, 5, 3, 2), 16, 10, 3, 2, 0))


# Whole graphs. Each also runs with memory that nodes share (ggml_gallocr): see GRAPHS.


def graph(name: str, bound: str = "f32") -> Callable[[Build], Build]:
    def add(build: Build) -> Build:
        case("graph", name, build, bound)
        return build

    return add


SILU, GELU, SIGMOID, RELU = (ggml.UNARY.index(op) for op in ("SILU", "GELU", "SIGMOID", "RELU"))


def bias(b: Builder, x: Any, channels: int) -> Any:
    return b.add_inplace(x, b.reshape_4d(b.x(channels), 1, 1, channels, 1))


def group_norm(b: Builder, x: Any, channels: int, groups: int = 4) -> Any:
    scaled = b.mul(b.group_norm(x, groups, 1e-6), b.reshape_4d(b.x(channels, low=0.5), 1, 1, channels, 1))
    return bias(b, scaled, channels)


def layer_norm(b: Builder, x: Any, width: int) -> Any:
    return b.add(b.mul(b.norm(x, 1e-5), b.x(width, low=0.5)), b.x(width))


def linear(b: Builder, x: Any, inner: int, outer: int, type: str = "F32") -> Any:
    return b.add_inplace(b.mul_mat(b.x(inner, outer, type=type, low=-0.2, high=0.2), x), b.x(outer))


def conv(b: Builder, x: Any, inner: int, outer: int, k: int = 3, s: int = 1, type: str = "F32") -> Any:
    kernel = b.x(k, k, inner, outer, type=type, low=-0.2, high=0.2)
    return bias(b, b.conv_2d(kernel, x, s, s, k // 2, k // 2, 1, 1), outer)


def heads(b: Builder, x: Any, n: int) -> Any:
    """[width, tokens, batch] → [width / n, tokens, n, batch], no byte moved."""
    width, tokens, batch = list(x.contents.ne)[:3]
    return b.permute(b.reshape_4d(x, width // n, n, tokens, batch), 0, 2, 1, 3)


def attention(b: Builder, x: Any, y: Any, n: int, flash: bool, type: str = "F32") -> Any:
    """Attention of ``x`` over ``y``, with K and V in f16 when ``flash``, else by two products and a softmax."""
    width, tokens, batch = list(x.contents.ne)[:3]
    inner, scale = y.contents.ne[0], (width // n) ** -0.5
    q = heads(b, linear(b, x, width, width, type), n)
    k = heads(b, linear(b, y, inner, width, type), n)
    v = heads(b, linear(b, y, inner, width, type), n)
    if flash:
        merged = b.prec_f32(b.flash_attn_ext(q, b.cast(k, F16), b.cast(v, F16), None, scale, 0.0, 0.0))
    else:
        weights = b.soft_max_inplace(b.scale_inplace(b.mul_mat(b.cont(k), b.cont(q)), scale))
        merged = b.cont(b.permute(b.mul_mat(b.cont(b.transpose(v)), weights), 0, 2, 1, 3))
    return linear(b, b.reshape_4d(merged, width, tokens, batch, 1), width, width, type)


@graph("conv-block", "f16")
def _(b: Builder) -> Any:
    x = conv(b, b.x(12, 10, 4, 2), 4, 8)
    return b.unary_inplace(group_norm(b, x, 8), SILU)


@graph("conv-f16", "f16")
def _(b: Builder) -> Any:
    return conv(b, b.unary(conv(b, b.x(12, 10, 4, 2), 4, 8, type="F16"), SILU), 8, 4, s=2, type="F16")


@graph("resnet-block", "f16")
def _(b: Builder) -> Any:
    x, embedding = b.x(8, 8, 8, 2), b.x(32, 2)
    h = conv(b, b.unary_inplace(group_norm(b, x, 8), SILU), 8, 16)
    shift = linear(b, b.unary(embedding, SILU), 32, 16)
    h = b.add(h, b.reshape_4d(shift, 1, 1, 16, 2))
    h = conv(b, b.unary_inplace(group_norm(b, h, 16), SILU), 16, 16)
    return b.add_inplace(h, conv(b, x, 8, 16, k=1))


@graph("attention")
def _(b: Builder) -> Any:
    x = b.x(32, 20, 2)
    return b.add_inplace(attention(b, layer_norm(b, x, 32), b.x(48, 7, 2), 4, flash=False), x)


@graph("attention-flash", "f16 sums")
def _(b: Builder) -> Any:
    x = b.x(64, 20, 2)
    return b.add(attention(b, layer_norm(b, x, 64), b.x(48, 7, 2), 4, flash=True), x)


@graph("attention-quantized", "quantized")
def _(b: Builder) -> Any:
    return attention(b, b.x(256, 9, 1), b.x(256, 9, 1), 4, flash=False, type="Q8_0")


@graph("transformer-block", "f16 sums")
def _(b: Builder) -> Any:
    x, context = b.x(32, 24, 2), b.x(48, 7, 2)
    x = b.add(attention(b, layer_norm(b, x, 32), layer_norm(b, x, 32), 2, flash=True), x)
    x = b.add(attention(b, layer_norm(b, x, 32), context, 2, flash=False), x)
    gated = linear(b, layer_norm(b, x, 32), 32, 128)
    row = gated.contents.nb
    value = b.view_4d(gated, 64, 24, 2, 1, row[1], row[2], row[3], 0)
    gate = b.cont(b.view_4d(gated, 64, 24, 2, 1, row[1], row[2], row[3], 64 * 4))
    return b.add(linear(b, b.mul(value, b.unary_inplace(gate, GELU)), 64, 32), x)


@graph("causal-text-encoder", "f16")
def _(b: Builder) -> Any:
    x = b.add(b.get_rows(b.x(32, 100), b.indices(100, 12)), b.x(32, 12))
    for _ in range(2):
        h = layer_norm(b, x, 32)
        q, k, v = (heads(b, linear(b, h, 32, 32), 2) for _ in range(3))
        scores = b.diag_mask_inf_inplace(b.scale(b.mul_mat(b.cont(k), b.cont(q)), 0.25), 0)
        h = b.mul_mat(b.cont(b.transpose(v)), b.soft_max_inplace(scores))
        h = b.reshape_4d(b.cont(b.permute(h, 0, 2, 1, 3)), 32, 12, 1, 1)
        x = b.add(x, linear(b, h, 32, 32))
        h = b.unary_inplace(linear(b, layer_norm(b, x, 32), 32, 64), ggml.UNARY.index("GELU_QUICK"))
        x = b.add(x, linear(b, h, 64, 32))
    return layer_norm(b, x, 32)


@graph("down-up-skip", "f16")
def _(b: Builder) -> Any:
    skip = conv(b, b.x(8, 8, 4, 1), 4, 8)
    down = b.unary(conv(b, skip, 8, 8, s=2), SILU)
    up = conv(b, b.interpolate(down, 8, 8, 8, 1, 0), 8, 8)
    return conv(b, b.concat(up, skip, 2), 16, 4)


@graph("timestep-mlp")
def _(b: Builder) -> Any:
    h = linear(b, b.timestep_embedding(b.x(3, low=0, high=999), 32, 10000), 32, 64)
    return linear(b, b.unary_inplace(h, SILU), 64, 64)


@graph("in-place-chain")
def _(b: Builder) -> Any:
    x = b.scale(b.x(16, 9), 2.0)
    for step in range(12):
        x = (b.add_inplace, b.mul_inplace)[step % 2](x, b.x(16))
        x = b.unary_inplace(x, (SIGMOID, RELU, SILU)[step % 3])
    return x


@graph("old-value-read-through-another-name")
def _(b: Builder) -> Any:
    x = b.scale(b.x(16, 8), 3.0)
    before = b.cont(b.view_4d(x, 8, 8, 1, 1, 64, 512, 512, 0))
    after = b.add_inplace(x, b.x(16))
    return b.add(b.view_4d(after, 8, 8, 1, 1, 64, 512, 512, 32), before), b.cont(b.transpose(x))


@graph("in-place-on-a-view")
def _(b: Builder) -> Any:
    x = b.scale(b.x(16, 8), 3.0)
    half = b.view_4d(x, 8, 8, 1, 1, 64, 512, 512, 32)
    changed = b.unary_inplace(half, RELU)
    return b.add(changed, b.x(8)), b.scale(x, 0.5)


@graph("in-place-on-an-input")
def _(b: Builder) -> Any:
    x = b.x(16, 8)
    y = b.add_inplace(x, b.x(16, 8))
    z = b.mul_inplace(y, b.x(16))
    return z, x


@graph("kv-cache")
def _(b: Builder) -> Any:
    cache = b.x(32, 24, type="F32")
    for step in range(3):
        rows = linear(b, b.x(16, 4), 16, 32)
        written = b.cpy(rows, b.view_4d(cache, 32, 4, 1, 1, 128, 512, 512, 128 * (5 + 4 * step)))
        b.first.append(written)
    keys = b.view_4d(cache, 32, 20, 1, 1, 128, 2560, 2560, 0)
    return b.soft_max(b.mul_mat(keys, b.x(32, 3))), cache


@graph("kv-cache-f16", "f16 sums")
def _(b: Builder) -> Any:
    keys, values = b.x(32, 64, type="F16"), b.x(32, 64, type="F16")
    for cache in (keys, values):
        rows = linear(b, b.x(16, 4), 16, 32)
        b.first.append(b.cpy(rows, b.view_4d(cache, 32, 4, 1, 1, 64, 256, 256, 64 * 9)))
    k, v = (b.view_4d(cache, 32, 32, 1, 1, 64, 2048, 2048, 0) for cache in (keys, values))
    return b.prec_f32(b.flash_attn_ext(b.x(32, 3), k, v, b.mask(32, 32, type="F16"), 0.2, 0.0, 0.0)), keys, values


@graph("kv-cache-set-rows", "f16")
def _(b: Builder) -> Any:
    cache = b.x(32, 24, type="F16")
    rows = linear(b, b.x(16, 4), 16, 32)
    written = b.set_rows(cache, rows, b.indices(24, 4, type="I64", unique=True))
    return b.mul_mat(written, b.x(32, 3)), cache


@graph("padded-mask")
def _(b: Builder) -> Any:
    padded = b.scale(b.x(16, 8), 0.0)
    b.first.append(b.cpy(b.x(10, 6), b.view_4d(padded, 10, 6, 1, 1, 64, 384, 384, 0)))
    return b.soft_max_ext(b.x(16, 8, 2), padded, 1.0, 0.0), padded


@graph("view-of-a-permuted-value")
def _(b: Builder) -> Any:
    x = b.permute(b.scale(b.x(8, 6, 4), 1.5), 1, 0, 2, 3)
    return b.cont(b.view_4d(x, 4, 6, 2, 1, x.contents.nb[1], x.contents.nb[2], x.contents.nb[3], x.contents.nb[0] * 2))


@graph("set-chain")
def _(b: Builder) -> Any:
    x = b.scale(b.x(12, 6), 1.0)
    x = b.set_inplace(x, b.scale(b.x(4, 2), 2.0), 48, 288, 288, 48)
    x = b.acc_inplace(x, b.x(6, 3), 48, 288, 288, 96)
    return b.norm(x, 1e-5)


@graph("many-results")
def _(b: Builder) -> Any:
    x = b.x(32, 6)
    first = b.norm(x, 1e-5)
    return first, b.unary(first, SILU), b.sum_rows(x), b.cont(b.transpose(first)), b.argmax(first)


@graph("unused-results")
def _(b: Builder) -> Any:
    x = b.scale(b.x(32, 6), 1.5)
    b.first += [b.unary(x, SILU), b.mul_mat(b.x(32, 5), x)]
    return b.add(x, b.x(32))


@graph("deep")
def _(b: Builder) -> Any:
    x = b.x(24, 10)
    for _ in range(40):
        x = b.norm(b.add(b.mul_mat(b.x(24, 24), b.unary(x, SILU)), x), 1e-5)
    return x


CUBE = (8, 8, 4, 1)
"""The shape that values of random graphs have."""


def planes(b: Builder, x: Any, first: int) -> Any:
    """Two of the four planes of ``x``."""
    nb = x.contents.nb
    return b.view_4d(x, 8, 8, 2, 1, nb[1], nb[2], nb[3], first * nb[2])


def columns(b: Builder, x: Any, first: int) -> Any:
    """Half of each row of ``x``."""
    nb = x.contents.nb
    return b.view_4d(x, 4, 8, 4, 1, nb[1], nb[2], nb[3], first * nb[0])


def row(b: Builder, x: Any) -> Any:
    """The fourth row of each plane of ``x``."""
    nb = x.contents.nb
    return b.view_4d(x, 8, 1, 4, 1, nb[1], nb[2], nb[3], 3 * nb[1])


def taps(b: Builder, x: Any) -> Any:
    """A convolution with nothing rounded to f16, as IM2COL, a product and a permutation."""
    kernel = b.x(3, 3, 4, 4)
    seen = b.im2col(kernel, x, 1, 1, 1, 1, 1, 1, True, F32)
    product = b.mul_mat(b.reshape_4d(seen, 36, 64, 1, 1), b.reshape_4d(kernel, 36, 4, 1, 1))
    return b.norm(b.reshape_4d(product, *CUBE), 0.1)


def attended(b: Builder, x: Any, y: Any) -> Any:
    weights = b.soft_max_inplace(b.scale_inplace(b.mul_mat(x, y), 0.3))
    return b.mul_mat(b.cont(b.transpose(x)), weights)


STEPS: tuple[Callable[[Builder, Any, Any], Any], ...] = (
    # values of their own
    lambda b, x, y: b.add(x, y),
    lambda b, x, y: b.sub(x, b.mean(y)),
    lambda b, x, y: b.norm(b.mul(x, y), 0.1),
    lambda b, x, y: b.norm(b.mul_mat(x, y), 0.1),
    lambda b, x, y: b.soft_max(b.add(x, y)),
    lambda b, x, y: b.unary(x, SILU),
    lambda b, x, y: b.group_norm(b.sub(x, y), 2, 0.1),
    lambda b, x, y: b.glu(b.concat(x, y, 0), ggml.GLU.index("REGLU"), False),
    lambda b, x, y: b.pool_2d(b.interpolate(b.add(x, y), 16, 16, 4, 1, 0), 1, 2, 2, 2, 2, 0, 0),
    lambda b, x, y: taps(b, x),
    lambda b, x, y: attended(b, x, y),
    # names and moves
    lambda b, x, y: b.cont(b.permute(x, 1, 0, 2, 3)),
    lambda b, x, y: b.cont_4d(b.permute(x, 1, 2, 0, 3), *CUBE),
    lambda b, x, y: b.add(y, b.permute(x, 1, 0, 2, 3)),
    lambda b, x, y: b.concat(planes(b, x, 1), planes(b, y, 0), 2),
    lambda b, x, y: b.concat(columns(b, x, 2), columns(b, y, 4), 0),
    lambda b, x, y: b.repeat(row(b, x), y),
    lambda b, x, y: b.reshape_4d(b.get_rows(b.reshape_4d(x, 8, 32, 1, 1), b.indices(32, 32)), *CUBE),
    lambda b, x, y: b.reshape_4d(x, 8, 4, 8, 1),
    # over bytes that have a name
    lambda b, x, y: b.scale_inplace(x, 0.75),
    lambda b, x, y: b.add_inplace(x, y),
    lambda b, x, y: b.mul_inplace(x, b.x(8)),
    lambda b, x, y: b.unary_inplace(x, SIGMOID),
    lambda b, x, y: b.norm_inplace(x, 0.1),
    lambda b, x, y: b.diag_mask_zero_inplace(x, 2),
    lambda b, x, y: b.unary_inplace(planes(b, x, 1), RELU),
    lambda b, x, y: b.unary_inplace(columns(b, x, 1), SILU),
    lambda b, x, y: b.add_inplace(planes(b, x, 0), planes(b, y, 2)),
    lambda b, x, y: b.cpy(planes(b, x, 0), planes(b, y, 2)),
    lambda b, x, y: b.cpy(b.scale(x, 0.5), y),
    lambda b, x, y: b.cpy(columns(b, x, 0), columns(b, y, 4)),
    lambda b, x, y: b.set_inplace(x, b.x(4, 3, 2), 32, 256, 1024, 256 + 32 + 8),
    lambda b, x, y: b.acc_inplace(x, b.x(8, 2, 4), 32, 256, 1024, 96),
    lambda b, x, y: b.set_rows(x, b.x(8, 3, 4), b.indices(8, 3, 4, type="I64", unique=True)),
)


def random_graph(b: Builder) -> Any:
    """Any operations on any values so far, in place or not, through any views. A name that was written over in place
    is read again: it stands for the bytes as they are by then."""
    pool = [b.scale(b.x(*CUBE), 1.0) for _ in range(2)] + [b.x(*CUBE)]
    for _ in range(40):
        x, y = (pool[b.rng.integers(len(pool))] for _ in range(2))
        made = STEPS[b.rng.integers(len(STEPS))](b, x, y)
        b.first.append(made)
        if tuple(made.contents.ne) == CUBE:
            pool.append(made)
    return tuple(pool[-3:])


MIXED_STEPS: tuple[Callable[[Builder, Any, Any], Any], ...] = (
    # between f32 (x) and f16 (h)
    lambda b, x, h: b.cast(x, F16),
    lambda b, x, h: b.cast(h, F32),
    lambda b, x, h: b.cpy(x, h),
    lambda b, x, h: b.cpy(h, x),
    lambda b, x, h: b.cpy(planes(b, x, 0), planes(b, h, 2)),
    lambda b, x, h: b.cpy(planes(b, h, 2), planes(b, x, 0)),
    lambda b, x, h: b.cpy(columns(b, h, 2), columns(b, x, 3)),
    lambda b, x, h: b.cpy(b.permute(x, 1, 0, 2, 3), h),
    lambda b, x, h: b.norm(b.mul_mat(h, x), 0.1),
    lambda b, x, h: b.norm(b.mul_mat(b.cont(b.transpose(h)), x), 0.1),
    lambda b, x, h: b.flash_attn_ext(x, h, h, None, 0.3, 0.0, 0.0),
    lambda b, x, h: b.reshape_4d(b.get_rows(b.reshape_4d(h, 8, 32, 1, 1), b.indices(32, 32)), *CUBE),
    lambda b, x, h: b.set_rows(h, b.x(8, 3, 4), b.indices(8, 3, 4, type="I64", unique=True)),
    lambda b, x, h: b.sub(h, x),
    # f16 alone
    lambda b, x, h: b.add_inplace(h, b.x(8, type="F16")),
    lambda b, x, h: b.unary_inplace(h, SIGMOID),
    lambda b, x, h: b.unary_inplace(planes(b, h, 1), RELU),
    lambda b, x, h: b.concat(planes(b, h, 1), planes(b, h, 0), 2),
    lambda b, x, h: b.cont(b.permute(h, 1, 0, 2, 3)),
    lambda b, x, h: b.repeat(row(b, h), h),
    # f32 alone
    lambda b, x, h: b.add_inplace(x, b.x(8)),
    lambda b, x, h: b.scale_inplace(x, 0.5),
    lambda b, x, h: b.soft_max(x),
)


def mixed_graph(b: Builder) -> Any:
    """As :func:`random_graph`, of values in f32 and f16 that go over into each other's memory."""
    wide, narrow = [b.scale(b.x(*CUBE), 1.0), b.x(*CUBE)], [b.cast(b.x(*CUBE), F16), b.x(*CUBE, type="F16")]
    for _ in range(40):
        x, h = wide[b.rng.integers(len(wide))], narrow[b.rng.integers(len(narrow))]
        made = MIXED_STEPS[b.rng.integers(len(MIXED_STEPS))](b, x, h)
        b.first.append(made)
        if tuple(made.contents.ne) == CUBE:
            (narrow if made.contents.type == F16 else wide).append(made)
    return (*wide[-2:], *narrow[-2:])


# What our server refuses, by the words that its log then has


def with_sinks(b: Builder) -> Any:
    result = b.flash_attn_ext(b.x(64, 4, 2), b.x(64, 8, 2), b.x(64, 8, 2), None, 0.1, 0.0, 0.0)
    ggml.library().ggml_flash_attn_ext_add_sinks(result, b.x(2))
    return result


REFUSED: dict[str, Case] = {
    "ROLL": Case("ROLL", lambda b: b.roll(b.x(8, 4), 1, 0, 0, 0), "f32"),
    "TRI": Case("TRI", lambda b: b.tri(b.x(8, 8), 2), "f32"),
    "MUL_MAT_ID": Case("MUL_MAT_ID", lambda b: b.mul_mat_id(b.x(8, 4, 3), b.x(8, 2, 5), b.indices(3, 2, 5)), "f32"),
    "XIELU": Case("UNARY", lambda b: b.xielu(b.x(8, 4), 0.8, 0.8, 0.5, -1e-6), "f32"),
    "sinks": Case("FLASH_ATTN_EXT", with_sinks, "f32"),
    "mode 2": Case("UPSCALE", lambda b: b.interpolate(b.x(8, 8, 2), 16, 16, 2, 1, 2), "f32"),
    "ROLL.*ADD_ID": Case(
        "ROLL", lambda b: b.add_id(b.roll(b.x(8, 4, 2), 1, 0, 0, 0), b.x(8, 6), b.indices(6, 4, 2)), "f32"
    ),
}

for _fill in (_unary, _binary, _glu, _rows, _soft_max, _rope, _copies, _products, _attention, _images):
    _fill()
for _seed in range(40):
    case("graph", f"random{_seed}", random_graph)
for _seed in range(16):
    case("graph", f"mixed{_seed}", mixed_graph, "f16 sums")

CASES: dict[str, Case] = dict(TABLE)
GRAPHS: tuple[str, ...] = tuple(name for name, c in CASES.items() if c.op == "graph")
OPERATIONS: tuple[str, ...] = tuple(name for name in CASES if name not in GRAPHS)

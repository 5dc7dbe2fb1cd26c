"""Operation parameters as typed values.

On the wire a tensor carries sixteen 32-bit words, ``op_params``, whose meaning depends on the operation (ggml.c, the
``ggml_set_op_params`` calls of each constructor). They are decoded once, here; raw words are not used after that.
A field's annotation says how its word is read: ``int`` as i32, ``float`` as f32. Numbers that differ between protocol
versions (unary and GLU operations, precisions) become names through the dialect.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple, Union, get_args, get_type_hints

if TYPE_CHECKING:
    from .dialect import Dialect

WORDS = 16

PREC_F32 = 10
"""ggml_prec: GGML_PREC_F32, to be computed in float32 whatever a device's own precision."""


class NoParams(NamedTuple):
    """An operation without parameters."""


class Eps(NamedTuple):
    eps: float


class GroupNorm(NamedTuple):
    groups: int
    eps: float


class Scale(NamedTuple):
    """``x * scale + bias``."""

    scale: float
    bias: float = 0.0


class Clamp(NamedTuple):
    min: float
    max: float


class LeakyRelu(NamedTuple):
    slope: float


class Concat(NamedTuple):
    """``dim`` counts from the fastest dimension, ne[0]."""

    dim: int


class MulMat(NamedTuple):
    """``hint`` says what the first operand is known to be. Of weights in I8 that have scales (protocol 5.0.1) ``group``
    tells how many numbers were rotated together, 0 for none, and ``kind`` how they are packed, 0 for a byte each."""

    prec: int = 0
    hint: int = 0
    group: int = 0
    kind: int = 0


class Rotation(NamedTuple):
    """So many numbers of a row are rotated together."""

    group: int


class Permute(NamedTuple):
    """Source dimension i becomes dimension ``axis_i`` of the result."""

    axis0: int
    axis1: int
    axis2: int
    axis3: int


class View(NamedTuple):
    """A byte offset into the source, split into two words."""

    offset_low: int
    offset_high: int = 0


class Im2Col(NamedTuple):
    s0: int
    s1: int
    p0: int
    p1: int
    d0: int
    d1: int
    is_2d: int


class Conv2D(NamedTuple):
    """``prec``, as products have it, is our own: ggml's backends do not read that word, and its clients send 0."""

    s0: int
    s1: int
    p0: int
    p1: int
    d0: int
    d1: int
    prec: int = 0


class Window3D(NamedTuple):
    """A window of three dimensions (stride, padding, dilation; width first). ``channels``: images of several of them
    lie one after the other in ne[3]. In CONV_3D, ``batch`` such images become as many of ``outputs``; IM2COL_3D has
    neither parameter: both are zero."""

    s0: int
    s1: int
    s2: int
    p0: int
    p1: int
    p2: int
    d0: int
    d1: int
    d2: int
    channels: int
    batch: int = 0
    outputs: int = 0


class ConvTranspose1D(NamedTuple):
    stride: int
    padding: int = 0
    dilation: int = 1


class ConvTranspose2D(NamedTuple):
    """``prec``: see :class:`Conv2D`."""

    stride: int
    prec: int = 0


class Col2Im1D(NamedTuple):
    """``channels`` of the result; ``padding`` is what is cut off at both ends."""

    stride: int
    channels: int
    padding: int = 0


class Pool1D(NamedTuple):
    op: int
    k: int
    s: int
    p: int


class Pool2D(NamedTuple):
    op: int
    k0: int
    k1: int
    s0: int
    s1: int
    p0: int
    p1: int


class Upscale(NamedTuple):
    """``mode``: the low byte is ggml_scale_mode (0 nearest, 1 bilinear, 2 bicubic); 256 is the flag align_corners, 512
    antialias."""

    mode: int


class Pad(NamedTuple):
    """Elements added before (l) and after (r) in each dimension, ne[0] first."""

    l0: int
    r0: int
    l1: int
    r1: int
    l2: int
    r2: int
    l3: int
    r3: int
    circular: int = 0


class PadReflect(NamedTuple):
    """Elements mirrored before and after each row."""

    left: int
    right: int


class Roll(NamedTuple):
    """How far elements move along each dimension; what leaves at one end comes in at the other."""

    shift0: int
    shift1: int
    shift2: int
    shift3: int


class Windows(NamedTuple):
    """``across`` × ``down`` square windows of ``size``."""

    across: int
    down: int
    size: int


class Unwindow(NamedTuple):
    size: int


class InPlace(NamedTuple):
    inplace: int = 0


class Tri(NamedTuple):
    """``part`` of a square matrix: 0 upper with the diagonal, 1 upper, 2 lower with the diagonal, 3 lower."""

    part: int


class TimestepEmbedding(NamedTuple):
    dim: int
    max_period: int


class Arange(NamedTuple):
    start: float
    stop: float
    step: float


class SoftMax(NamedTuple):
    scale: float
    max_bias: float = 0.0


class FlashAttn(NamedTuple):
    scale: float
    max_bias: float = 0.0
    logit_softcap: float = 0.0
    prec: int = 0


class Rope(NamedTuple):
    n_past: int
    n_dims: int
    mode: int
    n_ctx: int
    n_ctx_orig: int
    freq_base: float
    freq_scale: float
    ext_factor: float
    attn_factor: float
    beta_fast: float
    beta_slow: float
    section0: int = 0
    section1: int = 0
    section2: int = 0
    section3: int = 0
    n_offset: int = 0


class DiagMask(NamedTuple):
    n_past: int


class ArgSort(NamedTuple):
    """``order``: 0 ascending, 1 descending."""

    order: int


class SetView(NamedTuple):
    """Where ACC and SET write in their destination: strides and offset in bytes."""

    nb1: int
    nb2: int
    nb3: int
    offset: int
    inplace: int


class Fill(NamedTuple):
    value: float


class States(NamedTuple):
    """``states`` after the last tokens, the last one first, that a recurrence gives; 0, in protocols that have no such
    parameter: one."""

    states: int = 1


class LinearAttention(NamedTuple):
    scale: float


class Mixing(NamedTuple):
    """DSV4_HC_COMB: rows and columns are normalized in turn, ``rounds`` times."""

    eps: float
    rounds: int


class Gather(NamedTuple):
    """DSV4_HC_PRE. Protocols before 7.0 have neither parameter: both are zero."""

    scale: float = 1.0
    gated: int = 0


class Unary(NamedTuple):
    """``op`` is the operation's name: GELU, SILU, …; the rest belongs to XIELU, the alphas as its formula has them."""

    op: str
    alpha_n: float = 0.0
    alpha_p: float = 0.0
    beta: float = 0.0
    eps: float = 0.0


class Glu(NamedTuple):
    """``op`` is the operation's name: GEGLU, SWIGLU, …; ``swapped`` says that the second half is the gate's input."""

    op: str
    swapped: int = 0
    alpha: float = 0.0
    limit: float = 0.0


NO_PARAMS = NoParams()

Params = Union[  # noqa: UP007 (sixty classes joined by | would stand one to a line)
    NoParams, Eps, GroupNorm, Scale, Clamp, LeakyRelu, Concat, MulMat, Rotation, Permute, View, Im2Col, Conv2D,
    Window3D, ConvTranspose1D, ConvTranspose2D, Col2Im1D, Pool1D, Pool2D, Upscale, Pad, PadReflect, Roll, Windows,
    Unwindow, InPlace, Tri, TimestepEmbedding, Arange, SoftMax, FlashAttn, Rope, DiagMask, ArgSort, SetView, Fill,
    States, LinearAttention, Mixing, Gather, Unary, Glu,
]  # fmt: skip
"""Any of the classes above; which one belongs to an operation, :data:`sdrpc.ggml.ops.OPS` says."""


class Layout(NamedTuple):
    """How a parameter class lies in the sixteen words."""

    packer: struct.Struct
    named: str  # which numbering of the dialect the first word uses ("" for none)


def _layout(cls: type[Params]) -> Layout:
    hints = get_type_hints(cls)
    codes = {int: "i", float: "f", str: "i"}
    named = {Unary: "unary_ops", Glu: "glu_ops"}.get(cls, "")
    return Layout(struct.Struct("<" + "".join(codes[hints[name]] for name in cls._fields)), named)


CLASSES: tuple[type[Params], ...] = get_args(Params)
_LAYOUTS: dict[type[Params], Layout] = {cls: _layout(cls) for cls in CLASSES}


def decode(cls: type[Params], words: bytes, dialect: Dialect) -> Params:
    """The 64 bytes of ``op_params`` as parameters of the class ``cls``.

    Raises :class:`ValueError` when a numbered name (a unary or GLU operation) does not exist in the dialect.
    """
    packer, named = _LAYOUTS[cls]
    values = packer.unpack_from(words)
    if named:
        names = getattr(dialect, named)
        if not 0 <= values[0] < len(names):
            raise ValueError(f"{cls.__name__.upper()} number {values[0]} does not exist in protocol {dialect.version}")
        values = (names[values[0]], *values[1:])
    return cls(*values)


def encode(params: Params, dialect: Dialect) -> bytes:
    """The 64 bytes of ``op_params``. Raises :class:`ValueError` for a name that the dialect does not have."""
    packer, named = _LAYOUTS[type(params)]
    values: tuple[int | float | str, ...] = tuple(params)
    if named:
        names = getattr(dialect, named)
        if values[0] not in names:
            raise ValueError(f"{values[0]} does not exist in protocol {dialect.version}")
        values = (names.index(values[0]), *values[1:])
    return packer.pack(*values).ljust(4 * WORDS, b"\0")

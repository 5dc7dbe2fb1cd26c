"""What the table of operations is made of: its rows, and what shape rules share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar, cast

from ...errors import GraphError, UnsupportedOperation
from ..params import Params
from ..tensor import Dims, Tensor
from ..types import OF_GGML, TYPES, Type

FLOATS = frozenset({"F32", "F16", "BF16"})
"""Types that values are computed in."""
ALL = frozenset(TYPES)
PLAIN = frozenset(t.name for t in TYPES.values() if t.plain)
READABLE = FLOATS | (ALL - PLAIN)
"""Types that floats can be made of."""
WRITABLE = (READABLE & OF_GGML) - {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"}
"""Types that can be made of floats; those that are left out ggml makes in files only, with weights of importance, and
those of our own are in files of others."""
INDICES = frozenset({"I32", "I64"})
P = TypeVar("P", bound=Params)
P_co = TypeVar("P_co", covariant=True)
Sources = tuple[Tensor | None, ...]


class Result(NamedTuple):
    """Type and shape that an operation gives."""

    type: Type
    ne: Dims


@dataclass(frozen=True, slots=True)
class Call(Generic[P_co]):
    """One use of an operation, with parameters of the class ``P_co``. ``type`` and ``ne`` are what the node declares,
    None where they are asked for."""

    params: P_co
    src: tuple[Any, ...]  # tensors; None only where the operation allows it
    type: Type | None
    ne: Dims | None


@dataclass(frozen=True, slots=True)
class Op:
    """What there is to know about one of ggml's operations; made by :func:`op`."""

    name: str
    params: type[Params]
    """What its ``op_params`` mean."""
    infer: Callable[[Call[Any]], Result]
    """Its shape rule: type and shape of the result. It raises :class:`GraphError` for an invalid call and
    :class:`UnsupportedOperation` for a valid one that sdrpc does not compute. When it is called, the number of sources
    and the class of the parameters have been checked."""
    least: int
    """So many sources must be there."""
    most: int
    """So many may be."""
    alias: bool = False
    """It computes nothing: its tensor is another name for bytes that exist."""
    moves: bool = False
    """Its result holds elements of its only source, of any type, in another shape or order."""
    writes: int | None = None
    """The source whose memory the result is written to (of SET and ACC only if their parameter ``inplace`` is set);
    None where the result has memory of its own, or the node's place alone says where it is."""
    partial: bool = False
    """It changes only part of that memory: what else is there stays."""
    updates: tuple[int, ...] = ()
    """Other sources whose memory it changes."""
    finite: bool = True
    """Whether its parameters must be finite. NaN is never allowed."""
    portable: bool = False
    """Whether ggml's CPU, CUDA, Metal, Vulkan and SYCL backends all have it."""

    @property
    def reads(self) -> int:
        """It reads the values of so many sources at most; a source behind them only says where to write."""
        return self.writes or self.most


def op(
    name: str,
    params: type[P],
    infer: Callable[[Call[P]], Result],
    least: int,
    most: int | None = None,
    *,
    alias: bool = False,
    moves: bool = False,
    writes: int | None = None,
    partial: bool = False,
    updates: tuple[int, ...] = (),
    finite: bool = True,
    portable: bool = False,
) -> Op:
    """A row of the table, whose shape rule takes parameters of the class that the row names. ``most`` is ``least``
    unless it is given."""
    return Op(
        name, cast("type[Params]", params), infer, least, least if most is None else most,
        alias, moves, writes, partial, updates, finite, portable,
    )  # fmt: skip


def injective(type: Type, ne: Dims, nb: Dims) -> bool:
    """Whether these strides give no byte to two elements (sufficient: sorted by stride, each dimension steps over all
    that lies below it)."""
    reach = type.row_bytes(ne[0]) if not type.plain else type.size
    first = 0 if type.plain else 1
    for stride, n in sorted((nb[i], ne[i]) for i in range(first, 4) if ne[i] > 1):
        if stride < reach:
            return False
        reach += (n - 1) * stride
    return True


def need(truth: bool, message: str, *values: object) -> None:
    """Raise :class:`GraphError` unless ``truth``; the message is formatted only then."""
    if not truth:
        raise GraphError(message.format(*(list(v) if isinstance(v, tuple) else v for v in values)))


def support(truth: bool, message: str, *values: object) -> None:
    """Raise :class:`UnsupportedOperation` unless ``truth``."""
    if not truth:
        raise UnsupportedOperation(message.format(*values))


def typed(tensor: Tensor, allowed: frozenset[str], what: str = "source") -> None:
    if tensor.type.name not in allowed:
        raise UnsupportedOperation(f"{what} of type {tensor.type}")


def fits(n: int, whole: int) -> bool:
    """Whether ``whole`` is a multiple of ``n``; of zero only zero is one."""
    return whole % n == 0 if n else whole == 0


def repeats(small: Dims, large: Dims) -> bool:
    """Whether ``small`` fits a whole number of times into ``large``, in every dimension (ggml_can_repeat)."""
    return all(map(fits, small, large))


def declared(call: Call[object]) -> Dims:
    if call.ne is None:
        raise GraphError("the shape of the result must be given")
    return call.ne


def one_of(call: Call[object], allowed: frozenset[str], default: Type) -> Type:
    """The declared result type, which the operation leaves free within ``allowed``."""
    result = call.type or default
    support(result.name in allowed, "result of type {}", result)
    return result


def like(allowed: frozenset[str]) -> Callable[[Call[object]], Result]:
    """Element by element, or row by row: the result is as the first source."""

    def rule(call: Call[object]) -> Result:
        source = call.src[0]
        typed(source, allowed)
        return Result(source.type, source.ne)

    return rule


float_like = like(FLOATS)

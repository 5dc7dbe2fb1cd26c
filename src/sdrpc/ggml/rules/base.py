"""What rules are made of, and the types that they speak of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ...errors import GraphError, UnsupportedOperation
from ..tensor import Dims, Tensor
from ..types import TYPES, Type

FLOATS = frozenset({"F32", "F16", "BF16"})
"""Types that values are computed in."""
ALL = frozenset(TYPES)
PLAIN = frozenset(t.name for t in TYPES.values() if t.plain)
READABLE = FLOATS | (ALL - PLAIN)
"""Types that floats can be made of."""
WRITABLE = READABLE - {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"}
"""Types that can be made of floats; those that are left out ggml makes in files only, with weights of importance."""
INDICES = frozenset({"I32", "I64"})
Sources = tuple[Tensor | None, ...]


class Result(NamedTuple):
    """Type and shape that an operation gives."""

    type: Type
    ne: Dims


class Call(NamedTuple):
    """An operation as written down. ``type`` and ``ne`` are what the node declares, None where they are asked for."""

    op: str
    params: Any  # the op's class of PARAMS: checked before a rule sees it
    src: tuple[Any, ...]  # tensors; None only where the rule allows it
    type: Type | None
    ne: Dims | None


class Rule(NamedTuple):
    """``infer`` gets a call whose number of sources and class of parameters are right. The first ``least`` sources are
    needed, those up to ``most`` may be missing."""

    least: int
    most: int
    infer: Callable[[Call], Result]
    finite: bool = True  # whether parameters must be finite; NaN is never allowed


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


def repeats(small: Dims, large: Dims) -> bool:
    """Whether ``small`` fits a whole number of times into ``large``, in every dimension (ggml_can_repeat)."""
    return not (large[0] % small[0] or large[1] % small[1] or large[2] % small[2] or large[3] % small[3])


def declared(call: Call) -> Dims:
    if call.ne is None:
        raise GraphError("the shape of the result must be given")
    return call.ne


def one_of(call: Call, allowed: frozenset[str], default: Type) -> Type:
    """The declared result type, which the operation leaves free within ``allowed``."""
    result = call.type or default
    support(result.name in allowed, "result of type {}", result)
    return result


def like(allowed: frozenset[str]) -> Callable[[Call], Result]:
    """Element by element, or row by row: the result is as the first source."""

    def rule(call: Call) -> Result:
        source = call.src[0]
        typed(source, allowed)
        return Result(source.type, source.ne)

    return rule


float_like = like(FLOATS)

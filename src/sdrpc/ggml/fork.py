"""Operations that stable-diffusion.cpp's own ggml has beside ggml's, behind the last of them.

Their numbers move: 101 was QUANTIZE_I8_CONVROT, and became REGULAR_HADAMARD when that came before it, within one
version of the protocol; a later one had 105 operations. So a number there stands for any of ``Dialect.fork_ops``, and
which it is shows in what surrounds it.
"""

from __future__ import annotations

from ..errors import GraphError
from . import params
from .dialect import Dialect
from .ops import OPS, infer
from .rules.base import Sources
from .tensor import Dims
from .types import Type

MOST = 16
"""Numbers behind ggml's own that may be such an operation's: four have been seen."""


def may_be(number: int, dialect: Dialect) -> bool:
    """Whether operation ``number``, which ggml does not have, may be one of the fork's."""
    return bool(dialect.fork_ops) and len(dialect.ops) <= number < len(dialect.ops) + MOST


def tell(words: bytes, src: Sources, type: Type, ne: Dims, dialect: Dialect) -> tuple[str, params.Params]:
    """Which of the fork's operations this is, and its parameters: the one that gives a result of this type and shape.

    ``words`` are the 64 bytes of ``op_params``. Raises :class:`GraphError`, which names all candidates and what speaks
    against each, when none does, or several do.
    """
    found: list[tuple[str, params.Params]] = []
    against: list[str] = []
    for name in dialect.fork_ops:
        try:
            if name not in OPS:
                raise GraphError("what it computes is not known here")
            values = params.decode(OPS[name].params, words, dialect)
            infer(name, values, src, type, ne)
        except (GraphError, ValueError) as reason:
            against.append(f"{name} ({reason})")
        else:
            found.append((name, values))
    if len(found) == 1:
        return found[0]
    names = ", ".join(name for name, _ in found) or "; ".join(against)
    raise GraphError(f"an operation of stable-diffusion.cpp's own, it can't be told which: {names}")

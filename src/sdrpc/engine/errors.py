"""The one boundary at which torch's errors become sdrpc's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sdrpc.errors import ComputeError, OutOfMemory, SdrpcError

_NO_MEMORY = ("can't allocate memory", "out of memory", "not enough memory")


@contextmanager
def translated(device: str, doing: str, size: int = 0) -> Iterator[None]:
    """Run torch code of ``device``: running out of memory raises :class:`OutOfMemory` (of ``size`` bytes, if known),
    anything else that torch refuses :class:`ComputeError`."""
    try:
        yield
    except SdrpcError:
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemory(device, size, f"while {doing}") from error
    except (RuntimeError, IndexError, ValueError, TypeError, ArithmeticError, OSError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0]
        if any(words in reason.lower() for words in _NO_MEMORY):
            raise OutOfMemory(device, size, f"while {doing}") from error
        raise ComputeError(f"{device}: {doing}: {reason}") from error

"""The one boundary at which torch's errors become sdrpc's."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sdrpc.errors import ComputeError, OutOfMemory, SdrpcError

_NO_MEMORY = ("can't allocate memory", "cannot allocate memory", "out of memory", "not enough memory")
_ASKED = re.compile(r"(?:tried to )?allocate (\d+) bytes")
"""How torch's CPU allocator says what it was asked for."""


@contextmanager
def translated(device: str, doing: str, size: int = 0) -> Iterator[None]:
    """Run torch code of ``device``: running out of memory raises :class:`OutOfMemory` (of ``size`` bytes, if known),
    anything else that torch refuses :class:`ComputeError`."""
    try:
        yield
    except SdrpcError:
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemory(device, size or _asked(error), f"while {doing}") from error
    except (RuntimeError, IndexError, ValueError, TypeError, ArithmeticError, OSError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0]
        if getattr(error, "errno", 0) == errno.ENOMEM or any(words in reason.lower() for words in _NO_MEMORY):
            raise OutOfMemory(device, size or _asked(error), f"while {doing}") from error
        raise ComputeError(f"{device}: {doing}: {reason}") from error


def _asked(error: BaseException) -> int:
    """How many bytes the allocation asked for that failed; 0 if the error does not say."""
    found = _ASKED.search(str(error))
    return int(found[1]) if found else 0

"""What a device can't compute, the CPU does, as a last resort: a native client has no word for a refusal, and ends.

Torch has kernels for most operations on every device, not all: an operation, a dtype or a shape may be missing. That
shows when it is first run. The operands then go to the CPU and the result comes back, each time; the log says so once
for each operation.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from threading import Lock

import torch
from torch import Tensor

from .operations import OpName

log = logging.getLogger(__name__)

REFUSALS = re.compile(
    r"not (currently )?(implemented|supported)|(doesn't|does not) support|unsupported|unable to find an engine",
    re.IGNORECASE,
)
"""How torch and its libraries say that they have no kernel for something."""
BROKEN = re.compile(r"(CUDA|HIP|XPU|MPS)\w* error|stream is capturing", re.IGNORECASE)
"""How they say that the device itself has failed, or waits for something else: the CPU is no answer to that."""

_said: set[tuple[str, OpName]] = set()
_saying = Lock()


def refuses(error: Exception) -> bool:
    """Whether ``error`` says that there is no kernel, rather than that something is wrong."""
    if BROKEN.search(str(error)):
        return False
    return isinstance(error, NotImplementedError) or (
        isinstance(error, RuntimeError | TypeError) and REFUSALS.search(str(error)) is not None
    )


class LastResort:
    """A step that ``there`` computes on ``device``, and, once that has refused it, what ``make_here`` gives on the CPU.

    ``in_place``: it changes its first operand.
    """

    def __init__(
        self,
        op: OpName,
        device: torch.device,
        there: Callable[..., Tensor],
        make_here: Callable[[], Callable[..., Tensor]],
        in_place: bool = False,
    ) -> None:
        self._op, self._device, self._in_place = op, device, in_place
        self.there, self._make_here = there, make_here
        self._here: Callable[..., Tensor] | None = None

    def __call__(self, *operands: Tensor | None) -> Tensor:
        if self._here is None:
            try:
                return self.there(*operands)
            except Exception as error:
                if not refuses(error):
                    raise
                _say(self._device, self._op, error)
                self._here = self._make_here()
        moved = [None if operand is None else operand.cpu() for operand in operands]
        result = self._here(*moved)
        if self._in_place and operands and (changed := operands[0]) is not None and (copy := moved[0]) is not None:
            changed.copy_(copy)
            if result is copy:
                return changed
        return result.to(self._device)


def _say(device: torch.device, op: OpName, error: Exception) -> None:
    with _saying:
        if (str(device), op) in _said:
            return
        _said.add((str(device), op))
    reason = str(error).strip().split("\n")[0]
    log.warning("%s has no kernel for %s, which the CPU computes in its place from now on: %s", device, op, reason)

"""The CPU as an accelerator is used: what it computes on is memory that nobody else can touch."""

from __future__ import annotations

import torch

from sdrpc.engine import LocalDevice
from sdrpc.engine.memory import Storage


class Untouchable(LocalDevice):
    """A device whose buffers have no memory of the host's."""

    def _storage(self, size: int) -> Storage:
        return Storage(torch.zeros(size, dtype=torch.uint8, device=self.torch_device))

"""The CPU as an accelerator is used: what it computes on is memory that nobody else can touch."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from sdrpc.engine import LocalDevice
from sdrpc.engine.memory import Storage
from sdrpc.engine.sharing import Storages


class Untouchable(LocalDevice):
    """A device whose buffers have no memory of the host's."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._storages = Storages(partial(_storage, self.torch_device), self._weights)


def _storage(device: torch.device, size: int) -> Storage:
    return Storage(torch.zeros(size, dtype=torch.uint8, device=device))

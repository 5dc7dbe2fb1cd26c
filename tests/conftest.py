"""What holds for every test: few threads, the same examples each time."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)  # the suite runs in parallel processes on a small machine

settings.register_profile(
    "sdrpc",
    derandomize=True,
    deadline=None,
    max_examples=50,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("sdrpc")

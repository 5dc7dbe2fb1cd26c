"""A sampling step through a server, over the same step of diffusers in process."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from .rows import Mark, Row
from .sampling import DTYPES, InProcess, difference, sample, step_seconds
from .setup import Setup, Variant

ROUNDS = 2
"""Each side draws as often, in turn: what else the machine does then hits both."""

SAME_WORK = 0.15
"""How far (relative, L2) the latents of both sides may be from each other: rounding in narrow types takes a few per
cent, other work takes far more."""


def run(setup: Setup) -> Iterator[Row]:
    for variant in setup.variants:
        yield from _variant(setup, variant)


def _variant(setup: Setup, variant: Variant) -> Iterator[Row]:
    request = setup.request()
    with setup.server(variant) as server, setup.session(variant, server.port) as session:
        settings = session.settings(request)
        conditions = session.conditions(settings)
        text = np.concatenate([each["context"] for each in conditions.by_name.values()])
        mine = [sample(session, request, conditions)]  # uploads
        theirs = InProcess(session.model, setup.torch_device, _dtype(variant))
        eager = [theirs.sample(settings, text)]
        for _ in range(1, ROUNDS):
            mine.append(sample(session, request, conditions))
            eager.append(theirs.sample(settings, text))
        apart = difference(mine[-1].latents, eager[-1].latents)
        if apart > SAME_WORK:
            raise SystemExit(f"step, {variant}: the two sides draw different pictures ({apart:.0%} apart)")
        note = f"{settings.width}×{settings.height}, batch of 2; latents {apart:.2%} apart"
        yield _row(f"step, {variant}", step_seconds(*mine), step_seconds(*eager), "diffusers", note)
        if theirs.device.type == "cuda":
            graphs = [theirs.sample(settings, text, graph=True) for _ in range(ROUNDS)]
            yield _row(f"step, {variant}", step_seconds(*mine), step_seconds(*graphs), "diffusers, CUDA graph", note)


def _dtype(variant: Variant) -> torch.dtype:
    """What diffusers computes in: exact is float32 whatever the file holds."""
    return torch.float32 if variant.precision == "exact" else DTYPES[variant.type]


def _row(what: str, ours: float, theirs: float, against: str, note: str) -> Row:
    rates = f"{1 / ours:.2f} against {1 / theirs:.2f} steps/s; {note}"
    return Row(what, ours * 1e3, "ms", theirs * 1e3, against, Mark(1.10), rates)

"""Random operations that ggml's constructors allow: our server computes all of them, as ggml's CPU backend does."""

from __future__ import annotations

import os

import pytest

from sdrpc.server import Server
from tests.interop.cases import BOUNDS, drawn
from tests.interop.conftest import NativeClient

pytestmark = pytest.mark.interop

DRAWS = int(os.environ.get("SDRPC_TEST_DRAWS", "20"))
"""Cases of each operation."""


@pytest.mark.parametrize("op", drawn.DRAWN)
def test_what_ggml_accepts_is_accepted(op: str, native_client: NativeClient, our_server: Server) -> None:
    cases = [drawn.case(f"{op}-drawn-{number}") for number in range(DRAWS)]
    outcomes = native_client.run_all([case.name for case in cases], our_server.endpoint)
    wrong = [
        f"{case.name}: error {outcome.error:.3g} in\n{outcome.graph}"
        for case, outcome in zip(cases, outcomes, strict=True)
        if not outcome.error <= BOUNDS[case.bound]
    ]
    assert not wrong, "\n".join(wrong)

"""What is leased of what nodes offer."""

from __future__ import annotations

import pytest

from sdrpc.cluster.lease import leases
from sdrpc.errors import UsageError

NODES = [
    {"CPU": 8.0, "rpc:desktop:50052": 1.0, "rpc:mini:50052": 1.0},
    {"rpc:desktop:50052": 1.0, "rpc:localhost:50052": 1.0},
    {"rpc:localhost:50052": 1.0, "rpc:[fd00::1]:50053/1": 1.0},
]


@pytest.mark.parametrize(
    ("together", "only", "expected"),
    [
        (
            False,
            [],
            ["desktop:50052", "mini:50052", "localhost:50052", "localhost:50052", "[fd00::1]:50053/1"],
        ),
        (False, ["mini", "desktop:50052"], ["mini:50052", "desktop:50052"]),
        (True, ["mini", "desktop:50052"], ["mini:50052+desktop:50052", "desktop:50052"]),
        (
            True,
            [],
            ["desktop:50052+mini:50052", "desktop:50052+localhost:50052", "[fd00::1]:50053/1+localhost:50052"],
        ),
    ],
)
def test_each_offer_or_all_of_a_node(together: bool, only: list[str], expected: list[str]) -> None:
    """What two nodes reach is leased once, but for what is each node's own; ``only`` gives the order."""
    found = leases(NODES, together, only)
    assert [str(lease) for lease in found] == expected
    assert found[-1].resources == {f"rpc:{part}": 1.0 for part in expected[-1].split("+")}


@pytest.mark.parametrize(
    ("nodes", "only", "words"),
    [
        (NODES, ["other"], r"resource rpc:other:50052: .* ray start --resources '\{\"rpc:other:50052\": 1\}'"),
        ([{"CPU": 2.0}], [], "no node of the cluster offers devices"),
        (NODES, ["mini/x"], "which of the server's devices"),
        ([{"rpc:mini": 1.0}], [], "name it rpc:mini:50052"),
        ([{"rpc:de sktop:1": 1.0}], [], "no server"),
    ],
)
def test_what_can_not_be_leased(nodes: list[dict[str, float]], only: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        leases(nodes, False, only)

"""ggml's own RPC client on our server: the same results as on ggml's CPU backend."""

from __future__ import annotations

from concurrent.futures import wait

import pytest
from tests.interop.cases import BOUNDS, CASES, GRAPHS, OPERATIONS
from tests.interop.conftest import NativeClient
from tests.interop.scenarios import SCENARIOS
from tests.interop.tap import Tap
from tests.interop.worker import Outcome

from sdrpc.engine.dequant import DEQUANTIZE
from sdrpc.ggml.rules import FLOATS, GLU_OPS, RULES, UNARY_OPS
from sdrpc.server import Server

pytestmark = pytest.mark.interop


def check(name: str, outcome: Outcome) -> None:
    bound = BOUNDS[CASES[name].bound if name in CASES else "f32"]
    assert outcome.error <= bound, f"{name}: error {outcome.error:.3g}, at most {bound:.3g} in\n{outcome.graph}"


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(name: str, native_client: NativeClient, our_server: Server) -> None:
    check(name, native_client.run(name, our_server.endpoint))


@pytest.mark.parametrize("shared_memory", [False, True], ids=["own-memory", "shared-memory"])
@pytest.mark.parametrize("name", GRAPHS)
def test_graph(name: str, shared_memory: bool, native_client: NativeClient, our_server: Server) -> None:
    check(name, native_client.run(name, our_server.endpoint, shared_memory))


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(name: str, native_client: NativeClient, our_server: Server) -> None:
    check(name, native_client.run(name, our_server.endpoint))


def test_every_operation_and_type_has_cases() -> None:
    covered = {case.op for case in CASES.values()}
    assert set(RULES) - covered == {"NONE"}  # a leaf: in every case
    assert {f"UNARY-{op}-F32" for op in UNARY_OPS} <= set(CASES)
    assert {op for op in GLU_OPS if not any(name.startswith(f"GLU-{op}") for name in CASES)} == set()
    multiplied = {name.split("-")[1] for name in CASES if name.startswith("MUL_MAT-")}
    assert FLOATS | set(DEQUANTIZE) <= multiplied


def test_clients_at_once(
    native_client: NativeClient, our_server: Server, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = NativeClient(tmp_path_factory.mktemp("ggml") / "other.log")
    jobs = {
        (name, client): client.submit(name, our_server.endpoint, True)
        for name in GRAPHS[:12]
        for client in (native_client, other)
    }
    wait(jobs.values())
    for (name, _), job in jobs.items():
        check(name, job.result())
    other.close()


def test_commands_of_a_repeated_graph(native_client: NativeClient, our_server: Server) -> None:
    with Tap(our_server.endpoint) as tap:
        check("the-scheduler-computes-again", native_client.run("the-scheduler-computes-again", tap.endpoint))
        assert (tap.commands["GRAPH_COMPUTE"], tap.commands["GRAPH_RECOMPUTE"]) == (1, 3)


def test_commands_of_a_large_weight(native_client: NativeClient, our_server: Server) -> None:
    with Tap(our_server.endpoint) as tap:
        check("a-large-weight-is-offered-by-hash", native_client.run("a-large-weight-is-offered-by-hash", tap.endpoint))
        assert tap.commands["SET_TENSOR_HASH"] == 3

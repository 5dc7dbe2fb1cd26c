"""ggml's own RPC client on our server: the same results as on ggml's CPU backend."""

from __future__ import annotations

import itertools
import re
from concurrent.futures import wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from sdrpc.engine.blocks import READ
from sdrpc.ggml.ops import OPS
from sdrpc.ggml.rules.base import FLOATS
from sdrpc.ggml.rules.elementwise import GLU_OPS, UNARY_OPS
from sdrpc.ggml.types import OF_GGML
from sdrpc.server import Server
from tests.interop import table
from tests.interop.cases import BOUNDS, CASES, GRAPHS, OPERATIONS, REFUSED
from tests.interop.conftest import NativeClient
from tests.interop.scenarios import SCENARIOS
from tests.interop.tap import Tap
from tests.interop.worker import Outcome
from tests.support.process import ServerProcess

pytestmark = pytest.mark.interop

FAST = 4e-4
"""The normalized mean square error of fast precision: 2e-2 squared, what users are promised of whole networks."""
SHOWN = 20
"""Cases that are shown when they are wrong."""
CASES_AT_LEAST = 5000


def complaint(name: str, outcome: Outcome) -> str:
    """What is wrong, or nothing."""
    bound = BOUNDS[CASES[name].bound if name in CASES else "f32"]
    return "" if outcome.error <= bound else f"{name}: error {outcome.error:.3g} > {bound:.3g} in\n{outcome.graph}"


def check(name: str, outcome: Outcome) -> None:
    wrong = complaint(name, outcome)
    assert not wrong, wrong


@pytest.mark.parametrize("op", OPERATIONS)
def test_operation(op: str, native_client: NativeClient, our_server: Server) -> None:
    outcomes = native_client.run_all(OPERATIONS[op], our_server.endpoint)
    wrong = [said for name, outcome in zip(OPERATIONS[op], outcomes, strict=True) if (said := complaint(name, outcome))]
    assert not wrong, f"{len(wrong)} of {len(outcomes)} cases:\n" + "\n".join(wrong[:SHOWN])
    lines = itertools.chain(*table.rows(dict(zip(OPERATIONS[op], outcomes, strict=True))))
    unlike = sorted(set(lines) - set(table.PATH.read_text().splitlines()))
    assert not unlike, f"not in {table.PATH.name} (`make operations` writes it anew):\n" + "\n".join(unlike)


@pytest.mark.parametrize("shared_memory", [False, True], ids=["own-memory", "shared-memory"])
@pytest.mark.parametrize("name", GRAPHS)
def test_graph(name: str, shared_memory: bool, native_client: NativeClient, our_server: Server) -> None:
    check(name, native_client.run(name, our_server.endpoint, shared_memory))


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(name: str, native_client: NativeClient, our_server: Server) -> None:
    check(name, native_client.run(name, our_server.endpoint))


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_refused_is_named(
    words: str, native_client: NativeClient, our_server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The protocol has no word for it: the server hangs up, and its log says why. Other clients don't notice."""
    other = NativeClient(tmp_path / "client.log")
    with pytest.raises(BrokenProcessPool):
        other.submit(words, our_server.endpoint).result()
    other.close()
    assert re.search(f"disconnected: .*{words}", caplog.text)
    check(GRAPHS[0], native_client.run(GRAPHS[0], our_server.endpoint))


def test_there_are_as_many_cases_as_the_table_says() -> None:
    """Each operation's lines are compared when its cases have run: here only that there are no others."""
    cases = sum(map(len, OPERATIONS.values()))
    assert cases >= CASES_AT_LEAST
    rows = [line.split(" | ") for line in table.PATH.read_text().split("## Types of blocks")[0].splitlines()]
    assert sum(int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()) == cases


def test_every_operation_and_type_has_cases() -> None:
    covered = {case.op for case in CASES.values()}
    assert set(OPS) - covered == {"NONE", *table.of_others()}  # NONE is a leaf: in every case
    assert {name.split("-")[1] for name in OPERATIONS["UNARY"]} == UNARY_OPS
    assert {name.split("-")[1] for name in OPERATIONS["GLU"]} == GLU_OPS
    multiplied = {name.split("-")[1] for name in OPERATIONS["MUL_MAT"]}
    assert FLOATS | (set(READ) & OF_GGML) - {"Q8_1", "Q8_K"} <= multiplied  # ggml itself can't multiply with these two


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


def test_the_rpc_server_command(native_client: NativeClient) -> None:
    with ServerProcess("--device", "CPU", "--precision", "exact") as process:
        for name in GRAPHS[:8]:
            check(name, native_client.run(name, f"127.0.0.1:{process.port}", True))


def test_in_fast_precision(native_client: NativeClient) -> None:
    with ServerProcess("--device", "CPU", "--precision", "fast") as process:
        for name in ("conv-block", "resnet-block", "attention", "attention-flash", "transformer-block", "down-up-skip"):
            outcome = native_client.run(f"graph-{name}", f"127.0.0.1:{process.port}", True)
            assert outcome.error <= FAST, f"{name}: error {outcome.error:.3g}"


def test_a_client_of_another_version_is_turned_away(
    native_client: NativeClient, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """ggml's client gives up on what our server says of itself; the server goes on."""
    with ServerProcess("--device", "CPU", "--protocol", "5.1") as process:
        for _ in range(2):
            log = tmp_path_factory.mktemp("ggml") / "old.log"
            other = NativeClient(log)
            with pytest.raises(BrokenProcessPool):
                other.submit(GRAPHS[0], f"127.0.0.1:{process.port}").result()
            assert "RPC server version mismatch: 5.1.0" in log.read_text()
            other.close()
        assert process.process.poll() is None


def test_commands_of_a_repeated_graph(native_client: NativeClient, our_server: Server) -> None:
    with Tap(our_server.endpoint) as tap:
        check("the-scheduler-computes-again", native_client.run("the-scheduler-computes-again", tap.endpoint))
        assert (tap.commands["GRAPH_COMPUTE"], tap.commands["GRAPH_RECOMPUTE"]) == (1, 3)


def test_commands_of_graphs_that_take_turns(native_client: NativeClient, our_server: Server) -> None:
    with Tap(our_server.endpoint) as tap:
        check("schedulers-take-turns", native_client.run("schedulers-take-turns", tap.endpoint))
        assert (tap.commands["GRAPH_COMPUTE"], tap.commands["GRAPH_RECOMPUTE"]) == (3, 6)


def test_commands_of_rows(native_client: NativeClient, our_server: Server) -> None:
    with Tap(our_server.endpoint) as tap:
        check("rows-are-set-and-got", native_client.run("rows-are-set-and-got", tap.endpoint))
        assert (tap.commands["SET_TENSOR_2D"], tap.commands["GET_TENSOR_2D"]) == (3, 6)


def test_commands_of_a_large_weight(native_client: NativeClient, our_server: Server) -> None:
    with Tap(our_server.endpoint) as tap:
        check("a-large-weight-is-offered-by-hash", native_client.run("a-large-weight-is-offered-by-hash", tap.endpoint))
        assert tap.commands["SET_TENSOR_HASH"] == 3

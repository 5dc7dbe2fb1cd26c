"""Clients and servers of older protocol versions, as far as their libraries have been built: ``make interop-all``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from functools import cache
from itertools import count
from typing import Any, NamedTuple

import pytest

from sdrpc.client import connect
from sdrpc.ggml.dialect import dialects, newest
from sdrpc.server import Learning, Server
from tests.interop.cases import CASES, GRAPHS, OPERATIONS, REFUSED
from tests.interop.conftest import OLDER, NativeClient, NativeServer
from tests.interop.models import PARTS
from tests.interop.scenarios import SCENARIOS
from tests.interop.tap import Tap
from tests.interop.test_native_client import check, complaint
from tests.interop.test_native_server import SIZES
from tests.interop.test_native_server import check as check_part
from tests.support import ggml
from tools.native_ggml import ALWAYS

pytestmark = pytest.mark.interop

REFUSALS = {"7.0.0": 1, "6.0.0": 4, "5.1.0": 2, "5.0.0": 2, "4.0.2": 3, "3.6.1": 0}
"""Runs that a client needs before our server knows what it speaks: 8.0 is tried first, then 7.0, 5.0, 4.0, 6.0 last."""
OTHERWISE: dict[str, set[str]] = {
    "7.0.0": set(),
    "6.0.0": {"DSV4_HC_POST"},
    "5.1.0": {"DSV4_HC_POST", "CONV_TRANSPOSE_2D"},
    "5.0.0": {"DSV4_HC_POST", "CONV_TRANSPOSE_2D"},
    "4.0.2": {"SSM_SCAN", "CONV_TRANSPOSE_2D", "graph-blocks", "a-tensor-is-filled-in-part"},
    "3.6.1": {
        *("SSM_SCAN", "GATED_DELTA_NET", "CONV_TRANSPOSE_2D", "NORM", "L2_NORM"),
        *("graph-blocks", "a-tensor-is-filled-in-part", "rows-are-set-and-got"),
    },
}
"""What can't be compared: ggml's function takes other arguments than the newest one's, which the cases call (SSM_SCAN,
GATED_DELTA_NET); the version's own CPU backend stops (DSV4_HC_POST, norms, graph-blocks) or computes the first image
of a batch only (CONV_TRANSPOSE_2D); there is no such command or function yet (filling a part, rows)."""
LATER = re.compile(
    "undefined symbol: ggml_(clamp_inplace|prec_set_acc|rope_set_offset|dsv4_hc_pre_gated|swiglu_clamp)"
    "|ggml does not support"
)
"""Functions that the newest has and older ones lack, and what an older one's own CPU backend says that it can't do."""
SOME = 6
"""Cases of an operation, beside one for each type or function where there are many."""
WEIGHTS = {"MUL_MAT", "MUL_MAT_ID", "GET_ROWS"}
EACH = {"UNARY", "GLU", *WEIGHTS}
PLAIN = {"F32", "F16", "I32"}
COPIES = {"CPY", "DUP", "CONT", "VIEW", "PERMUTE", "TRANSPOSE", "RESHAPE"}
"""What every version of ggml's CPU backend computes of types: plain ones of these operations, all of products and rows,
F32 of the others. It aborts on what it does not."""
EXTREME = re.compile(r"-at[-\d]")
"""Where functions overflow or vanish: only the newest has been made to agree with itself there."""
SLACK = 2.0
"""Of the bounds for whole networks: 3.6.1 rounds more than the newest, 3.5e-3 where that has 2e-3 (F16)."""
SOME_GRAPHS = [name for name in GRAPHS if "flash" not in name][::4]
"""Flash attention in graphs sets its precision by one of those functions."""
ADDRESSES = count(2)


def marked(rows: Iterable[tuple[str, ...]]) -> list[Any]:
    """Parameters of tests, of which the first is the version, as far as they are not run by ``make interop``."""
    return [pytest.param(*row, marks=() if row[0] in ALWAYS else pytest.mark.older) for row in rows]


class Peer(NamedTuple):
    """``client`` speaks ``protocol`` and reaches ``server``, ours, from an address of its own, through ``tap``."""

    protocol: str
    client: NativeClient
    tap: Tap

    @property
    def endpoint(self) -> str:
        return self.tap.endpoint


def learnt(peer: Peer) -> int:
    """Let the client come until it is served: how often it gave up."""
    for refusals in range(6):
        try:
            peer.client.submit(SOME_GRAPHS[0], peer.endpoint).result()
            return refusals
        except BrokenProcessPool:
            peer.client.renew()
    raise AssertionError(f"{peer.protocol} is never served")


@pytest.fixture(scope="module")
def server(our_server: Server) -> Iterator[Server]:
    """Ours, to which no version is told."""
    with Server(our_server.devices, Learning()) as server:
        yield server


@pytest.fixture(scope="module")
def peers(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Peer]]:
    """Clients that are served already, one of each version, made when it is first asked for."""
    with ExitStack() as stack:

        @cache
        def made(protocol: str) -> Peer:
            client = NativeClient(tmp_path_factory.mktemp("ggml") / "older.log", protocol)
            stack.callback(client.close)
            tap = stack.enter_context(Tap(server.endpoint, f"127.0.0.{next(ADDRESSES)}"))
            learnt(peer := Peer(protocol, client, tap))
            return peer

        yield made


@pytest.fixture
def peer(request: pytest.FixtureRequest, peers: Callable[[str], Peer]) -> Peer:
    return peers(request.param)


def representative(op: str, protocol: str) -> list[str]:
    """Some cases of an operation, as far as ``protocol`` has what they use."""
    dialect = dialects()[protocol]
    if op not in dialect.ops:
        return []
    types = set(dialect.type_numbers) if op in WEIGHTS else PLAIN if op in COPIES else {"F32"}
    beyond = {*newest().type_numbers, *newest().glu_ops} - {*types, *dialect.glu_ops}
    names = [name for name in OPERATIONS[op] if not beyond & set(words(name)) and not EXTREME.search(name)]
    each = {words(name)[0]: name for name in names} if op in EACH else {}
    return sorted({*each.values(), *names[:: max(1, len(names) // SOME)]})


def words(name: str) -> list[str]:
    return CASES[name].label.split("-")


def compared(names: Iterable[str]) -> list[tuple[str, str]]:
    """(Protocol, name) of what can be compared in that version."""
    return [(p, name) for p in OLDER for name in names if not any(name.startswith(odd) for odd in OTHERWISE[p])]


@pytest.mark.parametrize(
    ("peer", "op"), marked((p, op) for p, op in compared(OPERATIONS) if representative(op, p)), indirect=["peer"]
)
def test_operation(peer: Peer, op: str) -> None:
    names = representative(op, peer.protocol)
    outcomes = dict(zip(names, peer.client.run_all(names, peer.endpoint), strict=True))
    had = {name: outcome for name, outcome in outcomes.items() if not LATER.search(outcome.graph)}
    wrong = [said for name, outcome in had.items() if (said := complaint(name, outcome))]
    assert not wrong, f"{len(wrong)} of {len(had)} cases:\n" + "\n".join(wrong)


@pytest.mark.parametrize(("peer", "name"), marked(compared(SOME_GRAPHS)), indirect=["peer"])
def test_graph(peer: Peer, name: str) -> None:
    check(name, peer.client.run(name, peer.endpoint, True))


@pytest.mark.parametrize(("peer", "name"), marked(compared(SCENARIOS)), indirect=["peer"])
def test_scenario(peer: Peer, name: str) -> None:
    check(name, peer.client.run(name, peer.endpoint))


@pytest.mark.parametrize("protocol", marked((p,) for p in OLDER))
def test_a_client_is_served_after_the_runs_that_it_takes_to_learn_its_version(
    protocol: str, our_server: Server, tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody says what it is: it gives up, with abort(), on what it does not like. Then our server knows."""
    folder = tmp_path_factory.mktemp("ggml")
    client = NativeClient(folder / "client.log", protocol)
    for refusals in (REFUSALS[protocol], 0):
        with Server(our_server.devices, Learning(folder / "clients.json")) as server, Tap(server.endpoint) as tap:
            assert learnt(Peer(protocol, client, tap)) == refusals
        assert caplog.text.count("left right after the greeting") == REFUSALS[protocol]
    client.close()


@pytest.mark.parametrize("peer", marked((p,) for p in OLDER), indirect=True)
def test_clients_of_two_versions_at_once(peer: Peer, native_client: NativeClient, server: Server) -> None:
    """Names of other lengths among them. Then one asks for what nobody has: the other notices nothing."""
    with Tap(server.endpoint, f"127.0.0.{next(ADDRESSES)}") as tap:
        recent = Peer(ggml.NEWEST, native_client, tap)
        learnt(recent)
        for _ in range(2):
            jobs = [(name, p.client.submit(name, p.endpoint, True)) for name in SOME_GRAPHS[:6] for p in (peer, recent)]
            for name, job in jobs:
                check(name, job.result())
        refused = native_client.submit(next(iter(REFUSED)), tap.endpoint)
        for name in SOME_GRAPHS[:6]:
            check(name, peer.client.run(name, peer.endpoint, True))
        with pytest.raises(BrokenProcessPool):
            refused.result()
        native_client.renew()


@pytest.fixture(scope="module", params=marked((p,) for p in OLDER))
def older_server(request: pytest.FixtureRequest) -> Iterator[NativeServer]:
    server = NativeServer(devices=2, protocol=request.param)
    yield server
    server.kill()


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_K"])
@pytest.mark.parametrize("part", PARTS)
def test_our_client_uses_older_servers(part: str, kind: str, older_server: NativeServer) -> None:
    older_server.start()
    devices = connect([older_server.endpoint])
    try:
        assert [device.name for device in devices] == ["RPC0", "RPC1"]
        assert all(0 < device.memory().free <= device.memory().total for device in devices)
        check_part(part, kind, SIZES[0], devices[1], slack=SLACK)
    finally:  # it serves one client at a time
        for device in devices:
            device.close()

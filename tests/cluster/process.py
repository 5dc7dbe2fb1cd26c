"""Ray clusters of this machine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from tests.web.process import WebServer

STORE_BYTES = 80 << 20
SECONDS = 120.0


@contextmanager
def cluster(*offers: str) -> Iterator[str]:
    """A head, and a node for each of ``offers``; the head's address. All on this machine, and ended at the end."""
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 0, "object_store_memory": STORE_BYTES}
    nodes = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
    try:
        for offer in offers:
            nodes.add_node(**small, resources={offer: 1})
        yield nodes.address
    finally:
        nodes.shutdown()


def until_there(server: WebServer, *names: str) -> None:
    """Wait for the seats of these servers."""
    end = time.monotonic() + SECONDS
    while {device["name"] for device in server.ask("/sdcpp/v1/devices").json()} != set(names):
        assert time.monotonic() < end, server.lines
        time.sleep(0.1)

"""The graphs of one client: what they mean, which are ready to run, and which it may ask for again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from ..device import NOBODY, Bytes, Client, ServedDevice, ServedProgram, Watch
from ..errors import GraphError, RemoteProtocolError, SdrpcError
from ..ggml import validate
from ..ggml.dialect import Dialect
from ..ggml.tensor import Graph
from ..wire import graphs
from ..wire.kept_graphs import KeptGraphs
from ..wire.records import record_bytes
from .addresses import AddressSpace, Region
from .limits import Limits
from .packed_graphs import PackedGraphs
from .places import device_at
from .version_memory import Versions


class Read(NamedTuple):
    """A graph on device number ``device``, as it is read in ``versions``, and the buffers that it uses by handle."""

    device: int
    graph: Graph
    used: dict[int, Region]
    versions: Versions


class Ready(NamedTuple):
    """A compiled graph, the buffers without which it means nothing, in which versions it means this, and how many
    tensors it has."""

    device: int
    program: ServedProgram
    handles: frozenset[int]
    versions: Versions
    tensors: int


class Kept(NamedTuple):
    """A graph that a client may ask for again: the digest of its bytes, the buffers without which it means nothing, and
    the graph itself where its bytes are not kept."""

    digest: bytes
    handles: frozenset[int]
    ready: Ready | None


class Latest(NamedTuple):
    """The graph that came last, as it came (``body``: without its uid), and the digest of that."""

    device: int
    body: Bytes
    digest: bytes

    def is_of(self, parts: graphs.Parts) -> bool:
        # words, of which all parts of a graph are whole numbers, take a third of the time
        same = self.device == parts.device and len(self.body) == len(parts.body)
        return same and np.array_equal(np.frombuffer(self.body, "<u4"), np.frombuffer(parts.body, "<u4"))


class ClientGraphs:
    """A client's graphs on ``devices``, which use buffers of ``space``. ``watch`` gives a reason to stop compiling.
    ``hold`` counts bytes that are kept for the client, if they may be had, ``give_up`` fewer."""

    def __init__(
        self,
        devices: Sequence[ServedDevice],
        space: AddressSpace,
        limits: Limits,
        watch: Watch,
        hold: Callable[[int], bool],
        give_up: Callable[[int], None],
    ) -> None:
        self._devices, self._space, self._limits, self._watch = devices, space, limits, watch
        self._hold, self._give_up = hold, give_up
        self.versions: Versions = ()
        """What the client may speak, the likeliest first. Graphs tell more than its HELLO."""
        self.client: Client = NOBODY
        """For whom the devices compile."""
        self._ready: OrderedDict[bytes, Ready] = OrderedDict()
        self._kept: KeptGraphs[Kept] = KeptGraphs()
        self._latest: Latest | None = None
        self._packed = PackedGraphs(limits.graph_bytes, hold, give_up)

    @property
    def dialect(self) -> Dialect:
        """What the client speaks, as far as that shows."""
        return self.versions[0]

    @property
    def framing(self) -> Dialect:
        """What messages are read as. Versions that a client may confuse us with differ in the numbers of operations;
        the newest has all types, and allows what an older one leaves zero."""
        return max(self.versions, key=lambda dialect: dialect.triple)

    @property
    def held(self) -> int:
        """Bytes that are kept, not counting what is compiled."""
        return self._packed.held + (0 if self._latest is None else len(self._latest.body))

    def sent(self, payload: Bytes) -> Ready:
        """The graph of a GRAPH_COMPUTE, which may be asked for again from now on."""
        parts = graphs.split(payload, self.framing)
        digest = self._digest(parts)
        ready = self._get_ready(digest, payload)
        if not self.framing.has_graph_uids:
            self._kept.put(parts.device, 0, Kept(digest, ready.handles, ready))
        elif parts.uid:
            self._packed.put(digest, payload)
            if self._kept.put(parts.device, parts.uid, Kept(digest, ready.handles, None)):
                self._forget(lambda _: False)
        return ready

    def again(self, device: int, uid: int) -> Ready:
        """The graph that a GRAPH_RECOMPUTE asks for. Raises :class:`RemoteProtocolError` where there is none."""
        kept = self._kept.get(device, uid)
        if kept is None:
            which = f"graph {uid}" if self.framing.has_graph_uids else "graph"
            raise RemoteProtocolError(f"GRAPH_RECOMPUTE: device {device} has no {which}, or not its buffers any more")
        return kept.ready or self._get_ready(kept.digest)

    def freed(self, handle: int) -> None:
        """Graphs that use this buffer mean nothing any more."""
        self._forget(lambda kept: handle in kept.handles)
        for digest in [digest for digest, ready in self._ready.items() if handle in ready.handles]:
            del self._ready[digest]

    def close(self) -> None:
        self._ready.clear()
        self._forget(lambda _: True)
        self._give_up_latest()

    def _digest(self, parts: graphs.Parts) -> bytes:
        """What a graph is known by. A client that has no number for it sends the same one at each step: it is compared
        with the last one, which takes a tenth of the time."""
        if self._latest is not None and self._latest.is_of(parts):
            return self._latest.digest
        digest = blake2b(parts.body, digest_size=32, salt=parts.device.to_bytes(4, "little")).digest()
        self._give_up_latest()
        if not self.framing.has_graph_uids and self._hold(len(parts.body)):
            self._latest = Latest(parts.device, parts.body, digest)
        return digest

    def _give_up_latest(self) -> None:
        if self._latest is not None:
            self._give_up(len(self._latest.body))
            self._latest = None

    def _get_ready(self, digest: bytes, payload: Bytes | None = None) -> Ready:
        """The graph with this ``digest``, compiled if it is not ready: from ``payload``, or from what was kept."""
        ready = self._ready.get(digest)
        if ready is None:
            if payload is None and (payload := self._packed.get(digest)) is None:
                raise RemoteProtocolError(
                    "GRAPH_RECOMPUTE: the graph is forgotten, since this client's later ones fill the "
                    f"{self._limits.graph_bytes / 2**20:,.1f} MiB for graphs, or all clients together have no more room"
                )
            ready = self._ready[digest] = self._compile(payload, digest)
        self._ready.move_to_end(digest)
        while len(self._ready) > 1 and (
            len(self._ready) > self._limits.graphs
            or sum(each.tensors for each in self._ready.values()) > self._limits.ready_tensors
        ):
            self._ready.popitem(last=False)
        return ready

    def _forget(self, lost: Callable[[Kept], bool]) -> None:
        """Graphs for which ``lost`` is true are not kept any more, nor the bytes of those that none is."""
        self._kept.drop(lost)
        self._packed.retain(kept.digest for kept in self._kept)

    def _compile(self, payload: Bytes, digest: bytes) -> Ready:
        """The graph in ``payload``, which has this ``digest``, as the likeliest version has it in which it makes sense;
        those in which it does not are none of this client's. When it makes sense in none, raises what is wrong with it
        in the likeliest: the first that has all its numbers, if one has."""
        parts = graphs.split(payload, self.framing)
        meanings = graphs.meanings(parts, self.versions)
        reads: list[Read] = []
        faults: list[tuple[Versions, SdrpcError]] = []
        for versions in meanings:
            try:
                read = self._read(parts, versions)
                if len(meanings) > 1:  # else compiling checks it
                    self._check(read)
                reads.append(read)
            except (RemoteProtocolError, GraphError) as fault:
                faults.append((versions, fault))
        if not reads:
            versions, why = min(faults, key=lambda item: isinstance(item[1], RemoteProtocolError))
            self._narrow(versions)
            raise why
        possible = {version.version for read in reads for version in read.versions}
        self._narrow([version for version in self.versions if version.version in possible])
        read = reads[0]
        regions = sorted(read.used.values(), key=lambda region: region.handle)
        buffers = {region.buffer.key: region.buffer for region in regions}
        # the graph's bytes mean the same wherever a client has buffers of the same sizes at the same addresses
        name = blake2b(digest, digest_size=32)
        name.update(repr((read.versions[0].version, [region[:4] for region in regions])).encode())
        program = self._devices[read.device].compile(read.graph, buffers, name.digest(), self._watch, self.client)
        return Ready(read.device, program, frozenset(read.used), read.versions, len(read.graph.tensors))

    def _check(self, read: Read) -> None:
        sizes = {region.buffer.key: region.buffer.size for region in read.used.values()}
        validate.check(read.graph, sizes, max_bytes=self._devices[read.device].memory().free)

    def _narrow(self, versions: Sequence[Dialect]) -> None:
        """Only ``versions`` are left. What was computed as if the client spoke another one is not kept for it."""
        self.versions = tuple(versions)
        self._forget(lambda kept: kept.ready is not None and self.dialect not in kept.ready.versions)
        for digest in [digest for digest, ready in self._ready.items() if self.dialect not in ready.versions]:
            del self._ready[digest]

    def _read(self, parts: graphs.Parts, versions: Versions) -> Read:
        device_at(self._devices, parts.device)
        count = len(parts.tensors) // record_bytes(parts.name_length) if parts.name_length else 0
        if count > self._limits.tensors or len(parts.node_ids) > self._limits.tensors:
            raise RemoteProtocolError(f"GRAPH_COMPUTE: {count} tensors; {self._limits.tensors} are allowed")
        used: dict[int, Region] = {}

        def resolve(handle: int, address: int) -> tuple[int, int]:
            region = used[handle] = self._space[handle]
            if region.device != parts.device:
                raise RemoteProtocolError(
                    f"GRAPH_COMPUTE: buffer {handle} is on device {region.device}, the graph on {parts.device}"
                )
            return region.buffer.key, region.offset(address, 0)

        graph = graphs.decode_graph(parts, versions[0], resolve).graph
        return Read(parts.device, graph, used, versions)

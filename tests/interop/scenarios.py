"""What ggml's RPC client does with our server's memory and devices, beyond computing one graph.

Each scenario is a function of backends (CPU, or the RPC devices of one server; two at least) that gives arrays, which
must be the same on both kinds.
"""

from __future__ import annotations

import ctypes as c
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from tests.support import ggml

Arrays = list[np.ndarray]
Scenario = Callable[[Sequence[int]], Arrays]
SCENARIOS: dict[str, Scenario] = {}
WEIGHTS = 1  # GGML_BACKEND_BUFFER_USAGE_WEIGHTS


def scenario(function: Scenario) -> Scenario:
    SCENARIOS[function.__name__.replace("_", "-")] = function
    return function


@contextmanager
def tensors(backend: int, *specs: tuple[Any, ...]) -> Iterator[tuple[int, list[Any]]]:
    """A buffer of ``backend`` and tensors in it, each given as (type, ne0, ne1, …)."""
    lib, context = ggml.library(), ggml.Context(64)
    made = [context.tensor(*spec) for spec in specs]
    buffer = lib.ggml_backend_alloc_ctx_tensors(context.pointer, backend)
    yield buffer, made
    lib.ggml_backend_buffer_free(buffer)
    context.free()


class Compiled:
    """A graph of leaves of its own, to be computed again and again: ``feed`` writes leaves, ``run`` gives results."""

    def __init__(self, backend: int, build: Callable[[ggml.Context, list[Any]], Any], *leaves: tuple[Any, ...]) -> None:
        lib = ggml.library()
        self.backend, self._context, self._nodes = backend, ggml.Context(64), ggml.Context(256)
        self.leaves = [self._context.tensor(*leaf) for leaf in leaves]
        self._buffer = lib.ggml_backend_alloc_ctx_tensors(self._context.pointer, backend)
        self._result = build(self._nodes, self.leaves)
        lib.ggml_set_output(self._result)
        self.graph = self._nodes.graph(self._result)
        self._allocator = lib.ggml_gallocr_new(lib.ggml_backend_get_default_buffer_type(backend))
        assert lib.ggml_gallocr_alloc_graph(self._allocator, self.graph)

    def feed(self, *arrays: np.ndarray) -> Compiled:
        for leaf, array in zip(self.leaves, arrays, strict=False):
            ggml.write(leaf, ggml.encode("F32", array))
        return self

    def run(self) -> np.ndarray:
        assert not ggml.library().ggml_backend_graph_compute(self.backend, self.graph)
        return ggml.values(self._result)

    def free(self) -> None:
        lib = ggml.library()
        lib.ggml_gallocr_free(self._allocator)
        lib.ggml_backend_buffer_free(self._buffer)
        self._nodes.free()
        self._context.free()


def numbers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def noise(seed: int, size: int) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def raw(*tensors: Any) -> Arrays:
    return [np.frombuffer(ggml.read(tensor), np.uint8) for tensor in tensors]


@scenario
def parts_are_set_and_got(backends: Sequence[int]) -> Arrays:
    with tensors(backends[0], ("F32", 32, 8), ("F16", 17, 5), ("Q4_K", 256, 3), ("I64", 9)) as (buffer, made):
        ggml.library().ggml_backend_buffer_clear(buffer, 0)
        for seed, tensor in enumerate(made):
            size = ggml.library().ggml_nbytes(tensor)
            ggml.write(tensor, noise(seed, size - 11), 7)
            ggml.write(tensor, noise(seed + 9, 5), size - 5)
            ggml.write(tensor, b"\x55", 0)
        pieces = [np.frombuffer(ggml.read(tensor, 3, 13), np.uint8) for tensor in made]
        return pieces + raw(*made)


@scenario
def rows_are_set_and_got(backends: Sequence[int]) -> Arrays:
    """What a tensor that is split over devices is filled with: parts of its rows (SET_TENSOR_2D, GET_TENSOR_2D)."""
    lib = ggml.library()
    with tensors(backends[0], ("F32", 32, 8), ("Q8_0", 64, 5), ("I8", 1000, 3)) as (buffer, made):
        lib.ggml_backend_buffer_clear(buffer, 0x5A)
        got = []
        for tensor, (offset, size, count, stride) in zip(
            made, ((64, 48, 8, 128), (0, 34, 5, 68), (7, 3, 300, 9)), strict=True
        ):
            data = np.frombuffer(noise(size, 2 * size * count), np.uint8)
            lib.ggml_backend_tensor_set_2d(tensor, data.ctypes.data, offset, size, count, stride, 2 * size)
            packed, spread = np.zeros(size * count, np.uint8), np.zeros((count, size + 5), np.uint8)
            lib.ggml_backend_tensor_get_2d(tensor, packed.ctypes.data, offset, size, count, stride, size)
            lib.ggml_backend_tensor_get_2d(tensor, spread.ctypes.data, offset, size, count, stride, size + 5)
            got += [packed, spread]
        return [*got, *raw(*made)]


@scenario
def a_view_is_set(backends: Sequence[int]) -> Arrays:
    lib, context = ggml.library(), ggml.Context(8)
    whole = context.tensor("F32", 16, 8)
    row = context.view_4d(whole, 16, 1, 1, 1, 64, 64, 64, 3 * 64)
    buffer = lib.ggml_backend_alloc_ctx_tensors(context.pointer, backends[0])
    lib.ggml_backend_buffer_clear(buffer, 1)
    ggml.write(row, noise(1, 64))
    got = raw(whole, row)
    lib.ggml_backend_buffer_free(buffer)
    context.free()
    return got


@scenario
def a_buffer_is_cleared(backends: Sequence[int]) -> Arrays:
    with tensors(backends[0], ("F32", 33, 3), ("Q8_0", 64, 2)) as (buffer, made):
        got = []
        for value in (0xAB, 0x00, 0xFF):
            ggml.library().ggml_backend_buffer_clear(buffer, value)
            got += raw(*made)
        return got


@scenario
def a_tensor_is_filled_in_part(backends: Sequence[int]) -> Arrays:
    with tensors(backends[0], ("F32", 33, 3), ("Q8_0", 64, 2)) as (buffer, made):
        lib = ggml.library()
        lib.ggml_backend_buffer_clear(buffer, 0)
        for tensor in made:
            lib.ggml_backend_tensor_memset(tensor, 0x7E, 10, 30)
            lib.ggml_backend_tensor_memset(tensor, 0x01, 0, 1)
        return raw(*made)


@scenario
def a_tensor_is_copied_to_another_buffer(backends: Sequence[int]) -> Arrays:
    with (
        tensors(backends[0], ("F32", 31, 7)) as (_, [source]),
        tensors(backends[0], ("I8", 4), ("F32", 31, 7)) as (_, made),
    ):
        ggml.write(source, noise(1, 31 * 7 * 4))
        ggml.library().ggml_backend_tensor_copy(source, made[1])
        return raw(source, made[1])


@scenario
def a_tensor_is_copied_to_another_device(backends: Sequence[int]) -> Arrays:
    with tensors(backends[0], ("F16", 64, 3)) as (_, [source]), tensors(backends[1], ("F16", 64, 3)) as (_, [target]):
        ggml.write(source, noise(1, 64 * 3 * 2))
        ggml.library().ggml_backend_tensor_copy(source, target)
        return raw(target)


@scenario
def graphs_alternate_on_one_device(backends: Sequence[int]) -> Arrays:
    product = Compiled(backends[0], lambda n, x: n.mul_mat(x[0], n.add(x[1], x[1])), ("F32", 16, 5), ("F32", 16, 3))
    norm = Compiled(backends[0], lambda n, x: n.norm(n.add(x[0], x[1]), 1e-5), ("F32", 24, 4), ("F32", 24))
    got = []
    for step in range(4):
        got.append(product.feed(numbers(step, 5, 16), numbers(step + 10, 3, 16)).run())
        got.append(norm.feed(numbers(step, 4, 24), numbers(step + 10, 24)).run())
    product.free()
    norm.free()
    return got


@scenario
def one_graph_is_computed_again_with_other_inputs(backends: Sequence[int]) -> Arrays:
    chain = Compiled(backends[0], lambda n, x: n.scale_inplace(n.add_inplace(n.mul(x[0], x[1]), x[1]), 0.5),
                     ("F32", 16, 5), ("F32", 16))  # fmt: skip
    got = [chain.feed(numbers(step, 5, 16), numbers(step, 16)).run() for step in range(3)]
    chain.feed(numbers(7, 5, 16))
    got.append(chain.run())
    chain.free()
    return got


@scenario
def devices_of_one_server_work_side_by_side(backends: Sequence[int]) -> Arrays:
    build: Any = lambda n, x: n.soft_max(n.mul_mat(x[0], x[1]))  # noqa: E731
    graphs = [Compiled(backend, build, ("F32", 16, 5), ("F32", 16, 3)) for backend in backends[:2]]
    for seed, graph in enumerate(graphs):
        graph.feed(numbers(seed, 5, 16), numbers(seed + 5, 3, 16))
    got = [graph.run() for graph in (*graphs, *graphs)]
    for graph in graphs:
        graph.free()
    return got


@scenario
def a_cache_keeps_what_earlier_graphs_wrote(backends: Sequence[int]) -> Arrays:
    """Tokens come one by one: each graph writes a row of the cache and reads all rows so far."""
    lib, got = ggml.library(), []
    with tensors(backends[0], ("F16", 32, 16), ("F32", 32)) as (buffer, (cache, token)):
        lib.ggml_backend_buffer_clear(buffer, 0)
        for step in range(4):
            nodes = ggml.Context(64)
            written = nodes.cpy(token, nodes.view_4d(cache, 32, 1, 1, 1, 64, 64, 64, 64 * step))
            keys = nodes.view_4d(cache, 32, step + 1, 1, 1, 64, 64 * (step + 1), 64 * (step + 1), 0)
            scores = nodes.mul_mat(keys, token)
            lib.ggml_set_output(scores)
            graph = nodes.graph(written, scores)
            allocator = lib.ggml_gallocr_new(lib.ggml_backend_get_default_buffer_type(backends[0]))
            assert lib.ggml_gallocr_alloc_graph(allocator, graph)
            ggml.write(token, ggml.encode("F32", numbers(step, 32).round(1)))  # whole tenths: f16 hardly rounds
            assert not lib.ggml_backend_graph_compute(backends[0], graph)
            got.append(ggml.values(scores))
            lib.ggml_gallocr_free(allocator)
            nodes.free()
        return [*got, ggml.values(cache)]


@scenario
def the_scheduler_computes_again(backends: Sequence[int]) -> Arrays:
    """ggml's scheduler numbers its graphs, so that the RPC client sends GRAPH_RECOMPUTE from the second time on."""
    lib, got = ggml.library(), []
    cpu = ggml.cpu()
    context, nodes = ggml.Context(16), ggml.Context(64)
    weight, x = context.tensor("F32", 16, 8), context.tensor("F32", 16, 3)
    buffer = lib.ggml_backend_alloc_ctx_tensors(context.pointer, backends[0])
    lib.ggml_backend_buffer_set_usage(buffer, WEIGHTS)
    ggml.write(weight, ggml.encode("F32", numbers(1, 8, 16)))
    result = nodes.norm(nodes.mul_mat(weight, nodes.add(x, x)), 1e-5)
    lib.ggml_set_output(result)
    graph = nodes.graph(result)
    scheduler = lib.ggml_backend_sched_new(ggml.pointers([backends[0], cpu]), None, 2, 64, False, False)
    assert lib.ggml_backend_sched_alloc_graph(scheduler, graph)
    for step in range(4):
        ggml.write(x, ggml.encode("F32", numbers(step, 3, 16)))
        assert not lib.ggml_backend_sched_graph_compute(scheduler, graph)
        got.append(ggml.values(result))
    lib.ggml_backend_sched_free(scheduler)
    lib.ggml_backend_buffer_free(buffer)
    lib.ggml_backend_free(cpu)
    context.free()
    nodes.free()
    return got


@scenario
def schedulers_take_turns(backends: Sequence[int]) -> Arrays:
    """Each has a graph with a number of its own: from protocol 8.0 on all of them are sent once."""
    lib, got = ggml.library(), []
    cpu = ggml.cpu()
    context = ggml.Context(16)
    weight, x = context.tensor("F32", 16, 16), context.tensor("F32", 16, 3)
    buffer = lib.ggml_backend_alloc_ctx_tensors(context.pointer, backends[0])
    lib.ggml_backend_buffer_set_usage(buffer, WEIGHTS)
    ggml.write(weight, ggml.encode("F32", numbers(1, 16, 16)))
    made = []
    for number in range(3):
        nodes = ggml.Context(64)
        result = x
        for _ in range(number + 1):
            result = nodes.norm(nodes.mul_mat(weight, nodes.add(result, x)), 1e-5)
        lib.ggml_set_output(result)
        scheduler = lib.ggml_backend_sched_new(ggml.pointers([backends[0], cpu]), None, 2, 64, False, False)
        made.append((nodes, nodes.graph(result), result, scheduler))
        assert lib.ggml_backend_sched_alloc_graph(scheduler, made[-1][1])
    for step in range(9):
        _, graph, result, scheduler = made[step % 3]
        ggml.write(x, ggml.encode("F32", numbers(step, 3, 16)))
        assert not lib.ggml_backend_sched_graph_compute(scheduler, graph)
        got.append(ggml.values(result))
    for nodes, _, _, scheduler in made:
        lib.ggml_backend_sched_free(scheduler)
        nodes.free()
    lib.ggml_backend_buffer_free(buffer)
    lib.ggml_backend_free(cpu)
    context.free()
    return got


@scenario
def a_branch_that_is_not_chosen_is_not_computed(backends: Sequence[int]) -> Arrays:
    """Of two branches one gives the result; the other, if it were computed, would write over what is there."""
    lib, got = ggml.library(), []
    for chosen in (0, 1):
        nodes = ggml.Context(16)
        with tensors(backends[0], ("F32", 16, 4), ("F32", 16, 4)) as (_, [x, kept]):
            for seed, leaf in enumerate((x, kept)):
                ggml.write(leaf, ggml.encode("F32", numbers(seed, 4, 16)))
            branches = nodes.sqr(x), nodes.cpy(nodes.scale(x, 2.0), kept)
            graph = lib.ggml_new_graph_custom(nodes.pointer, 16, False)
            both = ggml.pointers([c.cast(branch, c.c_void_p).value or 0 for branch in branches])
            result = lib.ggml_build_forward_select(graph, both, len(branches), chosen)
            memory = lib.ggml_backend_alloc_ctx_tensors(nodes.pointer, backends[0])
            assert len(ggml.nodes(graph)) == 3
            assert not lib.ggml_backend_graph_compute(backends[0], graph)
            got += [ggml.values(result), ggml.values(kept)]
            lib.ggml_backend_buffer_free(memory)
        nodes.free()
    return got


@scenario
def a_large_weight_is_offered_by_hash(backends: Sequence[int]) -> Arrays:
    """More than 10 MiB of a weight: SET_TENSOR_HASH first; the same bytes twice, then others."""
    lib, got = ggml.library(), []
    with tensors(backends[0], ("F32", 1024, 2600), ("F32", 1024, 2600)) as (buffer, made):
        lib.ggml_backend_buffer_set_usage(buffer, WEIGHTS)
        for tensor, seed in ((made[0], 1), (made[1], 1), (made[0], 2)):
            ggml.write(tensor, noise(seed, 1024 * 2600 * 4))
            got += [np.frombuffer(ggml.read(tensor, offset, 64), np.uint8) for offset in (0, 10 << 20)]
        return got


@scenario
def buffers_come_and_go(backends: Sequence[int]) -> Arrays:
    got = []
    for step in range(60):
        with tensors(backends[step % 2], ("F32", 1000, 64)) as (_, [tensor]):
            ggml.write(tensor, noise(step, 100), 400 * step)
            got.append(np.frombuffer(ggml.read(tensor, 400 * step, 100), np.uint8))
    return got


@scenario
def an_allocation_too_large_is_refused_and_work_goes_on(backends: Sequence[int]) -> Arrays:
    lib = ggml.library()
    refused = lib.ggml_backend_buft_alloc_buffer(lib.ggml_backend_get_default_buffer_type(backends[0]), 1 << 60)
    return [np.array([refused is None]), *parts_are_set_and_got(backends)]


@scenario
def the_largest_names_arrive(backends: Sequence[int]) -> Arrays:
    def build(nodes: ggml.Context, leaves: list[Any]) -> Any:
        result = nodes.add(leaves[0], leaves[1])
        for tensor, name in ((leaves[0], "x" * 63), (leaves[1], "größe 大きさ"), (result, "")):
            ggml.library().ggml_set_name(tensor, name.encode())
        return result

    named = Compiled(backends[0], build, ("F32", 8, 3), ("F32", 8))
    got = named.feed(numbers(1, 3, 8), numbers(2, 8)).run()
    named.free()
    return [got]


@scenario
def sizes_are_sensible(backends: Sequence[int]) -> Arrays:
    """What a backend says of itself, as facts that hold for every sound one."""
    lib, facts = ggml.library(), []
    nodes = ggml.Context(64)
    q, k = nodes.tensor("F32", 64, 5, 2), nodes.tensor("F16", 64, 32, 2)
    odd, attention = nodes.tensor("Q4_0", 96, 3), nodes.flash_attn_ext(q, k, k, None, 0.1, 0.0, 0.0)
    for backend in backends[:2]:
        buffers = lib.ggml_backend_get_default_buffer_type(backend)
        alignment = lib.ggml_backend_buft_get_alignment(buffers)
        free, total = c.c_size_t(), c.c_size_t()
        lib.ggml_backend_dev_memory(lib.ggml_backend_get_device(backend), c.byref(free), c.byref(total))
        facts += [alignment & (alignment - 1) == 0, lib.ggml_backend_buft_get_max_size(buffers) > 1 << 20]
        facts += [lib.ggml_backend_buft_get_alloc_size(buffers, t) >= lib.ggml_nbytes(t) for t in (odd, attention)]
        facts += [0 < free.value <= total.value]
    nodes.free()
    return [np.array(facts), np.array([True] * len(facts))]

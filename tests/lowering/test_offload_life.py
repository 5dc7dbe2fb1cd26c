"""Offloaded modules from several threads, their memory, copies and other processes."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import pickle
import threading
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sdrpc
from sdrpc.client import RemoteDevice
from sdrpc.device import Device
from sdrpc.errors import UsageError
from tests.lowering import models
from tests.lowering.devices import ReferenceDevice
from tests.lowering.offloading import same


def held(device: RemoteDevice) -> int:
    return sum(buffer.size for buffer in device._server.buffers)


@torch.no_grad()
def test_offload_memory_kept(remote: RemoteDevice) -> None:
    big, x = nn.Linear(256, 256), torch.randn(1, 256)
    for _ in range(3):
        offloaded = sdrpc.offload(big, remote)
        offloaded(x)
        assert held(remote) >= 4 * 256 * 256
        offloaded.forward = offloaded.forward  # type: ignore[method-assign]  # a circle: only the collector ends it
        del offloaded
        gc.collect()
        assert held(remote) == 0


@torch.no_grad()
def test_memory_is_not_freed_in_the_middle_of_a_request(remote: RemoteDevice) -> None:
    """A module may become garbage while the device answers the same thread."""
    offloaded = sdrpc.offload(nn.Linear(8, 8), remote)
    offloaded(torch.ones(1, 8))
    with remote.turns:
        del offloaded
        gc.collect()
        assert held(remote) > 0
    assert held(remote) == 0


@pytest.mark.parametrize("where", ["cpu", "remote"])
def test_offload_threads(where: str, request: pytest.FixtureRequest) -> None:
    device = request.getfixturevalue(where)
    modules = [nn.Linear(16, 16), nn.Linear(16, 16)]
    offloaded = [sdrpc.offload(module, device) for module in modules]
    inputs = [torch.randn(1 + i % 2, 16) for i in range(4)]

    @torch.no_grad()
    def work(i: int) -> float:
        wanted = modules[i % 2](inputs[i])
        return max(float((offloaded[i % 2](inputs[i]) - wanted).abs().max()) for _ in range(50))

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(work, range(4))) < 1e-4


@torch.no_grad()
def test_two_threads_capture_at_once() -> None:
    units = [models.unet((8, 16)) for _ in range(2)]
    x, t, context = torch.randn(1, 4, 4, 4), torch.tensor(3), torch.randn(1, 2, 24)
    wanted = [unit(x, t, context).sample for unit in units]
    found: list[Any] = [None, None]

    def work(i: int) -> None:
        found[i] = sdrpc.offload(units[i], ReferenceDevice())(x, t, context).sample

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine, theirs in zip(found, wanted, strict=True):
        same(mine, theirs)


@torch.no_grad()
def test_copies_have_their_own_memory() -> None:
    device, x = ReferenceDevice(), torch.ones(1, 4)
    offloaded = sdrpc.offload(nn.Linear(4, 4), device)
    wanted = offloaded(x)
    deep, shallow = copy.deepcopy(offloaded), copy.copy(offloaded)
    offloaded.forward = offloaded.forward  # type: ignore[method-assign]  # a circle
    round_ = copy.deepcopy(offloaded)
    del offloaded.forward
    offloaded.weight.zero_()
    same(round_(x), wanted)
    round_.close()  # type: ignore[operator]
    same(deep(x), wanted)
    same(shallow(x), offloaded.bias[None])
    for module in (deep, shallow, offloaded):
        module.close()  # type: ignore[operator]
    assert device.memory_of == {}
    same(deep(x), wanted)


def test_pickling_is_refused() -> None:
    offloaded = sdrpc.offload(nn.Linear(4, 4), ReferenceDevice())
    with pytest.raises(UsageError, match=r"an offloaded Linear can't be pickled: save its state_dict\(\)"):
        pickle.dumps(offloaded)
    assert offloaded.state_dict().keys() == {"weight", "bias"}


@torch.no_grad()
def test_an_offloaded_module_within_another() -> None:
    """The outer one computes all of it, on its device, also where a method of the inner one was set on it."""
    linear, x = nn.Linear(4, 4), torch.randn(1, 4)
    for own in (False, True):
        inner = sdrpc.offload(linear, ReferenceDevice())
        if own:
            inner.forward = inner.forward  # type: ignore[method-assign]
        model, device = nn.Sequential(inner, nn.ReLU()), ReferenceDevice()
        same(model(x), linear(x).relu())
        same(sdrpc.offload(model, device)(x), linear(x).relu())
        assert device.written


@torch.no_grad()
def test_modules_in_a_chain_of_accelerates() -> None:
    """As enable_model_cpu_offload makes one: each hook leads to the module before, and from there to itself."""
    accelerate = pytest.importorskip("accelerate")
    linears, x, before = [nn.Linear(4, 4) for _ in range(2)], torch.randn(1, 4), None
    chain = [sdrpc.offload(linear, ReferenceDevice()) for linear in linears]
    for module in chain:
        _, before = accelerate.cpu_offload_with_hook(module, "cpu", prev_module_hook=before)
    for module, linear in zip(chain, linears, strict=True):
        same(module(x), nn.functional.linear(x, linear.weight, linear.bias))


def test_a_pipeline_of_the_parts_of_another() -> None:
    """diffusers compares classes there."""
    module = nn.Linear(4, 4)
    kind: Any = type(sdrpc.offload(module, ReferenceDevice()))
    assert kind in (nn.Linear,)
    assert {kind: 1}[nn.Linear] == 1
    assert kind in (type(sdrpc.offload(module, ReferenceDevice())),)
    assert kind not in (nn.ReLU, type(sdrpc.offload(nn.ReLU(), ReferenceDevice())))


def test_a_forked_process_is_refused(remote: RemoteDevice) -> None:
    """It waited for ever for threads that it does not have, or took answers from its parent's connection."""
    offloaded, x = sdrpc.offload(nn.Linear(4, 4).requires_grad_(False), remote), torch.ones(1, 4)
    wanted = offloaded(x)
    process = multiprocessing.get_context("fork").Process(target=_used_in_a_fork, args=(offloaded, x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that this process has threads
        process.start()
    process.join()
    assert process.exitcode == 0
    same(offloaded(x), wanted)


def _used_in_a_fork(offloaded: nn.Module, x: Tensor) -> None:
    with pytest.raises(UsageError, match="a device of another process"):
        offloaded(x)
    del offloaded
    gc.collect()


def test_results_do_not_share_memory_with_the_device(cpu: Device) -> None:
    offloaded = sdrpc.offload(nn.Linear(4, 4), cpu)
    with torch.no_grad():
        first = offloaded(torch.ones(1, 4))
        kept = first.clone()
        offloaded(torch.zeros(1, 4))
    np.testing.assert_array_equal(first.numpy(), kept.numpy())


@torch.no_grad()
def test_weights_go_with_the_module() -> None:
    """At once, as a module's do: its class, and what looks for changes, kept them for the collector."""
    module, device = nn.Sequential(nn.Linear(4, 4)), ReferenceDevice()
    offloaded, weight = sdrpc.offload(module, device), weakref.ref(module[0].weight)
    offloaded(torch.ones(1, 4))
    module[0] = nn.Linear(4, 4)
    gc.collect()
    gc.disable()
    try:
        offloaded(torch.ones(1, 4))
        assert weight() is None  # a part that was replaced
        weight = weakref.ref(module[0].weight)
        del offloaded, module
        assert weight() is None
        assert device.memory_of == {}
    finally:
        gc.enable()


@torch.no_grad()
def test_other_models_that_a_hook_leads_to_are_not_copied() -> None:
    """As of enable_model_cpu_offload: each capture copied the weights of all models before."""
    other, seen, x = nn.Linear(4, 4), set[int](), torch.ones(1, 4)

    class Leading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before = [SimpleNamespace(model=other)]

        def forward(self, x: Tensor) -> Tensor:
            seen.add(self.before[0].model.weight.data_ptr())
            result: Tensor = self.before[0].model(x)
            return result

    same(sdrpc.offload(Leading(), ReferenceDevice())(x), other(x))
    assert seen == {other.weight.data_ptr()}

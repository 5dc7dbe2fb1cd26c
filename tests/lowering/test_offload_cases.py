"""What users tripped over with offloaded modules, by the names under which it was reported, and more of each kind."""

from __future__ import annotations

import copy
import functools
import gc
import multiprocessing
import operator
import pickle
import subprocess
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sdrpc
from sdrpc.client import RemoteDevice
from sdrpc.device import Device
from sdrpc.errors import CaptureError, ConnectionLost, LocalProtocolError, UsageError
from sdrpc.lowering import remote_module
from tests.lowering import models
from tests.lowering.compare import TOLERANCE, error
from tests.lowering.devices import ReferenceDevice
from tests.support.process import ServerProcess


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    """It multiplies in bfloat16 where nobody asks for more, as a server with a GPU does."""
    with ServerProcess("--precision", "fast", "--device", "CPU") as process:
        yield process


@pytest.fixture
def remote(server: ServerProcess) -> Iterator[RemoteDevice]:
    device = sdrpc.devices(rpc=f"127.0.0.1:{server.port}")["RPC0"]
    assert isinstance(device, RemoteDevice)
    yield device
    device.close()


@pytest.fixture
def cpu() -> Iterator[Device]:
    device = sdrpc.devices(precision="fast", threads=1)["CPU"]
    yield device
    device.close()


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[type]:
    """The classes of the modules that were captured, with nothing to be found on disk before."""
    monkeypatch.setenv("SDRPC_CACHE", str(tmp_path))
    seen: list[type] = []
    real = remote_module.capture

    def counted(module: nn.Module, *args: Any) -> Any:
        seen.append(type(module))
        return real(module, *args)

    monkeypatch.setattr(remote_module, "capture", counted)
    return seen


def same(mine: Any, theirs: Any, tolerance: float = TOLERANCE["exact"]) -> None:
    assert mine.dtype == theirs.dtype
    assert error(mine.detach().float().numpy(), theirs.detach().float().numpy()) <= tolerance


class Writing(nn.Module):
    """Writes slices, as SlicedAttnProcessor does."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for i in range(2):
            y[i : i + 1] = x[i : i + 1] * 2
        return y


UNET_INPUTS = (torch.randn(2, 4, 8, 8), torch.tensor(3), torch.randn(2, 7, 24))


def both(module: nn.Module, offloaded: nn.Module) -> None:
    """An offloaded UNet gives what the module gives."""
    with torch.no_grad():
        same(offloaded(*UNET_INPUTS).sample, module(*UNET_INPUTS).sample)


@torch.no_grad()
def test_offload_attention_slicing(remote: RemoteDevice) -> None:
    x = torch.ones(2, 3)
    assert torch.equal(sdrpc.offload(Writing(), remote)(x), 2 * x)
    unet = models.unet()
    sliced = sdrpc.offload(unet, remote)
    both(unet, sliced)
    sliced.set_attention_slice("auto")
    both(unet, sliced)


@pytest.mark.parametrize(
    "change",
    [
        lambda unet: unet.set_attention_slice(1),
        lambda unet: unet.enable_freeu(0.9, 0.2, 1.2, 1.4),
        lambda unet: unet.fuse_qkv_projections(),
        lambda unet: unet.set_default_attn_processor(),
        lambda unet: [module.register_forward_hook(lambda _, __, y: y * 1.5) for module in [unet.mid_block]],
        lambda unet: setattr(unet.down_blocks[0].resnets[0], "output_scale_factor", 2.0),
        lambda unet: [setattr(p, "scale", 2.0) or p for p in unet.attn_processors.values()],
    ],
    ids=["slicing", "freeu", "fused", "processors", "hook", "attribute", "processor's state"],
)
def test_changes_of_what_is_computed_are_noticed(change: Callable[[Any], Any], captures: list[type]) -> None:
    unet = models.unet()
    offloaded: Any = sdrpc.offload(unet, ReferenceDevice())
    both(unet, offloaded)
    offloaded.set_attn_processor(offloaded.attn_processors)  # the same again
    seen = len(captures)
    change(offloaded)
    both(offloaded_as_module(offloaded), offloaded)
    assert len(captures) > seen


def offloaded_as_module(offloaded: Any) -> nn.Module:
    """The module, with what was changed in the offloaded one, in this process."""
    plain = object.__new__(type(offloaded)._sdrpc_original)
    plain.__dict__.update(vars(offloaded))
    return plain  # type: ignore[no-any-return]


def test_offload_instance_forward(remote: RemoteDevice, captures: list[type]) -> None:
    """What was set on the instance is what runs on the device, and never here."""
    module = nn.Linear(4, 4)
    old = module.forward
    module.forward = lambda *a, **k: old(*a, **k) * 3  # type: ignore[method-assign]
    offloaded = sdrpc.offload(module, remote)
    x = torch.ones(1, 4)
    with torch.no_grad():
        wanted = module(x)
        for _ in range(3):
            same(offloaded(x), wanted)
    assert len(captures) == 1
    remote.close()
    with torch.no_grad(), pytest.raises((ConnectionLost, LocalProtocolError)):
        offloaded(x)


class Halving:
    """Such as accelerate sets on instances: a function of the module in the place of its forward."""

    def __init__(self, module: nn.Module) -> None:
        self.old = module.forward
        module.forward = functools.update_wrapper(functools.partial(self.forward, module), self.old)  # type: ignore[method-assign]

    def forward(self, module: nn.Linear, x: Tensor) -> Tensor:
        result: Tensor = self.old(x) / 2 + module.bias
        return result


@pytest.mark.parametrize("when", ["before", "after"])
@torch.no_grad()
def test_functions_set_on_the_instance(when: str) -> None:
    device, module, x = ReferenceDevice(), nn.Linear(4, 4), torch.ones(1, 4)
    wanted = module(x) / 2 + module.bias
    offloaded = module if when == "before" else sdrpc.offload(module, device)
    Halving(offloaded)
    offloaded = sdrpc.offload(offloaded, device) if when == "before" else offloaded
    same(offloaded(x), wanted)
    assert device.written
    del offloaded.forward
    same(offloaded(x), nn.functional.linear(x, module.weight, module.bias))
    with pytest.raises(AttributeError):
        del offloaded.forward


@torch.no_grad()
def test_a_compiled_method_on_the_instance() -> None:
    vae: Any = models.vae()
    latents = torch.randn(1, 4, 3, 3)
    wanted = vae.decode(latents).sample
    vae.decode = torch.compile(vae.decode, backend="eager")
    device = ReferenceDevice()
    same(sdrpc.offload(vae, device).decode(latents).sample, wanted)
    assert device.written


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
def test_offload_to_dtype(remote: RemoteDevice) -> None:
    x = torch.ones(1, 4)
    module = nn.Linear(4, 4)
    offloaded = sdrpc.offload(module, remote).half()
    same(offloaded(x.half()), module(x.half()), 1e-2)  # before the first call
    offloaded.bfloat16()
    same(offloaded(x.bfloat16()), module(x.bfloat16()), 1e-2)  # and after
    offloaded.float()
    same(offloaded(x), module(x))
    module.weight.mul_(2)
    same(offloaded(x), module(x))


class Multiplying(nn.Module):
    """Everything that devices have a narrower dtype for."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(4, 8, 3)
        self.deep, self.groups = nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3, groups=2)
        self.up, self.line, self.film = nn.ConvTranspose2d(8, 8, 2, 2), nn.Conv1d(8, 8, 3), nn.Conv3d(8, 4, (1, 3, 3))
        self.linear = nn.Linear(8, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.up(self.groups(self.deep(self.wide(x))))
        rows = y.flatten(2).transpose(1, 2)
        seen = nn.functional.scaled_dot_product_attention(rows, rows, rows)
        return self.linear(seen), self.line(y.flatten(2)), self.film(y[:, :, None]), rows @ rows.transpose(1, 2)


@torch.no_grad()
def test_float32_is_multiplied_in_float32(remote: RemoteDevice, cpu: Device) -> None:
    """Whatever the device prefers, unless torch is told that less will do."""
    module, x = Multiplying(), torch.randn(1, 4, 10, 10)
    wanted = module(x)

    def errors(offloaded: nn.Module) -> list[float]:
        return [error(mine.numpy(), right.numpy()) for mine, right in zip(offloaded(x), wanted, strict=True)]

    for device in (remote, cpu):
        offloaded = sdrpc.offload(module, device)
        assert max(errors(offloaded)) <= TOLERANCE["exact"]
        torch.set_float32_matmul_precision("medium")
        try:
            assert min(errors(offloaded)) > 1e-3, "bfloat16"
        finally:
            torch.set_float32_matmul_precision("highest")
        assert max(errors(copy.copy(offloaded))) <= TOLERANCE["exact"]
        assert min(errors(sdrpc.offload(module, device, float32_matmul_precision="medium"))) > 1e-3
    with pytest.raises(UsageError, match="float32_matmul_precision low: there are highest, high, medium"):
        sdrpc.offload(module, cpu, float32_matmul_precision="low")


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.weight.mul_(2),
        lambda m: m.weight.data.mul_(2),  # as LoRAs are merged; torch counts no version
        lambda m: setattr(m.weight, "data", m.weight.data * 2),
        lambda m: setattr(m, "weight", nn.Parameter(m.weight * 2)),
        lambda m: m.load_state_dict({"weight": m.weight * 2, "bias": m.bias}),
        lambda m: setattr(m, "bias", None),
        lambda m: nn.utils.parametrize.register_parametrization(m, "weight", nn.Softplus()),
    ],
    ids=["in place", "data in place", "data", "parameter", "load_state_dict", "no bias", "parametrization"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_weights_that_change_reach_the_device(change: Callable[[nn.Module], Any], dtype: torch.dtype) -> None:
    module, x = nn.Sequential(nn.Linear(40, 30)).to(dtype), torch.randn(2, 40).to(dtype)
    device = ReferenceDevice()
    offloaded = sdrpc.offload(module, device)
    same(offloaded(x), module(x), 1e-2)
    device.written.clear()
    same(offloaded(x), module(x), 1e-2)
    assert device.written == []  # nothing changed
    change(module[0])
    same(offloaded(x), module(x), 1e-2)


@torch.no_grad()
def test_tables_that_change_reach_the_device() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.arange(3.0), persistent=False)
            self.factors = [torch.ones(3)]

        def forward(self, x: Tensor) -> Tensor:
            return x * self.table * self.factors[0]

    module, x = Table(), torch.ones(3)
    offloaded = sdrpc.offload(module, ReferenceDevice())
    for change in (lambda: None, lambda: module.table.add_(1), lambda: module.factors[0].mul_(5)):
        change()
        same(offloaded(x), module(x))


@torch.no_grad()
def test_weights_that_are_one_or_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tied weights and others of the same shapes have graphs of their own, also on disk."""
    monkeypatch.setenv("SDRPC_CACHE", str(tmp_path))
    x, (first, second) = torch.randn(2, 4), (nn.Linear(4, 4), nn.Linear(4, 4))
    module, offloaded = nn.Sequential(first, second), sdrpc.offload(nn.Sequential(first, first), ReferenceDevice())
    same(offloaded(x), first(first(x)))
    offloaded = sdrpc.offload(module, ReferenceDevice())
    same(offloaded(x), module(x))
    second.weight = first.weight
    same(offloaded(x), module(x))
    second.weight = nn.Parameter(torch.randn(4, 4))
    same(offloaded(x), module(x))


FACTOR = 1.0


class Plan:
    """A script's own object, which its function reads."""

    strength = 1.0


class Reading(nn.Module):
    """What it computes depends on what it reads everywhere."""

    factor = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.table = torch.ones(4)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(self.linear(x) * self.factor * self.table) * FACTOR + 1


@torch.no_grad()
def test_whatever_is_read_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Closures, globals, what is set on classes and modules of Python's, hooks of all modules."""
    module, plan, scale, x = Reading(), Plan(), [1.0], torch.randn(2, 4)
    module.linear.register_forward_hook(lambda _, __, y: y * scale[0] * plan.strength)
    offloaded = sdrpc.offload(module, ReferenceDevice())
    hooks = []
    forward = nn.Linear.forward
    changes = (
        lambda: None,
        lambda: scale.append(scale.pop() * 3),
        lambda: setattr(plan, "strength", 2.0),
        lambda: monkeypatch.setattr(Plan, "strength", 7.0) or delattr(plan, "strength"),
        lambda: monkeypatch.setitem(globals(), "FACTOR", 5.0),
        lambda: monkeypatch.setattr(Reading, "factor", 0.5),
        lambda: module.table.data.mul_(3),
        lambda: monkeypatch.setattr(nn.functional, "relu", lambda x, inplace=False: x * 2),
        lambda: monkeypatch.setattr(nn.Linear, "forward", lambda self, x: forward(self, x) - 1),
        lambda: monkeypatch.setattr(Reading, "forward", lambda self, x: self.linear(x) * 3),
        lambda: hooks.append(nn.modules.module.register_module_forward_hook(lambda _, __, y: y * 2)),
    )
    try:
        before = None
        for number, change in enumerate(changes):
            change()
            wanted = module(x)
            assert before is None or not torch.equal(before, wanted), number
            before = wanted
            same(offloaded(x), wanted)
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def test_offload_torch_compile(remote: RemoteDevice) -> None:
    module, x = nn.Linear(4, 4), torch.ones(1, 4)
    wanted = module(x)
    offloaded = sdrpc.offload(module, remote)
    same(torch.compile(offloaded, backend="eager")(x), wanted)
    offloaded.compile(backend="eager")
    same(offloaded(x), wanted)
    same(torch.compile(lambda x: offloaded(x) + 1, backend="eager")(x), wanted + 1)


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


def test_what_is_no_module_or_no_device_is_refused(cpu: Device) -> None:
    with pytest.raises(UsageError, match="takes a torch module, not an object of function"):
        sdrpc.offload(lambda x: x, cpu)  # type: ignore[arg-type]
    for wrong in ("CPU", sdrpc.Devices({"CPU": cpu})):
        with pytest.raises(
            UsageError, match=rf'such as sdrpc.devices\(\)\["CPU"\], not an object of {type(wrong).__name__}'
        ):
            sdrpc.offload(nn.Linear(2, 2), wrong)  # type: ignore[arg-type]


def test_pickling_is_refused() -> None:
    offloaded = sdrpc.offload(nn.Linear(4, 4), ReferenceDevice())
    with pytest.raises(UsageError, match=r"an offloaded Linear can't be pickled: save its state_dict\(\)"):
        pickle.dumps(offloaded)
    assert offloaded.state_dict().keys() == {"weight", "bias"}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_what_would_compute_here_is_refused() -> None:
    """torch.jit.script compiled the original without a word."""
    offloaded, x = sdrpc.offload(nn.Linear(3, 3), ReferenceDevice()), torch.ones(1, 3)
    with pytest.raises(UsageError, match="an offloaded Linear can't be scripted"):
        torch.jit.script(offloaded)
    with torch.no_grad(), pytest.raises(UsageError, match="an offloaded Linear can't be traced or exported"):
        torch.jit.trace(offloaded, x)
    with torch.no_grad(), pytest.raises(UsageError, match="an offloaded Linear can't be traced or exported"):
        torch.export.export(offloaded, (x,))


@torch.no_grad()
def test_functions_of_functions_are_refused() -> None:
    offloaded = sdrpc.offload(nn.Linear(3, 3), ReferenceDevice())
    with pytest.raises(UsageError, match=r"an offloaded Linear has no part in torch\.func"):
        torch.vmap(offloaded)(torch.ones(2, 3))


@pytest.mark.parametrize("hook", ["enable_group_offload", "enable_layerwise_casting"])
def test_hooks_that_move_weights_are_refused(hook: str) -> None:
    unet = models.unet((8, 16))
    offloaded: Any = sdrpc.offload(unet, ReferenceDevice())
    if hook == "enable_group_offload":
        offloaded.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    else:
        offloaded.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    with torch.no_grad(), pytest.raises(UsageError, match=f"diffusers' {hook} and sdrpc.offload exclude each other"):
        offloaded(torch.randn(1, 4, 4, 4), torch.tensor(3), torch.randn(1, 2, 24))


class Keeping(nn.Module):
    """Keeps what it has computed, or counts its calls."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear, self.how, self.last, self.calls = nn.Linear(4, 4), how, None, 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if self.how == "attribute":
            self.last = y
        self.calls += self.how == "count"
        return y * 2


@torch.no_grad()
def test_tensors_that_a_call_keeps_are_refused() -> None:
    """As hooks that collect features and stores of attention do: theirs had no numbers, or only those of one call."""
    seen: list[Tensor] = []
    hooked, x = nn.Sequential(nn.Linear(4, 4)), torch.ones(1, 4)
    hooked[0].register_forward_hook(lambda _, __, y: seen.append(y))
    for module, place in ((Keeping("attribute"), "last"), (hooked, "0._forward_hooks")):
        with pytest.raises(CaptureError, match=rf"{place} keeps a tensor of each call"):
            sdrpc.offload(module, ReferenceDevice())(x)
    seen.clear()
    outer = sdrpc.offload(nn.Linear(4, 4), ReferenceDevice())
    outer.register_forward_hook(lambda _, __, y: seen.append(y))
    results = [outer(x) for _ in range(2)]
    assert all(map(operator.is_, seen, results))  # hooks of the module itself run here


@torch.no_grad()
def test_calls_that_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    """In a closure by each call; in the module by none, which is said."""
    calls, module, x = [0], nn.Sequential(nn.Linear(4, 4)), torch.ones(1, 4)

    def counted(_: nn.Module, __: Any, y: Tensor) -> Tensor:
        calls[0] += 1
        return y * calls[0]

    module[0].register_forward_hook(counted)
    offloaded = sdrpc.offload(module, ReferenceDevice())
    for number in (1, 2, 3):
        same(offloaded(x), nn.functional.linear(x, module[0].weight, module[0].bias) * number)
    counting = sdrpc.offload(Keeping("count"), ReferenceDevice())
    for _ in range(2):
        counting(x)
    assert [r.getMessage() for r in caplog.records if "calls changes when the module is called" in r.getMessage()]


def test_caches_of_diffusers_are_refused() -> None:
    from diffusers import FirstBlockCacheConfig, FluxTransformer2DModel

    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 6, "num_attention_heads": 1}
    widths = {"joint_attention_dim": 4, "pooled_projection_dim": 4, "axes_dims_rope": (2, 2, 2), "in_channels": 4}
    offloaded: Any = sdrpc.offload(FluxTransformer2DModel(**sizes, **widths), ReferenceDevice())
    offloaded.enable_cache(FirstBlockCacheConfig())
    with torch.no_grad(), pytest.raises(UsageError, match=r"fbc_.* exclude each other.*disable_cache"):
        offloaded(torch.ones(1, 4, 4), torch.ones(1, 3, 4), torch.ones(1, 4), torch.ones(1))


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


@torch.no_grad()
@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
def test_weights_that_are_computed(kind: str) -> None:
    module, x = getattr(nn.utils.parametrizations, kind)(nn.Linear(6, 5)).eval(), torch.randn(2, 6)
    same(sdrpc.offload(module, ReferenceDevice())(x), module(x))


class Scale:
    def __init__(self, factor: float, table: Tensor | None = None) -> None:
        self.factor, self.table = factor, table


class Scaled(nn.Module):
    def forward(self, x: Tensor, scale: Scale) -> Tensor:
        y = x * scale.factor
        return y if scale.table is None else y + scale.table


@torch.no_grad()
def test_objects_among_the_arguments_count_by_their_state(captures: list[type]) -> None:
    offloaded, x = sdrpc.offload(Scaled(), ReferenceDevice()), torch.ones(2)
    scale = Scale(2.0)
    for factor in (2.0, 3.0, 2.0):
        scale.factor = factor
        same(offloaded(x, scale), x * factor)
    assert len(captures) == 2
    for table in (torch.ones(2), torch.zeros(2)):
        same(offloaded(x, Scale(2.0, table)), 2 * x + table)
    assert len(captures) == 3  # its tensor is an input


@dataclass(slots=True)
class SlottedScale:
    factor: float
    table: Tensor | None = None


@torch.no_grad()
def test_objects_with_slots_count_by_their_state() -> None:
    offloaded, x, scale = sdrpc.offload(Scaled(), ReferenceDevice()), torch.ones(2), SlottedScale(2.0)
    for factor in (2.0, 3.0):
        scale.factor = factor
        same(offloaded(x, scale), x * factor)
    scale.table = torch.ones(2)
    same(offloaded(x, scale), x * 3 + 1)


@torch.no_grad()
def test_integers_that_mean_another_thing_as_tensors() -> None:
    """transformers' ``logits_to_keep``: the last so many, or those at these places."""

    class Last(nn.Module):
        def forward(self, x: Tensor, keep: int | Tensor = 0) -> Tensor:
            return x[slice(-keep, None) if isinstance(keep, int) else keep] * 1

    module, x = Last(), torch.arange(5.0)
    offloaded = sdrpc.offload(module, ReferenceDevice())
    for keep in (1, 2, torch.tensor([1, 2])):
        same(offloaded(x, keep), module(x, keep))


@pytest.mark.parametrize(
    "make",
    [lambda x: (x * i for i in range(2)), lambda x: deque([x * 2]), lambda x: {"a": x * 2}.values()],
    ids=["generator", "deque", "view"],
)
@torch.no_grad()
def test_results_that_nothing_can_fill_are_refused(make: Callable[[Tensor], Any]) -> None:
    """They held tensors without numbers, the same ones in each call."""
    with pytest.raises(CaptureError, match=r"Calling\.forward returns an object of .*: return tensors in tuples"):
        sdrpc.offload(Calling(make), ReferenceDevice())(torch.ones(2))


@pytest.mark.parametrize(
    ("function", "x"),
    [
        (lambda x: x * 2, torch.complex(torch.ones(3), torch.arange(3.0)).conj().imag),
        (lambda x: (x * 2).to(torch.float8_e4m3fn), torch.tensor([0.3, -1.4, 2.2])),
        (lambda x: x.float() + 1, torch.tensor([0.3, -1.4]).to(torch.float8_e5m2)),
        (lambda x: x + torch.ones(3), torch.ones(3)),
    ],
    ids=["negated view", "float8 results", "float8 inputs", "default dtype"],
)
@torch.no_grad()
def test_dtypes_and_views(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    offloaded = sdrpc.offload(Calling(function), ReferenceDevice())
    same(offloaded(x), function(x))
    torch.set_default_dtype(torch.float64)
    try:
        same(offloaded(x), function(x))
    finally:
        torch.set_default_dtype(torch.float32)


class Calling(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


@torch.no_grad()
def test_what_a_device_has_no_numbers_for_is_refused() -> None:
    linear, doubled = nn.Linear(4, 4), Calling(lambda x: x + 1)
    with pytest.raises(UsageError, match="an offloaded Linear needs numbers: an input is on the meta device"):
        sdrpc.offload(linear, ReferenceDevice())(torch.ones(1, 4, device="meta"))
    with pytest.raises(UsageError, match="an offloaded Linear takes dense tensors"):
        sdrpc.offload(linear, ReferenceDevice())(torch.eye(4).to_sparse())
    with pytest.raises(UsageError, match="has integers that float32, in which devices compute, can't hold"):
        sdrpc.offload(doubled, ReferenceDevice())(torch.tensor([2**24 + 1]))
    linear.factor = nn.Parameter(torch.ones(4, dtype=torch.complex64))  # type: ignore[assignment]
    linear.forward = lambda x: (x * linear.factor).real  # type: ignore[method-assign]
    with pytest.raises(CaptureError, match="a weight of complex64"):
        sdrpc.offload(linear, ReferenceDevice())(torch.ones(1, 4))


def test_results_of_what_is_trained_need_gradients() -> None:
    """As a module's do; who asks for them is told. It was trained without learning."""
    module, x = nn.Linear(4, 4), torch.ones(1, 4)
    offloaded = sdrpc.offload(module, ReferenceDevice())
    result = offloaded(x)
    same(result, module(x))
    result += 1  # it can be written to
    with pytest.raises(UsageError, match="an offloaded Linear has no gradients: train the original"):
        result.sum().backward()
    assert not offloaded.requires_grad_(False)(x).requires_grad


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


@torch.no_grad()
def test_arguments_that_would_change_are_refused() -> None:
    class Counting(nn.Module):
        def forward(self, x: Tensor, scale: Scale) -> Tensor:
            scale.factor += 1
            return x * scale.factor

    class Collecting(nn.Module):
        def forward(self, x: Tensor, seen: list[Tensor]) -> Tensor:
            seen.append(x)
            return x + 1

    for module, argument in ((Counting(), Scale(1.0)), (Collecting(), [])):
        with pytest.raises(CaptureError, match="changes its arguments"):
            sdrpc.offload(module, ReferenceDevice())(torch.ones(2), argument)
    with pytest.raises(CaptureError, match="writes into input"):
        sdrpc.offload(nn.ReLU(inplace=True), ReferenceDevice())(torch.ones(2))


@torch.no_grad()
def test_caches_in_results_hold_results() -> None:
    """A language model's cache has the device's numbers, not what was left from capturing."""
    from transformers import Qwen3Config, Qwen3Model

    sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = Qwen3Config(vocab_size=99, num_key_value_heads=1, head_dim=8, max_position_embeddings=64, **sizes)
    model = models.randomized(Qwen3Model(config))
    ids = torch.tensor([[5, 7, 9, 11]])
    offloaded = sdrpc.offload(model, ReferenceDevice())
    mine, theirs = offloaded(ids, use_cache=True), model(ids, use_cache=True)
    assert type(mine.past_key_values) is type(theirs.past_key_values)
    for a, b in zip(mine.past_key_values.layers, theirs.past_key_values.layers, strict=True):
        same(a.keys, b.keys)
        same(a.values, b.values)
    with pytest.raises(CaptureError, match="use_cache=False"):
        offloaded(ids, past_key_values=mine.past_key_values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@torch.no_grad()
def test_narrow_weights_through_slices_and_transpositions(dtype: torch.dtype) -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 6))
            self.deep = nn.Parameter(torch.randn(2, 3, 4, 6))

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            steps = x + self.w[::2, 1:4].sum(), x * self.w[:, 1:4], x + self.w.t()[1:4, :4].t()
            return *steps, self.deep[:, 1].permute(2, 0, 1) * 2, self.deep.transpose(0, 3)[1:3].float() + 1

    module, x = Views().to(dtype), torch.randn(4, 3).to(dtype)
    for target in ("sdrpc", "portable"):
        device = ReferenceDevice(getattr(sdrpc.targets, target.upper()))
        for mine, theirs in zip(sdrpc.offload(module, device)(x), module(x), strict=True):
            same(mine, theirs, 2 * torch.finfo(dtype).eps)


class Choosing(nn.Module):
    """Numbers of a mask, and of a step, decide what is computed."""

    def forward(self, x: Tensor, mask: Tensor, strength: Tensor) -> Tensor:
        lengths = mask.sum(1).tolist()
        parts = torch.cat([row[:n] for row, n in zip(x, lengths, strict=True)]) * 2
        return parts if strength > 0.5 else x[mask.bool()]


@torch.no_grad()
def test_numbers_that_decide_are_known_and_others_are_not(captures: list[type]) -> None:
    module, x = Choosing(), torch.randn(2, 4, 3)
    offloaded = sdrpc.offload(module, ReferenceDevice())
    masks = [torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]]), torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])]
    for mask in (*masks, *masks):
        for strength in (0.1, 0.9):
            for values in (x, x + 1):
                same(offloaded(values, mask, torch.tensor(strength)), module(values, mask, torch.tensor(strength)))
    first = len(captures)
    offloaded(x, masks[0], torch.tensor(0.9))
    assert len(captures) == first


@torch.no_grad()
def test_nothing_of_a_module_is_computed_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a module can't be captured, it does not run in this process with its weights either."""

    class Deciding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x if self.linear.weight.sum() > 0 else self.linear(x)

    with pytest.raises(CaptureError, match="numbers of weights decide what is computed"):
        sdrpc.offload(Deciding(), ReferenceDevice())(torch.ones(1, 4))


SECOND = """
import sys, torch, sdrpc
from pathlib import Path
from sdrpc.lowering import capture, remote_module
from tests.lowering import models
from tests.lowering.devices import ReferenceDevice
def refused(*_): raise AssertionError("captured again")
remote_module.capture = refused
unet = models.unet((8, 16))
inputs = torch.load(sys.argv[1])
def told():
    try:
        with torch.no_grad():
            result = sdrpc.offload(unet, ReferenceDevice())(*inputs)
            print(type(result).__name__, float((result.sample - unet(*inputs).sample).abs().max()) < 1e-4)
    except AssertionError as error:
        print(error)
told()
notes = list(Path(sys.argv[2]).rglob("*.json"))
assert notes
kept = [note.read_bytes() for note in notes]
for note in notes:
    note.write_text('{"known": [], "result": ["object", {"module": "os", "name": "system"}, false, [], []]}')
told()
for note, was in zip(notes, kept):
    note.write_bytes(was)
told()
unet.enable_freeu(0.9, 0.2, 1.2, 1.4)
told()
"""


@torch.no_grad()
def test_another_process_finds_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where what is kept beside the graph names something else, nor where the module computes something else."""
    monkeypatch.setenv("SDRPC_CACHE", str(tmp_path / "cache"))
    inputs = (torch.randn(1, 4, 4, 4), torch.tensor(3), torch.randn(1, 2, 24))
    sdrpc.offload(models.unet((8, 16)), ReferenceDevice())(*inputs)
    torch.save(inputs, tmp_path / "inputs.pt")
    command = [sys.executable, "-c", SECOND, str(tmp_path / "inputs.pt"), str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    found = "UNet2DConditionOutput True"
    assert done.stdout.splitlines() == [found, "captured again", found, "captured again"], done.stderr


@torch.no_grad()
def test_code_without_a_version_is_not_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDRPC_CACHE", str(tmp_path))
    unet = models.unet((8, 16))
    unet.mid_block.register_forward_hook(lambda _, __, y: y * 2)
    inputs = (torch.randn(1, 4, 4, 4), torch.tensor(3), torch.randn(1, 2, 24))
    sdrpc.offload(unet, ReferenceDevice())(*inputs)
    sdrpc.offload(Writing(), ReferenceDevice())(torch.ones(2, 3))
    assert list(tmp_path.iterdir()) == []


def test_devices_str(server: ServerProcess) -> None:
    endpoint = f"127.0.0.1:{server.port}"
    devices = sdrpc.devices(rpc=endpoint)
    assert set(devices) >= {"CPU", "RPC0"}
    assert repr(devices["RPC0"]).startswith(f"<RemoteDevice RPC0: {endpoint}")
    assert repr(devices["CPU"]).startswith("<LocalDevice CPU: ")
    for wrong in (("127.0.0.1", server.port), [None], server.port):
        with pytest.raises(UsageError, match="rpc takes 'host:port', or several such texts, not"):
            sdrpc.devices(rpc=wrong)  # type: ignore[arg-type]
    with pytest.raises(KeyError, match=r"no device RPC7: there are CPU, RPC0"):
        devices["RPC7"]
    for device in devices.values():
        device.close()


def test_results_do_not_share_memory_with_the_device(cpu: Device) -> None:
    offloaded = sdrpc.offload(nn.Linear(4, 4), cpu)
    with torch.no_grad():
        first = offloaded(torch.ones(1, 4))
        kept = first.clone()
        offloaded(torch.zeros(1, 4))
    np.testing.assert_array_equal(first.numpy(), kept.numpy())

"""What an offloaded module can't do is refused, where it would be wrong without a word."""

from __future__ import annotations

import operator
import random
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sdrpc
from sdrpc.device import Device
from sdrpc.errors import CaptureError, UsageError
from tests.lowering import models
from tests.lowering.devices import ReferenceDevice
from tests.lowering.offloading import Calling, Scale, same
from tests.support.process import ServerProcess


def test_what_is_no_module_or_no_device_is_refused(cpu: Device) -> None:
    with pytest.raises(UsageError, match="takes a torch module, not an object of function"):
        sdrpc.offload(lambda x: x, cpu)  # type: ignore[arg-type]
    for wrong in ("CPU", sdrpc.Devices({"CPU": cpu})):
        with pytest.raises(
            UsageError, match=rf'such as sdrpc.devices\(\)\["CPU"\], not an object of {type(wrong).__name__}'
        ):
            sdrpc.offload(nn.Linear(2, 2), wrong)  # type: ignore[arg-type]


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


class Changing(nn.Module):
    """Calls ``change`` with itself and the input."""

    def __init__(self, change: Callable[[Any, Tensor], Any], notes: Any) -> None:
        super().__init__()
        self.change, self.notes, self.sizes = change, notes, {}
        self.register_buffer("table", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.setdefault(x.shape, torch.ones(1))
        self.change(self, x)
        return x - self.table


@pytest.mark.parametrize(
    "change",
    [
        lambda it, x: setattr(it, "table", it.table * 0.9 + x),
        lambda it, x: it.table[:2].copy_(x),
        lambda it, x: it.notes[0].add_(x),
        lambda it, x: NOTES.notes[0].add_(x),
    ],
    ids=["set anew", "written", "in a list", "in another module"],
)
@torch.no_grad()
def test_tensors_that_a_call_writes_to_are_refused(change: Callable[[Any, Tensor], Any]) -> None:
    """Buffers and tables of earlier calls; what was written there was lost."""
    with pytest.raises(CaptureError, match="keeps a tensor of each call"):
        sdrpc.offload(Changing(change, [torch.zeros(2)]), ReferenceDevice())(torch.ones(2))


NOTES = Changing(lambda it, x: None, [torch.zeros(2)])


@pytest.mark.parametrize(
    ("notes", "count"),
    [
        (torch.zeros(1, dtype=torch.int64), lambda it, _: it.notes.add_(1)),
        (True, lambda it, _: setattr(it, "notes", False)),
        ([1, 2], lambda it, _: it.notes.pop()),
        ({"n": 1}, lambda it, _: it.notes.update(n=2)),
        ("a", lambda it, _: setattr(it, "notes", "b")),
    ],
    ids=["tensor", "flag", "list", "dict", "text"],
)
@torch.no_grad()
def test_whatever_is_counted_is_said(notes: Any, count: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    """Not tables that were made for a size."""
    sdrpc.offload(Changing(count, notes), ReferenceDevice())(torch.ones(2))
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("Changing: notes")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_compiled_code_and_traces_are_refused_by_name() -> None:
    scripted, x = torch.jit.script(nn.Linear(3, 3)), torch.ones(1, 3)
    with pytest.raises(UsageError, match=r"not one that torch\.jit compiled"):
        sdrpc.offload(scripted, ReferenceDevice())
    with torch.no_grad(), pytest.raises(CaptureError, match=r"0 was compiled by torch\.jit"):
        sdrpc.offload(nn.Sequential(scripted), ReferenceDevice())(x)
    with pytest.raises(UsageError, match="an offloaded Linear can't be traced or exported"):
        torch.fx.symbolic_trace(sdrpc.offload(nn.Linear(3, 3), ReferenceDevice()))


@pytest.mark.filterwarnings("ignore:.*quantize:UserWarning", "ignore:.*quantized:UserWarning")
@torch.no_grad()
def test_buffers_that_devices_do_not_have_are_refused() -> None:
    """A quantized one ended the process."""
    for buffer in (torch.eye(2).to_sparse(), torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)):
        module = Calling(lambda x: x * 2)
        module.register_buffer("table", buffer)
        with pytest.raises(CaptureError, match="table is sparse or quantized"):
            sdrpc.offload(module, ReferenceDevice())(torch.ones(2))


@pytest.mark.parametrize("draw", [random.random, np.random.rand], ids=["random", "numpy"])
@torch.no_grad()
def test_random_numbers_of_others_are_said(draw: Callable[[], float], caplog: pytest.LogCaptureFixture) -> None:
    offloaded = sdrpc.offload(Calling(lambda x: x * draw()), ReferenceDevice())
    for _ in range(2):
        offloaded(torch.ones(2))
    assert [r.getMessage() for r in caplog.records if "draws random numbers of Python's or numpy's" in r.getMessage()]


@torch.no_grad()
def test_modules_and_functions_as_results_are_refused() -> None:
    """They were those of the copy that was captured, without numbers."""
    linear = nn.Linear(2, 2)
    for make in (lambda x: (x * 2, linear), lambda x: lambda: x * 2):
        with pytest.raises(CaptureError, match="returns an object of"):
            sdrpc.offload(Calling(make), ReferenceDevice())(torch.ones(2))

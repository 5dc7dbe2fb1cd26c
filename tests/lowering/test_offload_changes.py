"""What is changed in an offloaded module, or in what it reads, counts from the next call on."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import sdrpc
from sdrpc.client import RemoteDevice
from sdrpc.errors import ConnectionLost, LocalProtocolError
from tests.lowering import models
from tests.lowering.devices import ReferenceDevice
from tests.lowering.offloading import Calling, Writing, same

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
        return nn.functional.silu(self.linear(x) * self.factor * self.table) * FACTOR + 1


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
        lambda: monkeypatch.setattr(nn.functional, "silu", lambda x, inplace=False: x * 2),
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
@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
def test_weights_that_are_computed(kind: str) -> None:
    module, x = getattr(nn.utils.parametrizations, kind)(nn.Linear(6, 5)).eval(), torch.randn(2, 6)
    same(sdrpc.offload(module, ReferenceDevice())(x), module(x))


class Adapter(nn.Module):
    """As kohya's: its method is set on a module, of which it is no part."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.down, self.up, self.strength = nn.Linear(4, 2), nn.Linear(2, 4), 1.0
        self.module, self.old = [module], module.forward
        module.forward = self.forward  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.old(x) + self.up(self.down(x)) * self.strength
        return result


@torch.no_grad()
def test_modules_that_are_no_parts_count() -> None:
    """Set as a method, read by a hook, or hidden in a list: their numbers and weights were those of the first call."""
    x, device = torch.randn(2, 4), ReferenceDevice()
    adapted, hooked, hiding = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4)), Calling(lambda x: x)
    adapter, beside = Adapter(adapted[0]), nn.Linear(4, 4)
    hooked[0].register_forward_hook(lambda _, __, y: y + beside(y))
    hiding.hidden = [beside]  # type: ignore[assignment]
    hiding.function = lambda x: hiding.hidden[0](x)  # type: ignore[index, operator]
    modules = [adapted, hooked, hiding]
    offloaded = [sdrpc.offload(module, device) for module in modules]
    changes = (
        lambda: None,
        lambda: setattr(adapter, "strength", -3.0),
        lambda: [adapter.up.weight.mul_(2), beside.weight.mul_(2)],
        lambda: [adapter.up.weight.data.mul_(2), beside.weight.data.mul_(2)],
        lambda: [setattr(adapter, "up", nn.Linear(2, 4)), setattr(beside, "bias", None)],
    )
    for change in changes:
        change()
        for module, mine in zip(modules, offloaded, strict=True):
            same(mine(x), module(x))


class Tripled(nn.Linear):
    factor = 3.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factor


@torch.no_grad()
def test_classes_that_are_swapped_count() -> None:
    """As ToMe does it, with parts and with the module itself, which was computed here from then on."""
    linear, x, device = nn.Linear(4, 4), torch.randn(2, 4), ReferenceDevice()
    outer, inner = sdrpc.offload(nn.Sequential(linear), device), sdrpc.offload(linear, device)
    wanted = linear(x)
    for kind, factor in ((nn.Linear, 1), (Tripled, 3), (nn.Linear, 1)):
        linear.__class__ = inner.__class__ = kind  # type: ignore[assignment]
        same(outer(x), wanted * factor)
        buffers = len(device.memory_of)
        inner.close()  # type: ignore[operator]
        assert len(device.memory_of) < buffers or factor == 1
        same(inner(x), wanted * factor)
        assert isinstance(inner, kind)


@torch.no_grad()
def test_parametrizations_of_the_module_itself() -> None:
    offloaded, x = sdrpc.offload(nn.Linear(4, 4), ReferenceDevice()), torch.randn(2, 4)

    def wanted() -> Tensor:
        return nn.functional.linear(x, offloaded.weight, offloaded.bias)

    same(offloaded(x), wanted())
    nn.utils.parametrize.register_parametrization(offloaded, "weight", nn.Softplus())
    same(offloaded(x), wanted())
    offloaded.parametrizations.weight.original.mul_(2)
    same(offloaded(x), wanted())
    nn.utils.parametrize.remove_parametrizations(offloaded, "weight")
    same(offloaded(x), wanted())


@torch.no_grad()
def test_single_numbers_that_change_through_data() -> None:
    """Any in a small module, and in a large one any row of an embedding, as learnt words are put there."""
    table, linear = nn.Embedding(5000, 77), nn.Linear(100, 100)
    words, small = (sdrpc.offload(module, ReferenceDevice()) for module in (table, linear))
    rows, x = torch.arange(5000), torch.randn(2, 100)
    for row in (0, 1, 77, 2500, 4999):
        words(rows[:1])
        table.weight.data[row] = torch.randn(77)
        same(words(rows), table(rows))
        small(x)
        linear.weight.data[row % 100, 7] = 50
        same(small(x), linear(x))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_weights_that_are_set_anew_by_each_call() -> None:
    """By torch's pruning, and its old weight_norm: such tensors are made of weights, and nothing of a call is lost."""
    x, device = torch.randn(2, 6), ReferenceDevice()
    for change in (
        lambda linear: prune.l1_unstructured(linear, "weight", 0.5),
        lambda linear: nn.utils.weight_norm(linear),
    ):
        module = nn.Sequential(nn.Linear(6, 6))
        offloaded = sdrpc.offload(module, device)
        change(offloaded[0])
        same(offloaded(x), module(x))


@dataclass(slots=True)
class SlottedPlan:
    factor: float


class Longer(list[float]):
    pass


@pytest.mark.parametrize(
    ("notes", "read", "change"),
    [
        (deque([2.0]), lambda it: it[0], lambda it: it.appendleft(5.0)),
        (Longer([2.0]), lambda it: it[0], lambda it: it.insert(0, 5.0)),
        (np.ones(2, np.float32), torch.from_numpy, lambda it: it.fill(5)),
        (SimpleNamespace(factor=2.0), lambda it: it.factor, lambda it: setattr(it, "factor", 5.0)),
        (SlottedPlan(2.0), lambda it: it.factor, lambda it: setattr(it, "factor", 5.0)),
    ],
    ids=["deque", "subclass of list", "array", "namespace", "slots"],
)
@torch.no_grad()
def test_whatever_holds_numbers_counts_by_what_it_holds(
    notes: Any, read: Callable[[Any], Any], change: Callable[[Any], Any]
) -> None:
    module, x = Calling(lambda x: x * read(module.notes)), torch.ones(2)
    module.notes = notes
    offloaded = sdrpc.offload(module, ReferenceDevice())
    given = sdrpc.offload(Calling(lambda x, notes: x * read(notes)), ReferenceDevice())
    for _ in range(2):
        same(offloaded(x), module(x))
        same(given(x, notes), module(x))
        change(notes)


def _scaled(x: Tensor, by: tuple[float, ...] = (2.0,), *, kind: type = Plan) -> Tensor:
    return x * by[0] * kind.strength * _scaled.factor * settings.scale * elsewhere.strength  # type: ignore[attr-defined, no-any-return]


def _doubled(x: Tensor, by: tuple[float, ...] = (2.0,), *, kind: type = Plan) -> Tensor:
    return x * 2 * by[0]


settings, elsewhere = ModuleType("settings"), type("Options", (), {"__module__": "others"})()


@torch.no_grad()
def test_whatever_functions_mean_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their defaults, attributes and code, classes, modules of Python's and what they name of others' objects."""
    monkeypatch.setattr(_scaled, "factor", 2.0, raising=False)
    monkeypatch.setattr(settings, "scale", 2.0, raising=False)
    monkeypatch.setattr(elsewhere, "strength", 2.0, raising=False)
    module, x, before = Calling(_scaled), torch.ones(2), None
    offloaded = sdrpc.offload(module, ReferenceDevice())
    for owner, name, value in (
        (_scaled, "factor", 3.0),
        (settings, "scale", 3.0),
        (elsewhere, "strength", 3.0),
        (Plan, "strength", 3.0),
        (_scaled, "__defaults__", ((3.0,),)),
        (_scaled, "__kwdefaults__", {"kind": Reading}),
        (_scaled, "__code__", _doubled.__code__),
    ):
        if name == "__kwdefaults__":
            monkeypatch.setattr(Reading, "strength", 7.0, raising=False)
        monkeypatch.setattr(owner, name, value)
        wanted = module(x)
        assert before is None or not torch.equal(before, wanted), name
        before = wanted
        same(offloaded(x), wanted)

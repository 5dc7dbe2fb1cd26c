"""Arguments, numbers and results of offloaded modules are those of the modules."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sdrpc
from sdrpc.client import RemoteDevice
from sdrpc.device import Device
from sdrpc.errors import CaptureError, UsageError
from tests.lowering import models
from tests.lowering.compare import TOLERANCE, error
from tests.lowering.devices import ReferenceDevice
from tests.lowering.offloading import Calling, Scale, Scaled, same


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


class Given(nn.Module):
    def forward(self, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return function(x) * 2


@torch.no_grad()
def test_functions_and_modules_among_the_arguments_count_by_what_they_are_now() -> None:
    offloaded, x = sdrpc.offload(Given(), ReferenceDevice()), torch.ones(2, 3)
    factor, linear = [1.0], nn.Linear(3, 3)

    def scaled(x: Tensor) -> Tensor:
        return x * factor[0]

    for number in (1.0, 5.0):
        factor[0] = number
        linear.weight.data.mul_(number)
        same(offloaded(x, scaled), x * number * 2)
        same(offloaded(x, linear), linear(x) * 2)


@torch.no_grad()
def test_what_is_given_by_name_stays_so() -> None:
    """transformers' decorators look for names."""

    class Decorated(nn.Module):
        def named(self, x: Tensor, scale: Tensor | float = 1.0, flag: bool = False) -> Tensor:
            return x * scale if flag else x

        @functools.wraps(named)
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return self.named(*args, **{"flag": True, **kwargs})

    x = torch.ones(2)
    offloaded = sdrpc.offload(Decorated(), ReferenceDevice())
    for factor in (2.0, 3.0):
        same(offloaded(x=x, scale=factor), x * factor)
        same(offloaded(x, factor), x * factor)


@torch.no_grad()
def test_hidden_states_once_also_beside_the_original() -> None:
    """transformers puts its hooks on the parts, which both have, and notes that on one of them."""
    model, ids = models.text_encoder(), torch.arange(5)[None]
    offloaded = sdrpc.offload(model, ReferenceDevice())
    for _ in range(2):
        mine, theirs = (m(ids, output_hidden_states=True).hidden_states for m in (offloaded, model))
        for a, b in zip(mine, theirs, strict=True):
            same(a, b)


@torch.no_grad()
def test_padding_is_computed_as_by_torch() -> None:
    """Queries that see nothing have no attention."""
    from transformers import Qwen3Config, Qwen3Model

    sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = Qwen3Config(vocab_size=99, num_key_value_heads=1, head_dim=8, max_position_embeddings=64, **sizes)
    model, ids = models.randomized(Qwen3Model(config)), torch.tensor([[5, 7, 9, 11], [0, 0, 5, 7]])
    offloaded = sdrpc.offload(model, ReferenceDevice())
    mine, theirs = (m(ids, attention_mask=(ids > 0).long(), use_cache=False) for m in (offloaded, model))
    same(mine.last_hidden_state, theirs.last_hidden_state)

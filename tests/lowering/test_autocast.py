"""torch.autocast around offloaded modules and within them: dtypes are torch's, and numbers no worse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sdrpc
from sdrpc.errors import UsageError
from sdrpc.lowering import autocast
from sdrpc.lowering.lower import VOCABULARY
from tests.lowering import models
from tests.lowering.compare import error
from tests.lowering.devices import ReferenceDevice
from tests.lowering.offloading import Calling

PROMOTING = {"addcdiv", "addcmul", "cat", "dot", "index_put", "stack", "vdot"}
"""Operations whose operands get the widest of their dtypes, as they do without autocast."""


@pytest.mark.parametrize(("kind", "key"), [("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")])
def test_no_operation_of_torchs_lists_is_left_out(kind: str, key: str) -> None:
    """Of those that can be lowered."""
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::")}
    cast = {n.split("::")[1].split(".")[0] for n in names if torch._C._dispatch_has_kernel_for_dispatch_key(n, key)}
    lists = autocast.LISTS[kind]
    assert cast & VOCABULARY - lists.narrow - lists.wide <= PROMOTING


X, W = torch.randn(2, 4, 8), torch.randn(8, 8)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: x @ w,
        lambda x, w: torch.bmm(x, w[None].expand(2, -1, -1)),
        lambda x, w: F.layer_norm(x @ w, (8,)),
        lambda x, w: (x @ w) + x,
        lambda x, w: torch.cat([x @ w, x]),
        lambda x, w: F.conv1d(x, torch.ones(3, 4, 2)),
        lambda x, w: F.pad(x @ w, (1, 1), mode="reflect"),
        lambda x, w: F.scaled_dot_product_attention(x, x, x),
        lambda x, w: F.prelu(x, torch.ones(1)),
        lambda x, w: (x @ w).softmax(-1),
        lambda x, w: x.double() @ w.double(),
    ],
)
@torch.no_grad()
def test_operations_have_the_dtypes_of_autocast(function: Callable[..., Tensor]) -> None:
    offloaded = sdrpc.offload(Calling(function), ReferenceDevice())
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            mine, theirs = offloaded(X, W), function(X, W)
        assert mine.dtype == theirs.dtype
        assert error(mine.float().numpy(), theirs.float().numpy()) < 4 * torch.finfo(dtype).eps
    assert offloaded(X, W).dtype == function(X, W).dtype


class Switching(nn.Module):
    """Switches autocast by the kind of device that a tensor is on, as rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(x.device.type, enabled=False):
            exact = self.linear(x)
        with torch.amp.autocast(x.device.type, torch.bfloat16):
            narrow = self.linear(x)
        return exact, narrow, self.linear(x)


@torch.no_grad()
def test_autocast_within_a_module() -> None:
    module = Switching()
    offloaded = sdrpc.offload(module, ReferenceDevice())
    for enabled in (False, True):
        with torch.autocast("cpu", enabled=enabled):
            mine, theirs = offloaded(X), module(X)
        assert [t.dtype for t in mine] == [t.dtype for t in theirs]
        assert error(mine[0].numpy(), theirs[0].numpy()) < 1e-5


@torch.no_grad()
def test_parts_of_a_pipeline_under_autocast() -> None:
    """Further from float32 than what torch computes so they are not."""
    ids, vae = torch.arange(77)[None], Calling(models.vae().decode)
    calls: list[tuple[nn.Module, tuple[Any, ...]]] = [
        (models.unet((8, 16)), (torch.randn(1, 4, 4, 4), torch.tensor(3), torch.randn(1, 2, 24))),
        (models.text_encoder(), (ids,)),
        (vae, (torch.randn(1, 4, 3, 3),)),
    ]
    for module, arguments in calls:
        offloaded, exact = sdrpc.offload(module, ReferenceDevice()), module(*arguments)[0].numpy()
        with torch.autocast("cpu"):
            mine, theirs = offloaded(*arguments)[0], module(*arguments)[0]
        assert mine.dtype == theirs.dtype
        assert error(mine.float().numpy(), exact) <= 1.3 * error(theirs.float().numpy(), exact)


def test_autocast_of_other_devices_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autocast, "LISTS", {})
    with (
        torch.no_grad(),
        torch.autocast("cpu"),
        pytest.raises(UsageError, match=r"does not follow torch\.autocast of cpu"),
    ):
        sdrpc.offload(nn.Linear(3, 3), ReferenceDevice())(torch.ones(1, 3))

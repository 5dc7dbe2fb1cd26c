"""Weights in the form that a program computes with."""

from __future__ import annotations

import torch

from sdrpc.engine.weights import PIECE, Form, convert
from sdrpc.ggml.types import F16


def test_float16_is_rounded_to_bfloat16_piece_by_piece() -> None:
    columns = 3 * PIECE // 100 * torch.get_num_threads()  # three pieces and a bit
    numbers = torch.randn(101, columns, generator=torch.Generator().manual_seed(0)).half()
    for x in (numbers, numbers[:, ::3], numbers.mT, numbers[:1, :1], numbers[:0]):
        found = convert(x, F16, (1, 1, 1, 1), Form(torch.bfloat16))
        assert found.is_contiguous()
        torch.testing.assert_close(found, x.to(torch.bfloat16), rtol=0, atol=0)

"""Convolutions that are tried when a server starts, because they were computed before."""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from sdrpc.engine import LocalDevice, convolutions
from sdrpc.engine.compilation import Compiler, Origin
from sdrpc.engine.compilation import compiler as compiling
from sdrpc.engine.compilation.job import Job
from sdrpc.engine.convolutions import MOST, Convolution, decode, encode, try_out
from sdrpc.engine.precision import Precision
from sdrpc.ggml.tensor import Graph

CPU = torch.device("cpu")
FAST = Precision("fast", torch.bfloat16)
SECONDS = 300.0
ONE = Convolution((2, 8, 16, 12), (4, 8, 3, 3), (2, 1), (1, 1), (1, 1), "torch.float16", True)
OTHER = ONE._replace(image=(1, 8, 9, 9), kernel=(4, 8, 1, 1), padding=(0, 0), dtype="torch.float32", together=False)
THIRD = OTHER._replace(stride=(1, 1))


def test_convolutions_as_a_file() -> None:
    assert decode(encode([ONE, OTHER])) == [ONE, OTHER]
    assert len(decode(encode([ONE] * (MOST + 1)))) == MOST
    for each in (ONE, OTHER):
        try_out(each, CPU)


@pytest.mark.parametrize(
    "changed",
    [
        {"image": [2, 8, 16]},
        {"image": [1 << 10, 1 << 10, 1 << 10, 1 << 10]},
        {"kernel": [4, 8, 3, 0]},
        {"kernel": [4, 8, 3, True]},
        {"stride": [1.5, 1]},
        {"padding": [-1, 0]},
        {"dilation": 7},
        {"dtype": "torch.uint8"},
        {"dtype": []},
        {"together": 1},
    ],
)
def test_what_is_no_convolution_is_refused(changed: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="convolution"):
        decode(json.dumps([list((ONE._asdict() | changed).values())]).encode())


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"[[]]", b"7", b'{"a": 1}', b"\xff", b"[" * 100_000])
def test_what_is_no_file_of_them_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 json says what is wrong, or we
        decode(data)


def test_they_are_kept_for_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(convolutions, "_noted", OrderedDict())
    job = Job(Origin(Graph(()), FAST, {}, {}), CPU, (), 1)
    compiler = Compiler(tmp_path)
    assert compiler.find(job).result(SECONDS) is None
    assert not list(tmp_path.iterdir()), "a CPU's are not noted"
    for each in (ONE, OTHER, ONE):
        convolutions._note(each)
    assert compiler.find(job).result(SECONDS) is None
    assert compiler.convolutions(CPU, 1) == [OTHER, ONE]
    assert compiler.convolutions(CPU, 2) == [], "that is as another device"
    convolutions._note(THIRD)
    convolutions._noted.popitem(last=False)
    assert compiler.find(job).result(SECONDS) is None
    assert compiler.convolutions(CPU, 1) == [OTHER, ONE, THIRD]

    tried: list[Convolution] = []
    monkeypatch.setattr("sdrpc.engine.device.try_out", lambda one, _: tried.append(one))
    monkeypatch.setattr(compiling, "prepare", lambda: None)
    device = LocalDevice("CPU", CPU, FAST, threads=1, compiler=compiler)
    assert device.warm()
    device.close()
    assert tried == [THIRD, ONE, OTHER], "the last ones first"
    with caplog.at_level(logging.WARNING):
        (path,) = tmp_path.iterdir()
        path.write_bytes(b"[1]")
        assert compiler.convolutions(CPU, 1) == []
    assert "no convolutions" in caplog.text
    compiler.close()

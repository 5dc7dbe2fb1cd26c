"""Checkpoints of torch.save: what torch reads from them, and that nothing in them is run."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdrpc.checkpoints import pickled
from sdrpc.checkpoints.checkpoint import open_checkpoint
from sdrpc.errors import CheckpointError
from tests.checkpoints.test_expressions import address, numbers

DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
]
DTYPES += [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("protocol", [2, 4])
def test_tensors_are_those_of_torch(dtype: torch.dtype, protocol: int, tmp_path: Path) -> None:
    base = torch.randn(4, 6, 2).mul(50).to(dtype)
    state = {
        "whole": base, "part": base[1:3], "moved": base.permute(2, 0, 1), "scalar": base[0, 0, 0], "empty": base[:0],
        "columns": base[:, 1:3], "parameter": torch.nn.Parameter(torch.ones(2)),
    }  # fmt: skip
    path = tmp_path / "m.ckpt"
    torch.save({"state_dict": state, "epoch": 3, "hyper": {"lr": 0.1}}, path, pickle_protocol=protocol)
    checkpoint = open_checkpoint(path)
    assert list(checkpoint.tensors) == ["whole", "part", "moved", "scalar", "empty", "parameter"]
    assert list(checkpoint.skipped) == ["columns"]
    assert "strides" in checkpoint.skipped["columns"]
    for name in ("whole", "part", "moved", "scalar", "empty"):
        got = torch.from_numpy(numbers(checkpoint.tensors[name]).astype(np.float64))
        assert torch.equal(got, state[name].to(torch.float32 if dtype == torch.float64 else dtype).double()), name


def test_storages_are_views_of_the_file(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(100.0), "b": torch.arange(100.0)}, tmp_path / "m.pt")
    tensors = open_checkpoint(tmp_path / "m.pt").tensors
    assert tensors["a"].data().obj is tensors["b"].data().obj  # the mapping
    assert address(tensors["a"].data()) % 64 == 0


def test_dictionaries_in_dictionaries(tmp_path: Path) -> None:
    inner: dict[Any, Any] = {"conv.weight": torch.ones(2), 5: torch.ones(1)}
    loop: dict[str, Any] = {"params_ema": inner, "x": 1}
    loop["self"] = loop
    torch.save(
        {"model": loop, "state_dict": {"model_ema.decay": torch.ones(1), "model.w": torch.ones(1)}}, tmp_path / "m.pt"
    )
    assert list(open_checkpoint(tmp_path / "m.pt").tensors) == [
        "model.params_ema.conv.weight",
        "model_ema.decay",
        "model.w",
    ]
    torch.save([1, 2], tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="no tensors by name"):
        open_checkpoint(tmp_path / "m.pt")


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, how: int, mark: Path) -> None:
        self.call = [(os.system, (f"touch {mark}",)), (exec, (f"open({str(mark)!r}, 'w')",)), (eval, ("1/0",))][how]

    def __reduce__(self) -> Any:
        return self.call


class Setting:
    """Has a state that would be set."""

    def __init__(self) -> None:
        self.x = 1

    def __setstate__(self, state: Any) -> None:
        raise AssertionError("was run")


@pytest.mark.parametrize("how", range(3))
@pytest.mark.parametrize("protocol", [2, 4])
def test_nothing_is_run(how: int, protocol: int, tmp_path: Path) -> None:
    """The tensors beside it are read; whatever is called is not."""
    mark = tmp_path / "mark"
    content = {"bad": Hostile(how, mark), "w": torch.ones(3), "s": Setting(), "set": {1, 2}, "n": np.float32(1)}
    torch.save(content, tmp_path / "m.ckpt", pickle_protocol=protocol)
    assert list(open_checkpoint(tmp_path / "m.ckpt").tensors) == ["w"]
    (tmp_path / "old.ckpt").write_bytes(pickle.dumps(content, protocol))
    with pytest.raises(CheckpointError, match=r"old form.* python -c .*weights_only=True"):
        open_checkpoint(tmp_path / "old.ckpt")
    assert not mark.exists()


def test_files_of_old_torch_say_what_converts_them(tmp_path: Path) -> None:
    path = tmp_path / "m.ckpt"
    torch.save({"w": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="old form") as caught:
        open_checkpoint(path)
    command = str(caught.value).split("convert it with: ")[1]
    code = command.removeprefix('python -c "').removesuffix('"')
    exec(code)
    assert list(open_checkpoint(tmp_path / "m.safetensors").tensors) == ["w"]


def archive(path: Path, entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as out:
        for name, content in entries.items():
            out.writestr(name, content)


def entries_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archived:
        return {name: archived.read(name) for name in archived.namelist()}


def test_archives_that_are_no_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save({"w": torch.ones(100)}, path)
    entries = entries_of(path)
    whole = path.read_bytes()
    for content, reason in (
        (lambda: archive(path, entries, zipfile.ZIP_DEFLATED), "is compressed"),
        (lambda: archive(path, {"a.txt": b"x"}), r"is a zip archive without data\.pkl"),
        (
            lambda: archive(path, {"x/a.safetensors": b"x", "b.txt": b"y"}, zipfile.ZIP_DEFLATED),
            r"is a zip archive with 'x/a\.safetensors' in it: unpack it first",
        ),
        (lambda: archive(path, entries | {"m/byteorder": b"big"}), "big-endian"),
        (lambda: archive(path, entries | {"m/data/0": b"1234"}), "outside of its storage"),
        (lambda: archive(path, {name: data for name, data in entries.items() if name != "m/data/0"}), "no storage '0'"),
        (lambda: archive(path, entries | {"m/data.pkl": b"\x80\x02" + b"(" * 100}), "pickle is not understood"),
        (lambda: path.write_bytes(whole[: len(whole) // 2]), "damaged or incomplete"),
    ):
        content()
        with pytest.raises(CheckpointError, match=reason):
            open_checkpoint(path)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, bytes]:
    path = tmp_path_factory.mktemp("pickle") / "m.pt"
    torch.save({"state_dict": {"a": torch.ones(4, 4).t(), "b": torch.ones(3).half()}, "n": [1, {2: "x"}]}, path)
    return path, path.read_bytes(), entries_of(path)["m/data.pkl"]


@settings(max_examples=200)
@given(st.data())
def test_any_damage_is_an_error_of_ours(good: tuple[Path, bytes, bytes], data: st.DataObject) -> None:
    path, whole, pickle_bytes = good
    content = bytearray(whole)
    begin = whole.index(pickle_bytes)
    for _ in range(data.draw(st.integers(1, 4))):
        inside = st.integers(begin, begin + len(pickle_bytes) - 1)
        content[data.draw(inside | st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.just(len(content)) | st.integers(1, len(content)))])
    try:
        for weight in open_checkpoint(path).tensors.values():
            assert len(weight.data()) == weight.nbytes
    except CheckpointError:
        return


def test_a_pickle_that_would_take_for_ever_to_hash() -> None:
    """Nested tuples as a key: 2 to the 60 steps for whoever hashes them."""
    stream = b"\x80\x04}N" + b"2\x86" * 60 + b"K\x01s."
    assert pickled._interpret(stream) == {}
    assert pickled._interpret(io.BytesIO(pickle.dumps({"a": [1, (2, 3)], "b": None})).getvalue()) == {
        "a": [1, (2, 3)],
        "b": None,
    }

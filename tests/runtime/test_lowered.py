"""Lowered modules as bytes and on disk: the same results, no torch, and nothing that damage can do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sdrpc.errors import GraphError
from sdrpc.lowering.capture import capture
from sdrpc.lowering.lower import lower
from sdrpc.runtime.cache import SUFFIX, Cache, default_folder, key
from sdrpc.runtime.lowered import DIGEST_BYTES, MAGIC, Lowered, from_bytes, to_bytes
from sdrpc.runtime.run import Executable
from sdrpc.targets import PORTABLE, SDRPC
from tests.lowering.devices import ReferenceDevice
from tests.runtime.test_run import Small, arrays, inputs, lowered, weights


def constants() -> Lowered:
    """A graph with constants of several types, a known result and an unread input."""

    def call(_: nn.Module, x: torch.Tensor, unread: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rows = x[torch.tensor([2, 0])] * torch.tensor([[1.5, 2.5]])
        return rows, torch.tensor([True, False]), torch.arange(2)

    return lower(capture(nn.Module(), {"x": torch.ones(3, 2), "unread": torch.ones(1)}, call), SDRPC, {})


def test_a_module_from_bytes_gives_the_same_results() -> None:
    module = Small()
    again = from_bytes(to_bytes(lowered(module)))
    with Executable(again, ReferenceDevice(), weights(module)) as run, torch.no_grad():
        np.testing.assert_allclose(run(**arrays(inputs()))[0], module(**inputs()), rtol=1e-4, atol=1e-5)


def test_constants_and_known_results_are_kept() -> None:
    original = constants()
    data = to_bytes(original)
    again = from_bytes(data)
    assert to_bytes(again) == data
    given_arrays = {"x": np.arange(6, dtype=np.float32).reshape(3, 2), "unread": np.zeros(1, np.float32)}
    for module in (original, again):
        rows, flags, numbers = Executable(module, ReferenceDevice(), {})(**given_arrays)
        np.testing.assert_array_equal(rows, [[6, 12.5], [0, 2.5]])
        assert flags.tolist() == [True, False]
        assert numbers.tolist() == [0, 1]


DATA = to_bytes(constants())
BODY = DATA[len(MAGIC) + DIGEST_BYTES :]


def sealed(body: bytes) -> bytes:
    """``body`` with a right digest: damage that the digest can't see."""
    return MAGIC + blake2b(body, digest_size=DIGEST_BYTES).digest() + body


@given(at=st.integers(0, len(BODY) - 1), value=st.integers(0, 255), cut=st.booleans())
def test_damaged_bytes_are_a_module_or_a_graph_error(at: int, value: int, cut: bool) -> None:
    body = BODY[:at] if cut else BODY[:at] + bytes([value]) + BODY[at + 1 :]
    with suppress(GraphError):
        from_bytes(sealed(body))
    if body != BODY:
        with pytest.raises(GraphError):
            from_bytes(DATA[: len(MAGIC) + DIGEST_BYTES] + body)


@given(table=st.recursive(st.none() | st.integers() | st.text(max_size=3), lambda x: st.lists(x, max_size=4)))
def test_tables_of_anything_are_refused(table: object) -> None:
    graph_size = int.from_bytes(BODY[8:16], "little")
    rest = BODY[16 + int.from_bytes(BODY[:8], "little") :]
    for part in ("inputs", "weights", "constants", "outputs"):
        text = json.dumps({"inputs": [], "weights": [], "constants": [], "outputs": [], part: table}).encode()
        body = len(text).to_bytes(8, "little") + graph_size.to_bytes(8, "little") + text + rest
        with pytest.raises(GraphError):
            from_bytes(sealed(body))


def test_a_cache_makes_each_module_once(tmp_path: Path) -> None:
    cache, made = Cache(tmp_path), []

    def make() -> Lowered:
        made.append(1)
        return constants()

    first, second = cache.load("a", make), cache.load("a", make)
    assert len(made) == 1
    assert to_bytes(first) == to_bytes(second)
    path = tmp_path / f"a{SUFFIX}"
    path.write_bytes(path.read_bytes()[:-1])
    assert cache.get("a") is None
    cache.load("a", make)
    assert len(made) == 2
    assert cache.get("b") is None
    assert [path.name for path in tmp_path.iterdir()] == [f"a{SUFFIX}"]


def test_a_cache_stays_within_its_budget(tmp_path: Path) -> None:
    cache = Cache(tmp_path, budget=2 * len(DATA))
    for age, name in enumerate("abc"):
        cache.put(name, constants())
        os.utime(tmp_path / f"{name}{SUFFIX}", (age, age))
    assert cache.get("b") is not None  # used now: "c" is the older one from here on
    cache.put("d", constants())
    assert {path.stem for path in tmp_path.iterdir()} == {"b", "d"}


def test_a_file_that_can_not_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Lowered) -> bytes:
        raise OSError("no space left")

    monkeypatch.setattr("sdrpc.runtime.cache.to_bytes", refuse)
    with pytest.raises(OSError, match="no space left"):
        Cache(tmp_path).put("a", constants())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_can_not_be_made_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    made = constants()
    assert Cache(tmp_path / "file" / "graphs").load("a", lambda: made) is made
    assert "graphs are not kept" in caplog.text


def test_keys_tell_targets_and_facts_apart() -> None:
    facts = {"module": "x", "inputs": {"a": [1, 2]}}
    assert key(SDRPC, **facts) == key(SDRPC, **dict(reversed(facts.items())))
    assert len({key(SDRPC, **facts), key(PORTABLE, **facts), key(SDRPC, module="y"), key(SDRPC)}) == 4


def test_the_folder_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SDRPC_CACHE", str(tmp_path))
    assert Cache().folder == default_folder() == tmp_path / "graphs"
    monkeypatch.delenv("SDRPC_CACHE")
    assert default_folder().name == "graphs"


def test_cached_graphs_run_without_torch() -> None:
    code = "import sdrpc.runtime.run, sdrpc.runtime.cache, sys; assert not {'torch', 'gguf'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

"""A second run of sd-cli sends no weights: the server has them, also when it was started again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sdrpc.storage import cache_folder
from tests.cli.conftest import Outcome
from tests.interop.tap import Tap
from tests.server.conftest import eventually
from tests.support.process import ServerProcess

SMALL = ("-p", "a lovely cat", "-W", "64", "-H", "64", "--steps", "1", "--disable-image-metadata")


def test_weights_cross_the_wire_once(
    sd: Callable[..., Outcome], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDRPC_CACHE", str(tmp_path / "cache"))  # other tests' servers keep the same weights

    def sent(name: str) -> int:
        """Bytes of tensors for a picture ``name``: weights and inputs, without the questions."""
        with Tap(f"127.0.0.1:{server.port}") as tap:
            outcome = sd("-m", checkpoint, *SMALL, "--rpc", tap.endpoint, "-o", tmp_path / name)
        assert outcome.status == 0, outcome.err
        assert 0 < tap.bytes["SET_RANGES_DIGEST"] < 0.01 * checkpoint.stat().st_size
        return tap.bytes["SET_TENSOR"]

    with ServerProcess("--precision", "exact", "-d", "CPU", "--cache", "--cache-size", "1G") as server:
        first = sent("1.png")
        assert first > 0.9 * checkpoint.stat().st_size
        assert f"local cache    : {cache_folder('weights')} (at most 1024 MiB)" in server.output
        assert eventually(lambda: not list(cache_folder("weights").glob("*.part")))
        second = sent("2.png")
    with ServerProcess("--precision", "exact", "-d", "CPU", "-c") as server:
        third = sent("3.png")
    assert (second / first, third / first) < (0.01, 0.01), (first, second, third)
    assert len({(tmp_path / name).read_bytes() for name in ("1.png", "2.png", "3.png")}) == 1

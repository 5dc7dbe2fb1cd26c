"""Files that are kept: whole or not there, private, within limits; folders that are missing, read-only or deleted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sdrpc import content, storage
from sdrpc.client import Keychain
from sdrpc.client.endpoint import Endpoint
from sdrpc.client.names import Names
from sdrpc.errors import UsageError
from sdrpc.ggml.weight import Origin
from sdrpc.server import Cache, Learning
from sdrpc.text import printable


@pytest.fixture(autouse=True)
def no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SDRPC_CACHE", "SDRPC_STATE"):
        monkeypatch.delenv(name, raising=False)


def test_one_policy_for_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert storage.cache_folder("graphs").parts[-2:] == ("sdrpc", "graphs")
    assert storage.state_folder().name == "sdrpc"
    monkeypatch.setenv("SDRPC_CACHE", str(tmp_path / "c"))
    monkeypatch.setenv("SDRPC_STATE", str(tmp_path / "s"))
    assert storage.cache_folder("graphs") == tmp_path / "c" / "graphs"
    assert storage.cache_folder("weights") == tmp_path / "c" / "weights"
    assert storage.state_folder() == tmp_path / "s"


NO_HOME = """
import logging, os, sys
logging.basicConfig(level=logging.WARNING)
import platformdirs
def nowhere(name):
    raise RuntimeError("could not determine the home directory")
platformdirs.user_cache_path = platformdirs.user_state_path = nowhere
from sdrpc.client.names import Names
from sdrpc.ggml.weight import Origin
from sdrpc.server import Learning
from sdrpc.server.negotiation import default_path
from sdrpc.wire.hello import NATIVE, Hello
names = Names()
names.put(Origin("file", "0"), bytes(32))
names.save()
names.save()
protocol = Learning(default_path())
protocol.accepted("192.168.1.5", Hello(True, NATIVE), "5.0.1")
print(names.get(Origin("file", "0")) == bytes(32), protocol.offer("192.168.1.5", Hello(True, NATIVE)).name)
"""


def test_without_a_home_nothing_is_kept_and_everything_works() -> None:
    done = subprocess.run([sys.executable, "-c", NO_HOME], capture_output=True, text=True, check=True)
    assert done.stdout == "True 5.0 or 5.1\n"
    assert "Traceback" not in done.stderr
    assert done.stderr.count("set HOME, or SDRPC_CACHE and SDRPC_STATE") == 1


def test_a_tilde_that_no_shell_has_read_is_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As a unit of systemd or a container says it; a folder called ~ was made."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in ("SDRPC_CACHE", "SDRPC_STATE"):
        monkeypatch.setenv(variable, "~/data")
    assert storage.cache_folder("graphs") == tmp_path / "data" / "graphs"
    assert storage.state_folder() == tmp_path / "data"


def test_cache_folder_deleted_meanwhile_is_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    storage.write_whole(folder / "x", b"1")
    (folder / "x").unlink()
    folder.rmdir()
    storage.write_whole(folder / "x", b"2")
    assert storage.read_own(folder / "x", 10) == b"2"
    assert (folder / "x").stat().st_mode & 0o077 == 0
    cache = Cache(tmp_path / "weights", 1 << 20)
    (tmp_path / "weights").rmdir()
    cache.shrink()
    file, part = cache.create()
    file.write(b"abc")
    file.close()
    cache.commit(part, bytes(32), 3)
    found = cache.open(bytes(32), 3)
    assert found is not None
    with found:
        assert found.read() == b"abc"


def test_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    storage.write_whole(path, b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        storage.write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_not_a_regular_file_of_ours_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "link").symlink_to(tmp_path / "secret")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    before = len(os.listdir("/proc/self/fd"))
    for name in ("link", "folder", "pipe", "missing"):
        for _ in range(20):
            assert storage.open_own(tmp_path / name) is None
            assert storage.read_own(tmp_path / name, 100) is None
    assert len(os.listdir("/proc/self/fd")) == before
    assert storage.read_own(tmp_path / "secret", 6) == b"secret"
    assert storage.read_own(tmp_path / "secret", 5) is None


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    for i in range(6):
        path = tmp_path / f"{i}.x"
        path.write_bytes(bytes(10))
        os.utime(path, ns=(i, i))
    (tmp_path / "other").write_bytes(bytes(1000))
    storage.mark_used(tmp_path / "1.x")
    kept = storage.shrink(tmp_path, ".x", 35)
    assert [entry.path.name for entry in kept] == ["1.x", "5.x", "4.x"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.x", "4.x", "5.x", "other"]
    assert [entry.path.name for entry in storage.shrink(tmp_path, ".x", 35, 1)] == ["1.x"]
    assert storage.shrink(tmp_path / "gone", ".x", 35) == []


def test_a_folder_for_others_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(UsageError, match="others can write"):
        storage.make_own(folder)
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(UsageError, match="symbolic link"):
        storage.make_own(tmp_path / "link")


def test_names_survive_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    names = Names(tmp_path / "file" / "digests")
    names.put(Origin("f", "0"), bytes(32))
    names.save()
    assert names.get(Origin("f", "0")) == bytes(32)
    assert Learning(tmp_path / "file" / "clients.json").dialect
    assert Keychain(path=tmp_path / "file" / "servers.json").credentials(Endpoint("box", 50052)) == []


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("plain – text, ümläut", "plain – text, ümläut"),
        ("\x1b[2J\x1b]0;title\x07", "\\x1b[2J\\x1b]0;title\\x07"),
        ("a\nerror: b\r", "a\\nerror: b\\r"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("\x9b31m", "\\x9b31m"),
    ],
)
def test_text_of_others_stays_in_its_line(text: str, wanted: str) -> None:
    assert printable(text) == wanted


def test_numba_cache_read_only_hashing_is_compiled_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """numba's words where neither the package's folder nor the home can be written to, as in a container."""
    numba = pytest.importorskip("numba")
    njit = numba.njit

    def read_only(*args: object, cache: bool = False, **named: object) -> object:
        if cache:
            raise RuntimeError("cannot cache function 'chain': no locator available for file 'content.py'")
        return njit(*args, **named)

    monkeypatch.setattr(numba, "njit", read_only)
    fnv = content._compiled.__wrapped__()
    assert fnv is not None
    assert fnv(b"a", content.FNV_START) == 0xAF63DC4C8601EC8C  # the FNV authors' test vector

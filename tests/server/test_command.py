"""rpc-server as its users meet it: real processes."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sdrpc.cli import rpc_server
from sdrpc.cli.rpc_server import COMMAND, choose
from sdrpc.cli.values import Size
from sdrpc.client import Keychain, connect
from sdrpc.errors import KeyNeeded, UsageError
from sdrpc.ggml.dialect import Version, dialects
from sdrpc.key import Key
from sdrpc.server import Cache
from sdrpc.server.key_ring import KeyRing
from sdrpc.wire import messages
from sdrpc.wire.framing import drive, encode_request, read_reply
from sdrpc.wire.messages import Command
from tests.server.conftest import eventually
from tests.support.client import Adder, RawClient, busy
from tests.support.process import ServerProcess

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """rpc-server in this process, with options that make it end by itself: status, output, errors in one line."""

    def run(*options: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rpc-server", *options])
        monkeypatch.setattr(rpc_server, "ready", lambda: None)  # that is for a process of its own
        with pytest.raises(SystemExit) as end:
            rpc_server.main()
        out, err = capfd.readouterr()
        return int(end.value.code or 0), out, " ".join(err.replace("│", " ").split())

    return run


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess("--precision", "exact", "--protocol", "5.0", "-v", "--device", "cpu") as process:
        yield process


def test_it_says_what_it_offers_and_serves_it(server: ServerProcess) -> None:
    with RawClient(server.port, dialects()["5.0.1"], 160) as client:
        Adder(client)()
    assert "Starting RPC server v5.0.1\n" in server.output
    assert re.search(r"^  CPU: .+ \(\d+ MiB, \d+ MiB free\)$", server.output, re.MULTILINE)
    assert f"  endpoint       : 127.0.0.1:{server.port}\n" in server.output
    assert "warning" not in server.output


def test_the_size_of_no_cache_has_no_effect(run: Run) -> None:
    assert "--cache-size has no effect without --cache" in run("--version", "--cache-size", "3G")[2]
    assert run("--version", "--cache", "--cache-size", "3G")[2] == ""


def test_a_port_in_use_is_one_clear_line(server: ServerProcess, run: Run) -> None:
    status, _, err = run("--port", str(server.port))
    assert status == 2
    assert re.fullmatch(rf"error: can't listen on 127.0.0.1:{server.port}: .*in use.*--port 0.*", err)


def test_ctrl_c_in_the_middle_of_a_computation(server: ServerProcess) -> None:
    """Status 0, no traceback, in a moment: a thread that gets no processor meanwhile logs nothing any more. (The last
    test that uses this server.)"""
    with RawClient(server.port, dialects()["5.0.1"]) as client:
        busy(client)
        with pytest.raises(subprocess.TimeoutExpired):
            server.process.wait(0.5)
        server.process.send_signal(signal.SIGINT)
        assert server.wait() == 0
        assert client.ended() == ""
    assert "Traceback" not in server.output


LATE = """
import threading, torch
from sdrpc.cli.entry import rpc_server
from sdrpc.engine.device import LocalDevice
from sdrpc.server import listener

def free(device, buffer):
    while threading.current_thread() is not threading.main_thread():
        torch.ones(300, 300) @ torch.ones(300, 300)

LocalDevice.free = free
listener._JOIN_SECONDS = 0.1
rpc_server()
"""


def test_a_thread_that_is_not_done_ends_with_the_server() -> None:
    """On a busy machine a client's own may give its memory back long after it was told to: torch calls abort() when it
    comes back to a Python that is gone."""
    with (
        ServerProcess("--device", "CPU", python=(sys.executable, "-c", LATE)) as server,
        RawClient(server.port) as client,
    ):
        client.buffer(100)
        server.process.send_signal(signal.SIGINT)
        assert (server.wait(), server.output.count("Traceback")) == (0, 0)


def test_versions_are_learnt_and_kept_for_the_next_server(tmp_path: Path) -> None:
    """A client of 7.0 is told 8.0 first, and hangs up; then 7.0, by this server and by the next one."""
    with ServerProcess("--device", "CPU", state=tmp_path) as server:
        with RawClient(server.port, dialects()["7.0.0"]) as client:
            assert client.hello.version == (8, 0, 0)
        assert eventually(lambda: "--protocol with its version" in " ".join(server.output.split()))
        serves(server, (7, 0, 0))
        assert "Starting RPC server v3.6.0 to v8.0.0, as each client wants it\n" in server.output
    with ServerProcess("--device", "CPU", state=tmp_path) as server:
        serves(server, (7, 0, 0))
    assert (tmp_path / "clients.json").is_file()


def serves(server: ServerProcess, told: Version) -> None:
    with RawClient(server.port, dialects()["7.0.0"]) as client:
        assert client.hello.version == told
        Adder(client)()


def test_a_key_lets_another_machine_in_and_sigterm_ends_it(tmp_path: Path) -> None:
    """The line that is printed is for sd-cli as it is; this machine is let in without."""
    ours = ("--allow-from", "127.0.0.1")  # in a container, too
    with ServerProcess("--host", "0.0.0.0", "--device", "CPU", *ours, state=tmp_path) as server:
        with RawClient(server.port) as client:
            Adder(client)()
            (line,) = re.findall(r"other machines : sd-cli (--rpc \S+:\d+) --rpc-key (\S+)\n", server.output)
            assert line[0].endswith(f":{server.port}")
            server.process.terminate()
            assert server.wait() == 0
            assert client.ended() == ""
        assert "Traceback" not in server.output
        assert "warning" not in server.output
    key = Key.parse(line[1])
    assert [(each.name, each.key) for each in KeyRing(tmp_path / "keys.json").all()] == [("default", key)]
    with ServerProcess("--host", "0.0.0.0", "--device", "CPU", "--require-key", state=tmp_path) as server:
        (device,) = connect([f"127.0.0.1:{server.port}"], keychain=Keychain([(None, key)], tmp_path / "client.json"))
        device.close()
        with pytest.raises(KeyNeeded):
            connect([f"127.0.0.1:{server.port}"], keychain=Keychain(path=tmp_path / "other.json"))
        assert "there are default (rpc-server keys show default)" in server.output
        assert key.code not in server.output, "it is shown once, and then on terminals only"


def test_a_terminal_that_is_closed_is_as_sigterm() -> None:
    """Clients were cut off in the middle of what they told. A shell passes the signal on, and the system sends it once
    more when the shell has ended."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs this may have it ignored
    try:
        server = ServerProcess("--device", "CPU")
    finally:
        signal.signal(signal.SIGHUP, before)
    with server, RawClient(server.port) as idle, RawClient(server.port) as client:
        Adder(idle)()
        tensor, data = client.record(client.buffer(4000), (1000,)), bytes(range(250)) * 16
        message = b"".join(encode_request(messages.SetTensor(tensor, 0, 0, data), client.dialect, 64))
        question = b"".join(encode_request(messages.GetAlignment(0), client.dialect, 64))
        client.send(question + message[:-1000])
        drive(read_reply(Command.GET_ALIGNMENT, client.dialect), client.receive)  # it has come, and most of the other
        server.process.send_signal(signal.SIGHUP)
        assert idle.ended() == ""
        server.process.send_signal(signal.SIGHUP)
        client.send(message[-1000:])
        assert client.get(tensor, 4000) == data
        assert client.ended() == ""
        assert server.wait() == 0
        assert "Traceback" not in server.output


@pytest.mark.parametrize("option", [("--plain",), ("--allow-from", "10.0.0.0/8,fd00::/8")], ids=["plain", "allow"])
def test_letting_others_in_without_a_key_is_warned_of_once(option: tuple[str, ...]) -> None:
    with ServerProcess("--host", "0.0.0.0", "--device", "CPU", *option) as server:
        assert server.port
        assert eventually(lambda: "warning" in server.output)
        said = " ".join(server.output.split())
    where = "anywhere" if option == ("--plain",) else "10.0.0.0/8, fd00::/8"
    assert re.search(rf"warning: whoever can reach 0\.0\.0\.0:\d+ from {re.escape(where)} can use", said)
    assert said.count("warning") == 1
    assert ("--rpc-key" in said) == (option != ("--plain",)), "no key is made where nobody needs one"


def test_in_a_container_whose_port_is_published_this_machine_is_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {"plain": False, "require_key": False, "allow_from": (), "host": "0.0.0.0"}
    for inside in (False, True):
        monkeypatch.setattr(rpc_server, "in_container", lambda inside=inside: inside)
        assert rpc_server.policy(chosen).local == (not inside)
        assert rpc_server.policy(chosen | {"host": "127.0.0.1"}).local
        assert rpc_server.policy(chosen | {"host": "localhost"}).local


def test_keys_are_made_shown_listed_and_revoked(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDRPC_STATE", str(tmp_path))
    assert "no keys" in run("keys", "list")[2]
    status, code, _ = run("keys", "add", "laptop")
    assert status == 0
    key = Key.parse(code)
    assert Key.parse(run("keys", "show", "laptop")[1]) == key
    run("keys", "add", "guest")
    _, listed, _ = run("keys", "list")
    assert "laptop" in listed
    assert "guest" in listed
    assert key.code not in listed
    assert run("keys", "revoke", "laptop")[0] == 0
    assert [each.name for each in KeyRing(tmp_path / "keys.json").all()] == ["guest"]
    assert "revoke" in run("keys")[1]


def test_devices_are_listed_without_serving(run: Run) -> None:
    status, out, _ = run("--list-devices")
    assert status == 0
    assert re.search(r"^  CPU: .+ \(\d+ MiB, \d+ MiB free\)$", out, re.MULTILINE)


MISTAKES = {
    "--grace -1": "--grace.*-1",
    "--compute-limit 0": "--compute-limit.*0",
    "--device CUDA99": "device CUDA99: there is no such device; there are .*CPU",
    "--device CPU,CPU": "a device is named twice",
    "--protocol 2.0": "--protocol 2.0: there are auto, 3.6.0, .* 8.0.0",
    "--precision sloppy": "--precision sloppy: .*there are auto, exact, fast, ggml",
    "--max_memory lots": "--max-memory lots: not a size",
    "--dequant-cache lots": "--dequant-cache lots: not a size",
    "--warm --compile off": "error: --warm has nothing to load with --compile off",
    "--max-memory 0": "--max-memory 0: 0 bytes are too few; write 512M or 2G",
    "--max-memory-per-client 8": "--max-memory-per-client 8: 8 bytes are too few",
    "--cache --cache-size 0": "--cache-size 0: 0 bytes are too few",
    "--cache --cache-size much": "--cache-size much: not a size",
    "--host no.such.host.invalid": "can't listen on no.such.host.invalid:50052",
    "--host 192.0.2.1": r"can't listen on 192.0.2.1:50052: .* \(this machine has no such address; 0\.0\.0\.0 means all",
    "--port 70000": "65535",
    "--nonsense": "--nonsense",
    "-m 8000": "error: -m: .*--max-memory 8G",
    "--plain --allow-from 10.0.0.0/8": "error: --plain lets everybody in, so --allow-from means nothing",
    "--plain --require-key": "error: --plain lets everybody in, so --require-key means nothing",
    "--allow-from here": "--allow-from here: not a network",
    "--allow-from 10.0.0.0/33": "--allow-from 10.0.0.0/33: not a network",
    "--allow-from ::ffff:10.0.0.0/104": "IPv4 is written as such",
    "keys add": "NAME",
    "keys add a/b": "name a/b: up to 32 letters",
    "keys lose laptop": "lose",
    "-p 0 keys add laptop": "keys comes first, before any option: rpc-server keys --help",
    "serve": "'serve' belongs to no option",
}


@pytest.mark.parametrize("options", MISTAKES)
def test_mistakes_are_one_clear_line(options: str, run: Run) -> None:
    status, out, err = run(*options.split())
    assert status == 2
    assert re.search(MISTAKES[options], err)
    assert "Traceback" not in err
    assert out == ""


def test_without_numba_a_cache_says_whom_it_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for fnv in (lambda data, state: state, None):
        monkeypatch.setattr(rpc_server, "fnv1a", lambda fnv=fnv: fnv)
        with rpc_server.cache_service(Cache(tmp_path / "weights", 1 << 20)) as cache_service:
            assert cache_service is not None
        said = " ".join(capfd.readouterr().err.split())
        assert ("can't use the cache" in said and "pip install 'sdrpc[cache]'" in said) == (fnv is None)


def test_a_cache_that_others_can_write_to_is_refused(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDRPC_CACHE", str(tmp_path))
    weights = tmp_path / "weights"
    weights.mkdir()
    weights.chmod(0o777)
    status, _, err = run("--cache")
    assert status == 2
    assert re.fullmatch(rf"error: --cache: others can write to {weights}: .*chmod 700\)", err)


@pytest.mark.parametrize("option", ["-h", "--version", "--cache-size=x -c"])
def test_it_answers_before_torch_is_there(option: str) -> None:
    code = (
        "import sys; from sdrpc.cli.rpc_server import main\n"
        f"sys.argv = ['rpc-server', *{option.split()!r}]\n"
        "try: main()\nexcept SystemExit: pass\n"
        "sys.exit(bool({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("columns", ["80", "120"])
def test_c9_help_is_complete_and_grouped(run: Run, monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    status, text, _ = run("--help")
    assert status == 0
    shown = " ".join(text.split())
    for option in COMMAND.options:
        for name in option.opts:
            assert re.search(rf"(^| ){re.escape(name)}\b", shown), name
    for group in dict.fromkeys(option.group for option in COMMAND.options):
        assert f"\n{group}:\n" in text
    for default in ("[default: 50052]", "[default: 32G]", "[default: all accelerators, else CPU]", "[default: auto]"):
        assert default in shown
    for noise in ("<int", "Sentinel", "None", "…", "\x1b"):
        assert noise not in text
    assert max(map(len, text.splitlines())) <= int(columns)
    text.encode("ascii")


@pytest.mark.parametrize("shell_name", ["bash", "zsh", "fish"])
def test_c17_completion(run: Run, shell_name: str) -> None:
    status, script, _ = run("--completion", shell_name)
    assert status == 0
    assert "_RPC_SERVER_COMPLETE" in script


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("8", "8.0.0"),
        ("7", "7.0.0"),
        ("6", "6.0.0"),
        ("v5.0.0", "5.0.0"),
        ("5.0", "5.0.1"),
        ("5", "5.1.0"),
        ("3.6", "3.6.1"),
    ],
)
def test_protocols(text: str, version: str) -> None:
    assert choose(text).version == version


@pytest.mark.parametrize("text", ["2", "6.1", "5.", "7.0.0.0", "x", "70"])
def test_protocols_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match=r"there are auto, 3\.6\.0"):
        choose(text)


@pytest.mark.parametrize(
    ("text", "count"),
    [("0", 0), ("4096", 4096), ("512M", 512 << 20), ("2g", 2 << 30), ("1.5GiB", 3 << 29), ("1 kB", 1024)],
)
def test_sizes(text: str, count: int) -> None:
    assert Size().convert(text, None, None) == count

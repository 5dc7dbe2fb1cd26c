"""What people see: in terminals, in pipes, and when streams are closed, full, broken or of an odd encoding."""

from __future__ import annotations

import io
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from sdrpc.cli import entry, interrupts
from sdrpc.cli.progress import BAR, Meter, StatusLine, fitted, pace, uploaded
from sdrpc.diffusion.events import Event
from tests.cli.conftest import Outcome
from tests.cli.terminal import in_terminal
from tests.cli.test_sd_cli import SMALL, Servers, rpc
from tests.interop.tap import Tap
from tests.server.conftest import eventually
from tests.support.process import ServerProcess, lasting_port

Sd = Callable[..., Outcome]

COMMAND = [sys.executable, "-m", "sdrpc", "sd-cli"]

LASTING = (
    r"Stable Diffusion 1\.x: .*",
    r"(RPC\d or )?RPC\d",
    r"(clip_l|diffusion|vae): captured its graph, once, in [\d.]+ s",
    r"(clip_l|diffusion|vae): [\d.]+ MiB of weights sent, in [\d.]+ s, [\d,.]+ MiB/s",
    r"picture \d of 2: 2 steps in [\d.]+ s, [\d.]+ (it/s|s/it)",
    r"load \d.*",
    r"[\d.]*s?",
)
"""Lines that stay on the screen, besides names of files; the first and the last may be too long for a line of 80."""


def shell(script: str, *words: object, **env: str) -> subprocess.CompletedProcess[str]:
    """``sd-cli`` in bash, as ``"$@"`` of a script."""
    command = ["bash", "-c", script, "bash", *COMMAND, *map(str, words)]
    encoding = env.get("PYTHONIOENCODING", "utf-8")
    return subprocess.run(command, capture_output=True, encoding=encoding, check=False, env=os.environ | env)


def drawing(servers: Servers, checkpoint: Path, output: object, *words: object) -> list[object]:
    return ["--rpc", rpc(servers), "-m", checkpoint, *SMALL, "--steps", "1", "-o", output, *words]


@pytest.mark.parametrize("columns", [80, 40])
def test_c1_what_was_drawn_stays_on_the_screen(
    servers: Servers, checkpoint: Path, tmp_path: Path, columns: int
) -> None:
    """Also on the second of two lines that are as long as the terminal is wide."""
    names = [str(tmp_path / f"a_{number}.png") for number in range(2)]
    words = ["sd-cli", "--rpc", rpc(servers), "-m", checkpoint, *SMALL, "-b", "2", "-o", tmp_path / "a.png"]
    ended = in_terminal(words, columns)
    assert ended.status == 0, ended.lines
    shown = "".join(line.ljust(columns) if len(line) == columns else line + "\n" for line in ended.lines)
    for name in names:
        assert name in shown
    assert "[" not in shown, "a bar is left over"
    assert "decoding" not in shown
    if columns == 80:
        others = [line for line in ended.lines if line and line not in "".join(names)]
        strange = [line for line in others if not any(re.fullmatch(each, line) for each in LASTING)]
        assert not strange
        assert "[" in ended.written, "there was no bar at all"


@pytest.mark.parametrize(("columns", "env"), [(20, {}), (80, {"COLUMNS": "0"})], ids=["narrow", "no size"])
def test_c1_nothing_is_cut_off_in_odd_terminals(columns: int, env: dict[str, str]) -> None:
    """A table wraps where the terminal ends, and an error is said where a program that went before had no terminal."""
    ended = in_terminal(["sd-cli", "--rpc", "127.0.0.1:1", "--list-devices"], columns, env)
    assert ended.status == 1
    assert "…" not in ended.written
    assert re.search(r"CPU .* [\d,]+ MiB +[\d,]+ MiB", ended.written)
    assert "127.0.0.1:1: nobody answers" in ended.written


def test_c1_names_are_all_of_standard_output(servers: Servers, checkpoint: Path, tmp_path: Path) -> None:
    """Progress in a terminal, the names in a file, and the other way round."""
    listed = tmp_path / "names"
    words = ["sd-cli", *drawing(servers, checkpoint, tmp_path / "a.png", "-b", "2")]
    with listed.open("w") as file:
        ended = in_terminal(words, stdout=file.fileno())
    assert ended.status == 0
    names = [str(tmp_path / "a_0.png"), str(tmp_path / "a_1.png")]
    assert listed.read_text().splitlines() == names
    assert not any(name in line for name in names for line in ended.lines)
    with (tmp_path / "log").open("w") as file:
        ended = in_terminal(words, columns=200, stderr=file.fileno())
    assert [line for line in ended.lines if line] == names
    assert "\x1b" not in (tmp_path / "log").read_text()


@pytest.mark.parametrize("width", [10, 39, 79])
@pytest.mark.parametrize("label", ["vae", "diffusion: capturing its graph, once", "猫" * 60, "x" * 200])
def test_c1_a_status_line_is_never_wider_than_the_terminal(label: str, width: int) -> None:
    from rich.cells import cell_len

    for fraction in (None, 0.0, 0.5, 1.0):
        line = fitted(label, fraction, "1,640 MiB of 1,640 MiB  1,234 MiB/s", width)
        assert cell_len(line) <= width
    assert fitted("vae", 0.5, "1 of 2", 79) == f"vae [{'=' * (BAR // 2)}{' ' * (BAR // 2)}] 1 of 2"


def test_progress_counts_the_steps_alone(capfd: pytest.CaptureFixture[str]) -> None:
    """What went into captures and uploads meanwhile is no time of the sampler."""
    from sdrpc.cli import report

    meter = report.meter()
    for event in (
        Event("encode", "", 0),
        Event("upload", "clip_l", 5, 5, 5, seconds=50.0),
        Event("encode", "", 1),
        Event("sample", "diffusion", 0, 4, None, 1, 1),
        Event("capture", "diffusion", 1, 1, seconds=5.0),
        Event("upload", "diffusion", 7 << 20, 7 << 20, 7 << 20, seconds=3.0),
        Event("sample", "diffusion", 4, 4, None, 1, 1, seconds=10.0),
    ):
        meter.tell(event)
    assert "picture 1 of 1: 4 steps in 2.0 s, 2.00 it/s\n" in capfd.readouterr().err
    assert pace(4, 10.0) == ", 2.50 s/it"
    assert pace(0, 10.0) == pace(4, 0.0) == ""


@pytest.mark.parametrize(
    ("sent", "says"),
    [
        (None, "100 MiB of weights loaded in 2.0 s"),
        (100 << 20, "100 MiB of weights sent, in 2.0 s, 50 MiB/s"),
        (40 << 20, "40 MiB of weights sent of 100 MiB, the server has the rest, in 2.0 s, 20 MiB/s"),
        (5000, "nothing had to be sent, its server has the 100 MiB of weights"),
        (0, "nothing had to be sent, its server has the 100 MiB of weights"),
    ],
)
def test_c8_what_an_upload_has_cost(sent: int | None, says: str) -> None:
    assert uploaded(Event("upload", "vae", 100 << 20, 100 << 20, sent, seconds=2.0)) == says


def test_c1_the_pace_is_that_of_the_steps() -> None:
    """What was prepared meanwhile is more than what was sent: programs were made, devices asked what they have."""
    said: list[str] = []
    spent = [7.0]
    meter = Meter(StatusLine(Console(file=io.StringIO())), said.append, lambda: spent[0])
    meter.tell(Event("sample", "diffusion", 0, 4, None, 1, 1))
    meter.tell(Event("upload", "diffusion", 5, 5, 5, seconds=1.0))
    spent[0] += 3
    meter.tell(Event("reconnected", "diffusion", 1, 1, seconds=2.0, device="RPC0"))
    meter.tell(Event("sample", "diffusion", 4, 4, None, 1, 1, 9.0))
    assert said[-1] == "picture 1 of 1: 4 steps in 4.0 s, 1.00 it/s"


@pytest.mark.parametrize("name", ["-", "/dev/stdout"])
def test_a_picture_is_not_for_a_terminal(name: str) -> None:
    ended = in_terminal(["sd-cli", "-p", "x", "-o", name])
    assert ended.status == 2
    assert "a picture is not for a terminal" in " ".join(ended.lines)


def test_c8_nothing_is_sent_to_a_server_that_has_it(
    sd: Sd, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDRPC_CACHE", str(tmp_path / "cache"))  # other tests' servers keep the same weights
    with ServerProcess("--precision", "exact", "--cache", "--cache-size", "1G") as server:
        words = ("--rpc", f"127.0.0.1:{server.port}", "-m", checkpoint, *SMALL, "-o", tmp_path / "x.png")
        first = sd(*words).err
        assert len(re.findall(r"MiB of weights sent, in", first)) == 3, first

        def second() -> bool:
            return len(re.findall(r"nothing had to be sent, its server has the", sd(*words).err)) == 3

        assert eventually(second)  # the server writes what it keeps while it answers


def test_c6_ctrl_c_while_sampling(checkpoint: Path, tmp_path: Path) -> None:
    with ServerProcess("--precision", "exact") as server, Tap(f"127.0.0.1:{server.port}") as tap:
        words = ["--rpc", tap.endpoint, "-m", checkpoint, *SMALL, "--steps", "5000", "-o", tmp_path / "x.png"]
        command = [*COMMAND, *map(str, words)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert eventually(lambda: tap.commands["GRAPH_RECOMPUTE"] >= 3, 240)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=240)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "interrupted"
    assert err.count("interrupted") == 1
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


TIDYING = """
import signal, sys, time
from sdrpc.cli import interrupts, report
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # what nohup starts ignores it, and leaves it so
interrupts.SECONDS = float(sys.argv[1])
interrupts.soon()
def command():
    try:
        print("at work", flush=True)
        time.sleep(300)
    finally:
        print("tidying up", flush=True)
        time.sleep(300)
sys.exit(report.guarded(command))
"""


@pytest.mark.parametrize(
    ("seconds", "signals", "number", "says"),
    [
        (0.2, 1, signal.SIGINT, "interrupted"),
        (250, 2, signal.SIGINT, "interrupted"),
        (0.2, 1, signal.SIGTERM, "ended by SIGTERM"),
        (0.2, 2, signal.SIGHUP, "ended by SIGHUP"),
    ],
    ids=["once", "twice", "SIGTERM", "terminal closed"],
)
def test_ctrl_c_does_not_wait_for_what_takes_long(seconds: float, signals: int, number: int, says: str) -> None:
    """Once: it has a second. Twice: none. SIGTERM is the same; a terminal that is closed is told of twice."""
    command = [sys.executable, "-c", TIDYING, str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for said, _ in zip(("at work\n", "tidying up\n"), range(signals), strict=False):
            assert process.stdout.readline() == said
            process.send_signal(number)
        _, err = process.communicate(timeout=240)
    assert (process.returncode, err) == (128 + number, f"{says}\n")


@pytest.mark.parametrize(("pid", "handler"), [(1, interrupts._leave), (2, signal.SIG_DFL)])
def test_the_next_signal_ends_also_the_first_process_of_a_container(
    monkeypatch: pytest.MonkeyPatch, pid: int, handler: object
) -> None:
    """Where the system ignores signals that nobody handles."""
    monkeypatch.setattr(os, "getpid", lambda: pid)
    before = signal.getsignal(signal.SIGUSR1)
    try:
        interrupts.next_ends(signal.SIGUSR1)
        assert signal.getsignal(signal.SIGUSR1) == handler
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_ctrl_c_while_this_machine_computes(tmp_path: Path) -> None:
    """A step that takes minutes does not hold it: what it computes after that is little."""
    size = ("-W", "1024", "-H", "1024")
    words = ["-m", "demo", "--backend", "CPU", *size, "-t", "1", "-p", "x", "-o", tmp_path / "x.png"]
    before = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    with subprocess.Popen([*COMMAND, *map(str, words)], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("diffusion:") and "weights loaded" in line:
                break
        running = psutil.Process(process.pid)
        loaded = sum(running.cpu_times()[:2])
        assert eventually(lambda: sum(running.cpu_times()[:2]) > loaded + 1), "it is in the middle of the step"
        asked = sum(running.cpu_times()[:2])
        process.send_signal(signal.SIGINT)
        err = process.stderr.read()
        process.wait(240)
    assert (process.returncode, err.splitlines()[-1:]) == (130, ["interrupted"])
    assert sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - before - asked < 20


@pytest.mark.parametrize("command", ["sd_cli", "sdrpc"])
@pytest.mark.parametrize("module", ["numpy", "click", "sdrpc.diffusion.samplers"])
def test_ctrl_c_at_start(command: str, module: str) -> None:
    """Ctrl-C while ``module`` is imported, which is before the command's own code runs."""
    words = ["sdrpc"] * (command == "sdrpc") + ["sd-cli", "--version"]
    code = f"""
import os, signal, sys
class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupting())
sys.argv = {words}
from sdrpc.cli.entry import {command}
{command}()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_a_command_ends_without_a_search_for_garbage() -> None:
    """Among all objects of torch and diffusers that took a second and more, after Ctrl-C, too."""
    code = (
        "import atexit, gc, sys; atexit.register(lambda: print(gc.get_freeze_count() > 1000))\n"
        "from sdrpc.cli.entry import sd_cli; sys.argv = ['sd-cli', '--version']; sd_cli()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "True"


def test_ctrl_c_that_is_ignored_stays_ignored() -> None:
    """As in a script's background job."""
    code = "import os, signal, sys; from sdrpc.cli.entry import sd_cli; sys.argv = ['sd-cli', '--version']\n"
    script = f"trap '' INT; exec {sys.executable} -c \"$1\""
    raised = code + "sys.meta_path.insert(0, type('I', (), {'find_spec': lambda *_: os.kill(os.getpid(), 2)})())\n"
    done = subprocess.run(
        ["bash", "-c", script, "bash", raised + "sd_cli()"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("sd-cli ")


def test_stdout_closed(servers: Servers, checkpoint: Path, tmp_path: Path) -> None:
    done = shell('"$@" >&-', *drawing(servers, checkpoint, tmp_path / "a.png"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.png").exists()


@pytest.mark.parametrize("closed", ["<&-", "2>&-", "<&- >&- 2>&-"])
def test_other_streams_closed(servers: Servers, checkpoint: Path, tmp_path: Path, closed: str) -> None:
    done = shell(f'"$@" {closed}', *drawing(servers, checkpoint, tmp_path / "a.png"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.png").exists()


def test_stdout_closed_at_a_server() -> None:
    """It serves; where, it says nowhere, so the port is a fixed one."""
    port = lasting_port()
    script = f"exec {sys.executable} -m sdrpc rpc-server -p {port} --device CPU >&-"
    with subprocess.Popen(["bash", "-c", script], stderr=subprocess.PIPE, text=True) as process:

        def answers() -> bool:
            assert process.poll() is None, process.stderr and process.stderr.read()
            with socket.socket() as client:
                return client.connect_ex(("127.0.0.1", port)) == 0

        try:
            assert eventually(answers, 120)
        finally:
            process.terminate()


@pytest.mark.parametrize("broken", ['"$@" | true', '"$@" 2> >(true)', '"$@" 2>&1 | true'])
def test_nobody_reads_the_output(servers: Servers, checkpoint: Path, tmp_path: Path, broken: str) -> None:
    """Both pictures are drawn, although the first one's name can't be written."""
    words = drawing(servers, checkpoint, tmp_path / "a.png", "-b", "2")
    done = shell(f"{broken}; exit ${{PIPESTATUS[0]}}", *words)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("a_*.png"))) == 2
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


def test_a_full_disk_below_standard_output(servers: Servers, checkpoint: Path, tmp_path: Path) -> None:
    done = shell('"$@" > /dev/full', *drawing(servers, checkpoint, tmp_path / "a.png", "-b", "2"))
    assert len(list(tmp_path.glob("a_*.png"))) == 2
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "warning: standard output: No space left on device"


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_stdout_encoding(servers: Servers, checkpoint: Path, tmp_path: Path, encoding: str) -> None:
    words = drawing(servers, checkpoint, tmp_path / "猫.png", "-b", "3", "-W", "60")
    done = shell('"$@"', *words, PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("猫_*.png"))) == 3
    shown = "猫" if encoding == "utf-8" else r"\u732b"
    assert done.stdout.splitlines() == [str(tmp_path / f"{shown}_{number}.png") for number in range(3)]


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "cp437", "utf-8"])
def test_help_in_each_encoding(encoding: str) -> None:
    done = shell('"$@"', "--help", PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert "--sampling-method" in done.stdout


def test_names_that_are_no_text_are_printed_as_they_are(servers: Servers, checkpoint: Path, tmp_path: Path) -> None:
    name = os.fsencode(tmp_path / "caf") + b"\xe9.png"
    words = [os.fsencode(str(word)) for word in (*COMMAND, *drawing(servers, checkpoint, ""))]
    command = [*words[:-1], name]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == name + b"\n"
    assert os.path.exists(name)


def test_c2_threads_sleep_while_they_wait() -> None:
    code = (
        "import os, sys; from sdrpc.cli.entry import rpc_server; sys.argv = ['rpc-server', '--version']\n"
        "try: rpc_server()\nexcept SystemExit: pass\n"
        "print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    )
    for chosen, expected in ((None, "PASSIVE False"), ("ACTIVE", "ACTIVE False")):
        env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
        env |= {} if chosen is None else {"OMP_WAIT_POLICY": chosen}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
        assert done.stdout.splitlines()[-1] == expected


@pytest.mark.parametrize(
    ("torch", "driver", "chosen", "expected"),
    [
        ("2.11.0", True, {}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ("2.13.0+cu130", True, {}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ("2.8.0", True, {}, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}),
        ("2.11.0", False, {}, {}),
        ("2.11.0+rocm7.0", True, {}, {}),
        ("2.13.0+cpu", True, {}, {}),
        ("2.11.0", True, {"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}, None),
    ],
)
def test_c2_a_gpus_memory_is_taken_in_segments_that_grow(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    torch: str,
    driver: bool,
    chosen: dict[str, str],
    expected: dict[str, str] | None,
) -> None:
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(entry, "NVIDIA", (str(tmp_path / ("nvidiactl" if driver else "none")),))
    monkeypatch.setattr("importlib.metadata.version", lambda _: torch)
    for name in entry.ALLOCATOR:
        monkeypatch.setenv(name, "")  # so that it is undone at the end
        monkeypatch.delenv(name)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    entry.segments_grow()
    found = {name: os.environ[name] for name in entry.ALLOCATOR if name in os.environ}
    assert found == (chosen if expected is None else expected)


def test_c17_completion(tmp_path: Path) -> None:
    """In a real shell, of options and of their values, by each of the ways to ask for the script."""
    program = tmp_path / "sd-cli"
    program.write_text(f'#!/bin/sh\nexec {" ".join(COMMAND)} "$@"\n')
    program.chmod(0o755)
    script = """
    asked=$(sd-cli --completion bash)
    for instruction in bash_source source_bash; do
        [ "$(_SD_CLI_COMPLETE=$instruction sd-cli)" = "$asked" ] || exit 4
    done
    eval "$asked"
    complete -p sd-cli > /dev/null || exit 3
    complete_words() {
        COMPREPLY=(); COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
        _sd_cli_completion sd-cli
        echo "${COMPREPLY[@]}"
    }
    complete_words sd-cli --sampl
    complete_words sd-cli --rng c
    complete_words sd-cli -p x --precision ""
    """
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["--sampling-method --sampler-rng", "cuda cpu", "auto exact fast ggml"]


@pytest.mark.parametrize("shell_name", ["bash", "zsh", "fish"])
def test_c17_scripts_for_other_shells(sd: Sd, shell_name: str) -> None:
    outcome = sd("--completion", shell_name)
    assert outcome.status == 0
    assert "_SD_CLI_COMPLETE" in outcome.out
    assert "sd-cli" in outcome.out


def test_a_users_module_does_not_shadow_one_of_pythons(tmp_path: Path) -> None:
    for name in ("random", "numbers", "typing_extensions", "click"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('shadowed')\n")
    source = Path(__file__).parent.parent.parent / "src"
    env = os.environ | {"PYTHONPATH": str(source)}
    done = subprocess.run([*COMMAND, "--version"], capture_output=True, text=True, check=False, cwd=tmp_path, env=env)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_folder_that_was_deleted(tmp_path: Path) -> None:
    """A terminal stays in it."""
    script = (
        "import os, runpy, sys; os.rmdir(os.getcwd()); sys.argv[1:] = ['sd-cli', '--version']; "
        "runpy.run_module('sdrpc', run_name='__main__')"
    )
    folder = tmp_path / "gone"
    folder.mkdir()
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent.parent / "src")}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=folder, env=env
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("sd-cli ")


def test_logging_of_another_thread_leaves_the_terminal_in_order(capfd: pytest.CaptureFixture[str]) -> None:
    from sdrpc.cli import report

    threads = [threading.Thread(target=report.say, args=(f"line {number}",)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(capfd.readouterr().err.splitlines()) == sorted(f"line {number}" for number in range(20))

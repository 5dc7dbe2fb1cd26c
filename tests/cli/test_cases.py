"""What users met (one test or more for each case, by its name), and what should happen."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

from sdrpc import storage
from sdrpc.checkpoints.checkpoint import open_checkpoint
from sdrpc.cli import output, report
from sdrpc.cli.output import MAX_SIDES, check_sides, check_writable, output_paths, save
from sdrpc.client.connection import open_connection
from sdrpc.client.endpoint import Endpoint
from sdrpc.diffusion.request import Request
from sdrpc.errors import ConnectionFailed, InvalidValue
from sdrpc.families.base import Defaults
from tests.cli.conftest import Outcome
from tests.cli.test_sd_cli import SMALL, Servers, entries, pixels, rpc
from tests.support.process import ServerProcess

Sd = Callable[..., Outcome]


@pytest.fixture
def draw(sd: Sd, servers: Servers, checkpoint: Path) -> Sd:
    """A small picture of one step on a server."""

    def run(*words: object) -> Outcome:
        return sd("--rpc", rpc(servers), "-m", checkpoint, *SMALL, "--steps", "1", *words)

    return run


# Prompts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tag",
    [
        "<lora:|high_noise|style:1>", "<lyco:style:1>", "<hypernet:y:1>", "<lora:unfinished", "<lora::1>",
        "<sd_cpp_extra_args>{}</sd_cpp_extra_args>",
    ],
)  # fmt: skip
def test_a_tag_that_cannot_be_followed(draw: Sd, tmp_path: Path, tag: str) -> None:
    for option in ("-p", "-n"):
        outcome = draw(option, f"a cat {tag}", "-o", tmp_path / "x.png")
        assert outcome.status == report.USAGE
        name = {"-p": "--prompt", "-n": "--negative-prompt"}[option]
        assert re.match(rf"error: {name} '?<\w+.*leave it out", outcome.error)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("prompt", ["I <3 cats", "a < b > c", "<cat>", "(a:1.2) <-> b", "lora:x:1"])
def test_prompts_with_angles_are_prompts(prompt: str) -> None:
    assert Request(prompt).resolved(Defaults(64), (64, 64), 64).prompt == prompt


@pytest.mark.parametrize(("option", "name"), [("-p", "--prompt"), ("-n", "--negative-prompt")])
def test_not_utf8_prompt(servers: Servers, checkpoint: Path, tmp_path: Path, option: str, name: str) -> None:
    words = ["--rpc", rpc(servers), "-m", checkpoint, *SMALL, "-o", tmp_path / "a.png", option]
    command = [sys.executable, "-m", "sdrpc", "sd-cli", *map(str, words)]
    done = subprocess.run([*map(os.fsencode, command), b"caf\xe9 noir"], capture_output=True, text=True, check=False)
    assert done.returncode == report.USAGE
    assert re.fullmatch(
        rf"error: {name} 'caf\\udce9 noir': is no UTF-8 text: the byte 0xe9 after 3 characters; .*\n", done.stderr
    )
    assert not (tmp_path / "a.png").exists()


def test_c10_no_prompt(draw: Sd, sd: Sd, servers: Servers, checkpoint: Path, tmp_path: Path) -> None:
    """As stable-diffusion.cpp does: a picture; but it is said. An empty prompt is one."""
    said = "no prompt is given with -p"
    words = ("--rpc", rpc(servers), "-m", checkpoint, *SMALL[2:], "-o", tmp_path / "x.png", "-n", "x")
    outcome = sd(*words)
    assert outcome.status == 0
    assert said in outcome.err
    assert said not in sd(*words, "-p", "").err


# Pictures that are drawn are there ----------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [200, 246, 255])
def test_picture_lost_at_the_end_long_names(draw: Sd, tmp_path: Path, length: int) -> None:
    name = "n" * (length - 4) + ".png"
    assert draw("-o", tmp_path / name).status == 0
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("made", ["a name of 256 bytes", "a directory", "one of several"])
def test_picture_lost_at_the_end_is_refused_before_it_is_drawn(draw: Sd, tmp_path: Path, made: str) -> None:
    if made == "a name of 256 bytes":
        outcome, says = draw("-o", tmp_path / ("n" * 252 + ".png")), "name too long"
    elif made == "a directory":
        (tmp_path / "out.png").mkdir()
        outcome, says = draw("-o", tmp_path / "out.png"), "directory"
    else:
        (tmp_path / "out_1.png").mkdir()
        outcome, says = draw("-b", "2", "-o", tmp_path / "out.png"), r"out_1\.png: is a directory"
    assert outcome.status == report.USAGE
    assert re.search(says, outcome.error, re.IGNORECASE)
    assert "step" not in outcome.err
    assert not [path for path in tmp_path.iterdir() if path.is_file()]


def test_a_file_that_is_protected_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder that takes new files, a new one took its place."""
    kept = tmp_path / "kept.png"
    kept.write_bytes(b"dear")
    kept.chmod(0o444)
    access = os.access  # of an administrator all is writable
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != kept and access(path, mode))
    with pytest.raises(InvalidValue, match=r"kept\.png: can't write there: it is read-only"):
        check_writable([kept])


def test_picture_lost_at_the_end_mount_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is mounted can't be replaced, but it can be written."""
    target = tmp_path / "out.png"
    target.write_bytes(b"old and longer than the new one")
    monkeypatch.setattr(os, "replace", _busy)
    assert save(target, b"new") == (target, "")
    assert target.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [target]


def _busy(_from: object, to: object) -> None:
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), to)


def test_picture_lost_at_the_end_is_kept_elsewhere(draw: Sd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What could be written when the work began can't any more: the pictures are beside, and both are drawn."""

    def refuse(_from: object, to: object) -> None:
        os.mkdir(os.fspath(to))  # type: ignore[call-overload]
        _busy(_from, to)

    monkeypatch.setattr(os, "replace", refuse)
    outcome = draw("-b", "2", "-o", tmp_path / "out.png", "--disable-image-metadata")
    assert outcome.status == report.FAILURE
    kept = [Path(line) for line in outcome.out.splitlines()]
    assert len(kept) == 2
    for number, path in enumerate(kept):
        assert f"warning: {tmp_path / f'out_{number}.png'}: Is a directory; the picture is in {path}\n" in outcome.err
        assert path.parent == tmp_path
        assert pixels(path).shape == (64, 64, 3)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a file that is always full")
def test_picture_lost_at_the_end_is_not_kept_among_devices(
    draw: Sd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a preview that has no room is no picture: it is said once."""
    monkeypatch.setattr(output.tempfile, "gettempdir", lambda: str(tmp_path))
    outcome = draw("-o", "/dev/full", "--steps", "3", "--preview", "proj", "--preview-path", "/dev/full")
    assert outcome.status == report.FAILURE
    (kept,) = tmp_path.glob("*.png")
    assert outcome.out == f"{kept}\n"
    assert f"warning: /dev/full: No space left on device; the picture is in {kept}\n" in outcome.err
    assert outcome.err.count("No space left on device; there are no more previews") == 1


def test_picture_lost_at_the_end_goes_to_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is gone by then."""
    monkeypatch.setattr(output.tempfile, "gettempdir", lambda: str(tmp_path))
    saved = save(tmp_path / "gone" / "out.png", b"picture")
    assert saved.why == "No such file or directory"
    assert saved.path.parent == tmp_path
    assert saved.path.read_bytes() == b"picture"
    assert saved.path.suffix == ".png"


def test_output_onto_a_link(draw: Sd, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link, target = tmp_path / "latest.png", tmp_path / "real" / "one.png"
    link.symlink_to(target)  # which is not there yet
    for seed in ("1", "2"):
        outcome = draw("-o", link, "-s", seed)
        assert outcome.out.split() == [str(link)]
        assert link.is_symlink()
        assert f"Seed: {seed}," in entries(target)["parameters"]
    assert [path.name for path in (tmp_path / "real").iterdir()] == ["one.png"]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError(), "error: this machine has no memory left for that\n"),
        (ImportError("libx.so: failed to map", name="torch"), "error: torch can't be loaded: libx.so: failed to map\n"),
    ],
)
def test_full_disk_words_of_a_machine_without_memory(
    error: Exception, says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    assert report.guarded(fail) == report.FAILURE
    assert capfd.readouterr().err == says


def test_output_that_is_thrown_away() -> None:
    """/dev/null.png was made."""
    assert output_paths("/dev/null", 1) == [Path("/dev/null")]
    assert output_paths("/dev/null", 2) == [Path("/dev/null")] * 2


def test_output_into_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    check_writable([pipe])
    with subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE) as reader:
        assert save(pipe, b"picture") == (pipe, "")
        assert reader.communicate()[0] == b"picture"
    assert pipe.is_fifo()


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    target = tmp_path / "out.png"
    target.write_bytes(b"old")
    monkeypatch.setattr(os, "chmod", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(target, b"new")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".webp", ".PNG"])
def test_other_formats(draw: Sd, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"cat{suffix}"
    outcome = draw("-o", path, "-s", "7")
    assert outcome.status == 0, outcome.err
    with Image.open(path) as image:
        image.load()
        assert image.size == (64, 64)
        assert image.format == {".png": "PNG", ".webp": "WEBP"}.get(suffix.lower(), "JPEG")
        if suffix == ".webp":
            text = "".join(ElementTree.fromstring(image.info["xmp"].decode()).itertext()).strip()
        elif suffix == ".PNG":
            text = image.info["parameters"]
        else:
            text = image.info["comment"].removeprefix(b"parameters\0").decode()
    assert text.startswith("a lovely cat\nSteps: 1, CFG scale")
    assert json.loads(text.partition("SDCPP: ")[2])["seed"] == 7


@pytest.mark.parametrize("suffix", [".webp", ".jpg"])
def test_formats_with_a_largest_side(suffix: str) -> None:
    check_sides(Path(f"x{suffix}"), MAX_SIDES[suffix], 64)
    with pytest.raises(InvalidValue, match=rf"height \d+: {suffix} files have at most {MAX_SIDES[suffix]}"):
        check_sides(Path(f"x{suffix}"), 64, MAX_SIDES[suffix] + 1)


def test_size_changed_silently(draw: Sd, tmp_path: Path) -> None:
    outcome = draw("-W", "100", "-H", "72", "-o", tmp_path / "o.png")
    assert "100×72 is rounded up to 128×128, the next size that the model can draw" in outcome.err
    assert pixels(tmp_path / "o.png").shape == (128, 128, 3)
    assert "rounded" not in draw("-W", "128", "-o", tmp_path / "o.png").err


def test_options_without_effect(draw: Sd, tmp_path: Path) -> None:
    """The picture is drawn all the same, as by stable-diffusion.cpp, and is the same."""
    usual, idle = tmp_path / "usual.png", tmp_path / "idle.png"
    words = ("--steps", "2", "--sampling-method", "euler", "--cfg-scale", "1")
    assert "no effect" not in draw(*words, "--clip-skip", "2", "-o", usual).err
    outcome = draw(*words, "--clip-skip", "2", "-n", "ugly", "--guidance", "5", "--eta", "0.5", "-o", idle)
    assert [line for line in outcome.err.splitlines() if "no effect" in line] == [
        "warning: --negative-prompt has no effect with a CFG scale of 1",
        "warning: --guidance has no effect with a model that was not distilled with it",
        "warning: --eta has no effect with euler",
    ]
    np.testing.assert_array_equal(pixels(usual), pixels(idle))


def test_sampler_rng(draw: Sd, tmp_path: Path) -> None:
    """Another source for the noise that samplers add; the file says so."""
    words = ("--steps", "3", "--sampling-method", "euler_a")
    drawn = {}
    for name, options in {"same": (), "named": ("--sampler-rng", "cuda"), "other": ("--sampler-rng", "cpu")}.items():
        assert draw(*words, *options, "-o", tmp_path / f"{name}.png").status == 0
        drawn[name] = pixels(tmp_path / f"{name}.png")
    np.testing.assert_array_equal(drawn["same"], drawn["named"])
    assert np.abs(drawn["same"] - drawn["other"]).mean() > 1
    assert ", RNG: cuda, Sampler RNG: cpu, Sampler: euler_a" in entries(tmp_path / "other.png")["parameters"]
    assert "Sampler RNG" not in entries(tmp_path / "same.png")["parameters"]


def test_prediction_option(draw: Sd, tmp_path: Path) -> None:
    for name in ("eps", "v"):
        assert draw("--prediction", name, "-o", tmp_path / f"{name}.png").status == 0
    assert np.abs(pixels(tmp_path / "eps.png") - pixels(tmp_path / "v.png")).mean() > 1


# Types of numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "same"),
    [(torch.float64, torch.float32), (torch.float8_e4m3fn, torch.float16)],
    ids=["f64_weights", "fp8_message"],
)
def test_types_that_ggml_lacks(
    sd: Sd, draw: Sd, checkpoint: Path, tmp_path: Path, stored: torch.dtype, same: torch.dtype
) -> None:
    """All of a file's tensors, those too from which sizes are read: the picture is that of the same numbers in a type
    that ggml has, and a converted file has them in that type, or in the one that is asked for."""
    tensors = {name: tensor.to(stored) for name, tensor in safetensors.torch.load_file(checkpoint).items()}
    safetensors.torch.save_file(tensors, tmp_path / "odd.safetensors")
    safetensors.torch.save_file({name: t.to(same) for name, t in tensors.items()}, tmp_path / "usual.safetensors")
    pictures = []
    for name in ("odd", "usual"):
        assert draw("-m", tmp_path / f"{name}.safetensors", "-o", tmp_path / f"{name}.png").status == 0
        pictures.append(pixels(tmp_path / f"{name}.png"))
    np.testing.assert_array_equal(*pictures)
    for options, types in ((("--type", "f16"), {"F16"}), ((), {{torch.float32: "F32", torch.float16: "F16"}[same]})):
        outcome = sd("-M", "convert", "-m", tmp_path / "odd.safetensors", *options, "-o", tmp_path / "x.gguf")
        assert outcome.status == 0, outcome.err
        found = {w.type.name for w in open_checkpoint(tmp_path / "x.gguf").tensors.values() if len(w.shape) > 1}
        assert found == types


# Words --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "shown"),
    [
        ("models [pruned]", "models [pruned]"),
        ("odd[/b]", "odd[/b]"),
        (":smile: [red]x[/red]", ":smile: [red]x[/red]"),
        ("\x1b[31mred\x1b[2J", r"\x1b[31mred\x1b[2J"),
        ("two\nlines", r"two\nlines"),
        ("\u202egnp", r"\u202egnp"),
    ],
)
def test_markup_in_paths(draw: Sd, checkpoint: Path, tmp_path: Path, folder: str, shown: str) -> None:
    (tmp_path / folder).mkdir(parents=True)
    path = tmp_path / folder / "m.safetensors"
    tensors = load_file(checkpoint)
    save_file(tensors | {"more [/b] \x1b[1m": np.zeros(1, np.float32)}, path)
    outcome = draw("-m", path, "-v", "-o", tmp_path / folder / "x.png")
    assert outcome.status == 0, outcome.err
    assert f"{tmp_path}/{shown}/m.safetensors: 1 tensors are not used by the model\n" in outcome.err
    assert "\n  more [/b] \\x1b[1m\n" in outcome.err
    assert "\x1b" not in outcome.err
    assert outcome.out == f"{tmp_path}/{folder}/x.png\n"
    failed = draw("-m", tmp_path / folder / "absent.safetensors")
    there = f"; did you mean {tmp_path}/{shown}/m.safetensors?"
    assert failed.error == f"error: --model {tmp_path}/{shown}/absent.safetensors: No such file or directory{there}"


def test_verbose_says_more(draw: Sd, servers: Servers, tmp_path: Path) -> None:
    quiet, loud = (draw("-o", tmp_path / "x.png", *more).err for more in ((), ("-v",)))
    for said in (
        "sdrpc ", "Python ", f"RPC0 is 127.0.0.1:{servers[0].port}", ": clip_l: ", "sampling_method 'euler'",
        "scheduler 'discrete'", "seed 42", "cfg_scale 7.0",
    ):  # fmt: skip
        assert said in loud
        assert said not in quiet


def test_folders_that_are_made_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "sdrpc")
    for _ in "ab":
        check_writable([tmp_path / "new" / "folder" / "x.png"])
    assert caplog.messages == [f"made the folder {tmp_path / 'new' / 'folder'}"]


def test_list_devices_dead_server(sd: Sd, servers: Servers) -> None:
    alive = f"127.0.0.1:{servers[0].port}"
    for order in ((alive, "127.0.0.1:1"), ("127.0.0.1:1", alive)):
        outcome = sd("--rpc", ",".join(order), "--list-devices")
        assert outcome.status == report.FAILURE
        assert re.search(rf"RPC{order.index(alive)} +{alive}", outcome.out), "as when both are there"
        assert "CPU" in outcome.out
        assert outcome.error.startswith("error: 127.0.0.1:1: nobody answers (Connection refused)")
        assert ("it counts as one device" in outcome.error) == (order[-1] == alive), "if others have numbers behind it"


def test_list_devices_with_two_dead_servers(sd: Sd) -> None:
    outcome = sd("--rpc", "127.0.0.1:1,127.0.0.1:2", "--list-devices")
    assert outcome.status == report.FAILURE
    assert re.findall(r"error: 127\.0\.0\.1:(\d): nobody answers", outcome.err) == ["1", "2"]
    assert "CPU" in outcome.out


@pytest.mark.parametrize("text", ["{0},", "{0}, ", " {0} ", ",{0}", "{0},,"])
def test_endpoint_advice_commas(sd: Sd, servers: Servers, text: str) -> None:
    outcome = sd("--rpc", text.format(f"127.0.0.1:{servers[0].port}"), "--list-devices")
    assert outcome.status == 0, outcome.err
    assert "RPC0" in outcome.out


@pytest.mark.parametrize(
    ("host", "hint"),
    [("192.168.1.20", r"-H 0\.0\.0\.0"), ("desktop", r"-H 0\.0\.0\.0"), ("127.0.0.1", "is rpc-server running")],
)
def test_c15_a_refused_connection_says_where_servers_listen(
    monkeypatch: pytest.MonkeyPatch, host: str, hint: str
) -> None:
    def refuse(*_: object) -> None:
        raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")

    monkeypatch.setattr("socket.create_connection", refuse)
    with pytest.raises(ConnectionFailed, match=rf"^{host}:50052: nobody answers \(Connection refused\); .*{hint}"):
        open_connection(Endpoint(host, 50052))


def test_full_disk_words(checkpoint: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for a disk without room."""
    path = tmp_path / "out.gguf"
    words = ["-M", "convert", "-m", str(checkpoint), "-o", str(path)]
    small = ["bash", "-c", 'ulimit -f 1024 && exec "$@"', "bash"]
    done = subprocess.run(
        [*small, sys.executable, "-m", "sdrpc", "sd-cli", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == report.FAILURE
    assert done.stderr.splitlines()[-1] == f"error: {path}: File too large"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("type", ["q4_K", "q2_k", "q6_K", "iq4_xs", "nonsense"])
def test_types_that_cannot_be_written(sd: Sd, checkpoint: Path, tmp_path: Path, type: str) -> None:
    outcome = sd("-M", "convert", "-m", checkpoint, "--type", type, "-o", tmp_path / "x.gguf")
    assert outcome.status == report.USAGE
    assert f"--type {type}: there are f32, f16, bf16, q8_0" in outcome.error


def test_no_home(draw: Sd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """HOME is not set, and the system does not know the user: pictures are drawn, servers serve, nothing is kept."""

    def nobody(*_: object, **__: object) -> Path:
        raise RuntimeError("could not determine the home directory")

    monkeypatch.delenv("SDRPC_CACHE")
    monkeypatch.delenv("SDRPC_STATE", raising=False)
    monkeypatch.setattr("platformdirs.user_cache_path", nobody)
    monkeypatch.setattr("platformdirs.user_state_path", nobody)
    storage._for_this_run.cache_clear()
    try:
        assert draw("-o", tmp_path / "x.png").status == 0
        folder = storage.state_folder()
        assert storage.cache_folder("graphs") == folder / "graphs"
        assert list((folder / "graphs").iterdir())
        assert folder.stat().st_mode & 0o777 == 0o700
        assert caplog.text.count("set HOME, or SDRPC_CACHE and SDRPC_STATE") == 1
    finally:
        storage._for_this_run.cache_clear()


def test_no_home_of_an_unknown_user() -> None:
    """The real libraries, where neither the environment nor the system's list of users has a home."""
    code = """
import os, pwd
def unknown(uid):
    raise KeyError(uid)
pwd.getpwuid = unknown
from sdrpc.storage import cache_folder, state_folder
print(cache_folder("weights").parent == state_folder(), state_folder())
"""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HOME", "XDG", "SDRPC"))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=kept)
    same, folder = done.stdout.split()
    assert same == "True"
    assert done.stderr.count("set HOME, or SDRPC_CACHE and SDRPC_STATE") == 1
    assert not Path(folder).exists()


def test_a_server_serves_what_the_wrappers_start() -> None:
    """python -m sdrpc rpc-server is the same command."""
    with ServerProcess(python=(sys.executable, "-m", "sdrpc", "rpc-server")) as server:
        assert server.port

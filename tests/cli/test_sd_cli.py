"""sd-cli from the outside: real servers, real files."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from tests.cli.conftest import Outcome
from tests.interop.tap import Tap
from tests.server.conftest import eventually
from tests.support.process import ServerProcess

Sd = Callable[..., Outcome]
Servers = tuple[ServerProcess, ServerProcess]

SMALL = ("-p", "a lovely cat", "-W", "64", "-H", "64", "--steps", "2", "--sampling-method", "euler")
PSNR_EXACT = 40.0
"""dB between pictures of the same seed, as the project promises for exact precision wherever a part runs."""


def rpc(servers: Servers) -> str:
    return ",".join(f"127.0.0.1:{server.port}" for server in servers)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image, dtype=np.float64)


def entries(path: Path) -> dict[str, str]:
    """The texts in a PNG."""
    with Image.open(path) as image:
        image.load()
        return dict(image.info)


def psnr(a: Path, b: Path) -> float:
    error = float(np.mean((pixels(a) - pixels(b)) ** 2))
    return 99.0 if error == 0 else 10 * float(np.log10(255**2 / error))


PLACEMENTS = (
    (
        ("--rpc-servers", "--backend", "te=RPC1,diffusion=RPC0,vae=CPU"),
        "clip_l on RPC1, diffusion on RPC0, vae on CPU",
    ),
    (("--rpc", "--main_backend_device", "rpc1"), "clip_l on RPC1, diffusion on RPC1, vae on RPC1"),
    (
        ("--rpc", "--clip-backend-device", "cpu", "--diffusion_backend_device", "RPC1", "--vae-backend-device", "RPC0"),
        "clip_l on CPU, diffusion on RPC1, vae on RPC0",
    ),
)


@pytest.mark.parametrize(("placement", "placed"), PLACEMENTS, ids=["backend", "main", "by-part"])
def test_a_picture_is_the_same_wherever_its_parts_run(
    sd: Sd, servers: Servers, checkpoint: Path, tmp_path: Path, placement: tuple[str, ...], placed: str
) -> None:
    here, there = tmp_path / "here.png", tmp_path / "there.png"
    common = ("-m", checkpoint, *SMALL, "--precision", "exact")
    assert sd(*common, "--backend", "CPU", "-o", here).status == 0
    option, *where = placement
    outcome = sd(*common, option, rpc(servers), *where, "-o", there)
    assert outcome.status == 0, outcome.err
    assert psnr(here, there) >= PSNR_EXACT
    assert pixels(here).std() > 1
    assert placed in outcome.err


def test_the_picture_says_how_it_was_made(sd: Sd, servers: Servers, checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "cat.png"
    outcome = sd("--rpc", rpc(servers), "-m", checkpoint, *SMALL, "-n", "blurry", "-s", "7", "-o", path)
    assert outcome.out.split() == [str(path)]
    text = entries(path)["parameters"]
    assert text.startswith("a lovely cat\nNegative prompt: blurry\nSteps: 2, CFG scale: 7.0")
    assert "Seed: 7, Size: 64x64, Model: tiny.safetensors, RNG: cuda, Sampler: euler discrete" in text
    assert json.loads(text.partition("SDCPP: ")[2])["seed"] == 7
    for stage in ("load", "upload", "encode", "sample", "decode"):
        assert re.search(rf"{stage} \d+\.\d\ds", outcome.err)
    assert "it" in outcome.err


def test_what_takes_long_says_so(
    sd: Sd, servers: Servers, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDRPC_CACHE", str(tmp_path / "graphs"))
    arguments = ("--rpc", rpc(servers), "-m", checkpoint, *SMALL, "-o", tmp_path / "cat.png")
    first, second = sd(*arguments).err, sd(*arguments).err
    for part in ("clip_l", "diffusion", "vae"):
        assert f"{part}: captured its graph, once" in first
        assert re.search(rf"{part}: .* MiB of weights", second)
    assert "captured" not in second


def test_several_pictures_count_names_and_seeds_up(sd: Sd, servers: Servers, checkpoint: Path, tmp_path: Path) -> None:
    pattern = tmp_path / "new" / "cat_%02d.png"
    common = ("--rpc", rpc(servers), "-m", checkpoint, *SMALL)
    assert sd(*common, "-b", "2", "-s", "5", "-o", pattern).status == 0
    assert sorted(path.name for path in pattern.parent.iterdir()) == ["cat_00.png", "cat_01.png"]
    alone = tmp_path / "alone.png"
    assert sd(*common, "-s", "6", "-o", alone, "--disable-image-metadata").status == 0
    assert psnr(alone, pattern.with_name("cat_01.png")) >= PSNR_EXACT
    assert not entries(alone)


def test_random_seeds_differ(sd: Sd, servers: Servers, checkpoint: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert sd("--rpc", rpc(servers), "-m", checkpoint, *SMALL, "-s", "-1", "-o", tmp_path / name).status == 0
    assert psnr(tmp_path / "a.png", tmp_path / "b.png") < PSNR_EXACT


def test_devices_are_numbered_across_servers(sd: Sd, servers: Servers) -> None:
    outcome = sd("--rpc", rpc(servers), "--list-devices")
    rows = [line.split() for line in outcome.out.splitlines() if line.strip()]
    table = {row[0]: " ".join(row) for row in rows}
    for name, server in zip(("RPC0", "RPC1"), servers, strict=True):
        assert f"127.0.0.1:{server.port}" in table[name]
        assert re.search(r"[\d,]+ MiB [\d,]+ MiB", table[name])
    assert "CPU" in table


def test_nothing_is_captured_twice(sd: Sd, servers: Servers, checkpoint: Path, tmp_path: Path) -> None:
    """With graphs in the cache and all parts elsewhere, sd-cli loads neither torch nor diffusers."""
    arguments = ["--rpc", rpc(servers), "-m", str(checkpoint), *SMALL, "-o", str(tmp_path / "x.png")]
    assert sd(*arguments).status == 0
    code = (
        "import sys; from sdrpc.cli.sd_cli import run\n"
        "try: run(sys.argv[1:])\nexcept SystemExit: pass\n"
        "print(*(name for name in ('torch', 'diffusers', 'transformers') if name in sys.modules), 'loaded')"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded"


BAD = [
    (("--rpc", "127.0.0.1:1", "--list-devices"), 1, r"127\.0\.0\.1:1: nobody answers"),
    (("--rpc", "nonsense:port", "--list-devices"), 2, r"nonsense:port"),
    (
        ("--vae", "{checkpoint}"),
        2,
        r"no diffusion model; give it with --diffusion-model, or a whole",
    ),
    (("-m", "absent.safetensors"), 1, r"absent\.safetensors: No such file"),
    (("-m", "{checkpoint}", "--backend", "RPC0"), 2, r"--backend RPC0: there is no such device; there are CPU"),
    (("-m", "{checkpoint}", "--sampling-method", "fast"), 2, r"--sampling-method fast: does not exist"),
    (("-m", "{checkpoint}", "--scheduler", "sideways"), 2, r"--scheduler sideways: does not exist"),
    (("-m", "{checkpoint}", "--rng", "dice"), 2, r"dice"),
    (("-m", "{checkpoint}", "--steps", "0"), 2, r"--steps 0"),
    (("-m", "{checkpoint}", "-W", "1000000"), 2, r"--width 1000000"),
    (("-m", "{checkpoint}", "--mode", "vid_gen"), 2, r"--mode vid_gen: Stable Diffusion 1\.x draws pictures, no films"),
    (("-m", "{checkpoint}", "--mode", "daydream"), 2, r"daydream: does not exist"),
    (("-m", "{checkpoint}", "--type", "q9"), 2, r"--type q9: there are f32, f16, bf16, q8_0"),
    (("-m", "{checkpoint}", "-H", "0"), 2, r"--height 0"),
    (("-m", "./demo"), 1, r"demo: No such file"),
    (("-m", "{checkpoint}", "--embd-dir", "x", "-p", "y"), 2, r"--embd-dir x: is no folder"),
    (
        ("-m", "{checkpoint}", "--lora-model-dir", "x", "-p", "<lora:y>"),
        2,
        r"y: no such LoRA in x \(--lora-model-dir\): there is none; .* comes outline$",
    ),
    (("-m", "{checkpoint}", "--hires", "--hires-upscaler", "x"), 2, r"no such upscaler; .* \(--hires-upscalers-dir\)$"),
    (("-m", "{checkpoint}", "--rpc", ""), 2, r"--rpc '': names no server: HOST:PORT"),
    (("-m", "{checkpoint}", "--sigmas", ""), 2, r"--sigmas '': numbers with commas"),
    (("-m", "{checkpoint}", "--hires", "--hires-sigmas", "[]"), 2, r"--hires-sigmas \[\]: numbers with commas"),
    (("-m", "{checkpoint}", "-o", "picture.gif"), 2, r"--output picture\.gif: .*\.jpg"),
    (("-m", "{checkpoint}", "-o", "/proc/nowhere/picture.png"), 2, r"can't write"),
    (("-m", "{checkpoint}", "--precision", "sloppy"), 2, r"sloppy"),
    (("-m", "{checkpoint}", "--clip-skip", "99", "--backend", "CPU"), 2, r"--clip-skip 99"),
    (("-m", "{checkpoint}", "--vae", "{checkpoint}.txt"), 1, r"No such file"),
]


@pytest.mark.parametrize(("arguments", "status", "says"), BAD, ids=[" ".join(case[0][-2:]) for case in BAD])
def test_bad_input_is_one_clear_line(
    sd: Sd, checkpoint: Path, tmp_path: Path, arguments: tuple[str, ...], status: int, says: str
) -> None:
    words = [word.format(checkpoint=checkpoint) for word in arguments]
    outcome = sd("-o", tmp_path / "x.png", "-W", "64", "-H", "64", *words)
    assert outcome.status == status, outcome.err
    assert re.search(says, outcome.error)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_none_is_named_with_its_option(sd: Sd, checkpoint: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.safetensors"
    empty.touch()
    for option in ("--model", "--vae", "--upscale-model"):
        outcome = sd("-m", checkpoint, option, empty, *SMALL, "-o", tmp_path / "x.png")
        assert (outcome.status, outcome.error) == (1, f"error: {option} {empty}: is empty")


@pytest.mark.parametrize("damage", ["missing", "misshapen"])
def test_a_broken_checkpoint_names_the_tensor(
    sd: Sd, servers: Servers, checkpoint: Path, tmp_path: Path, damage: str
) -> None:
    tensors = load_file(checkpoint)
    name = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_k.weight"
    if damage == "missing":
        del tensors[name]
    else:
        tensors[name] = tensors[name][:-1].copy()
    tensors["model_ema.decay"] = np.zeros(1, np.float32)
    broken = tmp_path / "broken.safetensors"
    save_file(tensors, broken)
    outcome = sd("--rpc", rpc(servers), "-m", broken, *SMALL, "-o", tmp_path / "x.png")
    assert outcome.status == 1
    assert "attn1.to_k.weight" in outcome.error
    assert not (tmp_path / "x.png").exists()


def test_unused_tensors_are_counted_and_named(sd: Sd, servers: Servers, checkpoint: Path, tmp_path: Path) -> None:
    tensors = load_file(checkpoint)
    extra = {"model_ema.decay", "alphas_cumprod"}
    path = tmp_path / "more.safetensors"
    save_file(tensors | {name: np.zeros(1, np.float32) for name in extra}, path)
    arguments = ("--rpc", rpc(servers), "-m", path, *SMALL, "-o", tmp_path / "x.png")
    quiet, loud = sd(*arguments), sd(*arguments, "-v")
    assert re.search(r"\d+ tensors are not used", quiet.err)
    assert not any(name in quiet.err for name in extra)
    assert all(name in loud.err for name in extra)


def test_a_server_that_dies_half_way_is_an_error_that_names_it(checkpoint: Path, tmp_path: Path, sd: Sd) -> None:
    """And the step that it was killed in, not what was tidied up after that."""
    with ServerProcess("--precision", "exact") as server, Tap(f"127.0.0.1:{server.port}") as tap:

        def kill() -> None:
            eventually(lambda: tap.commands["GRAPH_RECOMPUTE"] >= 3, 120)
            server.process.kill()

        killer = threading.Thread(target=kill)
        killer.start()
        arguments = ("--rpc", tap.endpoint, "-m", checkpoint, *SMALL, "--steps", "5000", "--rpc-retry", "0")
        outcome = sd(*arguments, "-o", tmp_path / "x.png")
        killer.join()
    assert outcome.status == 1
    step = r"(writing|reading) [\d,]+ bytes|running a graph again"
    assert re.fullmatch(rf"error: {tap.endpoint}: the server hung up while ({step}) on device 0.*", outcome.error)
    assert not (tmp_path / "x.png").exists()


def test_help_and_versions_load_nothing_heavy() -> None:
    for module, flag in (("sd_cli", "--help"), ("rpc_server", "--help"), ("sd_cli", "--version")):
        code = (
            f"import sys; sys.argv = ['x', '{flag}']\nfrom sdrpc.cli.{module} import main\n"
            "try: main()\nexcept SystemExit: pass\n"
            "print('HEAVY', *{'torch', 'diffusers', 'transformers'} & set(sys.modules))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1].split() == ["HEAVY"]


def test_listing_devices_needs_no_diffusers() -> None:
    code = (
        "import sys\nfrom sdrpc.cli.sd_cli import run\n"
        "try: run(['--list-devices'])\nexcept SystemExit: pass\n"
        "print('HEAVY', *{'diffusers', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].split() == ["HEAVY"]

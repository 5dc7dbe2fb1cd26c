"""sd-cli draws what prompts say: the shipped model, each of its parts on another device, two of them real servers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image, ImageDraw

from sdrpc import models
from sdrpc.checkpoints.checkpoint import open_checkpoint
from sdrpc.cli import report, sd_cli
from sdrpc.diffusion.convert import write_model
from sdrpc.families.weight_types import weight_types
from tests.support.process import ServerProcess
from training.captions import AFTER, BEFORE, BETWEEN
from training.detect import Sight, detect
from training.judge import Expectation, Stated, judge
from training.outlines import outlines

SD_CLI = (sys.executable, "-c", "from sdrpc.cli.sd_cli import main; main()")
SAMPLING = ("--sampling-method", "dpm++2m", "--steps", "12", "--cfg-scale", "4", "-s", "1")

PLACEMENTS = (
    "te=CPU,diffusion=RPC0,vae=RPC1",
    "te=RPC0,diffusion=RPC1,vae=CPU",
    "te=RPC1,diffusion=CPU,vae=RPC0",
)


PROMPTS = {
    "a large red circle on a white background": Expectation("white", (Stated("circle", "red", "large"),)),
    "a yellow star in the top left corner, on a blue background": Expectation(
        "blue", (Stated("star", "yellow", place=(BEFORE, BEFORE)),)
    ),
    "a green square on the right on a black background": Expectation(
        "black", (Stated("square", "green", place=(AFTER, BETWEEN)),)
    ),
    "a blue square on the left of a red heart on a yellow background": Expectation(
        "yellow", (Stated("square", "blue"), Stated("heart", "red")), relation=(BEFORE, BETWEEN)
    ),
    "a white ring above an orange triangle on a purple background": Expectation(
        "purple", (Stated("ring", "white"), Stated("triangle", "orange")), relation=(BETWEEN, BEFORE)
    ),
}
"""What to draw, and what has to be seen."""


class Servers(NamedTuple):
    """Two rpc-server processes that compute in ``precision``."""

    precision: str
    rpc: str


@pytest.fixture(scope="session", params=["exact", "fast"])
def servers(request: pytest.FixtureRequest) -> Iterator[Servers]:
    options = ("--precision", request.param, "--device", "CPU")
    with ExitStack() as stack:
        started = [stack.enter_context(ServerProcess(*options)) for _ in range(2)]
        yield Servers(request.param, ",".join(f"127.0.0.1:{server.port}" for server in started))


def words(servers: Servers, path: Path, *options: str) -> list[str]:
    """What sd-cli is told."""
    return ["--rpc", servers.rpc, "--precision", servers.precision, "--threads", "1", *options, "-o", str(path)]


def draw(servers: Servers, path: Path, *options: str) -> None:
    """sd-cli in this process, which has torch already."""
    assert report.guarded(lambda: sd_cli.run(words(servers, path, *options)), sd_cli.COMMAND.fields) == 0


def seen(path: Path) -> Sight:
    with Image.open(path) as image:
        return detect(np.asarray(image))


@pytest.mark.parametrize(("prompt", "placement"), [*zip(PROMPTS, cycle(PLACEMENTS))], ids=PROMPTS)
def test_a_picture_shows_what_its_prompt_says(prompt: str, placement: str, servers: Servers, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    draw(servers, path, "-m", "demo", "--backend", placement, "-p", prompt, *SAMPLING)
    assert judge(seen(path), PROMPTS[prompt]).right, seen(path)


def test_the_lora_that_ships_draws_outlines(servers: Servers, tmp_path: Path) -> None:
    """The same prompt gives the same shape, hollow with the LoRA and filled without."""
    prompt = "a large blue square on a yellow background"
    says = Expectation("yellow", (Stated("square", "blue", "large"),))
    for asked, hollow in ((f"{prompt} <lora:outline:1>", True), (prompt, False)):
        path = tmp_path / "picture.png"
        draw(servers, path, "-m", "demo", "--backend", PLACEMENTS[0], "-p", asked, *SAMPLING)
        with Image.open(path) as image:
            found = outlines(np.asarray(image))
        assert found.hollow == hollow
        assert judge(found.sight if hollow else seen(path), says).right, found


@pytest.fixture(scope="session")
def circle(graphs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of a large red circle on white, in the lower left."""
    path = tmp_path_factory.mktemp("inputs") / "circle.png"
    image = Image.new("RGB", (128, 128), "white")
    ImageDraw.Draw(image).ellipse((16, 48, 88, 120), fill=(220, 30, 30))
    image.save(path)
    return path


def test_a_mask_is_filled_with_what_the_prompt_says(servers: Servers, circle: Path, tmp_path: Path) -> None:
    path, mask = tmp_path / "picture.png", tmp_path / "mask.png"
    hole = Image.new("L", (128, 128))
    ImageDraw.Draw(hole).rectangle((88, 0, 127, 127), fill=255)
    hole.save(mask)
    prompt = "a red circle on the left of a small blue square on a white background"
    draw(
        servers, path, "-m", "demo", "-i", str(circle), "--mask", str(mask), "--strength", "1", "-p", prompt, *SAMPLING
    )
    says = Expectation("white", (Stated("circle", "red"), Stated("square", "blue")), relation=(BEFORE, BETWEEN))
    assert judge(seen(path), says).right, seen(path)
    before, after = (np.asarray(Image.open(file)).astype(int)[:, :72] for file in (circle, path))
    assert np.abs(before - after).mean() < 12, "outside the mask it is the same but for the VAE"


def test_a_picture_keeps_its_layout(servers: Servers, circle: Path, tmp_path: Path) -> None:
    """At 0.4 it stays what it is, at 0.8 it becomes what the prompt says, in the same place."""
    for strength, colour in (("0.4", "red"), ("0.8", "green")):
        path = tmp_path / f"{strength}.png"
        prompt = f"a large {colour} circle on a white background"
        draw(servers, path, "-m", "demo", "-i", str(circle), "--strength", strength, "-p", prompt, *SAMPLING)
        (found,) = seen(path).shapes
        assert (found.kind, found.colour) == ("circle", colour)
        assert abs(found.x - 52 / 128) < 0.1
        assert abs(found.y - 84 / 128) < 0.1


def test_its_gguf_does_so_too(servers: Servers, tmp_path: Path) -> None:
    prompt, says = next(iter(PROMPTS.items()))
    model, path = tmp_path / "demo.gguf", tmp_path / "picture.png"
    write_model(open_checkpoint(models.named("demo")), model, weight_types("q8_0"))
    draw(servers, path, "-m", str(model), "-p", prompt, *SAMPLING)
    assert judge(seen(path), says).right, seen(path)


def test_it_is_used_where_none_is_named_and_in_its_size(servers: Servers, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    command = [*SD_CLI, *words(servers, path, "-p", "a red circle", "--steps", "1", "-W", "128")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert [line for line in ended.stderr.splitlines() if "no model is named" in line and "demo" in line]
    with Image.open(path) as image:
        assert image.size == (128, 128)
        assert "Size: 128x128, Model: demo.safetensors" in image.info["parameters"]

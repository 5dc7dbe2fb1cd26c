"""Prompts from files, pictures to standard output, and what pictures say of themselves read back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdrpc.cli import report
from sdrpc.cli.prompt_file import MAX_BYTES, read_prompt
from sdrpc.diffusion.metadata import Parameters, encode
from sdrpc.diffusion.metadata_reader import read_metadata
from sdrpc.errors import InvalidValue
from tests.cli.conftest import Outcome

Sd = Callable[..., Outcome]

PARAMETERS = Parameters(
    "a cat <3 & \"more\", größer", "blurry", 64, 32, 4, 7.0, 42, "euler", "karras", "cuda", "0.1.0",
    models={"model": "a.safetensors"},
)  # fmt: skip


@pytest.fixture(params=[".png", ".jpg", ".webp"])
def picture(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"picture{request.param}"
    path.write_bytes(encode(np.zeros((32, 64, 3), np.uint8), request.param, PARAMETERS))
    return path


def test_what_was_written_is_read_back(picture: Path) -> None:
    found = read_metadata(picture)
    assert found.parameters == PARAMETERS.text()
    assert (found.width, found.height) == (64, 32)
    assert found.structured["prompt"]["positive"] == PARAMETERS.prompt
    assert found.structured["sampling"]["method"] == "euler"


def test_it_is_shown_as_text_and_as_json(sd: Sd, picture: Path) -> None:
    outcome = sd("-M", "metadata", "--image", picture)
    assert outcome.status == 0
    first, *lines = outcome.out.splitlines()
    assert first.endswith("64×32")
    assert lines[:2] == [PARAMETERS.prompt, "Negative prompt: blurry"]
    assert lines[2].startswith("Steps: 4, CFG scale: 7.000000")
    told = json.loads(sd("-M", "metadata", "--image", picture, "--metadata-format", "json").out)
    assert told["parameters"] == PARAMETERS.text()
    assert told["sdcpp"]["seed"] == 42
    brief = sd("-M", "metadata", "--image", picture, "--metadata-brief").out.splitlines()
    assert max(map(len, brief[1:])) == 100


def test_other_entries_are_shown_where_they_are_wanted(sd: Sd, tmp_path: Path) -> None:
    image, path = Image.new("RGB", (8, 8)), tmp_path / "photo.jpg"
    exif = image.getexif()
    exif[0x010F] = "A camera\x1b[31m"
    image.save(path, exif=exif, comment=b"by hand\0\xff")
    plain = sd("-M", "metadata", "--image", path)
    assert plain.status == report.FAILURE
    assert "says nothing of how it was made" in plain.err
    assert plain.out.splitlines() == [f"{path}: JPEG, 8×8"]
    every = sd("-M", "metadata", "--image", path, "--metadata-all", "--metadata-raw").out
    assert r"exif Make: A camera\x1b[31m" in every
    assert "comment: 62792068616e6400ff" in every


def test_the_web_uis_write_a_comment_of_exif(tmp_path: Path) -> None:
    path, image = tmp_path / "a.webp", Image.new("RGB", (8, 8))
    exif = image.getexif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + "a cat\nSteps: 20".encode("utf-16-be")
    image.save(path, exif=exif)
    found = read_metadata(path)
    assert found.parameters == "a cat\nSteps: 20"
    assert found.structured is None


@pytest.mark.parametrize(("arguments", "says"), [((), "--image"), (("--image", "none.png"), "--image none.png")])
def test_what_can_not_be_read_is_told(sd: Sd, arguments: tuple[str, ...], says: str) -> None:
    outcome = sd("-M", "metadata", *arguments)
    assert outcome.status == report.USAGE
    assert says in outcome.error


def test_a_prompt_comes_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_bytes("\ufeffa lovely\ncat\r\n".encode())
    assert read_prompt("prompt_file", str(path)) == "a lovely\ncat"
    path.write_bytes("a größer cat\r\n".encode("utf-16"))  # PowerShell's >
    assert read_prompt("prompt_file", str(path)) == "a größer cat"
    for content, says in ((b"\xfe\xffa", "no text in UTF-8"), (b"\xe9", "UTF-8"), (bytes(MAX_BYTES + 1), "larger")):
        path.write_bytes(content)
        with pytest.raises(InvalidValue, match=f"^negative_prompt_file .*{says}"):
            read_prompt("negative_prompt_file", str(path))
    with pytest.raises(InvalidValue, match="No such file"):
        read_prompt("prompt_file", str(tmp_path / "none"))


@pytest.mark.parametrize("kind", ["prompt", "negative-prompt"])
def test_there_is_one_prompt(sd: Sd, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text("a cat")
    outcome = sd(f"--{kind}", "a dog", f"--{kind}-file", path)
    assert outcome.status == report.USAGE
    assert f"--{kind} and --{kind}-file: " in outcome.error


@pytest.fixture
def to_standard(checkpoint: Path) -> list[str]:
    """sd-cli as a process that draws, as small as other tests do, what standard input says to standard output."""
    small = ("-W", "64", "-H", "64", "--steps", "1", "-t", "1", "-m", str(checkpoint))
    return [sys.executable, "-c", "from sdrpc.cli.sd_cli import main; main()", "--prompt-file", "-", "-o", "-", *small]


def test_a_picture_goes_to_standard_output(to_standard: list[str]) -> None:
    """Nothing else does; the prompt comes from standard input."""
    done = subprocess.run(to_standard, input=b"a red circle\n", capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    found = read_metadata(done.stdout)
    assert (found.format, found.width, found.height) == ("PNG", 64, 64)
    assert str(found.parameters).startswith("a red circle\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a file that is always full")
def test_a_picture_that_standard_output_does_not_take_is_kept(to_standard: list[str], tmp_path: Path) -> None:
    with open("/dev/full", "wb") as full:
        env = os.environ | {"TMPDIR": str(tmp_path)}
        done = subprocess.run(to_standard, input=b"x", stdout=full, stderr=subprocess.PIPE, env=env, check=False)
    assert done.returncode == report.FAILURE
    (kept,) = tmp_path.glob("sdrpc-*.png")
    warnings = [line for line in done.stderr.decode().splitlines() if line.startswith("warning: ")]
    assert warnings == [f"warning: standard output: No space left on device; the picture is in {kept}"]
    assert read_metadata(kept).width == 64


@pytest.mark.parametrize("options", [("-b", "2"), ("-M", "vid_gen")])
def test_standard_output_takes_one_picture(sd: Sd, options: tuple[str, ...]) -> None:
    outcome = sd("-p", "x", "-o", "-", *options)
    assert outcome.status == report.USAGE
    assert "--output -" in outcome.error

"""sd-cli --mode convert, and what is drawn from its files."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sdrpc.checkpoints.checkpoint import open_checkpoint
from tests.cli.conftest import Outcome
from tests.cli.test_sd_cli import PSNR_EXACT, SMALL, Servers, psnr, rpc

Sd = Callable[..., Outcome]

PSNR_Q8 = 25.0
"""dB between pictures of the same random weights in F32 and, matrices, in Q8_0; other weights give about 10."""


@pytest.mark.parametrize(
    ("suffix", "options", "least"),
    [
        (".gguf", (), PSNR_EXACT),
        (".gguf", ("--type", "q8_0", "--tensor-type-rules", r"^vae\.=f16,ff.net=q4_1"), PSNR_Q8),
        (".safetensors", (), PSNR_EXACT),
    ],
    ids=["as-is", "q8_0", "safetensors"],
)
def test_a_converted_model_draws_the_same_picture(
    sd: Sd, servers: Servers, checkpoint: Path, tmp_path: Path, suffix: str, options: tuple[str, ...], least: float
) -> None:
    converted = tmp_path / f"tiny{suffix}"
    outcome = sd("-M", "convert", "-m", checkpoint, "-o", converted, *options)
    assert outcome.status == 0, outcome.err
    assert outcome.out.split() == [str(converted)]
    pictures = []
    for model in (checkpoint, converted):
        pictures.append(tmp_path / f"{model.stem}{model.suffix}.png")
        assert sd("--rpc", rpc(servers), "-m", model, *SMALL, "-o", pictures[-1]).status == 0
    assert psnr(*pictures) >= least


def test_the_default_output(sd: Sd, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = sd("--mode", "convert", "-m", checkpoint)
    assert outcome.out.split() == ["output.gguf"]
    assert "1 tensors are not used" not in outcome.err
    assert open_checkpoint("output.gguf").tensors.keys() == open_checkpoint(checkpoint).tensors.keys()


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (("--type", "q4_K"), 2, r"--type q4_K: there are f32"),
        (("-o", "model.bin"), 2, r"a \.gguf or \.safetensors file"),
        (("-o", "model.safetensors", "--type", "q8_0"), 2, r"a \.safetensors file has no such type"),
        (("--tensor-type-rules", "q8_0"), 2, r"a rule is PATTERN=TYPE"),
        (("--tensor-type-rules", "(=q8_0"), 2, r"'\(' is no regular expression"),
        (("--tensor-type-rules", "vae=q9"), 2, r"q9: there are f32"),
        (("-o", "/proc/nowhere/model.gguf"), 2, r"can't write"),
        (("--vae", "{checkpoint}"), 2, r"takes one file, with -m or"),
        (("-m", "absent.safetensors"), 1, r"absent\.safetensors: No such file"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    sd: Sd, checkpoint: Path, tmp_path: Path, arguments: tuple[str, ...], status: int, says: str
) -> None:
    words = [word.format(checkpoint=checkpoint) for word in arguments]
    outcome = sd("-M", "convert", "-m", checkpoint, "-o", tmp_path / "x.gguf", *words)
    assert outcome.status == status, outcome.err
    assert re.search(says, outcome.error)
    assert not list(tmp_path.iterdir())


def test_a_rule_that_matches_nothing_is_told(sd: Sd, checkpoint: Path, tmp_path: Path) -> None:
    outcome = sd(
        "-M", "convert", "-m", checkpoint, "-o", tmp_path / "x.gguf", "--tensor-type-rules", "^vae=f16,wheel=f16"
    )
    assert outcome.status == 0
    assert re.findall(r"no tensor has a name that the rule (\S+) matches", outcome.err) == ["wheel"]


def test_the_tool_is_the_same(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    command = [sys.executable, Path(__file__).parents[2] / "tools" / "make_gguf.py", checkpoint, path, "--type", "q4_0"]
    subprocess.run([str(word) for word in command], check=True)
    assert "Q4_0" in {weight.type.name for weight in open_checkpoint(path).tensors.values()}

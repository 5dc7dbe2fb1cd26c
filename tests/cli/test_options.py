"""The options of sd-cli: their names, what they set, and that none of stable-diffusion.cpp's is passed over."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

from sdrpc.cli import report
from sdrpc.cli.options import ACTS_ON, ALWAYS_SO, OPTIONS, REFUSED
from sdrpc.cli.sd_cli import COMMAND
from sdrpc.diffusion.request import Request
from sdrpc.errors import InvalidValue, MissingComponent, UsageError
from sdrpc.families.model import ModelFiles
from tests.cli.conftest import Outcome

Sd = Callable[..., Outcome]

NATIVE = json.loads((Path(__file__).parent.parent / "data" / "sd-cli-options.json").read_text())
"""The options of stable-diffusion.cpp's sd-cli, with where they come from."""

NO_OPTIONS = {"loras"}
"""Fields of a request that a prompt fills."""

FIELDS = [*(entry.name for entry in fields(Request) if entry.name not in NO_OPTIONS), *ModelFiles.names()]
OTHER_FIELDS = ["backend", "output", "mode", "type", "precision", "completion"]
"""Fields of errors that are no field of a request or of a model's files."""


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (["--vae_backend_device", "RPC0"], ["--vae-backend-device", "RPC0"]),
        (["--clip-l=a_b.safetensors"], ["--clip_l=a_b.safetensors"]),
        (["--CLIP-L", "x"], ["--clip_l", "x"]),
        (["-p", "a_b --c"], ["-p", "a_b --c"]),
        (["-p", "-in the dark-"], ["-p", "-in the dark-"]),
        (["-p", "--fa"], ["-p", "--fa"]),
        (["--prompt", "-i"], ["--prompt", "-i"]),
        (["--unknown_one"], ["--unknown_one"]),
        (["-v", "--", "--fa"], ["-v", "--", "--fa"]),
        (["--color", "--mmap", "-v"], ["-v"]),
        (["--auto-fit", "-v"], ["--auto-fit=on", "-v"]),
        (["--auto_fit", "off", "-v"], ["--auto-fit=off", "-v"]),
        (["--auto-fit=on"], ["--auto-fit=on"]),
        (["-p", "--auto-fit", "on"], ["-p", "--auto-fit", "on"]),
    ],
)
def test_other_spellings_mean_the_same_and_values_stay(typed: list[str], meant: list[str]) -> None:
    assert COMMAND.canonical(typed) == meant


@pytest.mark.parametrize("option", REFUSED)
@pytest.mark.parametrize("value", [(), ("x",), ("-0.5",)], ids=["alone", "word", "number"])
def test_native_options_that_are_not_here_are_refused_by_name(option: str, value: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match=rf"^{option}: .* that sdrpc lacks"):
        COMMAND.run(["-p", "x", option, *value])
    with pytest.raises(UsageError, match=rf"^{option}: "):
        COMMAND.run(["-p", "x", option.replace("_", "-"), *value])


@pytest.mark.parametrize("version", NATIVE)
def test_c4_every_option_of_stable_diffusion_cpp_is_honoured_or_refused(version: str) -> None:
    ours = [name for option in OPTIONS for name in option.opts]
    known = {name.replace("_", "-") for name in (*ours, "-h", "--help", *REFUSED, *ALWAYS_SO)}
    unknown = [name for name in NATIVE[version]["options"] if name.replace("_", "-") not in known]
    assert not unknown
    assert NATIVE[version]["options"]


def test_no_option_is_both_here_and_refused() -> None:
    ours = [name for option in OPTIONS for name in option.opts]
    assert len(ours) == len(set(ours))
    assert not set(ours) & (REFUSED.keys() | ALWAYS_SO)


@pytest.mark.parametrize("field", [*FIELDS, *OTHER_FIELDS])
def test_errors_name_the_option_of_every_field(field: str) -> None:
    option = COMMAND.fields[field]
    assert option.startswith("--")
    assert report.said(InvalidValue(field, "x", "no"), COMMAND.fields) == f"{option} x: no"
    assert report.said(MissingComponent(field, "none"), COMMAND.fields) == f"none; give it with {option}"


BAD_VALUES = [
    (("--precision", "foo"), r"--precision foo: does not exist; there are auto, exact"),
    (("--rng", "dice"), r"--rng dice: does not exist"),
    (("--sampler-rng", "dice"), r"--sampler-rng dice: does not exist"),
    (("--prediction", "w"), r"--prediction w: does not exist; there are eps"),
    (("--sampling-method", "fast"), r"--sampling-method fast: does not exist"),
    (("--scheduler", "sideways"), r"--scheduler sideways: does not exist"),
    (("--mode", "daydream"), r"--mode daydream: does not exist"),
    (("--completion", "tcsh"), r"--completion tcsh: does not exist"),
    (("--steps", "many"), r"--steps.*many"),
    (("--output-begin-idx", "-1"), r"--output-begin-idx"),
    (("--frobnicate",), r"--frobnicate"),
    (("a", "cat"), r"'a' belongs to no option; words of one value are written in quotes"),
    (("-p",), r"-p.*argument"),
    (("--prompt", "<lora:x:much>"), r"--prompt <lora:x:much>: the strength 'much' is no number"),
    (("-n", "<lora:x:1>"), r"--negative-prompt <lora:x:1>"),
    (("--lora-apply-mode", "later"), r"--lora-apply-mode later: does not exist; there are auto"),
    (("-n", "x (nose:.)"), r"--negative-prompt 'x \(nose:\.\)': the weight '\.' is no number"),
    (("-p", "(cat:99999999999999999999)"), r"--prompt .*: the weight 1e\+20 of 'cat' is beyond 1000"),
    (("-p", f"(((cat:{'9' * 38}):{'9' * 38}):0)"), r"--prompt .*: the weight nan of 'cat' is beyond 1000"),
    (
        ("-n", "(" * 80 + "cat"),
        r"--negative-prompt .*: the weight 2048\.\d+ of 'cat' is beyond 1000: brackets multiply",
    ),
    (("-p", "x", "--cache-option", "Fn=1"), r"--cache-option Fn=1: says something of a --cache-mode, and none is"),
    (("-p", "x", "--scm-mask", "1,0"), r"--scm-mask 1,0: is of --cache-mode dbcache"),
    (("-p", "x", "--cache-mode", "dbcache", "--cache-option", "Fn=1,Fn=2"), r"--cache-option .*: Fn is given twice"),
    (("-o", ""), r"--output ''"),
    (("--cfg-scale", "7,5"), r"--cfg-scale: '7,5' is not a number; write it as 7\.5"),
    (("--steps", "7,5"), r"--steps: '7,5' is not a whole number$"),
    (("--auto-fit=maybe",), r"--auto-fit maybe: is on or off"),
    (("--preview", "proj", "--preview-path", "a.gif", "-t", "1"), r"--preview-path a\.gif: pictures are written as"),
    (("--preview", "proj", "--preview-path", "-", "-t", "1"), r"--preview-path -: standard output takes the picture"),
    (("-o", "a/" * 1500 + "b.png", "-t", "1"), r"--output a/.*: can't write there: "),
    (("-steps", "5"), r"-steps: long options begin with two hyphens: --steps"),
    (("\u2014cfg_scale=5",), r"\u2014cfg_scale: long options begin with two hyphens: --cfg-scale"),
    (("-o", "nodir/"), r"--output nodir/: names a directory"),
    (("--rpc-timeout", "nan"), r"--rpc-timeout nan: is no number of seconds"),
    (("--rpc-retry", "1e12"), r"--rpc-retry.* 1000000000000\.0 is not in the range"),
    (("-p", "x", "-t", "1000000"), r"--threads 1000000: it can be 1 … 1024"),
    (("-b", "1000000000"), r"--output .*: 1,000,000,000 files of one command are too many"),
    (("-p", "x", "-m", ""), r"--model '': a name is needed; is a variable of the shell not set\?"),
    (("-o", "picture.gif"), r"--output picture\.gif: pictures are written as \.png"),
    (("--rpc", "http://box:1", "--list-devices"), r"without http://"),
    (("--rpc", "box:1;b:2", "--list-devices"), r"commas"),
    (("--rpc", "box:1,box:1", "--list-devices"), r"box:1 is given twice"),
]


@pytest.mark.parametrize(("arguments", "says"), BAD_VALUES, ids=[" ".join(case[0]) for case in BAD_VALUES])
def test_c14_bad_values_are_refused_in_one_line(sd: Sd, arguments: tuple[str, ...], says: str) -> None:
    outcome = sd(*arguments)
    assert outcome.status == report.USAGE
    assert re.search(says, outcome.error), outcome.error
    assert not outcome.out


@pytest.mark.parametrize("columns", ["80", "120"])
def test_c9_help_is_complete_and_grouped(sd: Sd, monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    outcome = sd("--help")
    assert outcome.status == 0
    text = " ".join(outcome.out.split())
    for option in OPTIONS:
        for name in option.opts:
            assert re.search(rf"(^| ){re.escape(name)}\b", text), name
    for group in dict.fromkeys(option.group for option in OPTIONS):
        assert f"\n{group}:\n" in outcome.out
    for shown in ("[default: 42]", "[default: ./output.png]", "[default: what the model is made for]"):
        assert shown in text
    for noise in ("<bool>", "Sentinel", "None", "…", "\x1b"):
        assert noise not in outcome.out
    assert max(map(len, outcome.out.splitlines())) <= int(columns)
    outcome.out.encode("ascii")


def test_without_arguments_there_is_help(sd: Sd) -> None:
    outcome = sd()
    assert outcome.status == report.USAGE
    assert "Usage: sd-cli" in outcome.out


IDLE = {"hires_upscaler": "Lanczos", "preview_path": "x.png", "skip_layers": "7"}
IDLE |= {"metadata_format": "json"}
"""Values of options that take no number."""
ASKED = {"preview": "proj", "slg_scale": "2.5"}
"""Values of options that take no path."""


@pytest.mark.parametrize("name", ACTS_ON)
def test_an_option_that_has_no_effect_is_said_to_have_none(sd: Sd, name: str) -> None:
    options = {str(option.name): option for option in OPTIONS}
    acting, needed = options[name], ACTS_ON[name]
    other, *value = [needed] if isinstance(needed, str) else needed
    given = [COMMAND.fields[name], *([IDLE.get(name, "1")] if acting.takes_value else [])]
    asked = [COMMAND.fields[other], *(value or ([ASKED.get(other, "x")] if options[other].takes_value else []))]
    warning = f"warning: {given[0]} has no effect without {' '.join([asked[0], *value])}\n"
    assert sd("--version", *given).err == warning
    assert sd("--version", *asked, *given).err == ""
    assert sd("--version").err == ""


NOT_DRAWING = [
    (("--list-devices",), ("--steps", "3", "-p", "x", "--fps", "8"), "--prompt, --fps, --steps have"),
    (("--list-devices",), ("--rpc", "box:1", "-v"), ""),
    (("--discover",), ("--rpc", "box:1"), "--rpc has"),
    (("--mode", "convert"), ("--steps", "3", "-b", "2"), "--batch-count, --steps have"),
    (("--mode", "convert"), ("--vae", "x", "--type", "q8_0", "-o", "y.gguf"), ""),
    (("--mode", "upscale"), ("--strength", "1", "--max-vram", "3", "-i", "x"), "--strength, --max-vram have"),
    (("--mode", "upscale"), ("--upscale-model", "x", "--upscale-repeats", "2", "--backend", "CPU"), ""),
    (("--mode", "metadata"), ("-o", "x.png", "--image", "y.png"), "--output has"),
]

COUNTING = [
    (
        ("--sigmas", "9,1,0", "--steps", "3", "--scheduler", "karras"),
        "--steps, --scheduler have no effect with --sigmas",
    ),
    (("--hires", "--hires-width", "256", "--hires-scale", "2"), "--hires-scale has no effect with --hires-width"),
    (("--vae-on-cpu", "--vae-backend-device", "RPC0"), "--vae-on-cpu has no effect with --vae-backend-device"),
    (("--steps", "3", "--scheduler", "karras", "--vae-on-cpu"), ""),
]


@pytest.mark.parametrize(("given", "warning"), COUNTING)
def test_of_two_options_for_one_thing_it_is_said_which_counts(sd: Sd, given: tuple[str, ...], warning: str) -> None:
    assert sd("--version", *given).err == (f"warning: {warning}\n" if warning else "")


@pytest.mark.parametrize(("what", "given", "idle"), NOT_DRAWING, ids=[" ".join((*w, *g)) for w, g, _ in NOT_DRAWING])
def test_what_draws_nothing_says_what_it_does_not_read(
    sd: Sd, what: tuple[str, ...], given: tuple[str, ...], idle: str
) -> None:
    assert sd("--version", *what, *given).err == (f"warning: {idle} no effect with {' '.join(what)}\n" if idle else "")

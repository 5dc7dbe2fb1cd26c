"""`make newcomer`: the README's commands, line by line, as somebody types them who has only just cloned the project.

Everything happens in a folder of its own: a clone of what is committed, a new virtual environment, an empty home. What
the README's reader has and this machine lacks is put in place: hosts are servers on this machine, model files are small
ones with random weights. A command of the README that is neither run nor passed over below with a reason is an error.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PROGRAMS = ("pip", "sd-cli", "rpc-server", "sd-server", "make", "ssh", "eval", "SDRPC_TEST_DEVICE=CUDA0")
"""What a command begins with; other words in backquotes are names."""

HOSTS = ("desktop:50052", "mini:50052")
"""The machines of the README; each is a server on this one."""

STAND_INS = {
    "sdxl.safetensors": ("sdxl", "safetensors", "F16", "model"),
    "flux1-dev-Q8_0.gguf": ("flux1-dev", "gguf-parts", "Q8_0", "diffusion"),
    "clip_l.safetensors": ("flux1-dev", "parts", "F16", "clip_l"),
    "t5xxl_fp16.safetensors": ("flux1-dev", "parts", "F16", "t5xxl"),
    "ae.safetensors": ("flux1-dev", "parts", "F16", "vae"),
}
"""File of the README → family, form, number format, and which file of those that tools.checkpoints writes."""

LORAS = {"watercolour": "loras"}
"""LoRA of the README → its folder. It is one for the UNet of SDXL."""

PASSED_OVER = {
    r"make (?!demo).*": "long: CI and people run them",
    r"SDRPC_TEST_DEVICE=CUDA0 .*|rpc-server -d CUDA1 .*": "needs a GPU",
    r"ssh .*": "needs another machine",
    r"pip install '\.\[ray\]'|sd-server --ray .*": "needs a Ray cluster; make ray has one",
    r"eval .*": "a line of ~/.bashrc; tests/cli/test_terminal.py runs it",
    r"sd-cli .*-M vid_gen .*": "takes hours without a GPU; tests/remote/test_families.py draws small ones",
    r"[a-z-]+": "names a program",
}
"""Commands that are not run, as patterns, with the reason."""

ENDS = ("--help", "--version", "--list-devices", "--discover", "keys")
"""With these a server ends by itself."""

SERVERS = {"rpc-server": ("-p", "endpoint"), "sd-server": ("--listen-port", "http://")}
"""Command → its option for the port, and what stands in the line that says where it listens."""

PIPELINE = """
    import sdrpc, torch
    from diffusers import StableDiffusionXLPipeline
    pipe = StableDiffusionXLPipeline.from_pretrained("pipeline", torch_dtype=torch.float32, local_files_only=True)
"""
"""What comes before a block of Python that has a diffusers pipeline of its reader's."""

KEY = re.compile(r"\b[0-9a-z]{5}(?:-[0-9a-z]{5}){3}\b")
"""A key of a server, as the README shows one; the servers here have another."""

SECONDS = 1800
"""How long one command may take."""


class Command(NamedTuple):
    """``text`` as it stands in the README, in ``line``; ``kind``: sh or python."""

    line: int
    kind: str
    text: str


def commands(readme: str) -> Iterator[Command]:
    """The commands of ``readme``, in order: blocks of sh (line by line) and of Python, and those within sentences."""
    kind, block, begin = "", list[str](), 0
    for number, line in enumerate(readme.splitlines(), 1):
        fence = re.match(r"\s*```(\w*)", line)
        if fence and kind:
            body = textwrap.dedent("\n".join(block))
            if kind == "python":
                yield Command(begin, kind, body)
            elif kind == "sh":
                yield from (
                    Command(begin, kind, text)
                    for entry in body.replace("\\\n", " ").splitlines()
                    if (text := _code(entry))
                )
            kind, block = "", []
        elif fence:
            kind, begin = fence[1] or "text", number + 1
        elif kind:
            block.append(line)
        else:
            for span in re.findall(r"`([^`]+)`", line):
                if span.split()[0] in PROGRAMS and not line.startswith("|"):
                    yield Command(number, "sh", span)


def _code(line: str) -> str:
    return re.sub(r"\s+#.*", "", line).strip()


def reason_to_pass_over(command: Command) -> str | None:
    """Why ``command`` is not run; None where it is."""
    if command.kind != "sh":
        return None
    return next((why for pattern, why in PASSED_OVER.items() if re.fullmatch(pattern, command.text)), None)


class Reader:
    """Somebody with a clone of the project in ``folder`` and nothing else. ``hosts``: where the README's hosts are;
    ``key``: of the servers there."""

    def __init__(self, folder: Path, servers: ExitStack) -> None:
        self.clone, self.bin, self._servers = folder / "sdrpc", folder / "venv" / "bin", servers
        self.hosts = dict[str, str]()
        self.key = ""
        home = folder / "home"
        home.mkdir()
        kept = {name: os.environ[name] for name in ("LANG", "PIP_CACHE_DIR", "PIP_INDEX_URL") if name in os.environ}
        # the constraints choose the torch that is built for a CPU, where there is one
        self.env = kept | {
            "HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache"), "HF_HUB_OFFLINE": "1",
            "PATH": f"{self.bin}:{os.environ['PATH']}", "PIP_CONSTRAINT": str(self.clone / "constraints.txt"),
        }  # fmt: skip

    def run(self, command: Command) -> None:
        """Run ``command``; raises SystemExit where it fails."""
        text = command.text
        for name, endpoint in self.hosts.items():
            text = text.replace(name, endpoint)
        text = KEY.sub(self.key, text)
        if command.kind == "python":
            prelude = "" if "Session" in text else textwrap.dedent(PIPELINE)
            self._finish(command, [self.bin / "python", "-c", prelude + text])
        elif text.split()[0] in SERVERS and not set(shlex.split(text)) & {*ENDS}:
            self.serve(*shlex.split(text))
        else:
            self._finish(command, ["bash", "-c", text])

    def serve(self, program: str, *options: str) -> str:
        """Start a server for the rest of the run; its endpoint on this machine."""
        port, listens = SERVERS[program]
        words = [str(self.bin / program), *options, port, "0"]
        process = self._servers.enter_context(_stopped(words, self.env, self.clone))
        assert process.stdout is not None
        for line in process.stdout:
            print("   ", line, end="")
            found = KEY.search(line)
            self.key = found[0] if found else self.key
            if listens in line:
                return f"127.0.0.1:{re.findall(r':([0-9]+)', line)[-1]}"
        raise SystemExit(f"{shlex.join(words)} ended before it listened")

    def _finish(self, command: Command, words: list[str | Path]) -> None:
        env = self.env | {"SDRPC_RPC_KEY": self.key}  # which somebody at a terminal would be asked for
        done = subprocess.run(
            words, cwd=self.clone, env=env, timeout=SECONDS, check=False, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        print(textwrap.indent("\n".join(done.stdout.splitlines()[-6:]), "    "), flush=True)
        if done.returncode:
            print(done.stdout)
            raise SystemExit(f"README.md:{command.line}: exit status {done.returncode}: {command.text}")


@contextmanager
def _stopped(words: list[str], env: Mapping[str, str], folder: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(words, env=env, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(60)


def put_stand_ins(folder: Path) -> None:
    """Write the files that the README's reader has into ``folder``."""
    import numpy as np
    from PIL import Image
    from safetensors import safe_open
    from safetensors.numpy import save_file

    from tools.checkpoints import make

    made = {}
    for name, (*kind, which) in STAND_INS.items():
        family, form, numbers = key = tuple(kind)
        if key not in made:
            made[key] = make(family, folder / "models" / "-".join(key), form=form, type=numbers)
        made[key].files[which].rename(folder / name)
    mask = np.zeros((128, 128), np.uint8)
    mask[32:96, 72:120] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    pipeline = make("sdxl", folder / "models", form="diffusers").files["model"].rename(folder / "pipeline")
    lora = {}
    with safe_open(pipeline / "unet" / "diffusion_pytorch_model.safetensors", "numpy") as unet:
        for name in unet.keys():  # noqa: SIM118  what is opened is no dictionary
            if name.endswith("attn1.to_q.weight"):
                rows, columns = unet.get_slice(name).get_shape()
                layer = f"unet.{name.removesuffix('.weight')}"
                lora[f"{layer}.lora_A.weight"] = np.full((1, columns), 0.01, np.float32)
                lora[f"{layer}.lora_B.weight"] = np.full((rows, 1), 0.01, np.float32)
    for name, inside in LORAS.items():
        (folder / inside).mkdir(exist_ok=True)
        save_file(lora, folder / inside / f"{name}.safetensors")


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="newcomer-") as name, ExitStack() as servers:
        reader = Reader(Path(name), servers)
        subprocess.run(["git", "clone", "--quiet", ROOT, reader.clone], check=True)
        subprocess.run([sys.executable, "-m", "venv", reader.bin.parent], check=True)
        put_stand_ins(reader.clone)
        found = list(commands((reader.clone / "README.md").read_text()))
        for command in sorted(found, key=lambda command: not command.text.startswith("pip")):  # as its sections say
            why = reason_to_pass_over(command)
            print(f"README.md:{command.line}: {command.text}" + (f"   [{why}]" if why else ""), flush=True)
            if why:
                continue
            if HOSTS[0] in command.text and not reader.hosts:
                reader.hosts = {host: reader.serve("rpc-server", "-H", "0.0.0.0", "-d", "CPU") for host in HOSTS}
            begin = time.monotonic()
            reader.run(command)
            print(f"    ({time.monotonic() - begin:.0f} s)", flush=True)
    print("every command of the README did what it says")


if __name__ == "__main__":
    main()

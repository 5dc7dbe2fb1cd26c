"""`make demo`: a real rpc-server on a free port, the shipped model through it, and where the picture is."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPTS = Path(sysconfig.get_path("scripts"))
THREADS = ("--threads", "1")
"""The picture is small: on a machine that has other things to do, several threads would mostly wait for each other."""
PROMPT = "a large yellow star on the left of a small red heart, on a blue background"


def main() -> int:
    """Exit status of sd-cli. Further options are sd-cli's: ``python tools/demo.py -p "a green ring"``."""
    server = subprocess.Popen(
        [SCRIPTS / "rpc-server", "--port", "0", "--device", "CPU", *THREADS], stdout=subprocess.PIPE, text=True
    )
    try:
        endpoint = _endpoint(server)
        _show("sd-cli", "--rpc", endpoint, "--list-devices")
        return _show(
            "sd-cli", "--rpc", endpoint, "--backend", "te=CPU,diffusion=RPC0,vae=RPC0", "-m", "demo", "-p", PROMPT,
            "--sampling-method", "euler", "--cfg-scale", "4", *THREADS, "-o", ROOT / "demo.png", *sys.argv[1:],
        )  # fmt: skip
    finally:
        server.terminate()
        server.wait()


def _show(program: str, *options: object) -> int:
    words = [str(word) for word in options]
    print("$", program, *(f'"{word}"' if " " in word else word for word in words), flush=True)
    return subprocess.run([SCRIPTS / program, *words], check=False).returncode


def _endpoint(server: subprocess.Popen[str]) -> str:
    """Where the server says that it listens; its output is shown meanwhile."""
    assert server.stdout is not None
    for line in server.stdout:
        print(line, end="", flush=True)
        if "endpoint" in line:
            return line.split()[-1]
    raise SystemExit("rpc-server ended before it listened")


if __name__ == "__main__":
    sys.exit(main())

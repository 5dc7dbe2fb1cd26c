"""`make demo`: a checkpoint, a real rpc-server on a free port, sd-cli through it, and where the picture is."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPTS = Path(sysconfig.get_path("scripts"))


def main() -> int:
    """Exit status of sd-cli."""
    picture = ROOT / "demo.png"
    with tempfile.TemporaryDirectory(prefix="sdrpc-demo-") as folder:
        checkpoint = Path(folder) / "tiny.safetensors"
        _show(sys.executable, "tools/make_checkpoint.py", "--size", "tiny", checkpoint)
        server = subprocess.Popen(
            [SCRIPTS / "rpc-server", "--port", "0", "--device", "CPU"], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        try:
            endpoint = _endpoint(server)
            return _show(
                SCRIPTS / "sd-cli", "--rpc", endpoint, "-m", checkpoint, "-p", "a lovely cat", "-W", "256", "-H", "256",
                "--steps", "10", "-o", picture,
            )  # fmt: skip
        finally:
            server.terminate()
            server.wait()


def _show(*command: object) -> int:
    words = [str(word) for word in command]
    print("$", " ".join(words), flush=True)
    return subprocess.run(words, check=True, cwd=ROOT).returncode


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

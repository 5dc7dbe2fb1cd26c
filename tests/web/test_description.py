"""schemathesis asks a real server for all that /openapi.json allows, and for what it does not, and finds nothing: what
comes back is what is described, and nothing is a fault of the server's.

``SDRPC_TEST_EXAMPLES=200`` lets it try longer than the few seconds of a test."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.web.process import WebServer

EXAMPLES = os.environ.get("SDRPC_TEST_EXAMPLES", "2")
"""Of each kind, for each route."""

PHASES = "examples,fuzzing" if EXAMPLES == "2" else "examples,coverage,fuzzing,stateful"
"""Every boundary of every field is some two thousand requests: for who has the time."""

SCHEMATHESIS = "from schemathesis.cli import schemathesis; schemathesis()"

HERE = Path(__file__).parent / "described"
SECONDS = 600 + 30 * int(EXAMPLES)

ENDLESS = "/sdcpp/v1/events"
"""Its stream has no end that could be waited for."""


@pytest.mark.skipif(find_spec("schemathesis") is None, reason="there is no schemathesis")
@pytest.mark.timeout(SECONDS + 300)
def test_answers_are_what_is_described(tmp_path: Path, models: Path) -> None:
    model = ("-m", str(models / "tiny.safetensors"), "--max-pending", "4")
    with WebServer(tmp_path / "data", *model) as server:
        description = tmp_path / "openapi.json"
        description.write_bytes(server.ask("/openapi.json").body)
        tried = subprocess.run(
            [sys.executable, "-c", SCHEMATHESIS, "--config-file", str(HERE / "schemathesis.toml"), "run",
             str(description), "--url", server.url, "--exclude-path", ENDLESS, "--max-examples", EXAMPLES,
             "--seed", "1", "--generation-deterministic", "--phases", PHASES, "--request-timeout", "120", "--no-color"],
            env=os.environ | {"SCHEMATHESIS_HOOKS": "hooks", "PYTHONPATH": str(HERE), "COLUMNS": "200"}, cwd=tmp_path,
            capture_output=True, text=True, timeout=SECONDS,
        )  # fmt: skip
        assert tried.returncode == 0, tried.stdout[-20_000:] + tried.stderr + "".join(server.lines[-50:])
        assert "Traceback" not in "".join(server.lines)

"""The log as JSON, of a real process."""

from __future__ import annotations

import json
from pathlib import Path

from tests.web.process import SMALL, WebServer

KEY, PROMPT = "s3cret-one", "a very private cat"


def test_each_line_is_an_object_and_none_has_keys_or_prompts(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"anna: {KEY}\n")
    options = ("--api-key-file", str(tmp_path / "keys"), "--log-format", "json")
    headers = {"Authorization": f"Bearer {KEY}"}
    with WebServer(tmp_path / "data", *options) as server:
        answer = server.ask("/sdcpp/v1/img_gen", SMALL | {"model": "demo", "prompt": PROMPT}, headers=headers)
        name = answer.json()["id"]
        server.until_said(f'"message": "{name} is completed"')
        assert server.ask(f"/sdcpp/v1/jobs/{name}").status == 401
        assert server.stop() == 0
    lines = list(server.lines)
    assert not any(KEY in line or PROMPT in line for line in lines)
    told = [json.loads(line) for line in lines if line.startswith("{")]
    assert len(told) == len(lines) - 2  # what runs where, and the address, are for people
    assert all({"time", "level", "logger", "message"} <= set(each) for each in told)
    (job,) = (each for each in told if each.get("job") == name)
    assert (job["user"], job["model"], job["status"]) == ("anna", "demo", "completed")
    assert job["seat"]
    assert job["waited"] >= 0
    assert job["seconds"] > 0
    requests = [(each["method"], each["path"], each["status"]) for each in told if "method" in each]
    assert requests == [("POST", "/sdcpp/v1/img_gen", 202), ("GET", f"/sdcpp/v1/jobs/{name}", 401)]

"""Who may come in."""

from __future__ import annotations

import asyncio
import http.client
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from starlette.types import Message

from sdrpc.cli import sd_server
from sdrpc.errors import UsageError
from sdrpc.web.gate import TRIES, Bodies, Body, Refused, given_key, own_names
from sdrpc.web.serving import _Server
from tests.web.process import DRAW_SECONDS, SMALL, WebServer

KEYS = "# who draws\nanna: s3cret-one\ns3cret-two\n"


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebServer]:
    folder = tmp_path_factory.mktemp("locked")
    (folder / "keys").write_text(KEYS)
    with WebServer(folder / "data", "--api-key-file", str(folder / "keys"), "-v") as process:
        yield process


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    ("option", "says"),
    [("--steps", "what each request says"), ("-p", "what each request says"), ("--list-devices", "sd-cli lists them"),
     ("--diffusion-fa", "stable-diffusion.cpp's"), ("--serve-html-path", "a page of its own")],
)  # fmt: skip
def test_options_of_others_are_refused_by_name(option: str, says: str) -> None:
    with pytest.raises(UsageError, match=f"^{option}: .*{says}"):
        sd_server.run(["--version", option, "20"])
    assert sd_server.run(["--version", "--mmap", "--auto-fit", "on"]) == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            ["--listen-ip", "192.0.2.1", "--no-auth"],
            r"listen on 192\.0\.2\.1:1234: .* \(this machine has no such address",
        ),
        (["--listen-port", "0", "--data", "/dev/null"], "^/dev/null is no folder$"),
        (["--keep", "nan"], "^keep nan: is no number of days$"),
    ],
)
def test_what_a_server_can_not_have_is_said_with_what_to_do(options: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        sd_server.run(options)


def test_keys(locked: WebServer) -> None:
    """T62: without one, or with a wrong one, nothing but the page and health; the log has none of them."""
    for path in ("/v1/models", "/sdapi/v1/options", "/sdcpp/v1/jobs", "/metrics", "/openapi.json"):
        assert locked.ask(path).status == 401
        assert locked.ask(path, headers=bearer("s3cret-three")).status == 401
        assert locked.ask(path, headers=bearer("s3cret-two")).status == 200
    for path in ("/", "/page/app.js", "/page/style.css", "/health", "/ready"):
        assert locked.ask(path).status == 200
    assert locked.ask("/page/../v1/models").status in (401, 404)
    assert "s3cret" not in "".join(locked.lines)


def test_a_user_is_who_the_key_says(locked: WebServer) -> None:
    answer = locked.ask("/sdcpp/v1/img_gen", SMALL | {"model": "demo"}, headers=bearer("s3cret-one"))
    assert locked.ask(f"/sdcpp/v1/jobs/{answer.json()['id']}", headers=bearer("s3cret-two")).json()["user"] == "anna"


def test_guessing_ends(tmp_path: Path) -> None:
    """After many wrong keys even a right one is refused for a while."""
    (tmp_path / "keys").write_text(KEYS)
    with WebServer(tmp_path / "data", "--api-key-file", str(tmp_path / "keys")) as server:
        statuses = [server.ask("/v1/models", headers=bearer(f"guess {number}")).status for number in range(TRIES)]
        assert set(statuses) == {401}
        assert server.ask("/v1/models", headers=bearer("s3cret-one")).status == 429


@pytest.mark.parametrize(
    ("header", "key"),
    [
        ("Bearer abc", "abc"),
        ("bearer  abc ", "abc"),
        ("Basic dXNlcjphYmM=", "abc"),
        ("Basic !", ""),
        ("", None),
        ("x", None),
    ],
)
def test_headers_with_keys(header: str, key: str | None) -> None:
    assert given_key(header) == key


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "[::1]", "192.168.1.7", *sorted(own_names())])
def test_names_of_this_server(server: WebServer, name: str) -> None:
    assert server.ask("/health", headers={"Host": f"{name}:{server.port}"}).status == 200


@pytest.mark.parametrize("name", ["evil.example", "localhost.evil.example", "", "[", "[::1", "]", "[v1.x]"])
def test_a_foreign_name_is_refused(server: WebServer, name: str) -> None:
    """T64: a page of evil.example whose name was bound to 127.0.0.1 gets nothing."""
    answer = server.ask("/sdcpp/v1/jobs", headers={"Host": name})
    assert answer.status in (400, 421)
    assert b"job" not in answer.body


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:1", "http://[", "http://[::1"])
def test_foreign_pages_change_nothing(server: WebServer, origin: str) -> None:
    """T64: a form of another page, which browsers send without asking."""
    answer = server.ask("/sdcpp/v1/img_gen", SMALL, headers={"Origin": origin, "Content-Type": "text/plain"})
    assert answer.status == 403
    assert "access-control-allow-origin" not in {name.lower() for name in answer.headers}


def test_the_servers_own_page_may(server: WebServer) -> None:
    assert server.ask("/sdcpp/v1/img_gen", SMALL, headers={"Origin": server.url}).status == 202


def test_a_body_that_is_too_large(server: WebServer) -> None:
    """Refused by what it says of itself, and also where it says nothing."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=DRAW_SECONDS)
    connection.putrequest("POST", "/sdcpp/v1/img_gen")
    connection.putheader("Content-Length", str(1 << 40))
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()
    chunk = b"a" * (1 << 20)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=DRAW_SECONDS)
    try:
        connection.request(
            "POST", "/sdcpp/v1/img_gen", iter([chunk] * 80), {"Content-Type": "application/json"}, encode_chunked=True
        )
        status = connection.getresponse().status
    except (ConnectionError, BrokenPipeError):
        status = 413  # it hung up while we were still talking
    assert status in (400, 413)
    connection.close()
    assert server.ask("/health").status == 200


def test_a_head_without_end(server: WebServer) -> None:
    """A parser that keeps what came of it took all memory."""
    for begins in (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Much: ", b"GET /", b"GET /health HTTP/1.1\r\nHost: "):
        with socket.create_connection(("127.0.0.1", server.port), DRAW_SECONDS) as connection:
            connection.sendall(begins)
            with suppress(ConnectionError):
                for _ in range(64):
                    connection.sendall(b"a" * (1 << 16))
                while answer := connection.recv(1 << 16):
                    assert b" 400 " in answer
    assert server.ask("/health").status == 200


def test_who_asks_for_nothing_holds_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """512 connections that said nothing, or half of something, locked out everybody."""
    serving = uvicorn_server()

    def connection(cycle: object) -> Any:
        return SimpleNamespace(cycle=cycle, transport=SimpleNamespace(close=lambda: closed.append(cycle)))

    closed = list[object]()
    answered, under_way = SimpleNamespace(response_complete=True), SimpleNamespace(response_complete=False)
    there = [type("Connection", (), vars(connection(each)))() for each in (None, answered, under_way)]
    serving.server_state.connections = set(there)
    for _ in range(2):
        serving._look()
        assert not closed
    monkeypatch.setattr("sdrpc.web.serving.HEAD_SECONDS", -1.0)
    serving._look()
    assert set(map(id, closed)) == {id(None), id(answered)}


def uvicorn_server() -> Any:
    return _Server(uvicorn.Config(FastAPI()), lambda: None, lambda _: None)


def body_of(messages: list[bytes | None], most: int = 100, bodies: Bodies | None = None) -> Body:
    """A body that comes in these parts; None: nothing more comes."""

    async def receive() -> Message:
        part = messages.pop(0)
        if part is None:
            await asyncio.sleep(60)
        return {"type": "http.request", "body": part, "more_body": bool(messages)}

    return Body(receive, 0, most, bodies or Bodies())


def test_half_a_body_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdrpc.web.gate.STALL_SECONDS", 0.05)

    async def read(body: Body, times: int) -> None:
        for _ in range(times):
            await body.receive()

    with pytest.raises(Refused) as refused:
        asyncio.run(read(body_of([b"half", None, b""]), 2))
    assert refused.value.status_code == 408
    whole = body_of([b"half", b"whole"])
    asyncio.run(read(whole, 2))
    assert whole.size == 9
    monkeypatch.setattr("sdrpc.web.gate.MAX_BODIES", 12)
    bodies = Bodies(held=4)
    with pytest.raises(Refused) as refused:
        asyncio.run(read(body_of([b"half", b"whole"], bodies=bodies), 2))
    assert (refused.value.status_code, bodies.held) == (503, 13)


def test_who_leaves_in_the_middle_of_a_request_is_no_fault(server: WebServer) -> None:
    """A file that stopped coming was a traceback in the log."""
    head = b"POST /v1/images/edits HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n"
    form = b'--b\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\nhalf'
    for kind, begins in ((b"multipart/form-data; boundary=b", form), (b"application/json", b'{"prompt": "a c')):
        with socket.create_connection(("127.0.0.1", server.port), DRAW_SECONDS) as connection:
            connection.sendall(head + b"Content-Type: " + kind + b"\r\n\r\n" + begins)
            time.sleep(0.2)
    assert server.ask("/health").status == 200
    time.sleep(0.2)
    assert "Traceback" not in "".join(server.lines)


def test_nothing_is_open_by_mistake(tmp_path: Path) -> None:
    def chosen(**changes: object) -> dict[str, object]:
        return {"listen_ip": "0.0.0.0", "api_key_file": None, "no_auth": False} | changes

    with pytest.raises(UsageError, match=r"listen_ip 0\.0\.0\.0: others .*--api-key-file .*--no-auth"):
        sd_server.keys_of(chosen())
    assert sd_server.keys_of(chosen(no_auth=True)) == {}
    assert sd_server.keys_of(chosen(listen_ip="127.0.0.1")) == {}
    with pytest.raises(UsageError, match="exclude each other"):
        sd_server.keys_of(chosen(no_auth=True, api_key_file=str(tmp_path / "keys")))
    made = sd_server.keys_of(chosen(api_key_file=str(tmp_path / "keys")))
    assert len(made["home"]) >= 24
    assert sd_server.keys_of(chosen(api_key_file=str(tmp_path / "keys"))) == made
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o600
    (tmp_path / "empty").write_text("# nothing\n")
    with pytest.raises(UsageError, match="holds no key"):
        sd_server.keys_of(chosen(api_key_file=str(tmp_path / "empty")))


def test_keys_of_a_container_are_links_to_files_of_the_administrator(tmp_path: Path) -> None:
    (tmp_path / "..data").mkdir()
    (tmp_path / "..data" / "keys").write_text("anna: s3cret\n")
    (tmp_path / "keys").symlink_to(tmp_path / "..data" / "keys")
    assert sd_server.read_keys(tmp_path / "keys") == {"anna": "s3cret"}
    facts: Any = SimpleNamespace(st_mode=stat.S_IFREG | 0o444, st_uid=0, st_size=9)
    assert sd_server.distrusted(facts) == ""


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="owners and modes of files")
def test_keys_that_others_wrote_let_nobody_in(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("anna: s3cret\n")
    keys.chmod(0o666)
    with pytest.raises(UsageError, match="everybody can write to it, and let themselves in"):
        sd_server.read_keys(keys)
    theirs: Any = SimpleNamespace(st_mode=stat.S_IFREG | 0o600, st_uid=os.getuid() + 1, st_size=9)
    assert sd_server.distrusted(theirs) == "is somebody else's file"
    keys.chmod(0o600)
    keys.write_bytes(b"\xff\xfe")
    for path, says in (
        (keys, "is no text"),
        (tmp_path, "is no file with keys"),
        (keys / "x", "can't be used: Not a dir"),
    ):
        with pytest.raises(UsageError, match=f"api_key_file .*{says}"):
            sd_server.read_keys(path)

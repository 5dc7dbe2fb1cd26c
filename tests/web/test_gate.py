"""Who may come in."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdrpc.cli import sd_server
from sdrpc.errors import UsageError
from sdrpc.web.gate import TRIES, given_key, own_names
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


@pytest.mark.parametrize("name", ["evil.example", "localhost.evil.example", ""])
def test_a_foreign_name_is_refused(server: WebServer, name: str) -> None:
    """T64: a page of evil.example whose name was bound to 127.0.0.1 gets nothing."""
    answer = server.ask("/sdcpp/v1/jobs", headers={"Host": name})
    assert answer.status in (400, 421)
    assert b"job" not in answer.body


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:1"])
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

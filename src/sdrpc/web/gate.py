"""Who may come in: keys, hosts, origins, and how much a request may hold. A middleware, before anything is read."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import ipaddress
import json
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..attempts import Attempts

OPEN = ("/", "/health", "/ready", "/page/")
"""Paths that need no key: the page, which asks for one, and what a monitor calls."""

MOST_DIGITS = 18
"""Of a size; Python refuses to read thousands."""

SAFE = ("GET", "HEAD", "OPTIONS")
TRIES, TRY_SECONDS = 20, 60.0
"""Wrong keys from one address within so many seconds; then even a right one is refused."""

MAX_BODIES = 1 << 30
"""Bytes of all bodies whose requests are not answered yet: each is held several times while it is read."""

STALL_SECONDS, SLOWEST = 30.0, 128 << 10
"""A body comes with so many bytes a second, beyond some seconds: half of one must not hold a place for ever."""


@dataclass(frozen=True)
class Rules:
    """``keys``: name → key; none: everybody comes in. ``hosts``: names of this server beside its addresses, those of
    the machine and localhost. ``max_body``: bytes."""

    keys: Mapping[str, str] = field(default_factory=dict)
    hosts: frozenset[str] = frozenset()
    max_body: int = 64 << 20


class Refused(HTTPException):  # which passes through whatever reads a body
    """A request is answered with a status and the reason (``detail``)."""


class Gate:
    """Lets a request through to ``app`` when the ``rules`` do; it then knows its ``user`` (the key's name, else the
    address) in the scope's state."""

    def __init__(self, app: ASGIApp, rules: Rules) -> None:
        self._app, self._rules = app, rules
        self._wrong = Attempts(TRIES, TRY_SECONDS)
        self._names = {"localhost", *rules.hosts, *own_names()}
        self._bodies = Bodies()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        address = scope["client"][0] if scope.get("client") else ""
        try:
            self._check_host(headers, scope["method"])
            user = self._user(headers, scope["path"], address)
            body = Body(receive, self._announced(headers), self._rules.max_body, self._bodies)
        except Refused as refused:
            await answer(send, refused)
            return
        scope.setdefault("state", {})["user"] = user
        try:
            await self._app(scope, body.receive, send)
        finally:
            self._bodies.held -= body.size

    def _check_host(self, headers: Headers, method: str) -> None:
        """The name that a browser believes to talk to, and the page that made it do so: a foreign page whose name was
        bound to our address (DNS rebinding), or one that posts a form here, is refused."""
        host = headers.get("host", "")
        name = _host(f"//{host}").name
        if not (name in self._names or is_address(name)):
            raise Refused(421, f"this server is not called {name!r}; if it is, start it with --allow-host {name}")
        origin = headers.get("origin")
        if method not in SAFE and origin is not None and _host(origin).and_port != host:
            raise Refused(403, f"pages of {origin} may not ask for anything here")

    def _user(self, headers: Headers, path: str, address: str) -> str:
        keys = self._rules.keys
        if not keys or path in OPEN or path.startswith(OPEN[-1]):
            return address
        if self._wrong.exhausted(address):
            raise Refused(429, "too many wrong keys; wait a minute")
        given = given_key(headers.get("authorization", ""))
        for name, key in keys.items():
            if given is not None and hmac.compare_digest(given.encode(), key.encode()):
                return name
        if given is not None:
            self._wrong.failed(address)
        raise Refused(401, "a key is needed (Authorization: Bearer …)")

    def _announced(self, headers: Headers) -> int:
        """The bytes of a request's body, as far as it says that."""
        said, most = headers.get("content-length", "0"), self._rules.max_body
        if not said.isdecimal() or len(said) > MOST_DIGITS or int(said) > most:
            raise Refused(413, f"a request may hold {most >> 20} MiB")
        return int(said)


@dataclass
class Bodies:
    """Bytes that are ``held`` of the bodies of all requests."""

    held: int = 0


class Body:
    """The body of a request, of ``announced`` bytes or unknown size, as it comes: at most ``most`` bytes, and of all
    together (``bodies``) at most :data:`MAX_BODIES`. ``size``: what has come."""

    def __init__(self, receive: Receive, announced: int, most: int, bodies: Bodies) -> None:
        self.size = 0
        self._receive, self._announced, self._most, self._bodies = receive, announced, most, bodies
        self._began = time.monotonic()
        self._whole = False

    async def receive(self) -> Message:
        message = await (self._receive() if self._whole else self._in_time())
        if message["type"] == "http.disconnect" and self._is_half:
            raise Refused(400, "the rest of the request did not come")  # nobody hears it: it is no fault of ours
        size = len(message.get("body", b""))
        self.size += size
        self._bodies.held += size
        self._whole = not message.get("more_body", False)
        if self.size > self._most:
            raise Refused(413, f"a request may hold {self._most >> 20} MiB")
        if self._bodies.held > MAX_BODIES:
            raise Refused(503, "too many large requests are under way; try again later", {"Retry-After": "5"})
        return message

    @property
    def _is_half(self) -> bool:
        return not self._whole and max(self._announced, self.size) > 0

    async def _in_time(self) -> Message:
        until = self._began + STALL_SECONDS + max(self._announced, self.size) / SLOWEST
        try:
            return await asyncio.wait_for(self._receive(), min(STALL_SECONDS, until - time.monotonic()))
        except (asyncio.TimeoutError, TimeoutError):
            raise Refused(408, "the rest of the request did not come in time", {"Connection": "close"}) from None


class Host(NamedTuple):
    name: str
    and_port: str


def _host(url: str) -> Host:
    """Whom an address at the network names; nobody where it is none (``//[``)."""
    try:
        parts = urlsplit(url)
        return Host(parts.hostname or "", parts.netloc)
    except ValueError:
        return Host("", "")


def given_key(authorization: str) -> str | None:
    """The key of a Bearer or a Basic header (whose password it is, as A1111's clients send it)."""
    kind, _, value = authorization.partition(" ")
    if kind.lower() == "bearer":
        return value.strip()
    if kind.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, ValueError):
            return ""
    return None


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def own_names() -> set[str]:
    """What this machine is called on its network."""
    name = socket.gethostname().lower()
    short = name.partition(".")[0]
    return {name, short, f"{short}.local", f"{short}.lan"} - {""}


def error_body(reason: str, status: int) -> dict[str, Any]:
    """An error as OpenAI's clients read it, with A1111's ``detail``."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": reason, "type": kind, "param": None, "code": str(status)}, "detail": reason}


async def answer(send: Send, refused: Refused) -> None:
    body = json.dumps(error_body(refused.detail, refused.status_code)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if refused.status_code == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if refused.status_code == 429:
        headers.append((b"retry-after", b"60"))
    await send({"type": "http.response.start", "status": refused.status_code, "headers": headers})
    await send({"type": "http.response.body", "body": body})

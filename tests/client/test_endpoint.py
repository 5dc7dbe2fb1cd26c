"""``host:port`` as users write it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdrpc.client import Endpoint, parse_endpoint
from sdrpc.errors import UsageError


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("box", "box", 50052),
        ("box:1", "box", 1),
        (" 192.168.1.20:65535 ", "192.168.1.20", 65535),
        ("[::1]", "::1", 50052),
        ("[fe80::1%eth0]:50053", "fe80::1%eth0", 50053),
    ],
)
def test_good(text: str, host: str, port: int) -> None:
    assert parse_endpoint(text) == (host, port)
    assert parse_endpoint(str(parse_endpoint(text))) == (host, port)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("", "write host:port"),
        (":50052", "write host:port"),
        ("box:", "'' is no port"),
        ("box:0", "'0' is no port"),
        ("box:65536", "is no port"),
        ("box:-1", "is no port"),
        ("box:٣", "is no port"),
        ("box:99999999999999999999", "is no port"),
        ("::1", r"write an IPv6 address in brackets, \[::1\]:50052"),
        ("::1:50052", "in brackets"),
        ("[::1", "is written"),
        ("[::1]50052", "is written"),
        ("[]:1", "write host:port"),
        ("http://box:50052", "without http://, as box:50052"),
        ("box:50052;other:50052", "separate servers with commas"),
        ("box:50052\nother:50052", "separate servers with commas"),
        ("box:50052:1", "several colons"),
        ("http:/box", "is no port"),
        ("a b:1", "write host:port"),
        ("user@box:1", "write host:port"),
    ],
)
def test_bad(text: str, hint: str) -> None:
    with pytest.raises(UsageError, match=hint):
        parse_endpoint(text)


@given(st.text(max_size=40))
def test_any_text_is_an_endpoint_or_a_usage_error(text: str) -> None:
    try:
        endpoint = parse_endpoint(text)
    except UsageError:
        return
    assert endpoint.host
    assert 1 <= endpoint.port <= 65535
    assert parse_endpoint(str(endpoint)) == endpoint
    assert isinstance(endpoint, Endpoint)

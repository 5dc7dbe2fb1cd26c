"""Servers that announce themselves in the local network, and which of them are ours to use."""

from __future__ import annotations

import time
from collections.abc import Sequence

from ..errors import UsageError
from ..wire import service
from ..wire.service import Announcement
from .endpoint import Endpoint
from .keychain import Keychain

LISTEN_SECONDS = 2.5
"""How long servers may take to answer: they may wait up to a second for each other."""
MAX_SERVERS = 64
"""That are looked at: whoever floods the network with announcements gets no further."""
AUTO = "auto"
"""In the place of an endpoint: all servers in the network that let us in before."""


def discover(seconds: float = LISTEN_SECONDS, interfaces: Sequence[str] | None = None) -> list[Announcement]:
    """Servers that announce themselves, by name. Raises :class:`UsageError` without zeroconf, or without a network."""
    try:
        from zeroconf import InterfaceChoice, ServiceBrowser, ServiceListener, Zeroconf
    except ImportError as error:
        raise UsageError("looking for servers needs zeroconf: pip install 'sdrpc[discover]'") from error
    names: list[str] = []

    class Listener(ServiceListener):
        def add_service(self, _zeroconf: Zeroconf, _type: str, name: str) -> None:
            if len(names) < MAX_SERVERS:
                names.append(name)

        def update_service(self, _zeroconf: Zeroconf, _type: str, name: str) -> None:
            pass

        def remove_service(self, _zeroconf: Zeroconf, _type: str, name: str) -> None:
            pass

    try:
        zeroconf = Zeroconf(interfaces=InterfaceChoice.All if interfaces is None else list(interfaces))
    except OSError as error:
        raise UsageError(f"looking for servers: the network refuses: {error.strerror or error}") from error
    try:
        browser = ServiceBrowser(zeroconf, service.TYPE, Listener())
        time.sleep(seconds)
        browser.cancel()
        infos = [zeroconf.get_service_info(service.TYPE, name, 1000) for name in names]
    finally:
        zeroconf.close()
    found = [
        service.parse(info.name, info.parsed_addresses(), info.port or 0, info.properties)
        for info in infos
        if info is not None
    ]
    return sorted(announcement for announcement in found if announcement is not None)


def accepted(found: Sequence[Announcement], keychain: Keychain) -> tuple[list[Endpoint], Keychain]:
    """Those of the servers ``found`` that let us in before, told by their certificate, wherever they are now; and the
    keys for them. That it is theirs they have to prove when we connect."""
    endpoints = []
    for announcement in found:
        credential = keychain.by_certificate(announcement.certificate)
        if credential is not None:
            endpoint = Endpoint(announcement.host, announcement.port)
            endpoints.append(endpoint)
            keychain = keychain.where(endpoint, credential)
    return endpoints, keychain

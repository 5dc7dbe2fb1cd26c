"""Announcing a server in the local network, for ``sd-cli --discover``: only where its user wants that."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import UsageError
from ..wire import service
from .listener import Server


@contextmanager
def announced(server: Server) -> Iterator[None]:
    """Announce ``server`` until the end. Raises :class:`UsageError` where that can't be."""
    try:
        from zeroconf import InterfaceChoice, IPVersion, ServiceInfo, Zeroconf
    except ImportError as error:
        raise UsageError("--announce needs zeroconf: pip install 'sdrpc[discover]'") from error
    address = ipaddress.ip_address(server.address)
    keys = server.door.keys
    told = service.properties(
        [(device.name, device.memory().total) for device in server.devices],
        not server.door.policy.everybody,
        b"" if keys is None else keys.identity.fingerprint,
    )
    host = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname().partition(".")[0])[: service.MAX_TEXT] or "sdrpc"
    everywhere = address.is_unspecified
    try:
        zeroconf = Zeroconf(
            interfaces=InterfaceChoice.All if everywhere else [str(address)],
            ip_version=IPVersion.V6Only if address.version == 6 and not everywhere else IPVersion.V4Only,
        )
        info = ServiceInfo(
            service.TYPE,
            f"{host}.{service.TYPE}",
            port=server.port,
            parsed_addresses=_own_addresses() if everywhere else [str(address)],
            properties=told,
            server=f"{host}.local.",
        )
        zeroconf.register_service(info, allow_name_change=True)
    except OSError as error:
        raise UsageError(f"--announce: the network refuses: {error.strerror or error}") from error
    try:
        yield
    finally:
        zeroconf.unregister_service(info)
        zeroconf.close()


def _own_addresses() -> list[str]:
    """The IPv4 addresses at which other machines may reach this one."""
    import ifaddr  # zeroconf has it

    found = [ip.ip for adapter in ifaddr.get_adapters() for ip in adapter.ips if isinstance(ip.ip, str)]
    return [ip for ip in found if not ipaddress.ip_address(ip).is_loopback]

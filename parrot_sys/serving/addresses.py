"""Which addresses belong to the internet at large, and where a host's name leads, found out in bounded time."""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Resolver = Callable[[str, int], list[str]]

_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# Of IANA's registries of special addresses: those that some versions of `ipaddress` take for global.
_SPECIAL = tuple(map(ipaddress.ip_network, ("192.0.0.0/24", "192.88.99.0/24", "2001::/23", "3fff::/20")))


def is_public(address: Address) -> bool:
    """Whether an address, and any that it wraps, belongs to the internet at large.

    Of IPv6 only 2000::/3 does, where all addresses of the internet have been given out, and the two forms of IPv4
    addresses outside of it: mapped ones and those of NAT64's well-known prefix. A NAT64 prefix of a network's own looks
    like any other address.
    """
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if address in _NAT64:
            return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        inner = (address.sixtofour, *(address.teredo or ()))
        if address not in _GLOBAL_UNICAST or not all(is_public(each) for each in inner if each is not None):
            return False
    special = any(address in network for network in _SPECIAL if network.version == address.version)
    return address.is_global and not address.is_multicast and not special


def resolve(host: str, port: int) -> list[str]:
    """All addresses of a host."""
    return list(dict.fromkeys(str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)))


class BoundedResolver:
    """Resolves names in threads of their own: the operating system's call has no time limit."""

    def __init__(self, resolver: Resolver, *, most: int) -> None:
        """
        Args:
            resolver: addresses of a host.
            most: names that are looked up at the same time.
        """
        self._resolver = resolver
        self._free = threading.BoundedSemaphore(most)

    def __call__(self, host: str, port: int, seconds: float) -> list[str]:
        """Addresses of a host.

        Raises:
            TimeoutError: they were not found in so many seconds.
            OSError: there are none.
        """
        end = time.monotonic() + seconds
        if not self._free.acquire(timeout=seconds):
            raise TimeoutError
        found: Future[list[str]] = Future()
        # A daemon: a name server that does not answer must not keep the process from its end.
        threading.Thread(target=self._look, args=(host, port, found), name="resolve", daemon=True).start()
        return found.result(max(end - time.monotonic(), 0))

    def _look(self, host: str, port: int, found: Future[list[str]]) -> None:
        try:
            found.set_result(self._resolver(host, port))
        except Exception as error:
            found.set_exception(error)
        finally:
            self._free.release()

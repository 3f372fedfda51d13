"""Pictures behind addresses, fetched without letting a request reach what only this machine can reach.

The name of a host is resolved once, all of its addresses are checked, and the connection goes to one of those that were
checked, so that a second answer of the name server changes nothing. Each redirect is checked in the same way.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
import urllib.parse
from collections.abc import Callable, Sequence

from parrot_sys.serving.config import RemoteImages
from parrot_sys.serving.errors import ApiError, wrong

_REDIRECTS = (301, 302, 303, 307, 308)
_CHUNK = 64 * 2**10
_CODE = "remote_image"
_NAT64 = ipaddress.ip_network("64:ff9b::/96")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Resolver = Callable[[str, int], list[str]]


def resolve(host: str, port: int) -> list[str]:
    """All addresses of a host."""
    return list(dict.fromkeys(str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)))


def is_public(address: Address) -> bool:
    """Whether an address, and any that it wraps, belongs to the internet at large."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        if address in _NAT64:
            inner.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if not all(is_public(each) for each in inner if each is not None):
            return False
    return address.is_global and not address.is_multicast


class RemoteFetcher:
    """Fetches pictures."""

    def __init__(self, config: RemoteImages, *, resolver: Resolver = resolve) -> None:
        """
        Args:
            config: limits.
            resolver: addresses of a host.
        """
        self._config = config
        self._allowed: Sequence[Network] = [ipaddress.ip_network(each) for each in config.allowed_networks]
        self._resolve = resolver

    def fetch(self, url: str, param: str, *, max_bytes: int | None) -> bytes:
        """Contents behind an address.

        Args:
            url: `http://` or `https://`.
            param: place in the request, for errors.
            max_bytes: most that are read.

        Raises:
            ApiError: refused, not there, too slow or too large.
        """
        deadline = time.monotonic() + self._config.seconds
        try:
            for _ in range(self._config.max_redirects + 1):
                found = self._get(url, param, deadline, max_bytes)
                if isinstance(found, bytes):
                    return found
                url = urllib.parse.urljoin(url, found)
        except (OSError, http.client.HTTPException, ValueError) as error:
            what = "took too long" if isinstance(error, TimeoutError) else f"cannot be fetched: {type(error).__name__}"
            raise wrong(f"the picture {what}", param, _CODE) from None
        raise wrong(f"the picture has more than {self._config.max_redirects} redirects", param, _CODE)

    def _get(self, url: str, param: str, deadline: float, max_bytes: int | None) -> bytes | str:
        """Contents, or where the address redirects to."""
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
            raise wrong("a picture's address must be http://HOST/... or https://HOST/...", param, _CODE)
        secure = parts.scheme == "https"
        port = parts.port or (443 if secure else 80)
        address = self._checked_address(parts.hostname, port, param)
        connection = _Connection(parts.hostname, port, address, secure=secure, deadline=deadline)
        try:
            path = urllib.parse.quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
            query = f"?{urllib.parse.quote(parts.query, safe='/%:@!$&()*+,;=~-._?')}" if parts.query else ""
            connection.request("GET", path + query, headers={"Accept": "image/*", "User-Agent": "parrot-serve"})
            response = connection.getresponse()
            if response.status in _REDIRECTS and (location := response.getheader("Location")):
                return location
            if response.status != 200:
                raise wrong(f"the picture's server answers with status {response.status}", param, _CODE)
            return _read(response, connection, param, max_bytes)
        finally:
            connection.close()

    def _checked_address(self, host: str, port: int, param: str) -> str:
        """An address of a host all of whose addresses may be fetched from."""
        addresses = self._resolve(host, port)
        for text in addresses:
            address = ipaddress.ip_address(text.partition("%")[0])
            if not is_public(address) and not any(address in network for network in self._allowed):
                raise wrong("the picture's address is private, local or reserved: refused", param, "address_refused")
        if not addresses:
            raise wrong("the picture's host has no address", param, _CODE)
        return addresses[0]


class _Connection(http.client.HTTPConnection):
    """A connection to an address that was checked, whatever its host's name resolves to by now."""

    def __init__(self, host: str, port: int, address: str, *, secure: bool, deadline: float) -> None:
        super().__init__(host, port)
        self._address = address
        self._secure = secure
        self._deadline = deadline

    def connect(self) -> None:
        """Connects."""
        self.sock = socket.create_connection((self._address, self.port), timeout=self.left())
        if self._secure:
            self.sock = ssl.create_default_context().wrap_socket(self.sock, server_hostname=self.host)

    def left(self) -> float:
        """Seconds until the deadline.

        Raises:
            TimeoutError: it has passed.
        """
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left


def _read(response: http.client.HTTPResponse, connection: _Connection, param: str, max_bytes: int | None) -> bytes:
    contents = bytearray()
    while True:
        if connection.sock is not None:  # (it is closed with the last bytes)
            connection.sock.settimeout(connection.left())
        connection.left()
        chunk = response.read1(_CHUNK)
        if not chunk:
            return bytes(contents)
        contents += chunk
        if max_bytes is not None and len(contents) > max_bytes:
            raise ApiError(
                413, "the picture has more bytes than a request may have", param=param, code="image_too_large"
            )

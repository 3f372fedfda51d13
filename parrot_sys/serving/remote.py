"""Pictures behind addresses, fetched without letting a request reach what only this machine can reach.

The name of a host is resolved once, all of its addresses are checked, and the connection goes to one of those that were
checked, so that a second answer of the name server changes nothing. Each redirect is checked in the same way. One
deadline holds for all of it, down to each call that waits for bytes.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
import urllib.parse
from collections.abc import Sequence
from typing import Any

from parrot_sys.serving.addresses import BoundedResolver, Network, Resolver, is_public, resolve
from parrot_sys.serving.config import RemoteImages
from parrot_sys.serving.errors import ApiError, wrong
from parrot_sys.serving.workers import AllWaitError, outside

_REDIRECTS = (301, 302, 303, 307, 308)
_CHUNK = 64 * 2**10
_CODE = "remote_image"
_MOST_TRIED = 4
"""Addresses of a host that are tried; each gets an equal part of the time that is left."""


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
        self._resolve = BoundedResolver(resolver, most=config.max_fetches)

    def fetch(self, url: str, param: str, *, max_bytes: int | None) -> bytes:
        """Contents behind an address; in a thread of `Workers`, another one works meanwhile.

        Args:
            url: `http://` or `https://`.
            param: place in the request, for errors.
            max_bytes: most that are read.

        Raises:
            ApiError: refused, not there, too slow or too large; 429 when too many are fetched already.
        """
        try:
            with outside():
                return self._fetch(url, param, max_bytes)
        except AllWaitError:
            message = "the server fetches as many pictures as it can: try again later"
            raise ApiError(429, message, code="too_many_fetches", headers={"Retry-After": "1"}) from None

    def _fetch(self, url: str, param: str, max_bytes: int | None) -> bytes:
        deadline = Deadline(self._config.seconds)
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

    def _get(self, url: str, param: str, deadline: Deadline, max_bytes: int | None) -> bytes | str:
        """Contents, or where the address redirects to."""
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
            raise wrong("a picture's address must be http://HOST/... or https://HOST/...", param, _CODE)
        secure = parts.scheme == "https"
        port = parts.port or (443 if secure else 80)
        addresses = self._checked_addresses(parts.hostname, port, param, deadline)
        connection = _Connection(parts.hostname, port, addresses, secure=secure, deadline=deadline)
        try:
            path = urllib.parse.quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
            query = f"?{urllib.parse.quote(parts.query, safe='/%:@!$&()*+,;=~-._?')}" if parts.query else ""
            connection.request("GET", path + query, headers={"Accept": "image/*", "User-Agent": "parrot-serve"})
            response = connection.getresponse()
            if response.status in _REDIRECTS and (location := response.getheader("Location")):
                return location
            if response.status != 200:
                raise wrong(f"the picture's server answers with status {response.status}", param, _CODE)
            return _read(response, param, max_bytes)
        finally:
            connection.close()

    def _checked_addresses(self, host: str, port: int, param: str, deadline: Deadline) -> list[str]:
        """The addresses of a host, all of which may be fetched from."""
        addresses = self._resolve(host, port, deadline.left())
        for text in addresses:
            address = ipaddress.ip_address(text.partition("%")[0])
            if not is_public(address) and not any(address in network for network in self._allowed):
                raise wrong("the picture's address is private, local or reserved: refused", param, "address_refused")
        if not addresses:
            raise wrong("the picture's host has no address", param, _CODE)
        return addresses[:_MOST_TRIED]


class Deadline:
    """A time by which something is over."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds until then.

        Raises:
            TimeoutError: it has passed.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left


class _Socket(socket.socket):
    """Each call that waits for bytes waits no longer than the deadline: who sends byte after byte does not move it."""

    deadline: Deadline

    def recv_into(self, buffer: Any, nbytes: int | None = None, flags: int = 0) -> int:
        self.settimeout(self.deadline.left())
        return super().recv_into(buffer, nbytes or 0, flags)

    def sendall(self, data: Any, flags: int = 0) -> None:
        self.settimeout(self.deadline.left())
        super().sendall(data, flags)


class _SecureSocket(ssl.SSLSocket):
    """As `_Socket`."""

    deadline: Deadline

    def recv_into(self, buffer: Any, nbytes: int | None = None, flags: int = 0) -> int:
        self.settimeout(self.deadline.left())
        return super().recv_into(buffer, nbytes, flags)

    def send(self, data: Any, flags: int = 0) -> int:
        self.settimeout(self.deadline.left())
        return super().send(data, flags)


class _Connection(http.client.HTTPConnection):
    """A connection to one of a host's addresses that were checked, whatever its name resolves to by now."""

    def __init__(self, host: str, port: int, addresses: Sequence[str], *, secure: bool, deadline: Deadline) -> None:
        super().__init__(host, port)
        self._addresses = addresses
        self._secure = secure
        self._deadline = deadline

    def connect(self) -> None:
        """Connects to the first address that can be reached."""
        plain = self._reached()
        self.sock = plain
        if self._secure:
            context = ssl.create_default_context()
            context.sslsocket_class = _SecureSocket
            plain.settimeout(self._deadline.left())
            secure = context.wrap_socket(plain, server_hostname=self.host)
            assert isinstance(secure, _SecureSocket), "the context makes these"
            secure.deadline = self._deadline
            self.sock = secure

    def _reached(self) -> _Socket:
        for place, address in enumerate(self._addresses):
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            made = _Socket(family, socket.SOCK_STREAM)
            made.deadline = self._deadline
            try:
                made.settimeout(self._deadline.left() / (len(self._addresses) - place))
                made.connect((address, self.port))
            except OSError:
                made.close()
                if place == len(self._addresses) - 1:
                    raise
            else:
                return made
        raise AssertionError("a host has an address")


def _read(response: http.client.HTTPResponse, param: str, max_bytes: int | None) -> bytes:
    contents = bytearray()
    while chunk := response.read1(_CHUNK):
        contents += chunk
        if max_bytes is not None and len(contents) > max_bytes:
            raise ApiError(
                413, "the picture has more bytes than a request may have", param=param, code="image_too_large"
            )
    return bytes(contents)

"""Pictures behind addresses: what is fetched, what is refused, and that no trick reaches private networks."""

from __future__ import annotations

import http.server
import ipaddress
import itertools
import random
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parrot_sys.errors import ConfigError
from parrot_sys.serving.addresses import BoundedResolver, is_public, resolve
from parrot_sys.serving.config import RemoteImages
from parrot_sys.serving.errors import ApiError
from parrot_sys.serving.remote import RemoteFetcher

LOOPBACK = ("127.0.0.0/8", "::1/128")


class Pages(http.server.BaseHTTPRequestHandler):
    """`/ok` is a picture; `/to/X` redirects to X; `/large` and `/slow` do not end."""

    def do_GET(self) -> None:
        _, kind, *rest = self.path.split("/", 2)
        if kind == "to":
            self.send_response(302)
            self.send_header("Location", rest[0].replace("%3A", ":"))
            self.end_headers()
            return
        self.send_response(404 if kind == "none" else 200)
        self.end_headers()
        try:
            if kind == "ok":
                self.wfile.write(b"picture")
            while kind in ("large", "slow"):
                self.wfile.write(b"x" * (4096 if kind == "large" else 1))
                if kind == "slow":
                    threading.Event().wait(0.05)
        except OSError:
            pass

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()


def _fetch(url: str, *, resolver: Any = lambda host, port: ["127.0.0.1"], **settings: Any) -> bytes:
    config = RemoteImages(enabled=True, **{"allowed_networks": LOOPBACK, "seconds": 1.0, **settings})
    return RemoteFetcher(config, resolver=resolver).fetch(url, "here", max_bytes=10_000)


def test_a_picture_is_fetched_also_after_redirects(port: int) -> None:
    assert _fetch(f"http://pictures.example:{port}/ok") == b"picture"
    assert _fetch(f"http://pictures.example:{port}/to/http%3A//other.example%3A{port}/ok") == b"picture"


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("large", 413, "more bytes"),
        ("slow", 400, "took too long"),
        ("none", 400, "status 404"),
        ("to//to//to//to//to//ok", 400, "more than 1 redirects"),
        ("to/file%3A///etc/passwd", 400, "must be http"),
    ],
)
def test_pictures_that_do_not_come(port: int, path: str, status: int, message: str) -> None:
    with pytest.raises(ApiError, match=message) as caught:
        _fetch(f"http://pictures.example:{port}/{path}", max_redirects=1)
    assert (caught.value.status, caught.value.param) == (status, "here")


OK = b"HTTP/1.1 200 OK\r\n"
DRIBBLES = {
    "nothing": (b"", b""),
    "status": (b"HTTP/1.1 200 ", b"O"),
    "header": (OK + b"X: ", b"x"),
    "continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "chunk size": (OK + b"Transfer-Encoding: chunked\r\n\r\n", b"0"),
    "chunk": (OK + b"Transfer-Encoding: chunked\r\n\r\nffff\r\n", b"x"),
    "trailer": (OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"X: x\r\n"),
    "body": (OK + b"Content-Length: 9999\r\n\r\n", b"x"),
    "hello of TLS": (b"\x16\x03\x03\x40\x00", b"\x02"),
}


@pytest.mark.parametrize("kind", DRIBBLES)
def test_however_slowly_bytes_come_the_time_is_bounded(kind: str) -> None:
    begin, piece = DRIBBLES[kind]

    class Dribbling(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            end = time.monotonic() + 2
            self.request.recv(2**16)
            try:
                self.request.sendall(begin)
                while time.monotonic() < end:
                    time.sleep(0.02)
                    self.request.sendall(piece)
            except OSError:
                pass

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Dribbling) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        scheme = "https" if "TLS" in kind else "http"
        with pytest.raises(ApiError, match="took too long"):  # (not "cannot be fetched": as when the server ends)
            _fetch(f"{scheme}://pictures.example:{server.server_address[1]}/", seconds=0.2)
        server.shutdown()


def test_names_that_take_long_to_resolve_are_given_up(port: int) -> None:
    asked, over = itertools.count(), threading.Event()

    def resolver(host: str, port: int) -> list[str]:
        if next(asked) < 2:
            over.wait(10)
        return ["127.0.0.1"]

    named = BoundedResolver(resolver, most=2)
    for _ in range(3):  # the third finds that as many names are looked up as may be
        with pytest.raises(TimeoutError):
            named("pictures.example", port, 0.1)
    over.set()
    assert named("pictures.example", port, 10) == ["127.0.0.1"]
    over.clear()
    asked = itertools.count()
    with pytest.raises(ApiError, match="took too long"):
        _fetch(f"http://pictures.example:{port}/ok", resolver=resolver, seconds=0.1)
    over.set()


def test_an_address_that_cannot_be_reached_is_passed_over(port: int) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        held = [socket.socket() for _ in range(4)]
        for each in held:  # until no more is taken: further connections wait
            each.setblocking(False)
            each.connect_ex(full.getsockname())
        own = full.getsockname()[1]
        # (127.0.0.2 refuses connections to the picture's port; this port of 127.0.0.1 leaves them waiting.)
        reached = _fetch(f"http://x.example:{port}/ok", resolver=lambda host, port: ["127.0.0.2", "::1", "127.0.0.1"])
        assert reached == b"picture"
        with pytest.raises(ApiError, match=r"the picture (took too long|cannot be fetched)"):
            _fetch(f"http://x.example:{own}/ok", seconds=0.2, resolver=lambda host, port: ["127.0.0.1"] * 9)
        for each in held:
            each.close()
    with pytest.raises(ApiError, match="private, local or reserved"):
        _fetch(f"http://x.example:{port}/ok", resolver=lambda host, port: ["127.0.0.1", "127.0.0.2", "10.0.0.1"])


def test_redirects_are_checked_as_well(port: int) -> None:
    def resolver(host: str, port: int) -> list[str]:
        return ["169.254.169.254" if host == "metadata.example" else "127.0.0.1"]

    with pytest.raises(ApiError, match="private, local or reserved"):
        _fetch(f"http://pictures.example:{port}/to/http%3A//metadata.example/", resolver=resolver)


def test_the_address_that_was_checked_is_the_one_that_is_connected_to(port: int) -> None:
    """A name server that first names a public address and then this machine changes nothing."""
    answers = iter([["127.0.0.1"], ["10.0.0.1"], ["10.0.0.1"]])
    assert _fetch(f"http://rebinding.example:{port}/ok", resolver=lambda host, port: next(answers)) == b"picture"
    with pytest.raises(ApiError, match="private, local or reserved"):
        _fetch(f"http://both.example:{port}/ok", resolver=lambda host, port: ["127.0.0.1", "10.0.0.1"])


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "localhost", "0.0.0.0", "2130706433"])
def test_names_of_this_machine(port: int, host: str) -> None:
    with pytest.raises(ApiError, match="private, local or reserved"):
        _fetch(f"http://{host}:{port}/ok", resolver=resolve, allowed_networks=())


@given(st.ip_addresses(v=4))
def test_wrapped_addresses_are_as_public_as_what_they_wrap(address: ipaddress.IPv4Address) -> None:
    number = int(address)
    for wrapped in ((0xFFFF << 32) | number, (0x2002 << 112) | (number << 80), (0x64FF9B << 96) | number):
        assert is_public(ipaddress.IPv6Address(wrapped)) == is_public(address)
    assert not is_public(ipaddress.IPv6Address(number)), "IPv4-compatible addresses are no more"
    if address.is_private or address.is_loopback or address.is_link_local or address.is_multicast:
        assert not is_public(address)


# IANA's registries of special-purpose addresses, as far as these are not reachable globally, and what nobody was given.
SPECIAL = """
0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.2.0/24 192.88.99.0/24
192.168.0.0/16 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/4 240.0.0.0/4 255.255.255.255/32
::/96 ::1/128 ::/128 64:ff9b:1::/48 100::/64 100:0:0:1::/64 2001::/32 2001:2::/48 2001:10::/28 2001:db8::/32 3fff::/20
5f00::/16 fc00::/7 fe80::/10 fec0::/10 ff00::/8 4000::/2 8000::/1 ::/3 2002:7f00::/24 2002:a00::/24 2002:c0a8::/32
64:ff9b::7f00:0/104 64:ff9b::a00:0/104 ::ffff:10.0.0.0/104
"""


@pytest.mark.parametrize("network", SPECIAL.split())
def test_special_addresses_are_not_public(network: str) -> None:
    own = ipaddress.ip_network(network)
    nat64 = ipaddress.ip_network("64:ff9b::/96")
    for place in (0, own.num_addresses - 1, *(random.randrange(own.num_addresses) for _ in range(50))):
        address = own[place]
        assert not is_public(address) or (network == "::/3" and address in nat64), address


@pytest.mark.parametrize("name", ["8.8.8.8", "192.31.196.1", "2606:4700::1111", "2a00:1450::8a", "64:ff9b::808:808"])
def test_addresses_of_the_internet_are_public(name: str) -> None:
    assert is_public(ipaddress.ip_address(name))


def test_settings_that_are_wrong() -> None:
    with pytest.raises(ConfigError, match="allowed_networks must be networks"):
        RemoteImages(allowed_networks=("10.0.0.1/8",))
    with pytest.raises(ConfigError, match=r"remote\.seconds must be > 0"):
        RemoteImages(seconds=0)
    with pytest.raises(ConfigError, match=r"remote\.max_fetches must be >= 1"):
        RemoteImages(max_fetches=0)

"""Pictures behind addresses: what is fetched, what is refused, and that no trick reaches private networks."""

from __future__ import annotations

import http.server
import ipaddress
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parrot_sys.errors import ConfigError
from parrot_sys.serving.config import RemoteImages
from parrot_sys.serving.errors import ApiError
from parrot_sys.serving.remote import RemoteFetcher, is_public

LOOPBACK = ("127.0.0.0/8",)


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
    from parrot_sys.serving.remote import resolve

    with pytest.raises(ApiError, match="private, local or reserved"):
        _fetch(f"http://{host}:{port}/ok", resolver=resolve, allowed_networks=())


@given(st.ip_addresses(v=4))
def test_wrapped_addresses_are_as_public_as_what_they_wrap(address: ipaddress.IPv4Address) -> None:
    number = int(address)
    for wrapped in ((0xFFFF << 32) | number, (0x2002 << 112) | (number << 80), (0x64FF9B << 96) | number):
        assert is_public(address) or not is_public(ipaddress.IPv6Address(wrapped))
    if address.is_private or address.is_loopback or address.is_link_local or address.is_multicast:
        assert not is_public(address)


def test_settings_that_are_wrong() -> None:
    with pytest.raises(ConfigError, match="allowed_networks must be networks"):
        RemoteImages(allowed_networks=("10.0.0.1/8",))
    with pytest.raises(ConfigError, match=r"remote\.seconds must be > 0"):
        RemoteImages(seconds=0)

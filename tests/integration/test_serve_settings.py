"""The real server with settings that are off by default: pictures behind https addresses, pages of other origins, and a
model that turns pictures as their EXIF says."""

from __future__ import annotations

import http.server
import io
import json
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from parrot_sys.data.processor import PREPROCESSOR_FILE, ParrotProcessor
from tests.support.serving import CHECKPOINT, Server, answer, chat, picture, png, serving

ORIGIN = "https://page.example"
MOST_FETCHES = 3

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="makes certificates with openssl")


def _certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """A certificate of this machine's own address, and its key."""
    made = folder / f"{name}.pem", folder / f"{name}.key"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-out", str(made[0]), "-keyout", str(made[1])]
    subprocess.run(command, check=True, capture_output=True)
    return made


HELD, GATE = threading.Semaphore(0), threading.Event()


class _Picture(http.server.BaseHTTPRequestHandler):
    """`/held/...` counts itself in `HELD` and comes once `GATE` is open."""

    def do_GET(self) -> None:
        if self.path.startswith("/held"):
            HELD.release()
            GATE.wait(20)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(picture(3))

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def _pictures(certificate: tuple[Path, Path] | None = None) -> Iterator[str]:
    """Address of a server of pictures."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Picture)
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http{'' if certificate is None else 's'}://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def _named(address: str) -> dict[str, Any]:
    """A request with the picture behind an address."""
    body = chat("What is this?", picture(3))
    body["messages"][0]["content"][0]["image_url"]["url"] = address
    return body


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    folder = tmp_path_factory.mktemp("certificates")
    return {name: _certificate(folder, name) for name in ("trusted", "unknown")}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, certificates: dict[str, tuple[Path, Path]]) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("serve")
    shutil.copytree(CHECKPOINT.parent, folder / "parrot_tiny")
    model = folder / "parrot_tiny" / CHECKPOINT.name
    settings = {**ParrotProcessor.from_pretrained(CHECKPOINT).image_processor.to_dict(), "exif": "apply"}
    (model / PREPROCESSOR_FILE).write_text(json.dumps(settings))
    options = ["--remote.enabled", "--remote.allowed-networks", "127.0.0.0/8", "--cors-origins", ORIGIN]
    options += ["--remote.max-fetches", str(MOST_FETCHES), "--remote.seconds", "30"]
    trust = [("SSL_CERT_FILE", str(certificates["trusted"][0]))]
    with serving(folder, *options, checkpoint=model, environment=trust) as running:
        yield running


def test_pictures_are_turned_as_their_exif_says(server: Server) -> None:
    base = Image.open(io.BytesIO(picture(4)))
    exif = Image.Exif()
    exif[0x112] = 6
    with server.http() as http:
        wanted = answer(http, chat("What is this?", png(base.transpose(Image.Transpose.ROTATE_270))))
        encoded = server.metrics()["parrot:pictures_encoded_total"]
        assert answer(http, chat("What is this?", png(base, exif=exif))) == wanted
        assert server.metrics()["parrot:pictures_encoded_total"] == encoded, "it is the same picture"
        answer(http, chat("What is this?", png(base)))
        assert server.metrics()["parrot:pictures_encoded_total"] == encoded + 1, "unturned it is another one"


def test_pictures_are_fetched_from_https_addresses_that_are_trusted(
    server: Server, certificates: dict[str, tuple[Path, Path]]
) -> None:
    with server.http() as http, _pictures(certificates["trusted"]) as good, _pictures(certificates["unknown"]) as bad:
        wanted = answer(http, chat("What is this?", picture(3)))
        assert answer(http, _named(f"{good}/picture.png")) == wanted
        refused = http.post("/v1/chat/completions", json=_named(f"{bad}/picture.png"))
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "messages[0].content[0].image_url.url"


def test_pictures_that_are_still_to_come_keep_nobody_waiting(server: Server) -> None:
    """As many as may be fetched: others are answered meanwhile, and one more is told to come again."""
    with server.http() as http, _pictures() as address, ThreadPoolExecutor(MOST_FETCHES) as pool:
        wanted = answer(http, chat("What is this?", picture(3)))
        asked = [pool.submit(answer, http, _named(f"{address}/held/{k}.png")) for k in range(MOST_FETCHES)]
        assert all(HELD.acquire(timeout=30) for _ in asked)
        assert answer(http, chat("What is this?", picture(3))) == wanted
        refused = http.post("/v1/chat/completions", json=_named(f"{address}/picture.png"))
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_fetches")
        assert not any(own.done() for own in asked)
        GATE.set()
        assert {own.result() for own in asked} == {wanted}


def test_only_pages_of_named_origins_may_call(server: Server) -> None:
    name = "access-control-allow-origin"
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    with server.http() as http:
        for origin, allowed in ((ORIGIN, ORIGIN), ("https://other.example", None)):
            headers = {"Origin": origin}
            assert http.options("/v1/chat/completions", headers=headers | asks).headers.get(name) == allowed
            answered = http.post("/v1/chat/completions", json=chat("?", max_tokens=1), headers=headers)
            assert answered.status_code == 200
            assert answered.headers.get(name) == allowed

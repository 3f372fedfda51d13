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
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from parrot_sys.data.processor import PREPROCESSOR_FILE, ParrotProcessor
from tests.support.serving import CHECKPOINT, Server, answer, chat, picture, png, serving

ORIGIN = "https://page.example"

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="makes certificates with openssl")


def _certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """A certificate of this machine's own address, and its key."""
    made = folder / f"{name}.pem", folder / f"{name}.key"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-out", str(made[0]), "-keyout", str(made[1])]
    subprocess.run(command, check=True, capture_output=True)
    return made


class _Picture(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(picture(3))

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def _https(certificate: tuple[Path, Path]) -> Iterator[str]:
    """Address of a picture."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Picture)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"https://127.0.0.1:{server.server_address[1]}/picture.png"
    server.shutdown()


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
    with server.http() as http, _https(certificates["trusted"]) as good, _https(certificates["unknown"]) as bad:
        wanted = answer(http, chat("What is this?", picture(3)))
        body = chat("What is this?", picture(3))
        body["messages"][0]["content"][0]["image_url"]["url"] = good
        assert answer(http, body) == wanted
        body["messages"][0]["content"][0]["image_url"]["url"] = bad
        refused = http.post("/v1/chat/completions", json=body)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "messages[0].content[0].image_url.url"


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

"""A process that serves a folder as buckets of S3 and Google, and over HTTP, and fails when it is told to.

It speaks what s3fs and gcsfs ask of theirs: lists with prefix, delimiter and pages, facts, objects with ranges.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape

_GOOGLE = re.compile(r"(/download)?/storage/v1/b/([^/]+)(?:/o(?:/(.+))?)?")
_PAGE = 3  # keys in a page of a list, so that small tests have several


@dataclass
class Server:
    """The process as a test sees it."""

    url: str

    def fail(self, *kinds: str, only: str = "") -> None:
        """The next requests for objects whose path holds `only` fail in these ways, one after the other.

        `503`, `404` and so on answer with that status, `drop` closes the connection, `short` after half of the bytes,
        `slow` answers after three seconds, `whole` ignores the range.
        """
        self._ask("/_fail", {"kinds": kinds, "only": only})

    def requests(self) -> list[str]:
        """`METHOD /path range` of each request since the last call."""
        return self._ask("/_requests", {})

    def _ask(self, path: str, body: object) -> Any:
        with urllib.request.urlopen(urllib.request.Request(self.url + path, json.dumps(body).encode())) as answer:
            return json.loads(answer.read())


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[Server]:
    """Serves a folder (its folders are the buckets) until the end."""
    process = subprocess.Popen([sys.executable, __file__, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield Server(f"http://127.0.0.1:{int(process.stdout.readline())}")
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    root: Path
    seen: list[str] = []  # noqa: RUF012 - one process serves one folder
    faults: list[str] = []  # noqa: RUF012
    only = ""

    def log_message(self, *arguments: object) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = []
        if self.path == "/_fail":
            type(self).faults, type(self).only = body["kinds"], body["only"]
        else:
            answer, type(self).seen = self.seen, []
        self._send(200, json.dumps(answer).encode())

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        path, query = unquote(parts.path), parse_qs(parts.query, keep_blank_values=True)
        self.seen.append(f"{self.command} {path} {self.headers.get('Range', '')}".rstrip())
        fault = self.faults.pop(0) if self.faults and self.only in path else ""
        if fault == "drop":
            self.close_connection = True
        elif fault.isdigit():
            self._send_error(int(fault))
        elif "list-type" in query:
            self._send(200, self._list(path.strip("/"), {name: values[0] for name, values in query.items()}))
        elif (google := _GOOGLE.fullmatch(path)) is not None:
            self._answer_google(*google.groups(), {name: values[0] for name, values in query.items()}, fault)
        else:
            self._answer_file(self.root / path.lstrip("/"), fault)

    def _answer_file(self, file: Path, fault: str) -> None:
        if not file.is_file():
            self._send_error(404)
            return
        if fault == "slow":
            time.sleep(3)
        self._send_file(file, fault)

    def _answer_google(self, download: str | None, bucket: str, key: str | None, query: Any, fault: str) -> None:
        """A list, the facts of an object, or its bytes."""
        base = self.root / bucket
        if download:
            self._answer_file(base / str(key), fault)
        elif key is not None:
            file = base / key
            self._send(200, json.dumps(_facts(bucket, key, file)).encode()) if file.is_file() else self._send_error(404)
        else:
            page, token = self._page(bucket, query, int(query.get("pageToken", 0)))
            answer: dict[str, Any] = {"kind": "storage#objects"}
            answer["prefixes"] = [name for name, file in page if file is None]
            answer["items"] = [_facts(bucket, name, file) for name, file in page if file is not None]
            self._send(200, json.dumps(answer | ({"nextPageToken": str(token)} if token else {})).encode())

    def _send_file(self, file: Path, fault: str) -> None:
        data = file.read_bytes()
        headers = {
            "ETag": f'"{hashlib.md5(data).hexdigest()}"',
            "Last-Modified": formatdate(os.stat(file).st_mtime, usegmt=True),
            "Accept-Ranges": "bytes",
        }
        status, wanted = 200, self.headers.get("Range")
        if wanted and fault != "whole":
            first, last = wanted.removeprefix("bytes=").split("-")
            end = min(int(last or len(data)) + 1, len(data))
            headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(data)}"
            status, data = 206, data[int(first) : end]
        self._send(status, data, cut=fault == "short", **headers)

    def _send_error(self, status: int) -> None:
        code = {404: "NoSuchKey", 403: "AccessDenied", 503: "SlowDown"}.get(status, "InternalError")
        self._send(status, f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode())

    def _send(self, status: int, data: bytes, *, cut: bool = False, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        self.close_connection = self.close_connection or cut

    def _list(self, bucket: str, query: dict[str, str]) -> bytes:
        page, following = self._page(bucket, query, int(query.get("continuation-token", 0)))
        entries = []
        for name, file in page:
            entry = f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>"
            if file is not None:
                status = file.stat()
                entry = (
                    f"<Contents><Key>{escape(name)}</Key><Size>{status.st_size}</Size>"
                    f"<LastModified>{_moment(status.st_mtime)}</LastModified><ETag>x</ETag></Contents>"
                )
            entries.append(entry)
        token = f"<NextContinuationToken>{following}</NextContinuationToken>" if following else ""
        head = f"<Name>{quote(bucket)}</Name><IsTruncated>{str(following > 0).lower()}</IsTruncated>{token}"
        return f"<ListBucketResult>{head}{''.join(entries)}</ListBucketResult>".encode()

    def _page(self, bucket: str, query: dict[str, str], start: int) -> tuple[list[tuple[str, Path | None]], int]:
        """Names of a page of a list, with the files of those that are no folders; where the next page starts, or 0."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        base = self.root / bucket
        entries: dict[str, Path | None] = {}
        for key in sorted(path.relative_to(base).as_posix() for path in base.rglob("*") if path.is_file()):
            if key.startswith(prefix):
                head, found, _ = key[len(prefix) :].partition(delimiter) if delimiter else (key, "", "")
                entries[prefix + head + found if found else key] = None if found else base / key
        page = list(entries.items())[start : start + _PAGE]
        return page, start + _PAGE if start + _PAGE < len(entries) else 0


def _facts(bucket: str, key: str, file: Path) -> dict[str, str]:
    """An object as Google describes it."""
    status, digest = file.stat(), hashlib.md5(file.read_bytes()).hexdigest()
    facts = {"kind": "storage#object", "bucket": bucket, "name": key, "size": str(status.st_size), "etag": digest}
    return facts | {"generation": str(status.st_mtime_ns), "updated": _moment(status.st_mtime)}


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(seconds))


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *arguments: object) -> None:  # clients that give up are part of the tests
        pass


def main() -> None:
    _Handler.root = Path(sys.argv[1])
    with _Server(("127.0.0.1", 0), _Handler) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()

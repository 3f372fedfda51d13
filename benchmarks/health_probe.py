"""Asks a server for `/health` as supervisors do, in a process of its own, which waits for no other client."""

from __future__ import annotations

import http.client
import time
from urllib.parse import urlsplit

PAUSE_SECONDS = 0.05


def watch_health(url: str, seconds: float) -> list[tuple[int, float]]:
    """Status and seconds of each answer; every question opens a connection of its own.

    Args:
        url: of the server.
        seconds: for so long.
    """
    parts = urlsplit(url)
    assert parts.hostname is not None
    answers = []
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=120)
        connection.request("GET", "/health")
        response = connection.getresponse()
        response.read()
        connection.close()
        answers.append((response.status, time.perf_counter() - start))
        time.sleep(PAUSE_SECONDS)
    return answers

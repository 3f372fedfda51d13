"""Requests to a server of OpenAI's interface, with its key."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from parrot_sys.errors import ConfigError

_FIX = "give the address of `parrot serve`, or of another server of OpenAI's interface"
_SHOWN = 200
"""Characters of a server's words that an error shows."""


def base_url(server: str) -> str:
    """Address of the interface, which ends in `/v1`.

    Args:
        server: as the user gives it, with or without `/v1`.

    Raises:
        ConfigError: it is no address.
    """
    if not server.startswith(("http://", "https://")):
        raise ConfigError(f"--server must be an address such as http://127.0.0.1:8000, got {server!r}")
    return server.rstrip("/").removesuffix("/v1") + "/v1"


def ask(url: str, key: str, body: Mapping[str, Any] | None = None, *, timeout: float = 30) -> tuple[int, Any]:
    """Status and content of the answer to a request; the content is text where it is no JSON.

    Args:
        url: where to.
        key: sent with it; empty for none.
        body: sent as JSON; None asks by GET.
        timeout: seconds without a sign of the server.

    Raises:
        OSError: there is no answer.
        HTTPException: what comes is no HTTP.
    """
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=timeout) as answer:
            status, content = answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            status, content = error.code, error.read()
    text = content.decode("utf-8", errors="replace")
    try:
        return status, json.loads(text)
    except ValueError:
        return status, text


def served_model(server: str, key: str) -> str:
    """Name of the first model that a server has.

    Raises:
        ConfigError: it does not answer, wants another key, or names no model.
    """
    url = f"{base_url(server)}/models"
    try:
        status, answer = ask(url, key)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise ConfigError(
            f"--server {server}: wanted the list of models at {url}, got no answer ({reason}); start the server, or "
            "correct the address"
        ) from None
    if status in (401, 403):
        sent = "another key than the one sent" if key else "a key"
        raise ConfigError(
            f"--server {server}: wanted the list of models at {url}, got {status} ({reason_of(answer)}); the server "
            f"asks for {sent}: give it in PARROT_API_KEY, or with --key"
        )
    models = answer.get("data") if status == 200 and isinstance(answer, dict) else None
    if not isinstance(models, list) or not models or not isinstance(models[0], dict) or "id" not in models[0]:
        raise ConfigError(
            f"--server {server}: wanted the list of models at {url}, got {status} ({reason_of(answer)}); {_FIX}"
        )
    return str(models[0]["id"])


def reason_of(answer: Any) -> str:
    """Words of a server on a request that it does not answer, on one line."""
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    message = error.get("message", error) if isinstance(error, dict) else error
    line = " ".join(str(message).split())
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]}..."

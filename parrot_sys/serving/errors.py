"""Errors of the server in the form that OpenAI's interface has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from parrot_sys.errors import BusyError, CheckpointError, ParrotError, printable

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
_LONGEST_MESSAGE = 1000


class ApiError(Exception):
    """An answer with an error status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            status: of HTTP.
            message: for people.
            param: part of the request that is wrong, `messages[0].content[1].image_url.url`.
            code: for programs.
            headers: of the answer.
        """
        super().__init__(message)
        self.status = status
        self.message = printable(message, keep="\n\t")[:_LONGEST_MESSAGE]
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def wrong(message: str, param: str | None, code: str | None = None) -> ApiError:
    """The error of a part of a request that is wrong."""
    return ApiError(400, message, param=param, code=code)


def as_api_error(error: Exception, param: str | None = None) -> ApiError:
    """The answer to an error of the package: what the sender can change is 400, what passes by itself 429."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BusyError):
        return ApiError(429, str(error), code="queue_full", headers={"Retry-After": "1"})
    if isinstance(error, ParrotError) and not isinstance(error, CheckpointError):
        return ApiError(400, str(error), param=param)
    return ApiError(500, str(error) if isinstance(error, ParrotError) else "internal error", code="internal_error")


def path_of(location: Sequence[int | str]) -> str | None:
    """A place in a request, from `("messages", 0, "content")` to `messages[0].content`."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text or None

"""From the body of a request to what it asks, or to the error that names the part that is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from parrot_sys.serving.errors import ApiError, path_of, wrong

M = TypeVar("M", bound=BaseModel)


def parse(kind: type[M], body: bytes) -> M:
    """The request in a body.

    Raises:
        ApiError: 400 names the part that is wrong.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _first_error(error, body) from None


def _first_error(error: ValidationError, body: bytes) -> ApiError:
    """The error of the innermost wrong part: of the forms that a field may have, that one was meant."""
    details = error.errors(include_url=False, include_context=False, include_input=False)
    if details[0]["type"] == "json_invalid":
        return wrong(f"the body is no valid JSON: {details[0]['msg']}", None, "invalid_json")
    whole = from_json(body)
    located = [(_real_path(whole, detail["loc"]), detail["msg"]) for detail in details]
    path, message = max(located, key=lambda each: len(each[0]))
    name = path_of(path)
    return wrong(f"{name}: {message}" if name else message, name, "invalid_value")


def _real_path(whole: Any, location: Sequence[int | str]) -> list[int | str]:
    """A place as the sender knows it: without the names of the forms that a field may have."""
    path: list[int | str] = []
    for place, part in enumerate(location):
        if isinstance(whole, dict) and part in whole:
            whole = whole[part]  # type: ignore[index]
        elif isinstance(whole, list) and isinstance(part, int) and part < len(whole):
            whole = whole[part]
        elif not (isinstance(whole, dict) and place == len(location) - 1 and isinstance(part, str)):
            continue  # (what is left at the end is a field that is missing)
        path.append(part)
    return path

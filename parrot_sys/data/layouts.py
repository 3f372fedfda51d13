"""Records as other people write them -> turns and images as this project has them.

Turns are in `conversations`, `messages` or `texts`; a turn is `from`/`value`, `role`/`content`, or a pair
`user`/`assistant`. Images are in `image` or `images`, or in the list that the content of a turn is. A field that is
null is absent.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from parrot_sys.data.constants import IMAGE_TOKEN
from parrot_sys.data.parts import check_text
from parrot_sys.errors import DataError

TURN_LISTS = ("conversations", "messages", "texts")
IMAGE_FIELDS = ("image", "images")
ROLES: Mapping[str, str] = {"system": "system", "human": "human", "gpt": "gpt", "user": "human", "assistant": "gpt"}
"""Role as a file names it -> role here."""
_TEXT_TYPES = ("text", "input_text", "output_text", None)
_IMAGE_TYPES = ("image", "image_url", "input_image")
_SOURCES = ("image", "image_url", "url", "path", "file_name")  # keys that name the file of an image
_ALONE = re.compile(rf"^[ \t]*({re.escape(IMAGE_TOKEN)})[ \t]*\r?$", re.MULTILINE)
_ANY = re.compile(f"({re.escape(IMAGE_TOKEN)})")

Markers = Literal["all", "alone", "none"]
"""Which `<image>` in the texts of a record stand for images: all, those alone on their lines, or none."""


@dataclass(frozen=True, slots=True)
class _Image:
    """An image that is a part of a content; without a source it is one of the record's list."""

    source: str | None = None


class _Turn(NamedTuple):  # (made for every turn of every record: quicker than a frozen dataclass)
    role: str
    content: list[str | _Image]
    extra: str | None = None


def parse_layout(raw: Mapping[str, Any]) -> tuple[list[dict[str, Any]], tuple[str, ...], int]:
    """(turns, images, how many `<image>` are text) of a record.

    Turns are as `parts.Turn` describes them. The images are in the order of their markers.

    Raises:
        DataError: a turn or an image has another form, turns are not human and gpt in turn, markers and images do not
            match, or a text has no UTF-8.
    """
    given = parse_images(raw)
    if (plain := _plain_turns(raw, len(given))) is not None:
        return plain, given, 0
    turns = list(_parse_turns(raw))
    _check_order(turns)
    own = [part for turn in turns for part in turn.content if isinstance(part, _Image)]
    listed = sum(part.source is None for part in own)
    taken = _which_markers(turns, len(given) - listed, has_parts=bool(own))
    if taken is None:
        markers = listed + sum(text.count(IMAGE_TOKEN) for text in _human_texts(turns))
        raise DataError(
            f"must have one {IMAGE_TOKEN} marker for each image, got {markers} markers and {len(given)} images"
        )
    turns = [_split(turn, taken) for turn in turns]
    names = iter(given)
    images = [p.source or next(names) for turn in turns for p in turn.content if isinstance(p, _Image)]
    texts = [text for turn in turns for text in (*turn.content, turn.extra) if isinstance(text, str)]
    return [_plain(turn) for turn in turns], tuple(images), sum(text.count(IMAGE_TOKEN) for text in texts)


def parse_images(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the images in `image` or `images`.

    Raises:
        DataError: they are no file names, or both fields hold images and differ.
    """
    found = {name: _names(raw[name], name) for name in IMAGE_FIELDS if raw.get(name) is not None}
    if len(set(found.values())) > 1:
        raise DataError("`image` and `images` must not both hold images, got different ones")
    return next(iter(found.values()), ())


def layout_name(raw: Mapping[str, Any]) -> str:
    """The field that holds the turns; `conversations` where there is none."""
    return next((name for name in TURN_LISTS if raw.get(name) is not None), TURN_LISTS[0])


def short(value: Any) -> str:
    """A value for a message."""
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def valid_text(text: str, where: str) -> str:
    """The text, if it has a UTF-8 form.

    Raises:
        DataError: it has none; says where.
    """
    try:
        check_text(text)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    return text


def _plain_turns(raw: Mapping[str, Any], images: int) -> list[dict[str, Any]] | None:
    """Turns of a record that is written as LLaVA writes them, which nearly all are, in a third of the time.

    None where anything is otherwise or wrong: then the long way reads it, or says what is wrong.
    """
    entries = raw.get("conversations")
    if not isinstance(entries, list) or not entries or len(entries) % 2 or raw.get("system"):
        return None
    turns, markers = [], 0
    for place, entry in enumerate(entries):
        wanted = "gpt" if place % 2 else "human"
        if type(entry) is not dict or len(entry) != 2 or entry.get("from") != wanted:
            return None
        text = entry.get("value")
        if type(text) is not str or not _has_utf8(text) or (place % 2 and not text.strip()):
            return None
        if IMAGE_TOKEN in text:
            if place % 2:
                return None
            markers += text.count(IMAGE_TOKEN)
        turns.append({"from": wanted, "value": text})
    return turns if markers == images else None


def _has_utf8(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parse_turns(raw: Mapping[str, Any]) -> Iterator[_Turn]:
    name = layout_name(raw)
    value = raw.get(name)
    if not isinstance(value, list) or not value:
        raise DataError(f"`{name}` must be a list with at least one turn, got {short(value)}")
    if isinstance(system := raw.get("system"), str) and system and not _is_system(value[0]):
        yield _Turn("system", [valid_text(system, "`system`")])
    for index, entry in enumerate(value):
        if _is_pair(entry):
            yield _Turn("human", [valid_text(entry["user"], f"turn {index}")])
            yield _Turn("gpt", [valid_text(entry["assistant"], f"turn {index}")])
        else:
            yield _parse_turn(entry, f"turn {index}")


def _is_pair(entry: Any) -> bool:
    """Whether an entry is a question with its answer."""
    return isinstance(entry, Mapping) and isinstance(entry.get("user"), str) and isinstance(entry.get("assistant"), str)


def _is_system(entry: Any) -> bool:
    return isinstance(entry, Mapping) and "system" in (entry.get("from"), entry.get("role"))


def _parse_turn(entry: Any, where: str) -> _Turn:
    is_role = isinstance(entry, Mapping) and entry.get("role") is not None
    keys = ("role", "content") if is_role else ("from", "value")
    role, value = (entry.get(key) for key in keys) if isinstance(entry, Mapping) else (None, None)
    if not isinstance(role, str) or not isinstance(value, str | list):
        raise DataError(f"{where} must have strings in `{keys[0]}` and `{keys[1]}`, got {short(entry)}")
    if role not in ROLES:
        raise DataError(f"{where}: `{keys[0]}` must be one of {', '.join(ROLES)}, got {role!r}")
    parts = [value] if isinstance(value, str) else value
    content = [_part(part, where) for part in parts]
    if ROLES[role] != "human" and any(isinstance(part, _Image) for part in content):
        raise DataError(f"{where}: an image must be in a human turn, got one in a {role} turn")
    extra = entry.get("input")
    if extra is not None and (ROLES[role] != "human" or not isinstance(extra, str)):
        raise DataError(f"{where}: `input` must be a string in a human turn, got {short(entry)}")
    return _Turn(ROLES[role], content, extra and valid_text(extra, where))


def _part(part: Any, where: str) -> str | _Image:
    """A part of a content that is a list."""
    if isinstance(part, str):
        return valid_text(part, where)
    if isinstance(part, Mapping):
        kind = part.get("type")
        if kind in _TEXT_TYPES and isinstance(part.get("text"), str):
            return valid_text(part["text"], where)
        source = _source(part)
        if kind in _IMAGE_TYPES or (kind is None and source is not None):
            return _Image(None if source is None else _name(source, f"{where}: an image"))
    raise DataError(f"{where}: a part of the content must be a text or an image, got {short(part)}")


def _source(value: Any) -> Any:
    """The name of an image's file: the value itself, or the value of one of its keys."""
    if not isinstance(value, Mapping):
        return value
    return next((_source(value[key]) for key in _SOURCES if value.get(key) is not None), None)


def _names(value: Any, field: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        return (_name(_source(value), f"`{field}`", value),)
    return tuple(_name(_source(each), f"`{field}`", value) for each in value)


def _name(name: Any, where: str, whole: Any = None) -> str:
    if not isinstance(name, str) or not name:
        got = short(name if whole is None else whole)
        raise DataError(f"{where} must be a file name or a list of file names, got {got}")
    if name.startswith(("http:", "https:")):
        raise DataError(f"{where} must be a file name or a data URL, got {short(name)}: save the image as a file")
    return valid_text(name.removeprefix("file://"), where)


def _check_order(turns: list[_Turn]) -> None:
    for i, turn in enumerate(turns):
        if turn.role == "gpt" and not any(isinstance(part, str) and part.strip() for part in turn.content):
            raise DataError(f"turn {i}: the answer must not be empty")
    dialogue = turns[1:] if turns[0].role == "system" else turns
    roles = [turn.role for turn in dialogue]
    if "gpt" not in roles:
        raise DataError(f"must have at least one answer (a gpt turn), got {', '.join(roles) or 'a system turn only'}")
    if roles != ["human", "gpt"] * (len(roles) // 2):
        raise DataError(f"turns must be human and gpt in turn, after at most one system turn, got {short(roles)}")


def _human_texts(turns: list[_Turn]) -> list[str]:
    return [part for turn in turns if turn.role == "human" for part in turn.content if isinstance(part, str)]


def _which_markers(turns: list[_Turn], wanted: int, *, has_parts: bool) -> Markers | None:
    """The markers that are as many as the images they have to stand for; None when there are none such.

    Where a record has no image, a marker alone on its line has lost its own; any other one is text.
    """
    texts = [text for text in _human_texts(turns) if IMAGE_TOKEN in text]
    if sum(text.count(IMAGE_TOKEN) for text in texts) == wanted:
        return "all"
    alone = sum(len(_ALONE.findall(text)) for text in texts)
    if alone == wanted and alone:
        return "alone"
    return "none" if wanted == 0 and (has_parts or not alone) else None


def _split(turn: _Turn, taken: Markers) -> _Turn:
    """The turn with the markers that stand for images as images."""
    if turn.role != "human" or taken == "none" or not _holds_marker(turn):
        return turn
    content: list[str | _Image] = []
    for part in turn.content:
        if isinstance(part, _Image):
            content.append(part)
            continue
        at = 0
        for found in (_ANY if taken == "all" else _ALONE).finditer(part):
            content += [part[at : found.start(1)], _Image()]
            at = found.end(1)
        content.append(part[at:])
    return _Turn(turn.role, [part for part in content if part != ""] or [""], turn.extra)


def _holds_marker(turn: _Turn) -> bool:
    return any(isinstance(part, str) and IMAGE_TOKEN in part for part in turn.content)


def _plain(turn: _Turn) -> dict[str, Any]:
    """The turn as a text, or as a list of parts where a human text holds `<image>`."""
    value: Any = "".join(IMAGE_TOKEN if isinstance(part, _Image) else part for part in turn.content)
    if turn.role == "human" and _holds_marker(turn):
        value = [
            {"type": "image"} if isinstance(part, _Image) else {"type": "text", "text": part} for part in turn.content
        ]
    return {"from": turn.role, "value": value} | ({"input": turn.extra} if turn.extra else {})

"""Mistakes in tests that no linter finds."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]


def tuples_instead_of_messages(source: str) -> list[int]:
    """Lines of `assert_close(a, b), "message"`: a tuple that nobody reads instead of a message."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Tuple)
    ]


def test_the_check_sees_a_tuple() -> None:
    assert tuples_instead_of_messages('x = 1\nassert_close(a, b), "message"\nassert_close(a, b, msg="m")\n') == [2]


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: str(path.relative_to(TESTS)))
def test_no_message_is_lost_in_a_tuple(path: Path) -> None:
    assert not tuples_instead_of_messages(path.read_text()), f"{path}: use msg="

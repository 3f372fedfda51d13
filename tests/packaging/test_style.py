"""Rules of CONTRIBUTING.md about docstrings and comments that no linter checks."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

_CLAUSE = re.compile(r"(What|Whose|Those)\b")
_BANNER = re.compile(r"#\s*([-=#*~_])\1{3,}|#.*([-=#*~_])\2{7,}$", re.MULTILINE)


def clauses(source: str) -> list[int]:
    """Lines of docstrings, of fields as well, that open with a clause instead of a noun or a verb."""
    return sorted(
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        and _CLAUSE.match(node.value.value.lstrip())
    )


def banners(source: str) -> list[int]:
    """Lines of comments that are rules across the page."""
    if not _BANNER.search(source):  # tokens take long
        return []
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [token.start[0] for token in tokens if token.type == tokenize.COMMENT and _BANNER.match(token.string)]


def test_the_checks_see_what_they_look_for() -> None:
    source = '"""What it is."""\nclass A:\n    """Whether."""\n    x = 1\n    """Those of x."""\n    def f(self):\n'
    assert clauses(source + '        """Whose."""\n') == [1, 5, 7]
    assert banners("# ---- part\n#####\nx = 1  # a - b\n# part -----------\ny = '# ------'\n") == [1, 2, 4]


def places(check: Callable[[str], list[int]], folders: tuple[str, ...]) -> list[str]:
    """`file:line` of everything that a check finds in the Python files of these folders."""
    paths = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    assert paths
    return [f"{path.relative_to(ROOT)}:{line}" for path in paths for line in check(path.read_text())]


def test_docstrings_open_with_a_noun_or_a_verb() -> None:
    found = places(clauses, ("parrot_sys", "train", "examples"))
    assert not found, "say what it is (`Contents of ...`), not `What ...`"


def test_no_comment_is_a_banner() -> None:
    found = places(banners, ("parrot_sys", "kernels", "train", "examples", "benchmarks", "tests"))
    assert not found, "split the file, or let names say what belongs together"


def test_helpers_of_tests_are_in_modules_of_their_own() -> None:
    pattern = re.compile(r"^\s*from tests(\.\w+)*\.test_\w+ import", re.MULTILINE)
    assert pattern.search("from tests.megatron.test_wings import build\n")
    found = [str(path) for path in (ROOT / "tests").rglob("*.py") if pattern.search(path.read_text(encoding="utf-8"))]
    assert found == []

"""The console command: help, dispatch, unknown commands."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import sys
import types
from collections.abc import Sequence

import pytest

from parrot_sys import __version__
from parrot_sys.__main__ import COMMANDS, main
from parrot_sys.errors import CheckpointError


def test_help_shows_each_command_with_two_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert " ".join(COMMANDS) == "data train plan eval compare attention chat serve convert info"
    for command in COMMANDS.values():
        assert command.summary in text
        for example in command.examples:
            assert f"$ {example}\n" in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


@pytest.mark.parametrize(("name", "hint"), [("trian", "did you mean `parrot train`?"), ("x", "`parrot --help` lists")])
def test_unknown_commands(name: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name]) == 2
    text = capsys.readouterr().err
    assert (
        f"unknown command '{name}', want one of data, train, plan, eval, compare, attention, chat, serve, convert, info"
        in text
    )
    assert hint in text


@pytest.mark.parametrize("name", list(COMMANDS))
def test_the_module_of_each_command_exists(name: str) -> None:
    assert importlib.util.find_spec(COMMANDS[name].module) is not None


def test_arguments_and_errors_pass_through(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Sequence[str]] = []

    def convert_main(argv: Sequence[str]) -> int:
        seen.append(argv)
        raise CheckpointError("missing keys: a.b")

    module = types.ModuleType("stand_in")
    module.main = convert_main  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, COMMANDS["convert"].module, module)
    with pytest.raises(SystemExit) as caught:
        main(["convert", "--x", "1"])
    assert caught.value.code == 2
    assert seen == [["--x", "1"]]
    assert capsys.readouterr().err == "parrot convert: error: missing keys: a.b\n"


_PROGRAMS = [
    *(name for name in COMMANDS if name != "data"),
    *(f"data {name}" for name in ("build", "import", "check", "describe", "index")),
]


@pytest.mark.parametrize("program", _PROGRAMS)
def test_each_example_of_a_help_is_a_line_that_can_be_copied(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Paragraphs are filled, so that an example in one would run into the next one or into the text before it."""
    with contextlib.suppress(SystemExit):
        main([*program.split(), "--help"])
    _, _, text = capsys.readouterr().out.partition("\n")  # (without the line of usage)
    commands = [line for line in text.splitlines() if re.search(rf"(?<!`)\bparrot {program} .*--\w", line)]
    assert [line for line in commands if not line.startswith("  $ ") or line.count(f"parrot {program} ") > 1] == []

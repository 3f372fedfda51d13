"""No character, byte or closed pipe ends a program with a traceback."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parrot_sys.terminal import OutputClosedError, OutputError, _Stream, read_line

PROGRAM = [sys.executable, "-m", "parrot_sys"]
ENCODINGS = ["ascii", "latin-1", "cp1252", "cp437", "utf-8", "utf-16", "gbk", "koi8-r", "iso8859-6"]


@settings(max_examples=150, deadline=None)
@given(text=st.text(), encoding=st.sampled_from(ENCODINGS))
def test_every_text_can_be_shown_in_every_encoding(text, encoding):
    buffer = io.BytesIO()
    stream = _Stream(io.TextIOWrapper(buffer, encoding=encoding, newline=""), silent=False)
    print(text, end="", file=stream, flush=True)
    shown = buffer.getvalue().decode(encoding)
    if text.isascii():
        assert shown == text.replace("\n", os.linesep)
    assert not text or shown


@settings(max_examples=100, deadline=None)
@given(
    line=st.binary().filter(lambda line: b"\n" not in line and b"\r" not in line),
    encoding=st.sampled_from(["ascii", "utf-8"]),
)
def test_every_line_can_be_read(line, encoding):
    """UTF-8 comes through whatever the stream is set to; what is none stays recognisable."""
    with pytest.MonkeyPatch.context() as patch:
        stream = io.TextIOWrapper(io.BytesIO(line + b"\n"), encoding=encoding, errors="surrogateescape")
        patch.setattr(sys, "stdin", stream)
        patch.setattr(sys, "stdout", io.StringIO())
        assert read_line("> ").encode("utf-8", "surrogateescape") == line


def closed_pipe():
    """The writing end of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


@pytest.mark.parametrize("silent", [False, True])
def test_after_a_closed_pipe_a_stream_writes_to_nowhere(silent):
    stream = _Stream(io.TextIOWrapper(io.FileIO(closed_pipe(), "w")), silent=silent)
    if silent:
        print("lost", file=stream, flush=True)
    else:
        with pytest.raises(OutputClosedError):
            print("lost", file=stream, flush=True)
    print("and on", file=stream, flush=True)
    stream.close()


def test_a_full_disk_is_an_error_of_the_output():
    stream = _Stream(io.TextIOWrapper(io.FileIO("/dev/full", "w")), silent=False)
    with pytest.raises(OutputError, match="standard output cannot be written: No space left on device"):
        print("lost", file=stream, flush=True)
    stream.close()


def run(arguments, *, script="", **options):
    """Exit code and messages of `parrot`; `script` is what a shell adds, such as `>&-`."""
    command = ["sh", "-c", f'exec "$@" {script}', "sh", *PROGRAM, *arguments] if script else [*PROGRAM, *arguments]
    options.setdefault("stdin", subprocess.DEVNULL)
    options.setdefault("stdout", subprocess.PIPE)
    done = subprocess.run(command, stderr=subprocess.PIPE, timeout=120, check=False, **options)
    return done.returncode, done.stderr, done.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["compare", "--help"]])
def test_a_closed_pipe_ends_a_program_in_silence(arguments):
    writing = closed_pipe()
    code, messages, _ = run(arguments, stdout=writing)
    os.close(writing)
    assert (code, messages) == (141, b"")


@pytest.mark.parametrize("script", [">&-", "2>&-", "<&-", "<&- >&- 2>&-", ">/dev/full"])
def test_streams_that_are_closed_or_full_from_the_start(script):
    code, messages, _ = run(["--help"], script=script)
    assert b"Traceback" not in messages
    assert b"Exception" not in messages
    assert code == (2 if script == ">/dev/full" else 0)


def test_errors_of_standard_error_do_not_change_what_a_program_does():
    writing = closed_pipe()
    done = subprocess.run([*PROGRAM, "unknown"], stdout=subprocess.PIPE, stderr=writing, timeout=120, check=False)
    os.close(writing)
    assert done.returncode == 2


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_messages_with_characters_that_the_terminal_lacks(encoding, tmp_path: Path):
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xd0\xba\xd0\xbe\xd1\x82-\xff")
    code, messages, _ = run(["compare", "--evaluations", name, name, "--names", "a", "b"], env=environment)
    assert code == 2
    assert b"\\u043a\\u043e\\u0442-\\udcff" in messages

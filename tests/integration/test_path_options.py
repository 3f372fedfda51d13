"""Every command with every path option that it has: missing, of the wrong kind, and without permission.

The options come from the commands' own configuration classes, so that a new one is walked as well; a path that is not
marked as one, and a command that has no working call here, fail.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import importlib
import io
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml

from parrot_sys.__main__ import COMMANDS, main
from parrot_sys.config_values import config_to_dict, section_class
from parrot_sys.megatron.runtime.initialize import shutdown
from parrot_sys.paths import Place, path_settings
from parrot_sys.systems.hf_config import config_from_hf, read_json
from tests.foreign_files import FIXTURE, copy_fixture
from tests.permissions import mode, permissions_count

NO_PATHS = ("info",)
"""Commands with flags only, which have a parser of their own."""
WITH_SUBCOMMANDS = ("data",)
_SAYS_PATH = re.compile(r"\b(folders?|director(y|ies)|files?)\b", re.IGNORECASE)
SAY_FILE_BUT_ARE_NONE = {
    "name",  # the model's in file names
    "names",
    "overwrite",
    "force",
    "recompute",
    "verify",
    "resume",
    "cache_image_features",
}


class _Captured(Exception):
    def __init__(self, cls: type) -> None:
        self.cls = cls


def _programs() -> list[tuple[str, ...]]:
    """Names of all commands, with those of their subcommands."""
    found: list[tuple[str, ...]] = []
    for name in COMMANDS:
        if name not in WITH_SUBCOMMANDS:
            found.append((name,))
            continue
        with contextlib.redirect_stdout(io.StringIO()) as output:
            main([name, "--help"])
        subcommands = re.findall(r"^  (\w+) {2,}\S", output.getvalue(), re.MULTILINE)
        assert subcommands, output.getvalue()
        found += [(name, each) for each in subcommands]
    return found


def _class_of(program: tuple[str, ...]) -> type:
    """The configuration class that a command hands to its argument parser."""
    with pytest.MonkeyPatch.context() as patch:

        def capture(cls: type, **_: Any) -> Any:
            raise _Captured(cls)

        patch.setattr("tyro.cli", capture)
        try:
            main([*program, "--traceback"])
        except _Captured as captured:
            return captured.cls
    raise AssertionError(f"{' '.join(program)} parses its arguments without tyro")


PROGRAMS = {program: _class_of(program) for program in _programs() if program[0] not in NO_PATHS}
OPTIONS = [(program, name, place) for program, cls in PROGRAMS.items() for name, place in path_settings(cls).items()]
_START_SLOWLY = ("train", "eval", "attention")


@pytest.fixture(scope="module", autouse=True)
def _groups() -> Iterator[None]:
    yield
    shutdown()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the commands read."""
    root = tmp_path_factory.mktemp("world")
    model = copy_fixture(root)
    image = (FIXTURE / "image_0.png").read_bytes()
    (root / "cat.png").write_bytes(image)
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    (root / "records.json").write_text(json.dumps([{"id": "1", "image": "cat.png", "conversations": turns}]))
    row = {"index": "1", "image": base64.b64encode(image).decode(), "question": "What?", "A": "cat", "B": "dog"}
    row |= {"answer": "A", "category": "x", "l2-category": "y", "split": "test"}
    (root / "MMMB_en.tsv").write_text("\t".join(row) + "\n" + "\t".join(row.values()) + "\n")
    values = config_to_dict(
        dataclasses.replace(config_from_hf(read_json(model / "config.json"), model), max_seq_len=256)
    )
    values["vision"].pop("path")
    settings = {"model": values, "precision": "fp32", "global_batch_size": 1, "max_steps": 1}
    settings |= {"checkpoint": {"export": False}, "logging": {"trackers": [], "progress": False}}
    (root / "tiny.yaml").write_text(yaml.safe_dump(settings))
    (root / "llava.json").write_text((root / "records.json").read_text())
    (root / "questions.json").write_text(json.dumps({"questions": []}))
    shutil.copytree(FIXTURE.parent / "mmgpt_tiny", root / "mmgpt")
    (root / "annotations").mkdir()
    (root / "emoji-test.txt").touch()
    (root / "font.ttf").touch()
    return root


def _calls(root: Path, out: Path) -> dict[tuple[tuple[str, ...], str], list[str]]:
    """(program, option) -> a command line that works up to its work; the option may be given a second time by the test.

    An option without an entry of its own takes that of its program, under the name "".
    """
    model, table = str(root / "model"), str(root / "MMMB_en.tsv")
    assembled = ["--source-format", "multimodal_gpt", "--llm", str(root / "mmgpt/llama"), "--output", str(out / "new")]
    assembled += ["--flamingo", str(root / "mmgpt/open_flamingo.pt"), "--vision", str(root / "mmgpt/clip-vit-tiny")]
    assembled += ["--lora", str(root / "mmgpt/mmgpt-lora.pt")]
    train = ["--config", str(root / "tiny.yaml"), "--data.paths", str(root / "records.json"), "--output"]
    train += [str(out / "run"), "--checkpoint.load-from", model]
    from_scratch = [*train[:-2], "--model.tokenizer-path", model, "--model.vision.path", str(root / "clip-vit-tiny")]
    data_import = ["--source", "llava", "--input", str(root / "llava.json"), "--images", str(root)]
    data_import += ["--output", str(out / "new.json")]
    vqa = ["--source", "vqa_v2", "--input", str(root / "questions.json"), "--questions", str(root / "questions.json")]
    vqa += ["--images", str(root), "--output", str(out / "new.json")]
    vendor = ["--cldr", str(root), "--emoji-test", str(root / "emoji-test.txt"), "--noto-font", str(root / "font.ttf")]
    vendor += ["--output", str(out / "assets")]
    plan = ["--config", str(root / "tiny.yaml"), "--sample.text-tokens", "99", "--sample.label-tokens", "9"]
    check = ["--data.paths", str(root / "records.json"), "--config", str(root / "tiny.yaml")]
    check += ["--model.tokenizer-path", model]
    calls: dict[tuple[tuple[str, ...], str], list[str]] = {
        (("data", "build"), ""): ["--output", str(out / "new"), "--concepts", "4", "--held-out", "0"],
        (("data", "import"), ""): data_import,
        (("data", "import"), "questions"): vqa,
        (("data", "vendor"), ""): vendor,
        (("data", "check"), ""): check,
        (("data", "check"), "checkpoint.load_from"): check[:2],
        (("data", "index"), ""): [*check, "--output", str(out / "index")],
        (("data", "index"), "checkpoint.load_from"): [*check[:2], "--output", str(out / "index")],
        (("data", "describe"), ""): [*check, "--plot", str(out / "mix.png")],
        (("data", "describe"), "checkpoint.load_from"): [*check[:2], "--plot", str(out / "mix.png")],
        (("train",), ""): train,
        (("train",), "model.tokenizer_path"): from_scratch,
        (("train",), "model.vision.path"): from_scratch,
        (("train",), "validation.image_roots"): [*train, "--validation.paths", str(root / "records.json")],
        (("plan",), ""): [*plan, "--plot", str(out / "plan.svg")],
        (("eval",), ""): ["--checkpoint", model, "--data", table, "--output", str(out / "eval")],
        (("compare",), ""): ["--evaluations", str(root), str(root), "--output", str(out / "compare")],
        (("attention",), ""): ["--checkpoint", model, "--data", table, "--output", str(out / "attention")],
        (("chat",), ""): ["--checkpoint", model, "--message", "Hi", "--max-new-tokens", "1"],
        (("serve",), ""): ["--checkpoint", model, "--port", "0"],
        (("convert",), ""): ["--checkpoint", model, "--output", str(out / "new")],
    }
    return calls | {(("convert",), part): assembled for part in ("llm", "flamingo", "lora", "vision")}


_STATUS = {("data", "check"): (1, 2)}
"""Exit codes where they differ: its report is that training would not start."""
UNUSED = {
    (("data", "check"), "model.vision.path"),
    (("data", "describe"), "model.vision.path"),
    (("data", "index"), "model.vision.path"),
    (("data", "index"), "data.image_roots"),  # it looks at texts alone
    (("plan",), "model.tokenizer_path"),
    (("plan",), "model.vision.path"),
}
"""Options of configurations that two commands share, which this one does not read."""


@pytest.mark.parametrize("program", PROGRAMS, ids=" ".join)
def test_every_path_is_marked_as_one(program: tuple[str, ...]) -> None:
    cls = PROGRAMS[program]
    marked = path_settings(cls)
    for name, hint, text in _settings(cls):
        is_path = hint is Path or Path in _types(hint)
        says_so = _SAYS_PATH.search(text) is not None and str in _types(hint)
        if name.rsplit(".", 1)[-1] not in SAY_FILE_BUT_ARE_NONE:
            assert name in marked or not (is_path or says_so), f"{name}: mark it as a path (parrot_sys/paths.py)"


def _types(hint: Any) -> set[Any]:
    return {hint, *(inner for argument in get_args(hint) for inner in _types(argument))}


def _settings(cls: type, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """(dotted name, type, help) of all settings."""
    from tyro._docstrings import get_field_docstring

    for field in dataclasses.fields(cls):
        hint = get_type_hints(cls)[field.name]
        if (section := section_class(hint)) is not None:
            yield from _settings(section, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, hint, get_field_docstring(cls, field.name, ()) or ""


@pytest.mark.parametrize(
    ("program", "option", "place"),
    [
        pytest.param(
            *case,
            id=f"{' '.join(case[0])} {case[1]}",
            marks=[pytest.mark.slow] if case[0][0] in _START_SLOWLY and not case[2].writes else [],
        )
        for case in OPTIONS
    ],
)
def test_paths_that_cannot_be_used(
    program: tuple[str, ...],
    option: str,
    place: Place,
    world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = _calls(world, tmp_path)
    assert (program, "") in calls, f"add a call of {' '.join(program)} that works to _calls"
    if (program, option) in UNUSED:
        pytest.skip("the command takes this option from settings that it shares and does not read it: see UNUSED")
    command = [*program, *calls.get((program, option), calls[program, ""])]
    if place.writes:  # what cannot be written is found before the work begins
        module = importlib.import_module(COMMANDS[program[0]].module)
        for work in {"setup_logging", "load_pretrained", "build", "import_set", "vendor"} & vars(module).keys():
            monkeypatch.setattr(module, work, _no_work)
    for what, path, context in _bad_paths(place, tmp_path):
        with context():
            status, text = _run([*command, *_flag(option, path, PROGRAMS[program])], capsys)
        assert status in _STATUS.get(program, (2,)), (what, status, text)
        assert str(path) in text.replace("\n", ""), (what, text)
        assert "Traceback" not in text, (what, text)


def _no_work(*_: Any) -> None:
    pytest.fail("the work began")


def _flag(option: str, path: Path, cls: type) -> list[str]:
    values = [str(path)] * (2 if option == "evaluations" else 1)
    return values if option == "files" else [f"--{option.replace('_', '-')}", *values]


def _bad_paths(place: Place, folder: Path) -> Iterator[tuple[str, Path, Callable[[], Any]]]:
    """(what is wrong, the path, a block in which it is so)."""
    suffix = ".json" if place.beside else ".svg"
    file, inner = folder / f"a_file{suffix}", folder / f"a_folder{suffix}"
    file.write_text("nothing")
    (inner / "inside").mkdir(parents=True)
    if place.writes:
        yield "in a folder that may not be written", inner / f"new{suffix}", lambda: mode(inner, 0o500)
        yield "below a file", file / f"new{suffix}", permissions_count
        yield "of the wrong kind", file if place.folder else inner, permissions_count
        if not place.beside:
            locked = inner if place.folder else file
            yield "may not be written", locked, lambda: mode(locked, 0o500 if place.folder else 0o400)
        return
    yield "missing", folder / "missing", permissions_count
    if place.folder is not None:
        yield "of the wrong kind", file if place.folder else inner, permissions_count
    yield "may not be read", inner if place.folder else file, lambda: mode(inner if place.folder else file, 0)


def _run(command: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[Any, str]:
    try:
        status: Any = main(command)
    except SystemExit as error:
        status = error.code
    except BaseException as error:  # what a user would see as a traceback
        status = f"Traceback: {type(error).__name__}: {error}"
    logging.getLogger("parrot_sys").handlers.clear()  # they write to a stream that goes away
    captured = capsys.readouterr()
    return status, captured.out + captured.err + (status if isinstance(status, str) else "")


@pytest.mark.parametrize("program", PROGRAMS, ids=" ".join)
def test_configuration_files(program: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if program == ("convert",):
        return  # it takes flags alone
    file = tmp_path / "settings.yaml"
    file.write_text("{}")
    for path, bits in ((tmp_path / "missing.yaml", None), (tmp_path, None), (file, 0)):
        with permissions_count() if bits is None else mode(path, bits):
            status, text = _run([*program, "--config", str(path)], capsys)
        assert status == 2
        assert str(path) in text.replace("\n", "")


def test_commands_without_a_path_have_flags_only(capsys: pytest.CaptureFixture[str]) -> None:
    for name in NO_PATHS:
        with pytest.raises(SystemExit, match="0"):
            main([name, "--help"])
        assert re.findall(r"--[\w-]+ [A-Z]+", capsys.readouterr().out) == []

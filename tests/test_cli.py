"""parse_config: order of precedence, presets, and what a wrong command line is answered with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from parrot_sys import cli
from parrot_sys.cli import list_presets, nearest, parse_config, run_main
from parrot_sys.errors import DataError
from tests.config_classes import AdapterConfig, MoEConfig, RunConfig, SourceConfig


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "presets" / "stages").mkdir(parents=True)
    (tmp_path / "presets" / "other_program.yaml").write_text("beams: 4\n")
    (tmp_path / "presets" / "tiny.yaml").write_text("output: from_preset\nlr: 0.5\nmodel: {moe: {topk: 5}}\n")
    (tmp_path / "presets" / "stages" / "pretrain.yaml").write_text("lr: 0.25\nmodel: {moe: {routing: topk}}\n")
    monkeypatch.setattr(cli, "PRESET_DIR", tmp_path / "presets")
    return tmp_path / "presets"


def parse(*argv: str) -> RunConfig:
    return parse_config(RunConfig, argv, prog="parrot try")


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as caught:
        parse(*argv)
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_flags_alone() -> None:
    config = parse(
        "--output", "x", "--model.moe.topk", "4", "--languages", "tr", "ru", "--resume", "--mix", "en", "0.5"
    )
    assert config == RunConfig(
        output=Path("x"),
        model=config.model,
        languages=("tr", "ru"),
        resume=True,
        mix={"en": 0.5},
    )
    assert config.model.moe == MoEConfig(topk=4)


def test_a_flag_of_an_optional_section_switches_it_on(presets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert parse("--output", "x").model.adapter is None
    assert parse("--output", "x", "--model.adapter.rank", "4").model.adapter == AdapterConfig(rank=4)
    (presets / "adapter.yaml").write_text("model: {adapter: {rank: 2}}\n")
    both = parse("--output", "x", "--config", "adapter", "--model.adapter.targets", "v", "--model.adapter.targets", "o")
    assert both.model.adapter == AdapterConfig(rank=2, targets=("v", "o"))
    with pytest.raises(SystemExit):
        parse("--help")
    assert "--model.adapter.rank" in capsys.readouterr().out


def test_later_wins_and_flags_win_over_files(presets: Path) -> None:
    config = parse("--model.moe.topk", "1", "--config", "tiny", "--config=pretrain")
    assert config.output == Path("from_preset")
    assert config.lr == 0.25
    assert config.model.moe == MoEConfig(topk=1, routing="topk")
    assert parse("--config", "pretrain", "--config", "tiny").lr == 0.5
    assert parse("--config", "tiny", "--lr", "1", "--lr", "2").lr == 2


def test_repeated_list_flags_add_up() -> None:
    config = parse("--languages", "tr", "--output", "x", "--languages=ru", "--lr", "2", "--languages", "en", "zh")
    assert config.languages == ("tr", "ru", "en", "zh")
    assert (config.output, config.lr) == (Path("x"), 2.0)
    assert parse("--output", "x", "--mix", "en", "1", "--mix", "zh", "2").mix == {"en": 1.0, "zh": 2.0}
    assert parse("--output", "x", "--size", "3", "4", "--size", "5", "6").size == (5, 6)


def test_lists_null_and_nested_lists_from_yaml(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("output: x\nlanguages: []\nname: null\nresume: true\nsources: [{path: a}, {path: b, weight: 2}]\n")
    config = parse("--config", str(file), "--no-resume", "--sources.0.weight", "9")
    assert config.languages == ()
    assert config.name is None
    assert config.resume is False
    assert config.sources == (SourceConfig(path=Path("a"), weight=9.0), SourceConfig(path=Path("b"), weight=2.0))


def test_a_contradiction_in_a_file_may_be_mended_by_a_flag(presets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (presets / "bad.yaml").write_text("output: x\nmodel: {moe: {topk: 9}}\n")
    assert parse("--config", "bad", "--model.moe.num-experts", "10").model.moe.topk == 9
    assert "moe.topk must be in [1, moe.num_experts=6], got 9" in error_of(capsys, "--config", "bad")


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (("--output", "x", "--model.moe.topkk", "3"), ["--model.moe.topkk", "--model.moe.topk INT"]),
        (("--output", "x", "--model.moe.topk", "9"), ["moe.topk must be in [1, moe.num_experts=6], got 9"]),
        (("--output", "x", "--model.moe.topk", "x"), ["--model.moe.topk", "INT", "'x'"]),
        (("--output", "x", "--model.moe.routing", "tok"), ["'tok'", "--model.moe.routing", "dense", "topk"]),
        ((), ["--output"]),
        (("--config",), ["--config needs the name of a preset or a YAML file, got nothing"]),
        (("--config", "--lr"), ["--config needs the name of a preset or a YAML file, got --lr"]),
        (("--config", "tinny"), ["a preset (other_program, pretrain, tiny), got 'tinny'; did you mean tiny?"]),
    ],
)
def test_mistakes_exit_with_2_and_no_traceback(
    argv: tuple[str, ...], parts: list[str], presets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = error_of(capsys, *argv)
    assert "Traceback" not in text
    assert not [part for part in parts if part not in text], text


def test_an_unknown_key_in_a_file_names_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("model: {moe: {num_expert: 3}}\n")
    text = error_of(capsys, "--config", str(file))
    assert text == (
        f"parrot try: error: unknown setting model.moe.num_expert in {file}; the nearest is model.moe.num_experts\n"
    )


def test_help_teaches(presets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for part in (
        "Trains something.",
        "--config NAME_OR_PATH",
        "a preset: pretrain, tiny.",
        "How many experts there are.",
    ):
        assert part in text


def test_presets_are_found_by_name() -> None:
    assert all(path.is_file() and path.stem == name for name, path in list_presets().items())
    assert len(list_presets()) == len(list(cli.PRESET_DIR.rglob("*.yaml"))), "two presets share a name"


def test_nearest() -> None:
    assert nearest("trian", ["train", "eval"]) == "train"
    assert nearest("xyz", ["train", "eval"]) is None


def failing(argv: Sequence[str]) -> int:
    raise DataError(f"record 7 is broken, got {list(argv)}")


def test_run_main_prints_one_block(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run_main(failing, ["a"], prog="parrot data")
    assert caught.value.code == 2
    assert capsys.readouterr().err == "parrot data: error: record 7 is broken, got ['a']\n"


def test_run_main_shows_the_traceback_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"got \['a'\]"):
        run_main(failing, ["a", "--traceback"])
    monkeypatch.setenv("PARROT_TRACEBACK", "1")
    with pytest.raises(DataError):
        run_main(failing, ["a"])


def test_run_main_hands_through_results_and_other_errors() -> None:
    assert run_main(lambda argv: len(argv), ["a", "b", "c"]) == 3
    assert run_main(lambda argv: None, []) == 0

    def bug(argv: Sequence[str]) -> int:
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        run_main(bug, [])

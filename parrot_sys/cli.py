"""From YAML files and command-line flags to a frozen dataclass, and back to YAML.

A program has one configuration class. Its values come from, later wins: the defaults of the class, each `--config` in
the order given (the name of a preset, or a YAML file), and the flags (`--model.moe.topk 3`). Checks that need several
values (`__post_init__`) run once, on the final values.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import tyro

from parrot_kernels import env
from parrot_sys import terminal
from parrot_sys.config_values import (
    build,
    config_from_dict,
    config_to_dict,
    keyed_settings,
    list_settings,
    load_config,
    merge,
    nearest,
    optional_sections,
    read_yaml,
    save_config,
    switch_on,
    without_foreign,
)
from parrot_sys.errors import ConfigError, ParrotError
from parrot_sys.paths import check_outputs
from parrot_sys.processes import EXIT_INTERRUPTED, end_with_parent

__all__ = [
    "config_from_dict",
    "config_to_dict",
    "exit_with",
    "list_presets",
    "load_config",
    "nearest",
    "parse_config",
    "run_main",
    "save_config",
]

C = TypeVar("C")
PRESET_DIR = Path(__file__).parent / "presets"


def parse_config(
    cls: type[C],
    argv: Sequence[str] | None = None,
    *,
    prog: str | None = None,
    description: str | None = None,
    leave_out: type | None = None,
) -> C:
    """Builds `cls` from `--config NAME_OR_PATH ...` and flags.

    Args:
        cls: a dataclass with type hints; the string under a field is its help.
        argv: arguments without the program's name; those of this process when not given.
        prog: name of the program in messages.
        description: first paragraph of `--help`; the docstring of `cls` when not given.
        leave_out: another program's configuration, whose files this one reads too; settings that only it has are left
            out. An unknown name is an error all the same.

    Returns:
        The configuration. A wrong setting prints its name, what was wanted and what came, and exits with code 2.

    Raises:
        ConfigError: a place that the program writes to (`parrot_sys.paths`) cannot be written.
    """
    try:
        files, flags = _split_config_flags(sys.argv[1:] if argv is None else argv)
        values: dict[str, Any] = {}
        for path in map(_find_config, files):
            merge(cls, values, without_foreign(cls, leave_out, read_yaml(path)), where=f" in {path}")
        for section in optional_sections(cls):
            if any(_names_section(flag, section) for flag in flags):
                switch_on(values, section)
        _name_keys(cls, values, flags)
        base = build(cls, values, checked=False, missing=tyro.MISSING)
    except ConfigError as error:
        exit_with(error, prog)
    flags = _merge_repeated_lists(cls, flags)
    config: C = tyro.cli(
        cls,
        args=flags,
        default=base,
        prog=prog,
        description=_help_text(cls, description, leave_out),
        config=(tyro.conf.AvoidSubcommands,),  # sections that may be absent are those of `base`
    )
    check_outputs(config)
    return config


def _names_section(flag: str, section: str) -> bool:
    """Whether a flag sets something in an optional section; `--help` shows all of them."""
    return flag in ("-h", "--help") or flag.replace("_", "-").startswith(f"--{section}.".replace("_", "-"))


def _name_keys(cls: type, values: dict[str, Any], flags: Sequence[str]) -> None:
    """Gives mappings with BY_KEY the keys that flags name, as tyro knows flags of keys that are there."""
    for name, hint in keyed_settings(cls).items():
        for flag in flags:
            _, found, key = flag.partition("=")[0].partition(f"--{name}.")
            if not found:
                continue
            key = key.replace("-", "_")
            key = key.removeprefix("no_") if hint is bool else key
            section = values
            for part in name.split("."):
                section = section.setdefault(part, {})
            section.setdefault(key, hint())


def list_presets() -> dict[str, Path]:
    """Name -> file of every preset that `--config` takes by name."""
    return {path.stem: path for path in sorted(PRESET_DIR.rglob("*.yaml"))}


def exit_with(error: ParrotError, prog: str | None = None) -> NoReturn:
    """Prints the error as one block and exits with code 2.

    Raises:
        SystemExit: always.
    """
    print(f"{prog or Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
    raise SystemExit(2)


def run_main(main: Callable[[Sequence[str]], int | None], argv: Sequence[str], *, prog: str | None = None) -> int:
    """Calls `main(argv)` as a program: errors that a user can fix are one block of text and exit code 2.

    `--traceback` anywhere in `argv`, or PARROT_TRACEBACK=1, lets them through with their traceback. When nobody reads
    the output any more, as with `| head`, the program ends in silence with 141; Ctrl-C ends it with 130. A worker of
    torchrun ends with its launcher (SIGTERM), however that ends.
    """
    rest = [argument for argument in argv if argument != "--traceback"]
    shows_all = len(rest) < len(argv) or env.show_traceback()
    if env.torchrun_id() is not None:
        end_with_parent()  # a worker that outlives its launcher would keep its GPU and its output
    try:
        with terminal.standard_streams():
            return main(rest) or 0
    except KeyboardInterrupt:
        if shows_all:
            raise
        if env.rank() == 0:
            print(f"\n{prog or Path(sys.argv[0]).name}: stopped by Ctrl-C", file=sys.stderr)
        return EXIT_INTERRUPTED
    except terminal.OutputClosedError:
        return terminal.CLOSED_PIPE_STATUS
    except ParrotError as error:
        if shows_all:
            raise
        exit_with(error, prog)
    except OSError as error:  # a file that is there but may not be read, a disk that is full, ...
        if shows_all or error.filename is None:
            raise
        exit_with(ParrotError(f"{error.filename}: {error.strerror}"), prog)


def _help_text(cls: type, description: str | None, leave_out: type | None) -> str:
    presets = [name for name, path in list_presets().items() if _fits(cls, leave_out, path)]
    about = "--config NAME_OR_PATH (repeatable; flags win) reads settings from a YAML file"
    about += f" or a preset: {', '.join(presets)}." if presets else "."
    return f"{description or inspect.cleandoc(cls.__doc__ or '')}\n\n{about}"


def _fits(cls: type, leave_out: type | None, preset: Path) -> bool:
    """Whether a preset holds settings of this program."""
    try:
        merge(cls, {}, without_foreign(cls, leave_out, read_yaml(preset)), where="")
    except ConfigError:
        return False
    return True


def _split_config_flags(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The values of `--config X` and `--config=X`, and everything else in its order."""
    files, flags = [], []
    arguments = iter(argv)
    for argument in arguments:
        if argument == "--config":
            value = next(arguments, None)
            if value is None or value.startswith("--"):
                raise ConfigError(f"--config needs the name of a preset or a YAML file, got {value or 'nothing'}")
            files.append(value)
        elif argument.startswith("--config="):
            files.append(argument.removeprefix("--config="))
        else:
            flags.append(argument)
    return files, flags


def _merge_repeated_lists(cls: type, flags: Sequence[str]) -> list[str]:
    """`--data a --data b` as `--data a b`, for the flags that take any number of values."""
    lists = {name.replace("_", "-") for name in list_settings(cls)}
    groups: dict[str | int, list[str]] = {}  # each flag with its values; all of one list flag share a group
    group = groups.setdefault(-1, [])
    for position, argument in enumerate(flags):
        flag, equals, value = argument.partition("=")
        name = flag.removeprefix("--").replace("_", "-")
        if flag.startswith("--") and name in lists:
            group = groups.setdefault(name, [flag])
            group += [value] if equals else []
        elif flag.startswith("--") or flag == "-h":
            group = groups.setdefault(position, [argument])
        else:
            group.append(argument)
    return [argument for group in groups.values() for argument in group]


def _find_config(name: str) -> Path:
    if Path(name).is_file():
        return Path(name)
    presets = list_presets()
    if name in presets:
        return presets[name]
    hint = f"; did you mean {guess}?" if (guess := nearest(name, list(presets))) else ""
    raise ConfigError(f"--config must be a file or a preset ({', '.join(presets) or 'none'}), got {name!r}{hint}")

"""Plain nested values (YAML, JSON) <-> frozen configuration dataclasses; every wrong name or type is an error.

Understood types: bool, int, float, str, Path, Literal, unions, list, tuple, dict and nested dataclasses.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import yaml

from parrot_sys.errors import ConfigError
from parrot_sys.files import replace_text

C = TypeVar("C")
BY_KEY = "by key"
"""Mark of a mapping whose keys are settings of their own, as `Annotated[dict[str, bool], BY_KEY]`: a later file or flag
changes only those that it names (`--trainable.llm`)."""


def config_from_dict(cls: type[C], values: Mapping[str, Any]) -> C:
    """Builds `cls` from nested plain values, as `config_to_dict` makes them.

    Raises:
        ConfigError: an unknown key (names the nearest), a missing one, or a value of the wrong type or out of range.
    """
    return _from_values(cls, values, where="")


def _from_values(cls: type[C], values: Mapping[str, Any], where: str) -> C:
    merged: dict[str, Any] = {}
    merge(cls, merged, values, where=where)
    return cast(C, build(cls, merged, checked=True))


def config_to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as nested dicts, lists and scalars that YAML and JSON can hold."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of nested settings."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def save_config(config: Any, path: str | Path) -> None:
    """Writes every setting of `config` as YAML; a file that is there stays whole until the new one is."""
    replace_text(Path(path), yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True))


def load_config(cls: type[C], path: str | Path) -> C:
    """Reads what `save_config` wrote, or any YAML file with settings of `cls`.

    Raises:
        ConfigError: as `config_from_dict`; also when the file is missing or is not a mapping.
    """
    return _from_values(cls, read_yaml(Path(path)), where=f" in {path}")


def nearest(name: str, known: Sequence[str]) -> str | None:
    """The known name that `name` was probably meant to be."""
    matches = difflib.get_close_matches(name, known, n=1)
    return matches[0] if matches else None


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: the file cannot be read, is no YAML or holds no mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} must be UTF-8 text, got {error}: save it as UTF-8") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # (a date that there is not, too deep a nesting)
        raise ConfigError(f"{path} is no YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of settings, got {type(values).__name__}")
    return values


@functools.cache
def _field_types(cls: type) -> Mapping[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def section_class(hint: Any) -> type | None:
    """The dataclass behind `X`, or behind `X | None` (a section that is off by default); None for plain values."""
    choices = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    found = [choice for choice in choices if choice is not type(None)]
    return found[0] if len(found) == 1 and dataclasses.is_dataclass(found[0]) else None  # type: ignore[return-value]


def optional_sections(cls: type, prefix: str = "") -> list[str]:
    """Dotted names of the sections below `cls` that are off unless one of their settings is given (`X | None`)."""
    names = []
    for name, hint in _field_types(cls).items():
        if (section := section_class(hint)) is not None:
            names += [prefix + name] if section is not hint else []
            names += optional_sections(section, f"{prefix}{name}.")
    return names


def switch_on(values: dict[str, Any], section: str) -> None:
    """Gives an optional section (dotted name) its defaults in merged `values`, where it has no settings yet."""
    for name in section.split("."):
        if values.get(name) is None:
            values[name] = {}
        values = values[name]


def _setting_names(cls: type, prefix: str = "") -> list[str]:
    """Dotted names of all settings below `cls`."""
    names = []
    for name, hint in _field_types(cls).items():
        names.append(prefix + name)
        if (section := section_class(hint)) is not None:
            names += _setting_names(section, f"{prefix}{name}.")
    return names


def list_settings(cls: type, prefix: str = "") -> set[str]:
    """Dotted names of the settings below `cls` that take any number of values: `tuple[X, ...]`, list and dict."""
    names = set()
    for name, hint in _field_types(cls).items():
        if (section := section_class(hint)) is not None:
            names |= list_settings(section, f"{prefix}{name}.")
        choices = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        if any(get_origin(c) in (list, dict) or (get_origin(c) is tuple and get_args(c)[-1] is ...) for c in choices):
            names.add(prefix + name)
    return names


@functools.cache
def keyed_settings(cls: type, prefix: str = "") -> Mapping[str, Any]:
    """Dotted name -> type of the values, of the mappings below `cls` that are marked with BY_KEY."""
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(cls, include_extras=True).items():
        if BY_KEY in getattr(hint, "__metadata__", ()):
            found[prefix + name] = get_args(hint.__origin__)[1]
        elif (section := section_class(_field_types(cls).get(name))) is not None:
            found |= keyed_settings(section, f"{prefix}{name}.")
    return found


def _check_names(root: type, cls: type, values: Mapping[Any, Any], prefix: str, where: str) -> None:
    known = _field_types(cls)
    for key in values:
        if key in known:
            continue
        every = _setting_names(root)
        same_name = [name for name in every if name.rsplit(".", 1)[-1] == key]
        guess = nearest(str(key), list(known))
        hint = prefix + guess if guess else same_name[0] if same_name else nearest(f"{prefix}{key}", every)
        if (now := getattr(cls, "renamed", {}).get(key)) is not None:
            raise ConfigError(f"unknown setting {prefix}{key}{where}: it is {now} now")
        raise ConfigError(f"unknown setting {prefix}{key}{where}" + (f"; the nearest is {hint}" if hint else ""))


def without_foreign(cls: type, other: type | None, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` without the settings that `other` has and `cls` has not; all of them when `other` is None."""
    own, foreign = _field_types(cls), _field_types(other) if other else {}
    kept = {}
    for name, value in values.items():
        section = section_class(own.get(name))
        if section is not None and isinstance(value, Mapping):
            kept[name] = without_foreign(section, section_class(foreign.get(name)), value)
        elif name in own or name not in foreign:
            kept[name] = value
    return kept


def merge(
    cls: type, into: dict[str, Any], values: Mapping[str, Any], *, where: str, prefix: str = "", root: Any = None
) -> None:
    """Lays `values` over `into`: nested classes and mappings with BY_KEY key by key, everything else as a whole."""
    _check_names(root or cls, cls, values, prefix, where)
    keyed = keyed_settings(cls)
    for name, hint in _field_types(cls).items():
        if name not in values:
            continue
        value, section = values[name], section_class(hint)
        if section is not None and (value is not None or section is hint):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{prefix}{name}{where} must be a mapping of settings, got {value!r}")
            if into.get(name) is None:
                into[name] = {}
            merge(section, into[name], value, where=where, prefix=f"{prefix}{name}.", root=root or cls)
        else:
            value = _convert(hint, value, f"{prefix}{name}", where)
            into[name] = {**into.get(name, {}), **value} if name in keyed else value


def _convert(hint: Any, value: Any, name: str, where: str) -> Any:
    """`value` as the type `hint` wants it; a ConfigError when it does not fit."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, value, name, where)
    if origin is Literal:
        fits = any(value == choice and type(value) is type(choice) for choice in arguments)
        result = value
    elif origin in (list, tuple) and isinstance(value, list | tuple):
        result = origin(_convert_items(hint, value, name, where))
        fits = True
    elif origin is dict and isinstance(value, Mapping):
        key_hint, value_hint = arguments
        result = {
            _convert(key_hint, key, name, where): _convert(value_hint, item, f"{name}.{key}", where)
            for key, item in value.items()
        }
        fits = True
    elif dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        values: dict[str, Any] = {}
        merge(cast(type, hint), values, value, where=where, prefix=f"{name}.")
        return _build(cast(type, hint), values, None, f"{name}.", True, dataclasses.MISSING)
    else:
        fits, result = _convert_scalar(hint, value)
        if fits and hint is float and not math.isfinite(result):
            # Comparisons let NaN through in one of their directions: no range that a class checks would be safe.
            raise ConfigError(f"{name}{where} must be a finite number, got {value!r}")
    if not fits:
        raise ConfigError(f"{name}{where} must be {_type_name(hint)}, got {value!r}")
    return result


def _convert_union(arguments: tuple[Any, ...], value: Any, name: str, where: str) -> Any:
    if value is None and type(None) in arguments:
        return None
    choices = [choice for choice in arguments if choice is not type(None)]
    for choice in choices:
        try:
            return _convert(choice, value, name, where)
        except ConfigError:
            if len(choices) == 1:
                raise
    raise ConfigError(f"{name}{where} must be {' or '.join(map(_type_name, arguments))}, got {value!r}")


def _convert_items(hint: Any, value: Sequence[Any], name: str, where: str) -> list[Any]:
    arguments = get_args(hint)
    if get_origin(hint) is tuple and arguments[-1] is not ...:
        if len(value) != len(arguments):
            raise ConfigError(f"{name}{where} must have {len(arguments)} values, got {len(value)}: {value!r}")
        hints: Sequence[Any] = arguments
    else:
        hints = [arguments[0]] * len(value)
    pairs = zip(hints, value, strict=True)
    return [_convert(each, item, f"{name}[{i}]", where) for i, (each, item) in enumerate(pairs)]


def _convert_scalar(hint: Any, value: Any) -> tuple[bool, Any]:
    """(fits, converted value) for bool, int, float, str and Path."""
    if hint is float:
        # YAML 1.1 reads 1e-4 (no dot) as a string.
        try:
            return not isinstance(value, bool), float(value)
        except (TypeError, ValueError):
            return False, value
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    if hint is Path:
        return isinstance(value, str | Path), Path(value) if isinstance(value, str) else value
    if hint is Any:
        return True, value
    return isinstance(hint, type) and isinstance(value, hint), value


def _type_name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if hint is type(None):
        return "null"
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)


def build(cls: type, values: Mapping[str, Any], *, checked: bool, missing: Any = dataclasses.MISSING) -> Any:
    """`cls` from merged values.

    Args:
        cls: the dataclass.
        values: what `merge` left: converted values, a mapping for each nested class.
        checked: whether `__post_init__` runs.
        missing: stands for a value that has no default; by default that is an error.

    Raises:
        ConfigError: a setting without default is missing; `missing` is not given.
    """
    return _build(cls, values, None, "", checked, missing)


def _build(cls: type, values: Mapping[str, Any], base: Any, prefix: str, checked: bool, missing: Any) -> Any:
    """`base` is the default instance that the enclosing class gives for this field, if it gives one."""
    hints = _field_types(cls)
    arguments = {}
    for field in (field for field in dataclasses.fields(cls) if field.init):
        default = _default(field) if base is None else getattr(base, field.name)
        value = values.get(field.name, dataclasses.MISSING)
        section = section_class(hints[field.name])
        always = section is hints[field.name]
        if section is not None and (isinstance(value, Mapping) or (always and not checked)):
            nested_base = None if default is dataclasses.MISSING else default
            nested_values = {} if value is dataclasses.MISSING else value
            nested_prefix = f"{prefix}{field.name}."
            value = _build(section, nested_values, nested_base, nested_prefix, checked, missing)
        elif value is dataclasses.MISSING:
            value = missing if default is dataclasses.MISSING else default
        if value is dataclasses.MISSING:
            raise ConfigError(f"missing setting {prefix}{field.name} ({_type_name(hints[field.name])})")
        arguments[field.name] = value
    if checked:
        return cls(**arguments)
    instance: Any = object.__new__(cls)
    for name, value in arguments.items():
        object.__setattr__(instance, name, value)
    return instance


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return config_to_dict(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value

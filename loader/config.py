"""A run is one TOML file: `load_toml` turns it into a frozen msgspec Struct, strictly.

Strict means that an unknown key, a wrong type or a missing value ends the run with the file, the
key and how to fix it named. `--set a.b=c` overrides one value on the command line and is checked
just as strictly. `dump_toml` writes the resolved configuration back, defaults included, so that a
run's folder always says what really ran.
"""

import math
import re
import tomllib
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import msgspec
import tomli_w

ConfigT = TypeVar("ConfigT", bound=msgspec.Struct)
# as msgspec words it; group 2 is the table
_UNKNOWN_KEY = re.compile(r"unknown field `([^`]+)`(?: - at `\$\.([^`\[]*)[^`]*`)?")
_NO_OPTION = re.compile(r"Invalid enum value .* - at `\$\.([^`]+)`")


class ConfigError(ValueError):
    """The configuration can't be used; the message names the file, the key and the remedy."""


def load_toml(path: Path, kind: type[ConfigT], overrides: Sequence[str] = ()) -> ConfigT:
    """Decode the TOML file at `path` into `kind`, after applying `overrides` of the form
    "a.b=value".

    A value is read as TOML (`8`, `true`, `[1, 2]`, `"text"`); what is not TOML counts as a plain
    string, so `--set output=runs/a` needs no quotes. Raises ConfigError.
    """
    try:
        raw: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: can't read the configuration: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    return _converted(raw, kind, str(path), overrides)


def override(config: ConfigT, overrides: Sequence[str], where: str) -> ConfigT:
    """`config` with these "a.b=value", checked as `load_toml` does; `where` is for messages. Raises
    ConfigError.
    """
    raw = _without_none(msgspec.to_builtins(config))
    return _converted(raw, type(config), where, overrides)


def _converted(
    raw: dict[str, Any], kind: type[ConfigT], where: str, overrides: Sequence[str]
) -> ConfigT:
    for each in overrides:
        _apply(raw, each)
    changed = f" (with --set {' --set '.join(overrides)})" if overrides else ""
    try:
        config = msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}{changed}: {error}{_hint(str(error), kind)}") from error
    # TOML spells them, and bounds such as "greater than 0" let infinity pass
    for key, value in _floats(raw):
        if not math.isfinite(value):
            raise ConfigError(f"{where}{changed}: {key} = {value}: give a finite number")
    return config


def _floats(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """Every float in a decoded TOML file with its dotted key, those of lists by position."""
    if isinstance(value, float):
        yield key, value
    elif isinstance(value, dict):
        for name, each in value.items():
            yield from _floats(each, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for number, each in enumerate(value):
            yield from _floats(each, f"{key}[{number}]")


def _apply(raw: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    if not separator or not name:
        raise ConfigError(f"--set {override}: expected key=value, for example --set data.seed=1")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, last = name.split(".")
    table = raw
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {override}: {parent} is a value, not a table")
    table[last] = value


def _hint(message: str, kind: type[msgspec.Struct]) -> str:
    """What was meant by an unknown key: the nearest one, or else the keys of its table. And what a
    value may be that is none of a few.
    """
    if match := _NO_OPTION.search(message):
        options = _options_at(kind, re.sub(r"\[[^]]*\]", "", match[1]).split("."))
        return f"; choose from {', '.join(map(str, options))}"
    match = _UNKNOWN_KEY.search(message)
    if match is None:
        return ""
    name = match[1]
    table = f"{match[2]}." if match[2] else ""
    keys = _known_keys(kind)
    here = {key.removeprefix(table).partition(".")[0] for key in keys if key.startswith(table)}
    # one that has moved into a table of its own (checkpoint_every); then a key of this table, then
    # one that stands in another table under this very name
    near = [key for key in keys if key.replace(".", "_") == name]
    near += [table + each for each in get_close_matches(name, sorted(here), n=1)]
    near += [key for key in keys if key.rpartition(".")[2] == name]
    near += get_close_matches(table + name, keys, n=1)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; known keys here: {', '.join(sorted(here))}"


def _known_keys(kind: type[msgspec.Struct], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for field in msgspec.structs.fields(kind):
        name = prefix + field.encode_name
        table = _struct_in(field.type)
        keys += _known_keys(table, f"{name}.") if table else [name]
    return keys


def _options_at(kind: type[msgspec.Struct], keys: Sequence[str]) -> list[Any]:
    """The values that the key may have."""
    field = next(each for each in msgspec.structs.fields(kind) if each.encode_name == keys[0])
    table = _struct_in(field.type)
    return _options_at(table, keys[1:]) if table and keys[1:] else _options_of(field.type)


def _options_of(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [option for each in get_args(annotation) for option in _options_of(each)]


def _struct_in(annotation: Any) -> type[msgspec.Struct] | None:
    """The Struct of a field that is a table, an optional one, or a list of tables."""
    if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct):
        return annotation
    found = (_struct_in(argument) for argument in get_args(annotation))
    return next((each for each in found if each), None)


def dump_toml(config: msgspec.Struct) -> str:
    """The resolved configuration as TOML text that `load_toml` reads back to an equal Struct.

    None has no spelling in TOML: such keys are left out, and reading them back gives their
    default, None.
    """
    return tomli_w.dumps(_without_none(msgspec.to_builtins(config)))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return [_without_none(each) for each in value]
    return value

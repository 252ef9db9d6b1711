"""A run is one TOML file: `load_toml` turns it into a frozen msgspec Struct, strictly.

Strict means that an unknown key, a wrong type or a missing value ends the run with the file, the
key and the way out named. `--set a.b=c` overrides one value on the command line and is checked
just as strictly. `dump_toml` writes the resolved configuration back, defaults included, so that a
run's folder always says what really ran.
"""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

ConfigT = TypeVar("ConfigT", bound=msgspec.Struct)


class ConfigError(ValueError):
    """The configuration can't be used; the message names the file, the key and the way out."""


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
    for override in overrides:
        _apply(raw, override)
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        changed = f" (with --set {' --set '.join(overrides)})" if overrides else ""
        raise ConfigError(
            f"{path}{changed}: {error}; known keys: {', '.join(_known_keys(kind))}"
        ) from error


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


def _known_keys(kind: type, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for field in msgspec.structs.fields(kind):
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            keys += _known_keys(field.type, f"{prefix}{field.encode_name}.")
        else:
            keys.append(prefix + field.encode_name)
    return keys


def dump_toml(config: msgspec.Struct) -> str:
    """The resolved configuration as TOML text that `load_toml` reads back to an equal Struct.

    None has no spelling in TOML: such keys are left out, and reading them back gives their
    default, None.
    """
    lines: list[str] = []
    _dump_table(msgspec.to_builtins(config), "", lines)
    return "\n".join(lines).lstrip("\n") + "\n"


def _dump_table(table: dict[str, Any], name: str, lines: list[str]) -> None:
    if name:
        lines += ["", f"[{name}]"]
    subtables = {key: value for key, value in table.items() if isinstance(value, dict)}
    lines += [
        f"{key} = {_dump_value(value)}"
        for key, value in table.items()
        if key not in subtables and value is not None
    ]
    for key, value in subtables.items():
        _dump_table(value, f"{name}.{key}" if name else key, lines)


def _dump_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_dump_value, value))}]"
    if isinstance(value, dict):
        return (
            "{ " + ", ".join(f"{key} = {_dump_value(item)}" for key, item in value.items()) + " }"
        )
    if isinstance(value, str):  # a JSON string is a TOML basic string
        return msgspec.json.encode(value).decode().replace("\x7f", "\\u007f")
    return repr(value)

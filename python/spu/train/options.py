"""The options of a command as they were given: on the command line, and in a YAML file that it names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spu.common.options import Options, kind_of, unknown
from spu.train.config import option

__all__ = ["read_options", "read_yaml"]


def read_options(given: Mapping[str, Any], *classes: type[Options]) -> list[dict[str, Any]]:
    """Return the values that a user has named, for each of a command's dataclasses.

    Args:
        given: of the command line: texts, lists of them, or bools, by field; None for what was not named. Under
            "config" a YAML file, whose values stand in for what is not named here.
        classes: dataclasses that have the fields.

    Raises:
        ValueError: a file that cannot be read, a key that is no option, a value that is not allowed; names the value
            and the fix.
    """
    named = {name: (option(name), value) for name, value in given.items() if value is not None}
    if "config" in named:
        path = str(given["config"])
        named = {**{n: (f"{path}: {n}", v) for n, v in read_yaml(path, *classes).items()}, **named}
    result = []
    for options in classes:
        fields = {field.name: field for field in options.own_first()}
        result.append({name: _read(options, fields[name], *value) for name, value in named.items() if name in fields})
    return result


def _read(options: type[Options], field: Any, label: str, value: Any) -> Any:
    kind = kind_of(field)
    if isinstance(value, list) and kind.once:
        if len(value) != 1:
            words = kind.once.format(values=" ".join(map(str, value)))
            raise ValueError(f"{label} is given {len(value)} times, and {words}")
        (value,) = value
    return options.taken(field, kind.parse(value) if isinstance(value, str) else value, label)


def read_yaml(path: str, *classes: type[Options]) -> dict[str, Any]:
    """Return the values of a YAML file by field; keys may be written with - or _.

    Raises:
        ValueError: it cannot be read, is no mapping, or has a key that is no option; names the nearest one.
    """
    import yaml  # an optional package, as all that the commands need

    try:
        source = Path(path).read_text(encoding="utf-8")
        values, node = yaml.safe_load(source), yaml.compose(source, yaml.SafeLoader)
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}: give a YAML file of options") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values or {}, dict):
        raise ValueError(f"--config {path} must be lines of OPTION: VALUE, got {values!r}")
    keys = [str(key.value).replace("-", "_") for key, _ in node.value] if values else []  # a dict has the last of each
    if twice := [key for k, key in enumerate(keys) if key in keys[:k]]:
        raise ValueError(f"--config {path} has {twice[0]} twice: give one")
    known = [field.name for options in classes for field in options.own_first() if field.name != "config"]
    result: dict[str, Any] = {}
    for key, value in (values or {}).items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise ValueError(f"--config {path}: {unknown(str(key), known, 'an option')}")
        result[name] = value
    return {name: value for name, value in result.items() if value is not None}

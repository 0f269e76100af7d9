"""The options of a command as they were given: on the command line, and in a YAML file that it names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spu.common.files import write_atomically
from spu.common.options import Options, kind_of, unknown
from spu.train.config import option

__all__ = ["Given", "read_options", "read_yaml", "write_yaml"]


@dataclass(frozen=True)
class Given:
    """A value as the user has written it.

    Attributes:
        value: a text, a list of them or a bool of the command line; of a file what YAML makes of it.
        label: the option's name as it is written there.
        where: stands before messages: the file and the line; "" for the command line.
    """

    value: Any
    label: str
    where: str = ""


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
    named = {name: Given(value, option(name)) for name, value in given.items() if value is not None}
    if "config" in named:
        named = {**read_yaml(str(given["config"]), *classes), **named}
    result = []
    for options in classes:
        fields = {field.name: field for field in options.own_first()}
        result.append({name: _read(options, fields[name], value) for name, value in named.items() if name in fields})
    return result


def _read(options: type[Options], field: Any, given: Given) -> Any:
    kind, value = kind_of(field), given.value
    try:
        return options.taken(field, kind.parse(value) if isinstance(value, str) else value, given.label)
    except ValueError as error:
        raise ValueError(f"{given.where}{error}") from None


def read_yaml(path: str, *classes: type[Options]) -> dict[str, Given]:
    """Return the values of a YAML file by field; keys may be written with - or _. Empty values are left out.

    Raises:
        ValueError: it cannot be read, is no mapping of options to plain values, or has a key twice or one that is no
            option; names the line, and the nearest option.
    """
    import yaml  # an optional package, as all that the commands need

    try:
        source = Path(path).read_text(encoding="utf-8")
        root = yaml.compose(source, yaml.SafeLoader)
        values = yaml.safe_load(source)
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}: give a YAML file of options") from None
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ValueError(f"--config {path} is not YAML: {_one_line(error)}") from None
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"--config {path} must be lines of OPTION: VALUE, and is a {root.id}")
    known = [field.name for options in classes for field in options.own_first() if field.name != "config"]
    seen: dict[str, int] = {}
    result = {}
    for key, node in root.value:
        line, label = key.start_mark.line + 1, str(key.value)
        name, where = label.replace("-", "_"), f"--config {path}, line {line}: "
        if name not in known:
            raise ValueError(where + unknown(label, known, "an option"))
        if name in seen:
            raise ValueError(f"{where}{label} stands in line {seen[name]} already: give it once")
        seen[name] = line
        if not _is_plain(node):
            raise ValueError(
                f"{where}{label} has keys or lists in it: an option has one value, or a plain list"
                + (_as_pairs(node) if name == "budget" else "")
            )
        if values[key.value] is not None:
            result[name] = Given(values[key.value], label, where)
    return result


def _is_plain(node: Any) -> bool:
    """Tell whether a node is a scalar or a list of scalars."""
    return node.id == "scalar" or (node.id == "sequence" and all(item.id == "scalar" for item in node.value))


def _as_pairs(node: Any) -> str:
    """Return how a mapping of plain values is written in one text, as budgets are; "" for anything else."""
    if node.id != "mapping" or any(part.id != "scalar" for pair in node.value for part in pair):
        return ""
    return ": write " + ",".join(f"{key.value}={value.value}" for key, value in node.value)


def _one_line(error: BaseException) -> str:
    return "too deep" if isinstance(error, RecursionError) else " ".join(str(error).split())


def write_yaml(path: Path, options: Options, title: str) -> None:
    """Write every option that has a value, so that the file can be given with ``--config``.

    Args:
        path: the file; replaced as a whole.
        options: what to write.
        title: a line above it.

    Raises:
        OSError: it cannot be written.
    """
    import yaml

    values = options.to_json()
    named = {f.name.replace("_", "-"): values[f.name] for f in options.own_first() if values[f.name] is not None}
    write_atomically(path, f"# {title}\n" + yaml.safe_dump(named, sort_keys=False, allow_unicode=True))

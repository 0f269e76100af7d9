"""Options as fields of a dataclass: each with a sentence, its default and the check of its values.

Keywords, command lines, YAML keys and JSON are made from such a dataclass, so that an option stands in one place.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from spu.common.elsewhere import meant_by, rewritten

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "AUTO",
    "SWITCH",
    "Kind",
    "Options",
    "choice",
    "default",
    "field_of",
    "flag",
    "kind_of",
    "number",
    "takes_keywords",
    "text",
    "texts",
    "unknown",
    "whole",
]

AUTO = "auto"


# Kinds of values


@dataclass(frozen=True)
class Kind:
    """The values that a setting may have, and how they are read and written.

    Attributes:
        about: a sentence for help texts.
        allowed: the values in words, for error messages.
        take: return the value as the code uses it, or raise ValueError or TypeError if it is not allowed.
        parse: turn the text of a command line into a value; text that is none comes back unchanged, for ``take`` to
            refuse.
        plain: turn the value into JSON.
        is_flag: whether the command line has an option without a value for it.
        many: whether the command line may name it several times, for a value of several.
        metavar: what stands for the value in help texts.
        otherwise: what to do instead, for error messages.
    """

    about: str
    allowed: str
    take: Callable[[Any], Any]
    parse: Callable[[str], Any] = str
    plain: Callable[[Any], Any] = lambda value: value
    is_flag: bool = False
    many: bool = False
    metavar: str = "TEXT"
    otherwise: str = ""

    def shown(self, value: Any) -> str:
        """Return a value as help texts have it."""
        return f"{value:g}" if isinstance(value, float) else str(self.plain(value))

    @property
    def help(self) -> str:
        """The sentence, with the values where they can be listed."""
        return f"{self.about} One{self.allowed[3:]}." if self.listed else self.about

    @property
    def listed(self) -> bool:
        """Whether ``allowed`` names every value."""
        return self.allowed.startswith("one of ")


def choice(default: str | None, about: str, values: Iterable[str]) -> Any:
    """Return a field for one of several words."""
    known = tuple(values)

    def take(value: Any) -> Any:
        return value if isinstance(value, str) and value in known else _refuse()

    return field_of(default, Kind(about, f"one of {', '.join(known)}", take))


def _takes(kind: Kind, text: str) -> bool:
    try:
        kind.take(kind.parse(text))
    except (ValueError, TypeError, OverflowError):
        return False
    return True


def whole(default: int | str | None, about: str, *, least: int = 1, most: int | None = None, auto: bool = False) -> Any:
    """Return a field for a whole number, or "auto" where ``auto`` allows it."""

    def take(value: Any) -> Any:
        if auto and value == AUTO:
            return value
        known = isinstance(value, int) and not isinstance(value, bool)
        return value if known and least <= value and (most is None or value <= most) else _refuse()

    def parse(text: str) -> Any:
        return _as(int, text)

    allowed = f"a whole number of at least {least}" if most is None else f"a whole number from {least} to {most}"
    allowed += ", or auto" if auto else ""
    return field_of(default, Kind(about, allowed, take, parse, metavar="INTEGER|auto" if auto else "INTEGER"))


def number(
    default: float | None, about: str, *, zero: bool = False, most: float = math.inf, otherwise: str = ""
) -> Any:
    """Return a field for a finite number above 0 (with ``zero``, or 0) and up to ``most``."""

    def take(value: Any) -> Any:
        known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return float(value) if known and (0 < value <= most or (zero and value == 0)) else _refuse()

    def parse(text: str) -> Any:
        return _as(float, text)

    allowed = "0 or a positive number" if zero else "a positive number"
    allowed = f"from 0 to {most:g}" if math.isfinite(most) else allowed
    return field_of(default, Kind(about, allowed, take, parse, metavar="NUMBER", otherwise=otherwise))


def flag(default: bool, about: str) -> Any:
    """Return a field for yes or no."""

    def take(value: Any) -> Any:
        return value if isinstance(value, bool) else _refuse()

    def parse(text: str) -> Any:
        return SWITCH.get(text.lower(), text)

    return field_of(default, Kind(about, "true or false", take, parse, is_flag=True))


def text(default: str | None, about: str, *, otherwise: str = "") -> Any:
    """Return a field for any text; ``otherwise`` is said where something else is given."""

    def take(value: Any) -> Any:
        return value if isinstance(value, str) else _refuse()

    return field_of(default, Kind(about, "a text", take, otherwise=otherwise))


def texts(about: str) -> Any:
    """Return a field for one text or several, as a tuple, or None."""

    def take(value: Any) -> Any:
        values = [value] if isinstance(value, str) else value
        known = isinstance(values, list | tuple) and values and all(isinstance(one, str) for one in values)
        return tuple(values) if known else _refuse()

    def plain(value: tuple[str, ...]) -> Any:
        return value[0] if len(value) == 1 else list(value)

    return field_of(None, Kind(about, "a text or a list of texts", take, plain=plain, many=True))


def default(base: type[Options], name: str, value: Any, more: str = "") -> Any:
    """Return the field ``name`` of ``base`` with another default, and perhaps one more sentence about it, for a class
    that extends ``base``.
    """
    kind = kind_of(next(field for field in dataclasses.fields(base) if field.name == name))
    return field_of(value, dataclasses.replace(kind, about=f"{kind.about} {more}") if more else kind)


def kind_of(field: dataclasses.Field[Any]) -> Kind:
    """Return the kind of a setting's values."""
    kind: Kind = field.metadata["kind"]
    return kind


def field_of(default: Any, kind: Kind) -> Any:
    """Return a field of this kind; None is allowed where it is the default."""
    return dataclasses.field(default=default, metadata={"kind": kind})


def _refuse() -> Any:
    raise ValueError


def _as(kind: Callable[[str], Any], text: str) -> Any:
    """Return the number that a text means, or the text."""
    try:
        return kind(text)
    except ValueError:
        return text


SWITCH = {"on": True, "true": True, "yes": True, "off": False, "false": False, "no": False}


# What all options can do


def unknown(name: str, known: Iterable[str], what: str = "a setting") -> str:
    """Return the words that refuse a name that is not known: with what other libraries call so, the nearest one, or all
    of them.
    """
    names = list(known)
    near = meant_by(name, names) or next(iter(difflib.get_close_matches(name, names, n=1)), None)
    said = f"did you mean {near}?" if near else f"there are {', '.join(names)}"
    return f"{name!r} is not {what}; {said}"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Fields made by the functions above, checked whenever one is made."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = self.taken(field, getattr(self, field.name), self.label(field.name))
            object.__setattr__(self, field.name, value)
        self.check()

    def check(self) -> None:
        """Raise ValueError where settings do not go together."""

    @classmethod
    def label(cls, name: str) -> str:
        """Return a setting's name in messages: as the user has written it."""
        return name

    @staticmethod
    def taken(field: dataclasses.Field[Any], value: Any, label: str) -> Any:
        """Return a field's value as the code uses it.

        Raises:
            ValueError: it is not allowed; says what is.
        """
        if value is None and field.default is None:
            return None
        kind = kind_of(field)
        try:
            return kind.take(value)
        except (ValueError, TypeError, OverflowError):
            if kind.listed:
                raise ValueError(f"unknown {label} {value!r}: give {kind.allowed}") from None
            better = rewritten(value, kind.metavar)
            better = better if _takes(kind, better) else ""  # 0, where it must be 1, is no other way to write it
            fix = f": write {better}" if better else f"; {kind.otherwise}" if kind.otherwise else ""
            raise ValueError(f"{label} {value!r} must be {kind.allowed}{fix}") from None

    @classmethod
    def names(cls) -> list[str]:
        """Return the fields' names."""
        return [field.name for field in dataclasses.fields(cls)]

    @classmethod
    def given(cls, settings: Self | None, keywords: Mapping[str, Any], caller: str) -> Self:
        """Return ``settings``, or the defaults, with the keywords of a call.

        Raises:
            TypeError: a keyword that is no setting; names the nearest one.
            ValueError: a value that is not allowed.
        """
        for name in keywords:
            if name not in cls.names():
                raise TypeError(f"{caller}: {unknown(name, cls.names(), 'one of its keywords')}")
        return cls(**keywords) if settings is None else dataclasses.replace(settings, **keywords)

    @classmethod
    def part_of(cls, settings: Options) -> Self:
        """Return those settings that this class has, of one that extends it."""
        return cls(**{name: getattr(settings, name) for name in cls.names()})

    def to_json(self) -> dict[str, Any]:
        """Return every setting as JSON."""
        values = {field.name: (kind_of(field), getattr(self, field.name)) for field in dataclasses.fields(self)}
        return {name: None if value is None else kind.plain(value) for name, (kind, value) in values.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], where: str = "", *, partly: bool = False) -> Self:
        """Return what ``to_json`` wrote.

        Args:
            values: by the settings' names.
            where: stands before a setting's name in messages.
            partly: settings that are missing have their defaults.

        Raises:
            ValueError: a setting that is missing, unknown, or has a value that is not allowed.
        """
        for name in values:
            if name not in cls.names():
                raise ValueError(where + unknown(name, cls.names()))
        for field in dataclasses.fields(cls):
            if field.name in values:
                cls.taken(field, values[field.name], where + field.name)
            elif not partly:
                raise ValueError(f"{where}{field.name} is missing")
        return cls(**values)

    @classmethod
    def own_first(cls) -> list[dataclasses.Field[Any]]:
        """Return the fields in the order for people: those of the class before those of what it extends."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        order = dict.fromkeys(name for base in cls.__mro__ for name in inspect.get_annotations(base))
        return [fields[name] for name in order if name in fields]


# Keywords of a class

Taker = TypeVar("Taker", bound=type)


def takes_keywords(options: type[Options]) -> Callable[[Taker], Taker]:
    """Let a class whose ``__init__`` ends in ``**keywords`` show the fields of ``options`` as its keywords.

    ``inspect.signature``, ``help`` and notebooks read ``__signature__``, and the docstring's line ``{keywords}``
    becomes a line for each field. A ``TypedDict`` with ``Unpack`` would show them to static checkers as well, but has
    to list every field a second time: none is made from a dataclass.
    """

    def decorated(cls: Taker) -> Taker:
        own = inspect.signature(cls)
        shown = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        lines = []
        for field in dataclasses.fields(options):
            kind = kind_of(field)
            start = None if field.default is None else kind.plain(field.default)
            shown.append(
                inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=start, annotation=field.type)
            )
            lines += textwrap.wrap(
                f"{field.name}: {kind.help} ({start!r})", 116, initial_indent=" " * 8, subsequent_indent=" " * 12
            )
        setattr(cls, "__signature__", own.replace(parameters=shown))  # noqa: B010  mypy knows no such attribute
        if cls.__doc__:  # not under python -OO
            cls.__doc__ = cls.__doc__.replace(" " * 8 + "{keywords}", "\n".join(lines))
        return cls

    return decorated

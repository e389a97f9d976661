"""Registries of named components: they build a frozen object from a name and options, and turn it back into both.

A component is a frozen dataclass whose fields are its options. The command line, the manifest and the contract tests find
registered components through their `Registry`.
"""

import dataclasses
import importlib.metadata
import json
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, Generic, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from kdcache.errors import UsageError, how_to_write, unknown_name

__all__ = ["FITTED", "NEWER", "Registry"]

T = TypeVar("T")
FITTED: dict[str, bool] = {"fitted": True}  # metadata of a field that is computed from data, and is no option
# Metadata of an option that came later: records have it only where it is not at its default, so that older names stay.
NEWER: dict[str, bool] = {"newer": True}


class Registry(Generic[T]):
    """Components of one kind (`codec`, `method`, ...), by name.

    `entry_points` names a group through which installed packages add components; it is read when a name is first
    looked up, so that merely importing kdcache never imports them. A component that is no subclass of `base` is registered as
    one that inherits from both, so that it has what `base` says of components that say nothing.
    """

    def __init__(self, kind: str, *, entry_points: str | None = None, base: type | None = None) -> None:
        self.kind = kind
        self._group = entry_points
        self._base = base
        self._types: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator: make a frozen dataclass known as `name`. The class that it returns is the one that is registered."""

        def add(component: type[T]) -> type[T]:
            if not (dataclasses.is_dataclass(component) and component.__dataclass_params__.frozen):  # type: ignore[attr-defined]
                raise TypeError(f"{component.__name__} must be a frozen dataclass to be registered as {self.kind} {name!r}")
            if name in self._types:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            component = self._with_defaults(component)
            self._types[name] = component
            return component

        return add

    def _with_defaults(self, component: type[T]) -> type[T]:
        if self._base is None or issubclass(component, self._base):
            return component
        names = {name: getattr(component, name) for name in ("__module__", "__qualname__", "__doc__")}
        complete = types.new_class(component.__name__, (component, self._base), exec_body=lambda body: body.update(names))
        missing: frozenset[str] = getattr(complete, "__abstractmethods__", frozenset())
        if missing:
            raise TypeError(f"{component.__name__} cannot be registered as {self.kind}: it has no {', '.join(sorted(missing))}")
        return complete

    def _load_plugins(self) -> None:
        group, self._group = self._group, None
        if group:
            for entry in importlib.metadata.entry_points(group=group):
                if entry.name not in self._types:
                    self.register(entry.name)(entry.load())

    def __iter__(self) -> Iterator[str]:
        self._load_plugins()
        return iter(sorted(self._types))

    def __contains__(self, name: object) -> bool:
        self._load_plugins()
        return name in self._types

    def __getitem__(self, name: str) -> type[T]:
        if name not in self:
            raise unknown_name(self.kind, name, self)
        return self._types[name]

    def build(self, name: str, **options: Any) -> T:
        """Build component `name` with `options`. Raises UsageError for unknown options and for values of a wrong type."""
        return self._build(name, options, _checked)

    def _build(self, name: str, options: dict[str, Any], check: Callable[[Any, Any, str], Any]) -> T:
        component = self[name]
        fields: dict[str, Any] = {f.name: f for f in dataclasses.fields(component)}  # type: ignore[arg-type]
        hints = typing.get_type_hints(component, include_extras=True)
        for option, value in options.items():
            if option not in fields:
                raise unknown_name(f"option of {self.kind} {name}", option, fields)
            options[option] = check(value, hints[option], f"{option} of {self.kind} {name}")
        for option, field in fields.items():
            if option not in options and field.default is field.default_factory is dataclasses.MISSING:
                raise UsageError(
                    f"{self.kind} {name} without {option}",
                    why="this option has no default",
                    fix=f"give it one: {name}:{option}=...",
                )
        return component(**options)

    def parse(self, spec: str) -> T:
        """Build a component from its command-line form: `name`, `name:value` (its first option) or `name:key=value,key=value`.

        Keyword-only options always need their names. A backslash protects a comma, equals sign or backslash in a value.
        """
        name, _, rest = spec.partition(":")
        component = self[name]
        hints = typing.get_type_hints(component)
        first = _first(component)
        fields = [f.name for f in _options(component)]
        options: dict[str, Any] = {}
        for number, item in enumerate(_ITEM.findall(rest) if rest else []):
            key, equals, value = _KEY.fullmatch(item).groups()  # type: ignore[union-attr]  # it matches any text
            key, value = _unescape(key), _unescape(value)
            if not equals:
                if number or first is None:
                    raise UsageError(
                        f"{self.kind} {spec!r} has the bare value {item!r}",
                        why=f"only {first} may be given without its name" if first else "its options are given by name",
                        fix=f"write {name}:" + ",".join(f"{field}=..." for field in fields) + r" (a comma in a value: \,)"
                        if fields
                        else f"write {name} alone: it has no options",
                    )
                key, value = first, key
            key = key.strip() if key not in fields else key
            if key not in fields:
                raise unknown_name(f"option of {self.kind} {name}", key, fields)
            if key in options:
                raise UsageError(f"{self.kind} {spec!r} has {key} twice", why="one value would be lost", fix="leave one out")
            options[key] = None if value.lower() in {"none", "null"} and _is_optional(hints[key]) else value
        return self.build(name, **options)

    def to_dict(self, component: T) -> dict[str, Any]:
        """`{"name": ..., option: value, ...}`, the form in manifests and run records."""
        options = dataclasses.asdict(component)  # type: ignore[call-overload]
        for field in dataclasses.fields(component):  # type: ignore[arg-type]
            if field.metadata.get("newer") and options[field.name] == field.default:
                del options[field.name]
        return {"name": self.name_of(component), **options}

    def from_dict(self, stored: Mapping[str, Any]) -> T:
        options = dict(stored)
        name = options.pop("name", None)
        if not isinstance(name, str):
            raise UsageError(
                f"{self.kind} {stored!r} has no name", why="a stored component is its name and its options", fix="give it a name"
            )
        return self._build(name, options, _checked_as_stored)

    def name_of(self, component: T) -> str:
        for name, known in self._types.items():
            if known is type(component):
                return name
        raise KeyError(f"{type(component).__name__} is not a registered {self.kind}")

    def describe(self, name: str) -> str:
        """Options of component `name` with their defaults, as text."""
        shown = []
        for field in _options(self[name]):
            required = field.default is dataclasses.MISSING
            shown.append(field.name if required else f"{field.name}={_text(field.default)}")
        return ", ".join(shown)

    def spec(self, component: T) -> str:
        """The shortest command-line form of a component, without options at their defaults."""
        changed = [
            (field.name, getattr(component, field.name))
            for field in _options(component)
            if getattr(component, field.name) != field.default
        ]
        name = self.name_of(component)
        if not changed:
            return name
        if len(changed) == 1 and changed[0][0] == _first(component):
            return f"{name}:{_escape(changed[0][1])}"
        return f"{name}:" + ",".join(f"{key}={_escape(value)}" for key, value in changed)


# Items of a specification, and the key before an item's equals sign. Characters after a backslash end neither.
_ITEM = re.compile(r"(?:^|,)((?:\\[\\,=]|[^,])*)")
_KEY = re.compile(r"((?:\\[\\,=]|[^=])*)(=?)(.*)", re.DOTALL)


def _escape(value: object) -> str:
    return re.sub(r"([\\,=])", r"\\\1", _text(value))


def _text(value: object) -> str:
    """An option's value as a user types it; several values are joined by +."""
    return "+".join(f"{part:g}" for part in value) if isinstance(value, tuple) else str(value)


def _unescape(text: str) -> str:
    return re.sub(r"\\([\\,=])", r"\1", text)


def _options(component: Any) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(component) if not field.metadata.get("fitted")]


def _first(component: Any) -> str | None:
    """The option that needs no name: the first one, or None if all are keyword-only."""
    return next((field.name for field in _options(component) if not field.kw_only), None)


def _is_optional(hint: Any) -> bool:
    union = typing.get_origin(hint) in {types.UnionType, typing.Union}
    return union and types.NoneType in typing.get_args(hint)


@cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint, config=ConfigDict(allow_inf_nan=False, arbitrary_types_allowed=True))


def _checked(value: Any, hint: Any, where: str) -> Any:
    """`value`, parsed if it is text, as its annotated type. Raises UsageError for an invalid value."""
    try:
        return _adapter(hint).validate_python(value)
    except ValidationError as error:
        raise _not_valid(value, error, where) from None


def _checked_as_stored(value: Any, hint: Any, where: str) -> Any:
    """`value` from JSON as its annotated type, without conversions: stored values have the right types."""
    try:
        return _adapter(hint).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        raise _not_valid(value, error, where) from None


def _not_valid(value: Any, error: ValidationError, where: str) -> UsageError:
    reasons = [details["msg"].removeprefix("Input should be ") for details in error.errors()]
    return UsageError(
        f"{where}: {_text(value)!r} is not a valid value",
        why=f"it should be {' or '.join(dict.fromkeys(reasons))}",
        fix=how_to_write(error.errors()),
    )

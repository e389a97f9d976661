"""Named components: a name and options become a frozen object, and the object becomes the same name and options again.

A component is a frozen dataclass whose fields are its options. Registering it makes it available to the command line,
to the manifest and to the contract tests, all of which go through its `Registry`.
"""

import dataclasses
import importlib.metadata
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from kdcache.errors import UsageError, unknown_name

__all__ = ["FITTED", "Registry"]

T = TypeVar("T")
FITTED: dict[str, bool] = {"fitted": True}  # metadata of a field that is found from data, and is nobody's option


class Registry(Generic[T]):
    """Components of one kind (`codec`, `method`, ...), by name.

    `entry_points` names a group through which installed packages add components; it is read when a name is first
    looked up, so that merely importing kdcache never imports them.
    """

    def __init__(self, kind: str, *, entry_points: str | None = None) -> None:
        self.kind = kind
        self._group = entry_points
        self._types: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator: make a frozen dataclass known as `name`."""

        def add(component: type[T]) -> type[T]:
            if not (dataclasses.is_dataclass(component) and component.__dataclass_params__.frozen):  # type: ignore[attr-defined]
                raise TypeError(f"{component.__name__} must be a frozen dataclass to be registered as {self.kind} {name!r}")
            if name in self._types:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._types[name] = component
            return component

        return add

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
        """Make component `name` with `options`; unknown options are refused by name."""
        component = self[name]
        fields = [f.name for f in dataclasses.fields(component)]  # type: ignore[arg-type]
        for option in options:
            if option not in fields:
                raise unknown_name(f"option of {self.kind} {name}", option, fields)
        try:
            return component(**options)
        except TypeError as error:
            raise UsageError(
                f"{self.kind} {name!r} cannot be made from {options!r}",
                why=str(error),
                fix=f"give it its options: {', '.join(fields)}",
            ) from None

    def parse(self, spec: str) -> T:
        """Make a component from its command-line form: `name`, `name:value` (its first option) or `name:key=value,key=value`.

        A comma, equals sign or backslash that belongs to a value may be written with a backslash before it.
        """
        name, _, rest = spec.partition(":")
        component = self[name]
        hints = typing.get_type_hints(component)
        fields = [f.name for f in _options(component)]
        options: dict[str, Any] = {}
        for number, item in enumerate(_ITEM.findall(rest) if rest else []):
            key, equals, value = _KEY.fullmatch(item).groups()  # type: ignore[union-attr]  # it matches any text
            key, value = _unescape(key), _unescape(value)
            if not equals:
                if number or not fields:
                    raise UsageError(
                        f"{self.kind} {spec!r} has the bare value {item!r}",
                        why="only the first option of a component may be given without its name",
                        fix=f"write {name}:" + ",".join(f"{field}=..." for field in fields) + r" (a comma in a value: \,)"
                        if fields
                        else f"write {name} alone: it has no options",
                    )
                key, value = fields[0], key
            if key not in fields:
                raise unknown_name(f"option of {self.kind} {name}", key, fields)
            options[key] = _convert(value, hints[key], f"{self.kind} {spec!r}")
        return self.build(name, **options)

    def to_dict(self, component: T) -> dict[str, Any]:
        """`{"name": ..., option: value, ...}`: what the manifest and run records store."""
        return {"name": self.name_of(component), **dataclasses.asdict(component)}  # type: ignore[call-overload]

    def from_dict(self, stored: Mapping[str, Any]) -> T:
        options = dict(stored)
        name = options.pop("name", None)
        if not isinstance(name, str):
            raise UsageError(
                f"{self.kind} {stored!r} has no name", why="a stored component is its name and its options", fix="give it a name"
            )
        return self.build(name, **options)

    def name_of(self, component: T) -> str:
        for name, known in self._types.items():
            if known is type(component):
                return name
        raise KeyError(f"{type(component).__name__} is not a registered {self.kind}")

    def describe(self, name: str) -> str:
        """The options of component `name` with their defaults, as text."""
        shown = []
        for field in _options(self[name]):
            required = field.default is dataclasses.MISSING
            shown.append(field.name if required else f"{field.name}={field.default}")
        return ", ".join(shown)

    def spec(self, component: T) -> str:
        """The shortest command-line form of a component: options at their defaults are left out."""
        changed = [
            (field.name, getattr(component, field.name))
            for field in _options(component)
            if getattr(component, field.name) != field.default
        ]
        name = self.name_of(component)
        if not changed:
            return name
        first = dataclasses.fields(component)[0].name  # type: ignore[arg-type]
        if len(changed) == 1 and changed[0][0] == first:
            return f"{name}:{_escape(changed[0][1])}"
        return f"{name}:" + ",".join(f"{key}={_escape(value)}" for key, value in changed)


# Items of a specification, and the key before an item's equals sign; what a backslash protects ends neither.
_ITEM = re.compile(r"(?:^|,)((?:\\[\\,=]|[^,])*)")
_KEY = re.compile(r"((?:\\[\\,=]|[^=])*)(=?)(.*)", re.DOTALL)


def _escape(value: object) -> str:
    return re.sub(r"([\\,=])", r"\\\1", str(value))


def _unescape(text: str) -> str:
    return re.sub(r"\\([\\,=])", r"\1", text)


def _options(component: Any) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(component) if not field.metadata.get("fitted")]


def _convert(text: str, hint: Any, where: str) -> Any:
    """Read one option's text as its annotated type."""
    candidates = typing.get_args(hint) if typing.get_origin(hint) in {types.UnionType, typing.Union} else (hint,)
    if types.NoneType in candidates and text.lower() in {"none", "null"}:
        return None
    for kind in candidates:
        if typing.get_origin(kind) is typing.Literal:
            if text in typing.get_args(kind):
                return text
        elif kind is bool:
            if text.lower() in {"true", "yes", "1", "false", "no", "0"}:
                return text.lower() in {"true", "yes", "1"}
        elif kind in {int, float, str}:
            try:
                return kind(text)
            except ValueError:
                continue
    raise UsageError(
        f"{where}: {text!r} is not a valid value",
        why=f"the option takes {_described(candidates)}",
        fix="correct the value",
    )


def _described(candidates: tuple[Any, ...]) -> str:
    """The types of an option's values in words."""
    found: list[str] = []
    for kind in candidates:
        literal = typing.get_origin(kind) is typing.Literal
        found += map(str, typing.get_args(kind)) if literal else ["none" if kind is types.NoneType else kind.__name__]
    return " or ".join(found)

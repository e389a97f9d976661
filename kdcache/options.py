"""How an option is declared: once, as a field of a class. Command line, configurations, studies and records follow from it.

    class Runtime(Options):
        panel = "Where and how fast"
        workers: Annotated[int, Field(ge=0), Option("Processes that render views ahead.", short="-j")] = 0

`--workers 4`, `KDCACHE_DISTILL_WORKERS=4`, `workers: 4` in a `--config` file or a study, and `DistillConfig(workers=4)` are this
field. Groups of options are fields themselves (`runtime: Runtime = Runtime()`); outside Python their options lie flat.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, BeforeValidator, ByteSize, ConfigDict, TypeAdapter, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from kdcache.errors import UsageError, how_to_write

__all__ = [
    "LARGEST_INTEGER",
    "Betas",
    "Bytes",
    "Declared",
    "Floats",
    "Integers",
    "Names",
    "Option",
    "Options",
    "Several",
    "Share",
    "Temperatures",
    "Triple",
    "Usual",
    "Words",
    "as_text",
    "flag_of",
    "integers",
    "listed",
    "names_in",
    "wrong_option",
]

MOST_NUMBERS = 10_000
LARGEST_INTEGER = (1 << 64) - 1  # of a seed: one word of the random streams


@dataclass(frozen=True)
class Option:
    """What the command line says of a field: its help, and where the flag is not the field's name."""

    help: str
    short: str = ""  # `-b`
    off: str = ""  # the flag that says no: `--pretrained` beside `--from-scratch`
    none: str = ""  # the text that means None, which otherwise cannot be typed
    repeated: bool = False  # the flag is given once for each value
    former: str = ""  # the name in records, studies and configurations that were written before, and in identities of runs


@dataclass(frozen=True)
class Usual:
    """Says, beside a group of options, what they are where they are not given: not the class's defaults."""

    text: str


@dataclass(frozen=True)
class Declared:
    """An option as declared: its `name`, the `group` that has it, and the field."""

    name: str
    group: type["Options"]
    field: FieldInfo
    usual: str  # what it is if it is not given, where that is not the field's default

    @property
    def option(self) -> Option:
        return _option(self.field)


class Options(BaseModel):
    """Options of a command, or a group of them. Unknown names and values out of range raise ValidationError.

    Names may be written with hyphens or underscores, and those of nested groups stand beside the others.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True)

    panel: ClassVar[str] = "What"  # the heading of these options in a command's help

    @model_validator(mode="before")
    @classmethod
    def _nested(cls, data: Any) -> Any:
        """Sort flat options into their groups; one that several groups have goes to each of them."""
        if not isinstance(data, Mapping):
            return data
        renamed = {_option(field).former: name for name, field in cls.model_fields.items() if _option(field).former}
        nested: dict[str, Any] = {}
        for key, value in data.items():
            name = str(key).replace("-", "_")
            groups = [group for group, kind in cls._groups().items() if name in _spellings(kind)]
            for group in groups:
                nested.setdefault(group, {})[name] = value
            if not groups:
                nested[renamed.get(name, name)] = value
        return nested

    @classmethod
    def _groups(cls) -> dict[str, type["Options"]]:
        kinds = {name: field.annotation for name, field in cls.model_fields.items()}
        return {name: kind for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, Options)}

    @classmethod
    def declared(cls, usual: str = "") -> dict[str, Declared]:
        """All options, those of groups included, in the order of their declaration."""
        options: dict[str, Declared] = {}
        for name, field in cls.model_fields.items():
            if group := cls._groups().get(name):
                stated = next((each.text for each in field.metadata if isinstance(each, Usual)), usual)
                options = options | {key: each for key, each in group.declared(stated).items() if key not in options}
            elif _is_option(field):
                options[name] = Declared(name, _declaring(cls, name), field, usual)
        return options

    def given(self) -> dict[str, Any]:
        """The options that were given, flat, in the order of their declaration; the others have their defaults."""
        values: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if isinstance(value, Options):
                values |= value.given()
            elif name in self.model_fields_set and _is_option(field):
                values[name] = value
        return values

    def but(self, **changes: Any) -> Self:
        """The same options with these `changes`, checked."""
        return type(self)(**(self.given() | changes))

    def arguments(self, first: Sequence[str] = ()) -> list[str]:
        """The options that were given, as they are typed: those named `first`, then the others in the order of declaration."""
        declared, given = type(self).declared(), self.given()
        arguments: list[str] = []
        for name in [*first, *(name for name in declared if name not in first)]:
            option, flag = declared[name].option, flag_of(name)
            if name not in given or ((value := given[name]) is None and not option.none):
                continue
            if value is None:
                arguments += [flag, option.none]
            elif isinstance(value, bool):
                if value == declared[name].field.default:
                    continue
                arguments += [flag if value else option.off or flag.replace("--", "--no-", 1)]
            elif option.repeated:
                arguments += [part for each in value for part in (flag, as_text(each))]
            else:
                arguments += [flag, as_text(value)]
        return arguments


def flag_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _is_option(field: FieldInfo) -> bool:
    return any(isinstance(part, Option) for part in field.metadata)


def _option(field: FieldInfo) -> Option:
    return next((each for each in field.metadata if isinstance(each, Option)), Option(""))


def _declaring(kind: type[Options], name: str) -> type[Options]:
    """The class that declares a field first: `kind`, or one that it inherits the field from."""
    return next(each for each in reversed(kind.__mro__) if name in vars(each).get("__annotations__", {}))


def _spellings(kind: type[Options]) -> set[str]:
    names = {name for name in kind.model_fields if name not in kind._groups()}
    former = {_option(field).former for field in kind.model_fields.values()} - {""}
    return names | former | {name for group in kind._groups().values() for name in _spellings(group)}


def as_text(value: Any) -> str:
    """A value as it is typed on the command line."""
    if isinstance(value, tuple):
        return ",".join(map(as_text, value))
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def wrong_option(error: ValidationError, name_of: Callable[[str], str] = flag_of) -> UsageError:
    """The first of pydantic's findings in three lines, of an option that `name_of` spells."""
    finding = error.errors()[0]
    context = finding.get("ctx", {})
    places = [str(place) for place in finding["loc"] if not re.search(r"[\[(-]", str(place))]  # without pydantic's names of types
    name = name_of(next((place for place in reversed(places) if not place.isdecimal()), error.title))
    if finding["type"] == "extra_forbidden":
        return UsageError(f"{name} is not an option", why="there is none of that name", fix="leave it out, or correct the name")
    if finding["type"] == "missing":
        return UsageError(f"{name} is missing", why="it has no default", fix=f"add {name} ...")
    fix = f"{name} {context['example']}" if "example" in context else how_to_write([finding])
    why = finding["msg"].removeprefix("Value error, ").replace("Input should be", "it should be")
    return UsageError(f"{name} {as_text(finding['input'])!r}", why=why, fix=fix)


# ---------------------------------------------------------------- types of options that are typed as text


def _refused(why: str, example: str) -> PydanticCustomError:
    """Raised by the types below: why a text is not understood, and what may be written."""
    return PydanticCustomError("option", "{why}", {"why": why, "example": example})


def listed(value: Any) -> Iterator[Any]:
    """`1,4,20` as its parts, and of a list each member's parts."""
    for part in [value] if isinstance(value, str) or not isinstance(value, Iterable) else value:
        yield from (text.strip() for text in part.split(",") if text.strip()) if isinstance(part, str) else [part]


def _floats(value: Any) -> Any:
    try:
        return tuple(float(part) for part in listed(value))
    except (TypeError, ValueError):
        raise _refused("it takes numbers separated by commas", "1,4,20") from None


def _temperatures(value: Any) -> Any:
    taus = tuple(dict.fromkeys(_floats(value)))
    if (not taus and isinstance(value, str)) or not all(0 < tau < float("inf") for tau in taus):
        raise _refused("a temperature is a finite number above 0", "1,4,20")
    return taus


def integers(value: Any) -> tuple[int, ...]:
    """`0-2,5` as 0, 1, 2, 5."""
    numbers: list[int] = []
    try:
        for part in value.split(",") if isinstance(value, str) else listed(value):
            first, dash, last = part.strip().partition("-") if isinstance(part, str) else (part, "", "")
            if isinstance(part, bool | float):
                raise ValueError(part)
            span = range(int(first), int(last if dash else first) + 1)
            if span[0] < 0 or not 0 < len(span) <= MOST_NUMBERS - len(numbers) or span[-1] > LARGEST_INTEGER:
                raise ValueError(part)
            numbers += span
        if not numbers and isinstance(value, str):
            raise ValueError(value)
    except (IndexError, OverflowError, TypeError, ValueError):
        why = f"it takes whole numbers from 0 to 2^64 - 1 and ascending ranges of them, {MOST_NUMBERS:,} numbers at most"
        raise _refused(why, "1-3") from None
    return tuple(numbers)


def _words(value: Any) -> Any:
    return _some(tuple(map(str, listed(value))), value)


def _some(names: tuple[str, ...], value: Any) -> tuple[str, ...]:
    if not names and isinstance(value, str):  # a list may be empty, and a text has been typed to name something
        raise _refused("it names nothing", "NAME")
    return names


def names_in(text: str) -> list[str]:
    """Component names separated by commas; `key=value` parts belong to the component before them."""
    names: list[str] = []
    for part in (part.strip() for part in text.split(",")):
        if names and "=" in part and ":" not in part.partition("=")[0]:
            names[-1] += f",{part}"
        elif part:
            names.append(part)
    return names


def _names(value: Any) -> Any:
    texts = [value] if isinstance(value, str) else value
    return _some(tuple(name for text in texts for name in names_in(str(text))), value)


def _several(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _triple(value: Any) -> Any:
    values = _floats(value)
    if len(values) != 3 or not all(0 <= part <= 1 for part in values):
        raise _refused("it takes three numbers from 0 to 1, of red, green and blue", "0.5,0.5,0.5")
    return values


def _betas(value: Any) -> Any:
    values = _floats(value)
    if not values or not all(0 <= part < 1 for part in values):
        raise _refused("it takes numbers from 0 to below 1", "0.9,0.95")
    return values


def _share(value: Any) -> Any:
    """`2/8`, the third of eight parts, as (2, 8)."""
    try:
        number, parts = value.split("/") if isinstance(value, str) else value
        share = int(number), int(parts)
        if not 0 <= share[0] < share[1] <= MOST_NUMBERS:
            raise ValueError(value)
    except (TypeError, ValueError):
        why = f"it takes I/N: the number of this process, from 0 to N - 1, and how many there are, {MOST_NUMBERS:,} at most"
        raise _refused(why, "0/8") from None
    return share


def _bytes(value: Any) -> Any:
    try:
        return int(TypeAdapter(ByteSize).validate_python(value))
    except ValidationError:
        raise _refused("it takes a number with a unit of memory, as in 500MB, 12GB or 1.5GiB", "12GB") from None


Betas = Annotated[tuple[float, ...], BeforeValidator(_betas)]
Floats = Annotated[tuple[float, ...], BeforeValidator(_floats)]
Temperatures = Annotated[tuple[float, ...], BeforeValidator(_temperatures)]
Integers = Annotated[tuple[int, ...], BeforeValidator(integers)]
Names = Annotated[tuple[str, ...], BeforeValidator(_names)]
Several = Annotated[tuple[str, ...], BeforeValidator(_several)]  # as they are, commas included
Words = Annotated[tuple[str, ...], BeforeValidator(_words)]
Triple = Annotated[tuple[float, float, float], BeforeValidator(_triple)]
Share = Annotated[tuple[int, int], BeforeValidator(_share)]
Bytes = Annotated[int, BeforeValidator(_bytes)]

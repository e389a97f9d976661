"""From functions to commands: parameters that are `Options` become flags, and help shows commands and flags in groups.

A command is built when it is run, or when its own help is shown; the list of commands needs their docstrings only. So the
modules of commands name classes of options in quotes, and `DECLARED` says where they are.
"""

import importlib
import inspect
import os
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand, TyperGroup

from kdcache.cli.options import command_line

__all__ = ["Commands", "Of"]

DECLARED = {
    "DistillConfig": "kdcache.students.config",
    "RenderOptions": "kdcache.training.config",
    "DumpConfig": "kdcache.teachers.config",
    "PlanConfig": "kdcache.students.config",
    "Runtime": "kdcache.training.config",
    "TeacherConfig": "kdcache.teachers.config",
}
COMMON = "Common"


@dataclass(frozen=True)
class Of:
    """Annotates a parameter that is one option of a class of options: `device: Annotated[str, Of("Runtime", "device")]`."""

    options: str
    name: str


class Command(TyperCommand):
    """A command whose help shows its options under headings."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if (record := param.get_help_record(ctx)) is not None:
                argument = param.param_type_name == "argument"
                heading = "Arguments" if argument else getattr(param, "rich_help_panel", None) or "Options"
                sections.setdefault(COMMON if param.name == "help" else heading, []).append(record)
        for heading in sorted(sections, key=lambda heading: heading == COMMON):
            with formatter.section(heading):
                formatter.write_dl(sections[heading])


class Commands(TyperGroup):
    """Commands under headings. `sections` has the functions by heading and name, or groups of further commands."""

    sections: Mapping[str, Mapping[str, "Callable[..., None] | Commands"]] = {}

    def list_commands(self, ctx: Any) -> list[str]:
        return [name for section in self.sections.values() for name in section]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        sought = {name: made for section in self.sections.values() for name, made in section.items()}
        for name in [cmd_name] if cmd_name in sought else sought:  # typer offers close matches among those that are built
            if name not in self.commands:
                made = sought[name]
                self.commands[name] = made if isinstance(made, Commands) else build(name, made)
        return self.commands.get(cmd_name)

    def every_command(self, prefix: str = "") -> Iterator[tuple[str, Any]]:
        """All commands, built, by the words that call them: `study run`."""
        for name in self.list_commands(None):
            command = self.get_command(None, name)
            yield f"{prefix}{name}", command
            if isinstance(command, Commands):
                yield from command.every_command(f"{prefix}{name} ")

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        for heading, section in self.sections.items():
            with formatter.section(heading):
                formatter.write_dl([(name, _summary(made)) for name, made in section.items()])


def _summary(made: "Callable[..., None] | Commands") -> str:
    """The first sentence of a command's help."""
    text = " ".join((made.help if isinstance(made, Commands) else inspect.getdoc(made) or "").split())  # type: ignore[union-attr]
    return text.partition(". ")[0].removesuffix(".") + "."


def build(name: str, function: Callable[..., None]) -> Any:
    """The command that calls `function`."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, context_settings={"help_option_names": ["-h", "--help"]})
    app.command(name, cls=Command)(_with_flags(function))
    command = typer.main.get_command(app)
    for parameter in command.params:  # every option can be set as KDCACHE_COMMAND_OPTION, which help does not repeat each time
        parameter.show_envvar = parameter.envvar is not None  # type: ignore[attr-defined]
        if getattr(parameter, "multiple", False):
            setattr(parameter, "split_envvar_value", lambda text: text.split(","))  # noqa: B010  # folders' names have spaces
    return command


# ---------------------------------------------------------------- flags


def _declared(name: str) -> Any:
    """A class of options."""
    return getattr(importlib.import_module(DECLARED[name]), name)


def _with_flags(function: Callable[..., None]) -> Callable[..., None]:
    """`function` with a flag for each option in place of its parameters that are classes of options."""
    classes: dict[str, Any] = {}
    flags: list[inspect.Parameter] = [inspect.Parameter("_context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    for name, parameter in inspect.signature(function).parameters.items():
        kind = parameter.annotation
        single = next((part for part in getattr(kind, "__metadata__", ()) if isinstance(part, Of)), None)
        if single is not None:
            flags.append(_flag(_declared(single.options).declared()[single.name]).replace(name=name))
        elif isinstance(kind, str):
            classes[name] = _declared(kind)
            flags += [_flag(declared) for declared in classes[name].declared().values()]
        else:
            flags.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=kind))

    from kdcache.options import flag_of

    def call(_context: typer.Context, **values: Any) -> None:
        arguments = {param.name for param in _context.command.params if param.param_type_name == "argument"}
        titles = {key: key.upper() if key in arguments else flag_of(key) for key in values}
        values = {key: value if key == "config" else _at_home(titles[key], value) for key, value in values.items()}
        for name, kind in classes.items():
            named = {key: values.pop(key) for key in kind.declared()}
            given = {key: value for key, value in named.items() if _is_given(_context, key) and value is not None}
            values[name] = _made(kind, given)
        function(**values)

    call.__doc__ = function.__doc__
    call.__signature__ = inspect.Signature(flags)  # type: ignore[attr-defined]
    call.__annotations__ = {flag.name: flag.annotation for flag in flags}
    return call


def _at_home(title: str, value: Any) -> Any:
    """A value in which `~` is a home folder, as shells have it in words of their own but not in `--home=~/w` or in variables."""
    from kdcache.system.files import local_path

    if isinstance(value, list):
        return [_at_home(title, each) for each in value]
    if isinstance(value, Path):
        return local_path(value, title)
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~") else value  # noqa: PTH111


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _made(kind: Any, given: Mapping[str, Any]) -> Any:
    from pydantic import ValidationError

    from kdcache.options import wrong_option

    also = {"command": command_line()} if "command" in kind.model_fields else {}
    try:
        return kind(**given, **also)
    except ValidationError as error:
        raise wrong_option(error) from None


def _flag(declared: Any) -> inspect.Parameter:
    """The parameter that typer makes a flag of."""
    from kdcache.options import as_text, flag_of

    option, field = declared.option, declared.field
    kind = list[str] if option.repeated else _typed(field.annotation, field.metadata)
    flag = flag_of(declared.name)
    spellings = [f"{flag}/{option.off}" if option.off else flag, *filter(None, [option.short])]
    default = field.get_default(call_default_factory=True)
    required, text = field.is_required(), option.help
    if declared.usual and (kind is not bool or option.off):
        default, text = None, text if default is None else f"{text.removesuffix('.')} [{declared.usual}]."
    elif kind is str and not isinstance(default, str):
        default = as_text(default) or None if isinstance(default, tuple) else default
    if option.repeated:
        default = None
    if default is None and not required:
        kind = kind | None
    made = typer.Option(*spellings, help=text, rich_help_panel=declared.group.panel, **_range(field))
    return inspect.Parameter(
        declared.name,
        inspect.Parameter.KEYWORD_ONLY,
        annotation=Annotated[kind, made],
        default=inspect.Parameter.empty if required else default,
    )


def _typed(kind: Any, metadata: Any = ()) -> Any:
    """How typer reads an option of an annotated type: numbers, choices and paths itself, the rest as text for pydantic."""
    from pydantic import BeforeValidator

    if any(isinstance(part, BeforeValidator) for part in metadata):
        return str
    if typing.get_origin(kind) is Annotated:
        return _typed(kind.__origin__, kind.__metadata__)
    if typing.get_origin(kind) in {types.UnionType, typing.Union}:
        (inner,) = (part for part in typing.get_args(kind) if part is not types.NoneType)
        return _typed(inner)
    return kind if kind in {bool, int, float, Path} or typing.get_origin(kind) is Literal else str


def _range(field: Any) -> dict[str, Any]:
    """The limits of a number that are part of its range."""
    parts = [
        *field.metadata,
        *(part for inner in typing.get_args(field.annotation) for part in getattr(inner, "__metadata__", ())),
    ]
    parts = [limit for part in parts for limit in getattr(part, "metadata", [part])]  # of pydantic's Field
    limits = {name: value for part in parts for name in ("ge", "le") if (value := getattr(part, name, None)) is not None}
    return {flag: limits[name] for name, flag in (("ge", "min"), ("le", "max")) if name in limits}

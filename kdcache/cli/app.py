"""All commands of `kdcache`, gathered under headings."""

from typing import Annotated, Any

import typer

import kdcache
from kdcache.cli import machine, making, planning, reading, sharing, studies
from kdcache.cli.commands import Commands

__all__ = ["command"]


def _version(show: bool) -> None:
    if show:
        print(f"kdcache {kdcache.__version__}")
        raise typer.Exit


def _main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks (may stand anywhere on the line).")] = False,
) -> None:
    """Cache teacher logits once, distil students from them any number of times."""


def command() -> Commands:
    """The whole command line. Every option can be set as KDCACHE_COMMAND_OPTION."""
    study = Commands(name="study", help="Run whole studies from a YAML file: teachers, archives, students and report.")
    study.sections = {"Commands": _named(studies.run, studies.plan, studies.job)}
    app = typer.Typer(
        add_completion=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "KDCACHE"},
    )
    app.callback(cls=Commands)(_main)
    group = typer.main.get_command(app)
    assert isinstance(group, Commands)
    group.sections = {
        "Make": _named(
            making.quickstart,
            making.train_teacher,
            making.dump_teacher,
            making.finalize,
            making.convert,
            planning.plan,
            making.distill,
            making.report,
        ),
        "Read": _named(reading.ls, reading.info, reading.stats, reading.view, reading.verify, sharing.diff),
        "Share": _named(sharing.push, sharing.pull, sharing.sign, sharing.export),
        "Study": {"study": study},
        "Lists": _named(reading.models, reading.datasets, reading.methods, reading.policy),
        "This machine": _named(machine.doctor, machine.bench),
    }
    return group


def _named(*functions: Any) -> dict[str, Any]:
    return {function.__name__.replace("_", "-"): function for function in functions}

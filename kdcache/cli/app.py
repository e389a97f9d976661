"""All commands of `kdcache`, gathered."""

from typing import Annotated

import typer

import kdcache
from kdcache.cli import making, reading

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Cache teacher logits once, distil students from them any number of times.",
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "KDCACHE"},
)


def _version(show: bool) -> None:
    if show:
        print(f"kdcache {kdcache.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks (may stand anywhere on the line).")] = False,
) -> None:
    """Cache teacher logits once, distil students from them any number of times."""


for command in (
    making.quickstart,
    making.train_teacher,
    making.dump_teacher,
    making.finalize,
    making.distill,
    making.report,
    reading.info,
    reading.verify,
    reading.view,
    reading.ls,
    reading.models,
    reading.datasets,
    reading.methods,
    reading.bench,
):
    app.command()(command)

"""Every `fix:` can be typed as it stands, and none costs people their data."""

import ast
from pathlib import Path

import pytest

import kdcache
from tests.fixes import costs_data, not_understood

PACKAGE = Path(kdcache.__file__).parent


def literal(expression: ast.expr) -> str:
    """The text of an expression, with X for whatever is put into it."""
    if isinstance(expression, ast.Constant):
        return str(expression.value)
    if isinstance(expression, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in expression.values)
    if isinstance(expression, ast.BinOp):
        return literal(expression.left) + literal(expression.right)
    if isinstance(expression, ast.IfExp):
        return f"{literal(expression.body)}; {literal(expression.orelse)}"
    return "X"


def fixes() -> list[tuple[str, str]]:
    """Where each error of the package is made, and its fix."""
    return [
        (f"{file.relative_to(PACKAGE)}:{call.lineno}", literal(keyword.value))
        for file in sorted(PACKAGE.rglob("*.py"))
        for call in ast.walk(ast.parse(file.read_text()))
        if isinstance(call, ast.Call)
        for keyword in call.keywords
        if keyword.arg == "fix"
    ]


def test_fixes_name_commands_and_options_that_there_are() -> None:
    assert {place: wrong for place, fix in fixes() if (wrong := list(not_understood(fix)))} == {}


def test_no_fix_costs_data() -> None:
    assert [place for place, fix in fixes() if costs_data(fix)] == []


@pytest.mark.parametrize(
    "fix",
    [
        "kdcache dump-teachers --teacher vit_s",
        "look at it with: kdcache verify ARCHIVE --tau 4",
        "kdcache distill --taus 4",
        "use --no-such-option",
    ],
)
def test_the_check_knows_commands_and_options(fix: str) -> None:
    assert list(not_understood(fix))


@pytest.mark.parametrize("fix", ["delete the archive, and dump it again", "rm -r runs", "remove that folder"])
def test_the_check_knows_how_data_is_lost(fix: str) -> None:
    assert costs_data(fix)

"""Every `fix:` can be typed as it stands, and none costs people their data."""

import ast
import json
from pathlib import Path

import pytest

import kdcache
from tests.fixes import costs_data, not_understood
from tests.sites import EXEMPT, FOLLOWED, followed_by_tests, literal, sites, unexplained

PACKAGE = Path(kdcache.__file__).parent


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


def test_the_fix_of_each_error_is_followed_by_a_test_or_exempt_with_a_reason() -> None:
    assert unexplained() == {}, "follow it by a test, and run: python -m tests.sites --freeze"


def test_what_is_exempt_is_in_the_source_and_not_followed() -> None:
    followed = json.loads(FOLLOWED.read_text(encoding="utf-8"))
    alone = {name for name in sites() if name not in followed}
    assert [name for name in EXEMPT if name not in alone] == []
    assert [name for name in followed if name not in sites()] == []


@pytest.mark.exhaustive
def test_the_fixes_that_are_recorded_as_followed_are(tmp_path: Path) -> None:
    assert json.loads(FOLLOWED.read_text(encoding="utf-8")).items() <= followed_by_tests(tmp_path / "followed").items()

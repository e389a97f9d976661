"""Where the package makes its errors, and whose `fix:` a test has followed to a good end.

`python -m tests.sites` lists the sites that no test follows; `--freeze` runs the tests that follow and writes what they
followed to followed.json, which tests/test_fixes.py compares with the source: an error that is new, or says something new,
is to be followed by a test, or to be named in exempt.json with the reason.
"""

import ast
import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import kdcache

__all__ = ["EXEMPT", "FOLLOWED", "followed_by_tests", "literal", "note", "sites", "sites_of", "unexplained"]

PACKAGE = Path(kdcache.__file__).parent
FOLLOWED = Path(__file__).parent / "followed.json"
RECORD = "KDCACHE_TESTS_FOLLOWED"  # the file to which tests add the sites that they followed


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
    if isinstance(expression, ast.BoolOp):
        return "; ".join(map(literal, expression.values))
    return "X"


@functools.cache
def _of_file(file: Path) -> list[tuple[range, str, str]]:
    """Of each error made in `file`: its lines, its name (`module function: what`) and its fix."""
    found: list[tuple[range, str, str]] = []

    def visit(node: ast.AST, function: str) -> None:
        for child in ast.iter_child_nodes(node):
            inside = function
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                inside = f"{function}.{child.name}".lstrip(".")
            if isinstance(child, ast.Call) and (fix := next((k.value for k in child.keywords if k.arg == "fix"), None)):
                what = " / ".join(literal(argument) for argument in child.args if not isinstance(argument, ast.Name))
                name = f"{file.relative_to(PACKAGE)} {inside}: {what}".rstrip(": ")
                found.append((range(child.lineno, (child.end_lineno or child.lineno) + 1), name, literal(fix)))
            visit(child, inside)

    visit(ast.parse(file.read_text(encoding="utf-8")), "")
    counts: dict[str, int] = {}
    numbered = []
    for lines, name, fix in sorted(found, key=lambda site: site[0].start):
        counts[name] = counts.get(name, 0) + 1
        numbered.append((lines, name if counts[name] == 1 else f"{name} ({counts[name]})", fix))
    return numbered


def sites() -> dict[str, str]:
    """Every place of the package that makes an error, with its fix."""
    return {name: fix for file in sorted(PACKAGE.rglob("*.py")) for _, name, fix in _of_file(file)}


def sites_of(frame: FrameType | None) -> Iterator[str]:
    """The sites that are at work in this frame and those that called it: helpers are handed the fix by their callers."""
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if PACKAGE in file.parents:
            yield from (name for lines, name, _ in _of_file(file) if frame.f_lineno in lines)
        frame = frame.f_back


def note(names: set[str]) -> None:
    """Remember for this run of the tests that the fixes of these sites were followed."""
    if place := os.environ.get(RECORD):
        with Path(place).open("a", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(name)}\n" for name in names)


def followed_by_tests(record: Path) -> dict[str, str]:
    """Run the tests that follow fixes, and name the sites that they followed, with their fixes."""
    files = sorted(FOLLOWED.parent.rglob("test_followed_*.py"))
    command = [sys.executable, "-m", "pytest", "-m", "", "-q", "-n2", *map(str, files)]
    done = subprocess.run(command, check=False, env=os.environ | {RECORD: str(record)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    names = {json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()}
    return {name: fix for name, fix in sites().items() if name in names}


# Sites whose fix no test follows, by the reason: exempt.json.
EXEMPT: dict[str, str] = {
    name: reason
    for reason, names in json.loads(FOLLOWED.with_name("exempt.json").read_text(encoding="utf-8")).items()
    for name in names
}


def unexplained() -> dict[str, str]:
    """The sites of the source that neither a test follows nor `EXEMPT` explains."""
    followed = json.loads(FOLLOWED.read_text(encoding="utf-8"))
    return {name: fix for name, fix in sites().items() if followed.get(name) != fix and name not in EXEMPT}


if __name__ == "__main__":
    if "--freeze" in sys.argv:
        record = Path(sys.argv[sys.argv.index("--freeze") + 1]) if len(sys.argv) > 2 else FOLLOWED.with_suffix(".run")
        record.unlink(missing_ok=True)
        found = followed_by_tests(record)
        record.unlink()
        FOLLOWED.write_text(json.dumps(found, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, fix in unexplained().items():
        print(f"{name}\n    fix: {fix}")

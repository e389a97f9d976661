"""The import contracts notice what they forbid: each forbidden import is added to a copy of the package, and is named.

A contract that names the modules it guards forgets the next one. Those in pyproject.toml guard everything but the few places
that they name, and here every other module is tried.
"""

import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
LINTER = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
PACKAGE = LINTER["root_package"]


def contracts(kind: str) -> list[dict[str, Any]]:
    return [contract for contract in LINTER["contracts"] if contract["type"] == kind]


def modules() -> Iterator[str]:
    """Every module of the package."""
    for file in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def below(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def allowed(module: str, imported: str, contract: dict[str, Any]) -> bool:
    patterns = [pair.split(" -> ") for pair in contract.get("ignore_imports", [])]
    return any(fnmatchcase(module, importer) and fnmatchcase(imported, name) for importer, name in patterns)


def layers(contract: dict[str, Any]) -> list[list[str]]:
    """The modules and packages of each layer, the highest first."""
    (container,) = contract["containers"]
    return [[f"{container}.{name.strip()}" for name in layer.split("|")] for layer in contract["layers"]]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package with its contracts."""
    shutil.copytree(ROOT / PACKAGE, tmp_path / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def file_of(module: str, root: Path) -> Path:
    place = root.joinpath(*module.split("."))
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")


def add_import(module: str, imported: str, root: Path) -> None:
    with file_of(module, root).open("a") as file:
        file.write(f"\nimport {imported}\n")


def lint(root: Path) -> str:
    """What import-linter says of the package in `root`, which breaks a contract."""
    code = "import sys; sys.path.insert(0, '.'); from importlinter.cli import lint_imports_command as c; c(['--no-cache'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout


def test_every_module_that_imports_a_library_it_may_not_is_named(copy: Path) -> None:
    expected = {
        (module, imported)
        for contract in contracts("forbidden")
        for imported in contract["forbidden_modules"]
        for module in modules()
        if any(below(module, source) for source in contract["source_modules"])
        if not (allowed(module, imported, contract) or any(below(module, name) for name in contract["forbidden_modules"]))
    }
    assert len({module for module, _ in expected}) > 100, "hardly any module is guarded"
    for module, imported in expected:
        add_import(module, imported, copy)
    said = " ".join(lint(copy).split())
    missed = sorted((module, imported) for module, imported in expected if f"{module} -> {imported} (l." not in said)
    assert not missed


def test_in_every_layer_an_import_from_a_higher_one_is_named(copy: Path) -> None:
    expected = []
    for contract in contracts("layers"):
        (highest, *_), *lower = layers(contract)
        expected += [(module, highest) for layer in lower for module in layer]
    for module, imported in expected:
        add_import(module, imported, copy)
    said = " ".join(lint(copy).split())
    missed = [(module, imported) for module, imported in expected if f"{module} -> {imported} (l." not in said]
    assert not missed


def test_a_module_without_a_layer_is_named(copy: Path) -> None:
    (copy / PACKAGE / "newcomer.py").write_text('"""In no layer."""\n')
    assert f"{PACKAGE}.newcomer" in lint(copy)

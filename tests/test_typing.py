"""Protects what type checkers tell users: programs that use kdcache well pass mypy --strict, and mistakes are found."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import kdcache

PROGRAMS = Path(__file__).parent / "typing"
ROOT = Path(kdcache.__file__).parents[1]


def test_the_package_says_that_it_is_typed() -> None:
    assert Path(kdcache.__file__).with_name("py.typed").is_file()


@pytest.mark.slow
@pytest.mark.exhaustive
def test_mypy_finds_the_mistakes_of_users_and_no_others(tmp_path: Path) -> None:
    for program in ("sound.py", "mistaken.py"):  # elsewhere: what is beside kdcache is taken for a part of it
        (tmp_path / program).write_text((PROGRAMS / program).read_text())
    # This machine's mypy keeps what it knows of torch, which is most of the work.
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", ROOT / ".mypy_cache" / "users", "sound.py", "mistaken.py"]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    expected = [
        f"mistaken.py:{number}: {code}"
        for number, line in enumerate((PROGRAMS / "mistaken.py").read_text().splitlines(), 1)
        for code in re.findall(r"# E: ([\w-]+)", line)
    ]
    assert len(expected) >= 10
    errors = [re.sub(r": error: .*\[([\w-]+)\]$", r": \1", line) for line in finished.stdout.splitlines() if ": error: " in line]
    assert errors == expected, finished.stdout + finished.stderr

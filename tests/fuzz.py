"""Archives with random damage, thousands of them: `python -m tests.fuzz --seconds 300`.

Every case changes one file of a sound archive: a few bytes, or a value in its JSON. In half of the cases all checksums
agree with the change, as a stranger would make them. Whatever reads the archive then may only raise kdcache.errors, within
a bound of memory and time. Cases run in a process of their own, since what they are after may kill it; each is known by its
number, and `--only NUMBER` repeats it.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hostile import LAYOUT_OPTIONS, build, exercise, resealed

MEMORY = 512 << 20  # bytes of address space beyond what the process has when it begins
PATIENCE = {signal.ITIMER_PROF: 10, signal.ITIMER_REAL: 100}  # seconds of work and in all that a case may take
NUMBERS = [-1, 0, 1, 2, 3, 7, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
VALUES: list[Any] = [
    *NUMBERS,
    10**30,
    10**400,
    0.5,
    1e308,
    float("nan"),
    float("inf"),
    None,
    True,
    "",
    "x",
    "..",
    "/etc/passwd",
    "\ud800",
    "\x1b[2J\x07",
    "a" * 5000,
    "logits",
    "f32",
    "blake3",
    "statistics",
    [],
    [0] * 3000,
    {},
    {"name": "zarr"},
    {"name": "hdf5", "unit_rows": 3},
    {"name": "u8"},
]


# ------------------------------------------------------------------------------------------------------- damage


def damaged_bytes(rng: random.Random, data: bytes) -> bytes:
    """A few bytes changed, numbers set to extremes, pieces cut out, doubled or moved."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        at = rng.randrange(len(changed) + 1)
        length = rng.choice([1, 2, 4, 8, 16, 64, 512])
        match rng.randrange(8):
            case 0 if at < len(changed):
                changed[at] ^= 1 << rng.randrange(8)
            case 1:
                changed[at : at + 1] = rng.randbytes(1)
            case 2 | 3:
                size = rng.choice([1, 2, 4, 8])
                number = rng.choice([*NUMBERS, len(data), len(data) - 1, rng.randrange(1 << 16)])
                changed[at : at + size] = (number % (1 << (8 * size))).to_bytes(size, rng.choice(["little", "big"]))
            case 4:
                del changed[at : at + length]
            case 5:
                changed[at:at] = changed[at : at + length] if rng.random() < 0.5 else rng.randbytes(length)
            case 6:
                other = rng.randrange(len(changed) + 1)
                changed[at : at + length] = changed[other : other + length]
            case _:
                changed[at : at + length] = bytes([rng.choice([0, 255])]) * min(length, len(changed) - at)
    return bytes(changed)


def damaged_json(rng: random.Random, text: bytes) -> bytes:
    """Some values of a JSON text replaced, left out or doubled."""
    tree = json.loads(text)
    for _ in range(rng.choice([1, 1, 2])):
        places = list(_places(tree))
        if not places:
            break
        container, key = rng.choice(places)
        match rng.randrange(6):
            case 0:
                del container[key]
            case 1 if isinstance(container, list):
                container.insert(key, container[key])
            case 2 if isinstance(container, dict):
                container[rng.choice(["colour", "start", "name", "views"])] = rng.choice(VALUES)
            case 3:
                other, place = rng.choice(places)
                container[key] = json.loads(json.dumps(other[place]))  # a copy: a tree must not hold itself
            case _:
                container[key] = rng.choice(VALUES)
    data = json.dumps(tree)
    if rng.random() < 0.05:
        data = data.replace('"', rng.choice(['"', "'", "[" * 3000, '{"a":' * 1500]), 1)
    return data.encode()


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()):
        yield tree, key
        yield from _places(value)


class _Agreeing(int):
    """A checksum that is equal to whatever is stored: a stranger has stored the right one."""

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = int.__hash__


class Archives:
    """A sound archive of every layout, and what becomes of it in each case."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sound = {layout: _contents(build(folder / "sound" / layout.replace(":", "-"), layout)) for layout in LAYOUT_OPTIONS}
        self._changed: dict[str, set[str]] = {}

    def case(self, number: int) -> str:
        """Make case `number` and let everything read it; returns what it is. Raises what a reader should not have raised."""
        rng = random.Random(number)
        layout = rng.choice(list(LAYOUT_OPTIONS))
        files = self.sound[layout]
        path = self._restore(layout)
        manifest = json.loads(files["kdcache.json"])
        table = manifest["shards"]["path"]
        others = [name for name in files if name not in {"kdcache.json", table}]
        name = rng.choice(["kdcache.json", table, *[rng.choice(others)] * 4])
        sealed = rng.random() < 0.5
        data = files[name]
        if name == "kdcache.json" and rng.random() < 0.9:
            data = damaged_json(rng, data)
        elif name == table and rng.random() < 0.9:
            lines = data.splitlines()
            chosen = rng.randrange(len(lines))
            lines[chosen] = damaged_json(rng, lines[chosen])
            data = b"\n".join([*lines, b""])
        elif name.endswith(".h5") and rng.random() < 0.5:
            data = damaged_json(rng, data[:1024])[:1024].ljust(1024) + data[1024:]
        else:
            data = damaged_bytes(rng, data)
        self._write(layout, name, data)
        if sealed and name != "kdcache.json":
            self._record(layout, name, data, manifest)
        with _crc_agrees() if sealed else contextlib.nullcontext():
            outcome = exercise(path, self.folder / "copy" if rng.random() < 0.03 else None)
            if rng.random() < 0.05:
                _command_line(path, self.folder)
        shutil.rmtree(self.folder / "copy", ignore_errors=True)
        if not sealed and data != files[name] and name != "kdcache.json":
            assert outcome.get("open") or outcome["verify full"], f"verify does not notice that {name} was changed"
        return f"{layout} {name}{' sealed' if sealed else ''}"

    def _restore(self, layout: str) -> Path:
        """The folder of the sound archive of `layout`, without what earlier cases did to it."""
        path = self.folder / "case" / layout.replace(":", "-")
        for name in self._changed.pop(layout, self.sound[layout]):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(self.sound[layout][name])
        self._changed[layout] = set()
        return path

    def _write(self, layout: str, name: str, data: bytes) -> None:
        (self.folder / "case" / layout.replace(":", "-") / name).write_bytes(data)
        self._changed[layout].add(name)

    def _record(self, layout: str, name: str, data: bytes, manifest: dict[str, Any]) -> None:
        """Make size and sha256 of a changed file those that are recorded."""
        new = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        table = manifest["shards"]["path"]
        lines = [json.loads(line) for line in self.sound[layout][table].splitlines()] if name != table else []
        for record in [manifest["shards"], *manifest["files"], *(file for line in lines for file in line["files"])]:
            if record["path"] == name:
                record.update(new)
        if lines:
            text = "".join(json.dumps(line) + "\n" for line in lines).encode()
            self._write(layout, table, text)
            manifest["shards"].update(bytes=len(text), sha256=hashlib.sha256(text).hexdigest())
        self._write(layout, "kdcache.json", json.dumps(resealed(manifest)).encode())


def _contents(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@contextlib.contextmanager
def _crc_agrees() -> Iterator[None]:
    from kdcache.archive.layouts import mapped, zarr

    with pytest.MonkeyPatch.context() as patch:
        for module in (mapped, zarr):
            patch.setattr(module, "crc32c", lambda *data: _Agreeing(0))
        yield


def _command_line(path: Path, folder: Path) -> None:
    from kdcache.cli import run

    for command in (
        ["info", str(path)],
        ["info", str(path), "--json"],
        ["stats", str(path)],
        ["verify", str(path)],
        ["diff", str(path), str(folder / "sound/zarr")],
        ["pull", str(path), str(folder / "copy/pulled")],
        ["push", str(path), str(folder / "copy/pushed"), "--license", "data=mit,weights=mit"],
    ):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            status = run(command)
        assert status in {0, 2, 3, 4, 5}, (command, status, printed.getvalue()[-2000:])


# ------------------------------------------------------------------------------------------------------- running


class TooSlow(BaseException):
    """A case that ran out of its time; no `except Exception` may catch it."""


def _too_slow(*_: object) -> None:
    raise TooSlow


def _be_patient(seconds: dict[int, int]) -> None:
    for kind, limit in seconds.items():
        signal.setitimer(kind, limit)


def work(folder: Path, first: int, stop: int, seconds: float, trace: bool) -> None:
    """Cases `first` to `stop` until the time is over; a line of JSON about each finding, and one at the end."""
    os.environ["KDCACHE_CACHE"] = str(folder / "cache")
    os.fsync = lambda handle: None  # nothing here is to survive
    archives = Archives(folder)
    exercise(folder / "sound" / "zarr", folder / "warm")  # imports everything
    _command_line(folder / "sound" / "zarr", folder)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    for kind in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(kind, _too_slow)
    until, number = time.monotonic() + seconds, first
    slowest = 0.0
    for number in range(first, stop):
        (folder / "number").write_text(str(number))
        began = time.process_time()
        _be_patient(PATIENCE)
        try:
            what = archives.case(number)
            if trace:
                print(what, file=sys.stderr)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            _be_patient(dict.fromkeys(PATIENCE, 0))
            where = traceback.format_exc().strip().splitlines()
            print(json.dumps({"number": number, "error": repr(error)[:300], "where": where[-40:]}), flush=True)
        _be_patient(dict.fromkeys(PATIENCE, 0))
        slowest = max(slowest, time.process_time() - began)
        if time.monotonic() > until:
            break
    print(json.dumps({"done": number + 1, "slowest": slowest}), flush=True)


def fuzz(first: int, count: int, seconds: float) -> tuple[int, float, list[dict[str, Any]]]:
    """How many cases ran, the seconds that the slowest took, and the findings."""
    until, number, slowest = time.monotonic() + seconds, first, 0.0
    findings: list[dict[str, Any]] = []
    while number < first + count and (left := until - time.monotonic()) > 0:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "tests.fuzz", "--worker", folder, "--first", str(number)]
            command += ["--count", str(first + count - number), "--seconds", str(left)]
            environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environment)
            lines = [json.loads(line) for line in done.stdout.splitlines()]
            findings += [line for line in lines if "error" in line]
            if lines and "done" in lines[-1]:
                number, slowest = lines[-1]["done"], max(slowest, lines[-1]["slowest"])
                break
            at = Path(folder) / "number"
            if not at.exists():
                raise RuntimeError(f"the process that runs the cases ended with {done.returncode} before the first of them")
            findings.append({"number": int(at.read_text()), "error": f"the process ended with {done.returncode}", "where": []})
            number = int(at.read_text()) + 1
    return number - first, slowest, findings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--count", type=int, default=10**9, help="at most so many cases")
    parser.add_argument("--only", type=int, help="repeat one case, and say what it is")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work(given.worker, given.first, given.first + given.count, given.seconds, trace=False)
        return
    if given.only is not None:
        with tempfile.TemporaryDirectory() as folder:
            work(Path(folder), given.only, given.only + 1, given.seconds, trace=True)
        return
    count, slowest, findings = fuzz(given.first, given.count, given.seconds)
    for finding in findings:
        print(f"case {finding['number']}: {finding['error']}", *finding["where"], sep="\n  ")
    print(f"{count:,} cases, {len(findings)} findings, the slowest case took {slowest:.2f} s")
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()

"""`kdcache` command lines as processes of their own, without the seconds that it takes to import torch: forks of one that has."""

import multiprocessing
import os
import sys
from collections.abc import Mapping
from pathlib import Path

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        "kdcache.cli",
        "kdcache.students.distill",
        "kdcache.teachers.dump",
        "kdcache.models.creation",
        "kdcache.teachers.train",
        "timm",
    ]
)


class Forked:
    """Runs one command line; `out` and `err` are files."""

    def __init__(self, *arguments: object, out: Path, err: Path, environment: Mapping[str, str] | None = None) -> None:
        told = (list(map(str, arguments)), dict(environment or os.environ), str(Path.cwd()), str(out), str(err))
        self.out, self.err = out, err
        self._process = _SERVER.Process(target=_main, args=told)
        self._process.start()

    def end(self, seconds: float = 300) -> int:
        """Wait for its exit status."""
        self._process.join(seconds)
        assert self._process.exitcode is not None, self.err.read_text()
        return self._process.exitcode


def _main(arguments: list[str], environment: dict[str, str], folder: str, out: str, err: str) -> None:
    from kdcache.cli import main

    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for path, handle in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), handle)
    sys.argv = ["kdcache", *arguments]
    main()

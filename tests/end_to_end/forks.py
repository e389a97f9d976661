"""`kdcache` command lines as processes of their own, without the seconds that it takes to import torch: forks of one that has."""

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
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
    """Runs one command line, after `prepare` (a function of a module); `out` and `err` are files."""

    def __init__(
        self,
        *arguments: object,
        out: Path,
        err: Path,
        environment: Mapping[str, str] | None = None,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        told = (list(map(str, arguments)), dict(environment or os.environ), str(Path.cwd()), str(out), str(err), prepare)
        self.out, self.err = out, err
        self._process = _SERVER.Process(target=_main, args=told)
        self._process.start()

    def end(self, seconds: float = 300) -> int:
        """Wait for its exit status."""
        self._process.join(seconds)
        assert self._process.exitcode is not None, self.err.read_text()
        return self._process.exitcode


class Started:
    """Runs one command line, and is used as a `subprocess.Popen` of it with pipes and `text=True` is."""

    def __init__(self, *arguments: object, env: Mapping[str, str] | None = None) -> None:
        pipes = [multiprocessing.Pipe(duplex=False) for _ in range(2)]
        told = (list(map(str, arguments)), dict(env or os.environ), str(Path.cwd()), *(writer for _, writer in pipes))
        self._process = _SERVER.Process(target=_piped, args=told)
        self._process.start()
        self.stdout, self.stderr = (os.fdopen(os.dup(reader.fileno()), encoding="utf-8") for reader, _ in pipes)
        for pipe in pipes:
            for end in pipe:
                end.close()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("kdcache", timeout or 0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        with ThreadPoolExecutor(2) as pool, self.stdout, self.stderr:
            texts = [pool.submit(file.read) for file in (self.stdout, self.stderr)]
            try:
                self.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()
                raise
            return texts[0].result(), texts[1].result()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _main(
    arguments: list[str], environment: dict[str, str], folder: str, out: str, err: str, prepare: Callable[[], None] | None
) -> None:
    files = [os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for path in (out, err)]
    _become(arguments, environment, folder, *files, prepare=prepare)


def _piped(arguments: list[str], environment: dict[str, str], folder: str, out: Connection, err: Connection) -> None:
    _become(arguments, environment, folder, *(os.dup(end.fileno()) for end in (out, err)))


def _become(
    arguments: list[str], environment: dict[str, str], folder: str, *files: int, prepare: Callable[[], None] | None = None
) -> None:
    from kdcache.cli import main

    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, file in enumerate(files, start=1):
        os.dup2(file, number)
        os.close(file)
    sys.argv = ["kdcache", *arguments]
    if prepare is not None:
        prepare()
    main()

"""Benchmarks. Each measures kdcache and a rival in turns within one run, and reports their ratio."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from kdcache.bench.turns import Result
from kdcache.errors import unknown_name
from kdcache.system.progress import Progress

__all__ = ["Result", "run_benchmarks"]

NAMES = ("startup", "archive", "views", "dump", "methods", "distill", "rival", "study")


def run_benchmarks(which: str, seconds: float, progress: Progress) -> list[Result]:
    """Run one benchmark, or `all`, each for about `seconds` seconds. What only a GPU can tell is in `kdcache.bench.gpu`."""
    if which not in {*NAMES, "all"}:
        raise unknown_name("benchmark", which, [*NAMES, "gpu", "all"])
    results = []
    for name in NAMES if which == "all" else (which,):
        with tempfile.TemporaryDirectory(prefix="kdcache-bench-") as folder:
            results += _benchmark(name)(seconds, Path(folder), progress)
    return results


def _benchmark(name: str) -> Callable[[float, Path, Progress], list[Result]]:
    if name == "archive":  # needs no torch
        from kdcache.bench.archive import archive

        return archive
    if name == "methods":
        from kdcache.bench.methods import methods

        return methods
    if name == "rival":
        from kdcache.bench.rival import rival

        return rival
    if name == "study":
        from kdcache.bench.study import study

        return study
    from kdcache.bench import pipeline

    benchmark: Callable[[float, Path, Progress], list[Result]] = getattr(pipeline, name)
    return benchmark

"""Versions of the libraries, and whether they can be imported."""

import contextlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import kdcache
from kdcache.doctor.findings import Line, note, ok, problem

__all__ = ["Unusable", "extras", "libraries", "python", "unusable_modules"]

Unusable = Mapping[str, str]  # why a module cannot be imported

UNKNOWN = "not known"  # whether a module can be imported
PATIENCE = 180  # seconds for all imports: a cold network disk takes minutes
MODULES = {  # where a module is not named as its package
    "huggingface-hub": "huggingface_hub",
    "model-signing": "model_signing",
    "nvidia-ml-py": "pynvml",
    "pillow": "PIL",
    "pyopenssl": "OpenSSL",
    "pyyaml": "yaml",
    "scikit-learn": "sklearn",
    "snakemake-executor-plugin-slurm": "snakemake_executor_plugin_slurm",
}
GPU = "torch on a GPU"
TRIED = f"""
import importlib, json, sys
for name in sys.argv[1:]:
    print(json.dumps([name]), flush=True)
    try:
        if name == {GPU!r}:
            import torch
            if torch.cuda.is_available():
                torch.ones(8, device="cuda").sum().item()
        else:
            importlib.import_module(name)
        print(json.dumps([name, ""]), flush=True)
    except BaseException as error:
        text = (str(error).strip().splitlines() or [""])[0][:200]
        print(json.dumps([name, f"{{type(error).__name__}}: {{text}}"]), flush=True)
"""


def python() -> Iterator[Line]:
    yield ok("python", f"{platform.python_version()} ({platform.python_implementation()}), {sys.executable}")
    yield ok("kdcache", f"{kdcache.__version__}, {Path(kdcache.__file__).parent}")
    yield ok("platform", platform.platform())


def required() -> dict[str, tuple[str, str]]:
    """By package, kdcache's demands on its version, and the extra that wants it ("" for all). Empty if nobody has them."""
    try:
        stated = requires("kdcache") or []
    except PackageNotFoundError:
        return {}
    found: dict[str, tuple[str, str]] = {}
    for line in stated:
        demand, _, marker = line.partition(";")
        if match := re.match(r"\s*([A-Za-z0-9._-]+)\s*(.*)", demand):
            extra = re.search(r"""extra\s*==\s*['"]([^'"]+)""", marker)
            found[match[1].lower()] = (match[2].strip().strip("()"), extra[1] if extra else "")
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _module(package: str) -> str:
    return MODULES.get(package, package.replace("-", "_"))


def unusable_modules() -> dict[str, str]:
    """Modules of required packages that cannot be imported, with the reason.

    They are imported in a process of their own, since a library that does not suit the processor or the driver may end or
    stop the process that imports it.
    """
    names = [_module(package) for package, (_, extra) in required().items() if not extra] or ["torch", "torchvision", "timm"]
    return _tried([*names, GPU])


def _tried(names: Sequence[str], patience: float = PATIENCE) -> dict[str, str]:
    """Why modules cannot be imported. What comes after one that ends its process is tried in another."""
    command = [sys.executable, "-c", TRIED, *names]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    slow = False
    try:
        done = subprocess.run(command, capture_output=True, timeout=patience, env=environment, check=False)
        lines, end = done.stdout, _end(done.returncode)
    except subprocess.TimeoutExpired as error:
        slow, lines, end = True, error.stdout or b"", f"{UNKNOWN}: importing it had not ended after {patience:g} s"
    results: dict[str, str] = {}
    for line in lines.splitlines():
        with contextlib.suppress(ValueError):  # a library's own words
            name, *why = json.loads(line)
            results[name] = why[0] if why else end
    last = next(reversed(results), "")
    rest = [name for name in names if name not in results]
    if slow or not last:
        results |= dict.fromkeys(rest, f"{UNKNOWN}: not tried, since {last or 'Python'} took so long")
    elif rest:
        results |= _tried(rest, patience)
    return {name: why for name, why in results.items() if why}


def _end(status: int) -> str:
    if status < 0:
        return f"it ends the process ({signal.Signals(-status).name})"
    return f"it ends the process (status {status})"


def libraries(unusable: Unusable) -> Iterator[Line]:
    """A line for the libraries that are as they must be, and a line for each other."""
    sound = []
    for package, (demand, extra) in required().items():
        if extra:
            continue
        found, why = _version(package), unusable.get(_module(package), "")
        install = f"pip install '{package}{demand}'"
        without = "; archives can still be read, verified, shared and reported on" if package == "torch" else ""
        if found is None and why:
            yield problem(package, f"missing{without}", install)
        elif why.startswith(UNKNOWN):
            yield note(package, f"{found}, {why}")
        elif why:
            yield problem(
                package, f"{found} cannot be imported: {why}{without}", f"pip install --force-reinstall '{package}{demand}'"
            )
        elif not _satisfies(found, demand):
            yield problem(package, f"{found} is not what kdcache needs ({demand})", install)
        else:
            sound.append(f"{package} {found or '(no version)'}")
    if sound:
        yield ok("libraries", ", ".join(sound))
    else:
        yield note("libraries", "kdcache is not installed as a package, so nobody knows which versions it needs")


def _satisfies(found: str | None, demand: str) -> bool:
    try:
        from packaging.specifiers import SpecifierSet

        return found is None or SpecifierSet(demand).contains(found, prereleases=True)
    except Exception:  # packaging is not kdcache's own dependency, and other packages write versions of their own kind
        return True


def extras() -> Iterator[Line]:
    """A line for each of kdcache's extras."""
    missing: dict[str, list[str]] = {}
    present: dict[str, list[str]] = {}
    for package, (_, extra) in required().items():
        if extra:
            found = _version(package)
            (present if found else missing).setdefault(extra, []).append(f"{package} {found}" if found else package)
    for extra in sorted({*missing, *present}):
        if extra in missing:
            yield note(extra, f"not installed: {', '.join(missing[extra])}", f"pip install 'kdcache[{extra}]'")
        else:
            yield ok(extra, ", ".join(present[extra]))

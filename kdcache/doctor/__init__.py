"""What this machine has, and what is wrong with it: the first thing to paste in a report of a bug.

Nothing is imported before it is examined, so that a missing or broken library is a line of the report and not its end.
"""

import functools
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

from kdcache.doctor import machine, software, surroundings
from kdcache.doctor.findings import Finding, Line, safely

__all__ = ["Finding", "examine"]


def examine(home: Path, data: Path, *, offline: bool = False, variables: Collection[str] = ()) -> Iterator[Finding]:
    """The findings, part by part, as they are made. `variables`: the environment variables that commands read, if known.

    Nothing is changed but for a lock's file, which is made below `home` and removed. `offline`: the network is not asked.
    """
    unusable: dict[str, str] = {}
    yield from safely("software", "python", software.python)
    yield from safely("software", "libraries", lambda: _libraries(unusable))
    yield from safely("extras", "extras", software.extras)
    yield from safely("machine", "processor", machine.processors)
    yield from safely("machine", "memory", lambda: machine.memory(None if "torch" in unusable else _allowed_memory()))
    yield from safely("machine", "limits", machine.limits)
    yield from _devices(unusable)
    yield from safely("disks", "home", lambda: machine.folder("home", home, "choose another: --home or KDCACHE_HOME"))
    yield from safely("disks", "data", lambda: machine.folder("data", data, "choose another: --data-dir or KDCACHE_DATA_DIR"))
    yield from safely("disks", "cache", lambda: machine.folder("cache", _cache(), "choose another: export KDCACHE_CACHE=FOLDER"))
    temporary = Path(tempfile.gettempdir())
    yield from safely(
        "disks", "temporary", lambda: machine.folder("temporary", temporary, "choose another: export TMPDIR=FOLDER")
    )
    yield from safely("disks", "file locks", lambda: machine.locks(home))
    yield from safely("network", "hub", lambda: surroundings.hub(offline=offline))
    yield from safely("environment", "variables", lambda: surroundings.environment(variables))
    yield from safely("workspace", "content", lambda: surroundings.workspace(home))


def _libraries(unusable: dict[str, str]) -> Iterator[Line]:
    unusable |= software.unusable_modules()
    return software.libraries(unusable)


def _cache() -> Path:
    from kdcache.archive.reading.cache import Cache

    return Cache.from_environment().root


def _allowed_memory() -> int:
    from kdcache.training.memory import available_memory

    return available_memory("cpu")


def _devices(unusable: dict[str, str]) -> Iterator[Finding]:
    """What torch computes with. A GPU on which a first sum has failed is not tried again in this process."""
    if "torch" in unusable:
        yield Finding("devices", "GPU", "note", "not examined, as torch cannot be imported")
        return
    from kdcache.doctor import devices

    yield from safely("devices", "torch", devices.torch_build)
    why = unusable.get(software.GPU)
    if why:
        fix = "nvidia-smi; see that driver, torch's CUDA and the GPU's age fit together"
        yield Finding("devices", "GPU", "problem", f"a first sum on it fails: {why}", fix)
    else:
        yield from safely("devices", "GPU", devices.gpus)
    for device in devices.here(gpus=not why):
        yield from safely("devices", f"float32 on {device}", functools.partial(devices.float32, device))
        yield from safely("devices", f"renderers on {device}", functools.partial(devices.renderers, device))
    if not why:
        yield from safely("devices", "by default", devices.choices)

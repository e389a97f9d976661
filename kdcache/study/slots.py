"""Places for jobs on GPUs: several on one GPU, as far as its memory is known to suffice for them.

What a job takes is what jobs of its kind took before in the same study. A job of which that is unknown has a GPU to itself,
and is measured. A place is a lock, in whose file stands what its holder may take; it falls with the holder.
"""

import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcache.errors import UsageError
from kdcache.study.jobs import Job
from kdcache.system.documents import read_json
from kdcache.system.locks import has_locks, locked_by_family
from kdcache.system.peak import gpu_memory

__all__ = ["JOBS_PER_GPU", "Memory", "Slot", "gpu_slot", "gpus", "kind_of", "measured"]

JOBS_PER_GPU = 4  # at most, where it is left to kdcache: more of them leave each too few cores
PATIENCE = 1.0  # seconds between two looks for a place
SHARE = 0.9  # of a GPU's memory that jobs may take together
SPARE = 1.1  # room over what was measured: allocators differ from run to run
NUMBERED = {"epochs", "seed", "tau", "lr", "weight_decay", "control"}  # options of which only the number of values matters

Memory = Callable[[str], tuple[int, int] | None]  # free and all bytes of a GPU; None: unknown


@dataclass(frozen=True)
class Slot:
    """A place on a GPU, by the name that CUDA_VISIBLE_DEVICES has for it; `lock` is its descriptor, which children inherit.

    claim: bytes that its holder may take, with others beside it; None: the whole GPU is its holder's.
    """

    gpu: str
    lock: int
    claim: int | None


def gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them: by number, or by UUID as `GPU-...`, `MIG-...`."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        names = [gpu.strip() for gpu in named.split(",")]
        end = next((place for place, gpu in enumerate(names) if gpu in {"", "-1", "NoDevFiles"}), len(names))
        return list(dict.fromkeys(names[:end]))  # CUDA sees none from the first on that is no GPU
    if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")):
        return []  # and torch, which takes seconds to import, would say no more
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


@contextmanager
def gpu_slot(
    devices: Sequence[str],
    needed: Callable[[], int | None] = lambda: None,
    *,
    most: int = 1,
    memory: Memory = gpu_memory,
    alone: bool = False,
) -> Iterator[Slot]:
    """A place on one of these GPUs, on which jobs of this user on this machine have `most` places, until it is given back.

    needed: bytes that the job takes, which may become known while it waits.
    alone: wait for a GPU without other jobs, and let none beside this one.
    """
    # Within two jobs of SLURM, GPU 0 is not the same one.
    folder = Path(tempfile.gettempdir()) / "-".join(["kdcache-gpus", str(os.getuid()), os.environ.get("SLURM_JOB_ID", "")])
    folder.mkdir(mode=0o700, exist_ok=True)
    if not has_locks(folder):
        raise UsageError(
            f"the file system of {folder} has no locks",
            why="they tell which job is on which GPU",
            fix="export TMPDIR=FOLDER on a disk that has, such as /dev/shm",
        )
    while True:
        claim = None if alone or most == 1 else needed()
        for beside in (False, True):  # a GPU without jobs is the better place
            for gpu in devices:
                with ExitStack() as held:
                    if (lock := _place(gpu, folder, claim, most, memory, beside, held)) is not None:
                        yield Slot(gpu, lock, claim)
                        return
        time.sleep(PATIENCE)


def _place(gpu: str, folder: Path, claim: int | None, most: int, memory: Memory, beside: bool, held: ExitStack) -> int | None:
    """The lock of a free place on a GPU, beside other jobs or not, that `held` keeps; None if there is none."""
    name = re.sub(r"[^\w.-]", "-", gpu)[:100]
    places = [folder / (f"{name}.{number}.lock" if number else f"{name}.lock") for number in range(max(most, JOBS_PER_GPU))]
    with locked_by_family(folder / f"{name}.asked", wait=False) as asking:  # one looks at a time
        if asking is None:
            return None
        others, free = _claims(places)
        if bool(others) != beside or not free or not (not others or _fit(others, claim, most, memory(gpu))):
            return None
        lock = held.enter_context(locked_by_family(free[0], wait=False))
        if lock is not None:
            os.ftruncate(lock, 0)
            os.pwrite(lock, json.dumps(claim).encode(), 0)
        return lock


def _claims(places: Sequence[Path]) -> tuple[list[int | None], list[Path]]:
    """What the holders of places may take, and the places that nobody holds."""
    claims: list[int | None] = []
    free = []
    for place in places:
        with locked_by_family(place, wait=False) as held:
            if held is not None:
                free.append(place)
                continue
        try:
            claim = read_json(place)
        except (OSError, ValueError):  # a version without claims, which has the GPU to itself
            claim = None
        claims.append(claim if isinstance(claim, int) else None)
    return claims, free


def _fit(others: Sequence[int | None], claim: int | None, most: int, memory: tuple[int, int] | None) -> bool:
    """Whether a job fits beside others: those that are there may not have taken yet what they will take."""
    known = [other for other in others if other is not None]
    if claim is None or memory is None or len(known) < len(others) or len(others) >= most:
        return False
    unused, whole = memory
    return claim <= unused and claim + sum(known) <= SHARE * whole


# ---------------------------------------------------------------- what jobs take


def kind_of(job: Job, jobs: Mapping[str, Job]) -> tuple[Any, ...]:
    """The same for jobs that take as much memory: their seeds, rates, durations and temperatures may differ, but not in number.

    Of an archive, the dataset and the size of its views matter.
    """
    kind: list[Any] = [job.kind]
    option = ""
    for argument in job.arguments[1:]:
        if re.fullmatch(r"--[a-z]\S*", argument):
            option = argument.removeprefix("--").replace("-", "_")
            kind.append(option)
        elif (needed := re.fullmatch(r"\{(\w+-[0-9a-f]{8})\}", argument)) and needed[1] in jobs:
            kind.append(_data_of(jobs[needed[1]]))
        else:
            kind.append(argument.count(",") if option in NUMBERED else argument)
    return tuple(kind)


def _data_of(job: Job) -> tuple[str, ...]:
    """Dataset and sizes among the arguments of a job."""
    words = job.arguments
    return tuple(
        f"{option} {words[words.index(option) + 1]}" for option in ("--dataset", "--size", "--canvas") if option in words
    )


def measured(job: Job, jobs: Mapping[str, Job], record_of: Callable[[str], Mapping[str, Any] | None]) -> int | None:
    """Bytes that the job will take of a GPU, by the records of finished jobs of its kind; None if there is none of them."""
    kind = kind_of(job, jobs)
    records = [record_of(other.id) for other in jobs.values() if other.kind == job.kind and kind_of(other, jobs) == kind]
    peaks = [record["gpu_bytes"] for record in records if record and isinstance(record.get("gpu_bytes"), int)]
    return int(SPARE * max(peaks)) if peaks else None

"""What surrounds kdcache: environment variables, the network, the workspace."""

import os
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Collection, Iterator
from pathlib import Path

from kdcache.doctor.findings import Line, first_line, note, ok, problem

__all__ = ["environment", "hub", "shown", "workspace"]

HUB = "https://huggingface.co"
PATIENCE = 5.0  # seconds
MATTER = re.compile(  # names of variables that change what kdcache or its libraries do
    r"(KDCACHE|HF|HUGGINGFACE|TRANSFORMERS|TIMM|TORCH|TORCHINDUCTOR|PYTORCH|CUDA|CUBLAS|CUDNN|NVIDIA|NCCL|GLOO|OMP|MKL|OPENBLAS"
    r"|DNNL|ONEDNN|KMP|TRITON|AWS|GOOGLE|AZURE|SLURM|TORCHELASTIC)_\w+"
    r"|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|TMPDIR|XDG_CACHE_HOME|PYTHONPATH|LD_PRELOAD|LD_LIBRARY_PATH"
    r"|(HTTPS?|ALL|NO)_PROXY",
    re.IGNORECASE,
)
NOT_NEEDED = re.compile(  # of the many that schedulers and images set
    r"SLURM_(?!JOB_ID|PROCID|LOCALID|NTASKS$|NNODES|JOB_GPUS|GPUS)|TORCHELASTIC_|CUDA_(?!VISIBLE|LAUNCH|DEVICE)"
    r"|NVIDIA_(?!VISIBLE|DRIVER_CAP|TF32)"
)
SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|KEY|SIGNATURE|AUTH|CONNECTION_STRING", re.IGNORECASE)
LONGEST = 200


def environment(known: Collection[str] = ()) -> Iterator[Line]:
    """The variables that matter; `known` has the names of kdcache's own, if the caller has them."""
    names = sorted(name for name in os.environ if MATTER.fullmatch(name) and not NOT_NEEDED.match(name))
    for name in names:
        if known and name.upper().startswith("KDCACHE_") and name not in known:
            from difflib import get_close_matches

            close = get_close_matches(name, known, n=1)
            text = f"{shown(name, os.environ[name])}: kdcache reads no variable of that name"
            yield note(name, text, f"use {close[0]}, or unset {name}" if close else f"unset {name}")
        else:
            yield ok(name, shown(name, os.environ[name]))
    if not names:
        yield ok("variables", "none is set that matters")
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        yield from _rank()


def shown(name: str, value: str) -> str:
    """The value of a variable as it may be shown to strangers: no secrets, nothing that gives access in URLs."""
    if SECRET.search(name):
        return "set (not shown)" if value else "set, but empty"
    value = re.sub(r"(?<=://)[^/\s]*@", "***@", value)
    value = re.sub(r"((?:\w+)://[^\s?]*)\?\S+", r"\1?***", value)
    value = re.sub(r"\b(hf_|sk-|gh[a-z]_|github_pat_|glpat-|AKIA)[\w-]{12,}", r"\1***", value)
    if "PROXY" in name.upper():
        value = re.sub(r"^[^/\s]*@", "***@", value)
    return (value if len(value) <= LONGEST else f"{value[:LONGEST]}...") or "set, but empty"


def _rank() -> Iterator[Line]:
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        yield problem("processes", "only one of RANK and WORLD_SIZE is set", "unset both, or start the processes with torchrun")
    elif missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        text = f"RANK and WORLD_SIZE are set, and {' and '.join(missing)} not"
        yield problem("processes", text, "start the processes with torchrun, or unset RANK WORLD_SIZE LOCAL_RANK")


def hub(*, offline: bool, patience: float = PATIENCE) -> Iterator[Line]:
    """Whether the hub that weights and datasets come from answers, and whether its libraries may ask it."""
    place = os.environ.get("HF_ENDPOINT") or HUB
    name, still = "hub", "weights and datasets that are not here yet cannot be fetched"
    switch = next((name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if _is_on(os.environ.get(name))), None)
    if switch:
        yield note(name, f"{switch} is set: {still}", f"unset {switch}")
    elif offline:
        yield note(name, f"{shown('', place)} was not asked (--offline)")
    else:
        yield _answer(name, place, still, patience)
    token = any(os.environ.get(each) for each in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")) or _token_file().is_file()
    yield ok("hub token", "there is one" if token else "none, as is enough for public models and datasets")


def _answer(name: str, place: str, still: str, patience: float) -> Line:
    said: list[str | int] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(place, method="HEAD", headers={"User-Agent": "kdcache-doctor"})
            with urllib.request.urlopen(request, timeout=patience) as answer:
                said.append(answer.status or 200)
        except urllib.error.HTTPError as error:  # an answer, too
            said.append(error.code)
        except Exception as error:  # of the network; or what is in HF_ENDPOINT is no URL
            # What is in a URL before its host is repeated by some errors, and is nobody's business.
            said.append(type(error).__name__ if "@" in place else str(getattr(error, "reason", "")) or first_line(error))

    asking = threading.Thread(target=ask, daemon=True)  # looking up a name knows no time limit
    asking.start()
    asking.join(2 * patience)
    found = said[0] if said else f"no answer within {2 * patience:g} s"
    shown_place = shown("", place)
    if isinstance(found, str):
        text = f"{shown_place} cannot be reached ({shown('', found)}): {still}"
        return note(name, text, "see to the network, or to HTTPS_PROXY")
    if found >= 500 or found == 407:
        return note(name, f"{shown_place} answers with status {found}: {still}", "try later, or see to HTTPS_PROXY")
    return ok(name, f"{shown_place} answers")


def _is_on(value: str | None) -> bool:
    return (value or "").upper() in {"1", "ON", "YES", "TRUE"}  # as huggingface_hub reads it


def _token_file() -> Path:
    if place := os.environ.get("HF_TOKEN_PATH"):
        return Path(place).expanduser()
    base = os.environ.get("HF_HOME") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    return Path(base).expanduser() / "token"


def workspace(home: Path) -> Iterator[Line]:
    """How many archives, teachers, runs and reports there are below `home`."""
    from kdcache.workspace import Workspace

    place = Workspace(home)
    if not home.is_dir():
        yield note("content", f"none yet: {home.absolute()} is made at the first write" if not home.exists() else "none")
        return
    folders = place.archive_folders()
    finished = sum((folder / "kdcache.json").is_file() for folder in folders)
    runs = sum(1 for _ in place.runs.rglob("args.yaml"))
    ended = sum(1 for _ in place.runs.rglob("summary.json"))
    teachers = sum(1 for _ in place.teachers.glob("*/teacher.json"))
    reports, studies = (sum(1 for _ in folder.iterdir()) if folder.is_dir() else 0 for folder in (place.reports, place.studies))
    text = f"{finished} archives and {len(folders) - finished} unfinished, {teachers} teachers, {ended} of {runs} runs ended"
    yield ok("content", f"{text}, {reports} reports, {studies} studies")

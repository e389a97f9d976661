"""The record of a run: its resolved configuration, `args.yaml`."""

import datetime
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

import kdcache
from kdcache.archive import Ensemble, Licences
from kdcache.errors import IncompatibleError, IntegrityError, KdcacheError
from kdcache.methods import METHODS
from kdcache.models.creation import licence
from kdcache.models.names import public_name
from kdcache.options import as_text
from kdcache.replay.stream import ORDER_VERSION
from kdcache.students.config import DistillConfig
from kdcache.students.grid import StudentSpec
from kdcache.system.documents import DocumentError, read_yaml
from kdcache.system.files import set_aside, write_atomically
from kdcache.targets import CONTROLS
from kdcache.training.config import Runtime, under_present_names
from kdcache.training.learner import Learner

__all__ = ["record_graph", "require_own", "write_args"]


def write_args(
    learner: Learner,
    spec: StudentSpec,
    config: DistillConfig,
    archive: Ensemble,
    second: Ensemble,
    processes: int,
    about: dict[str, Any],
) -> None:
    """The resolved configuration of one run, `args.yaml`; a run that goes on adds to it what may differ from the beginning."""
    file, settings, runtime = spec.folder / "args.yaml", spec.settings, config.runtime
    session = {
        "allow_drift": config.allow_drift,
        **runtime.model_dump(mode="json", include=set(Runtime.model_fields)),
        **runtime.model_dump(mode="json", include={"channels_last", "compile"}, exclude_defaults=True),
        **({"graph": "off (--no-graph)"} if runtime.graph is False else {}),
        **({"processes": processes} if processes > 1 else {}),  # that had a part of every batch
        **({"moved_from": learner.moved_from} if learner.moved_from else {}),  # another kind of device
        "command": config.command,
        "kdcache_version": kdcache.__version__,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    if file.is_file():
        args = _read_args(file) | {"amp": learner.amp}  # of a run whose first session ended before its first checkpoint
        args.setdefault("resumed", []).append(session)
        write_atomically(file, yaml.safe_dump(args, sort_keys=False).encode())
        return
    args = {
        "archive": archive.location,
        "archive_name": archive.name,
        "archive_digest": archive.digest,
        **_members(archive),
        **({"second_archive": second.location, "second_archive_digest": second.digest} if second is not archive else {}),
        "dataset": config.dataset or archive.manifest.provenance.get("dataset"),
        "teacher": "+".join(
            member.manifest.teacher.alias if member.manifest.teacher else "unknown" for member in archive.members
        ),
        "teacher_name": "+".join(
            member.manifest.teacher.name if member.manifest.teacher else "unknown" for member in archive.members
        ),
        "student": public_name(spec.name),
        **about,
        **({"student_licence": licence(spec.name)} if spec.start.pretrained else {}),
        "licences": _licences(archive, second).model_dump(),
        "method": METHODS.to_dict(spec.method),
        "method_spec": METHODS.spec(spec.method),
        "control": CONTROLS.to_dict(spec.control),
        "control_spec": CONTROLS.spec(spec.control),
        "tau": spec.tau,
        "own_temperature": not spec.method.uses_tau,
        "seed": spec.seed,
        "batch_order": f"kdcache order {ORDER_VERSION}, seed {spec.order_seed}, "
        f"batches of {settings.batch_size}, the last one dropped",
        "share_order": spec.order_seed != spec.seed,
        "init": spec.start.name,
        "init_sha256": spec.start.sha256 or None,
        "init_top1": spec.start.top1,
        "folder": spec.folder.name,
        **({"head_init": settings.head_init} if spec.start.new_head else {}),
        **_settings(spec),
        "amp": learner.amp,
        **session,
    }
    write_atomically(file, yaml.safe_dump(args, sort_keys=False).encode())


_ALWAYS = ("archive_digest", "student", "method", "control", "tau", "seed")  # of args.yaml, since the first version


def require_own(spec: StudentSpec, archive: Ensemble) -> None:
    """Raise IncompatibleError if the folder of a student has another one's run: it was copied or renamed."""
    file = spec.folder / "args.yaml"
    if not file.is_file():
        return
    args = under_present_names(_read_args(file))
    if lost := [name for name in _ALWAYS if name not in args]:
        raise _damaged(file, f"it does not say the {lost[0]} of its student")
    with suppress(KdcacheError):  # older records lack newer options; what is unknown here is compared as it is recorded
        args["method"] = METHODS.to_dict(METHODS.from_dict(args["method"]))
        args["control"] = CONTROLS.to_dict(CONTROLS.from_dict(args["control"]))
    args |= {"init_sha256": args.get("init_sha256") or None, "pretrained": args.get("init") == "pretrained"}
    wanted = {
        "archive_digest": archive.digest,
        "student": public_name(spec.name),
        "method": METHODS.to_dict(spec.method),
        "control": CONTROLS.to_dict(spec.control),
        "tau": spec.tau,
        "seed": spec.seed,
        "share_order": spec.order_seed != spec.seed,
        "init_sha256": spec.start.sha256 or None,  # the weights' name may be another one by now
        "pretrained": spec.start.pretrained,
        **_settings(spec),
        "folder": spec.folder.name,  # which has all that there is, in six letters
    }
    if other := [name for name, value in wanted.items() if args.get(name, value) != value]:
        raise IncompatibleError(
            f"{spec.folder} has the run of another student: its {other[0]} is {args[other[0]]}, not {wanted[other[0]]}",
            why="the folder was copied, renamed or exchanged: folders are named after what was trained",
            fix=f"give it its own name again; or set it aside, and repeat the command: {set_aside(spec.folder)}",
        )


def _settings(spec: StudentSpec) -> dict[str, Any]:
    """How a student is trained, as it is recorded. Whether in bf16 is for its device to say, if nobody asked."""
    settings = spec.settings
    texts = {"decay_epochs": as_text(settings.decay_epochs), "opt_betas": as_text(settings.opt_betas or ())}
    return settings.model_dump(mode="json", exclude={"head_init", "amp"}) | texts


def record_graph(folder: Path, state: str) -> None:
    """Add to `args.yaml` whether the present session replays its steps as a CUDA graph."""
    file = folder / "args.yaml"
    args = _read_args(file)
    session = args["resumed"][-1] if args.get("resumed") else args
    if session.get("graph") != state:
        session["graph"] = state
        write_atomically(file, yaml.safe_dump(args, sort_keys=False).encode())


def _licences(archive: Ensemble, second: Ensemble) -> Licences:
    """Under what the data and the teachers' weights are that students learn from; unknown, where one of them is."""
    known = [member.manifest.known_licences for each in (archive, second) for member in each.members]

    def all_of(terms: Sequence[str | None]) -> str | None:
        return None if None in terms else " and ".join(dict.fromkeys(filter(None, terms)))

    return Licences(data=all_of([licences.data for licences in known]), weights=all_of([licences.weights for licences in known]))


def _members(archive: Ensemble) -> dict[str, Any]:
    """The archives of an ensemble and how they are averaged; of a single one there is no more to say."""
    if len(archive.members) == 1:
        return {}
    described = [{"archive": m.location, "archive_name": m.name, "archive_digest": m.manifest.digest} for m in archive.members]
    return {"archives": described, "average": archive.average}


def _read_args(file: Path) -> dict[str, Any]:
    try:
        args = read_yaml(file)
        if isinstance(args, dict) and isinstance(args.get("resumed", []), list):
            return args
        why = "it holds no configuration"
    except DocumentError as error:
        why = " ".join(str(error).split())[:200]
    raise _damaged(file, why)


def _damaged(file: Path, why: str) -> IntegrityError:
    return IntegrityError(
        f"{file} is damaged",
        why=why,
        fix=f"restore it from a copy; or train this run anew, after setting it aside: {set_aside(file.parent)}",
    )

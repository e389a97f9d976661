"""What a dump is to write, as its options, the machine and the archive say that it goes on with."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from kdcache.archive import ArchivePlan, recorded_plan
from kdcache.datasets import Source
from kdcache.datasets.canvas import Canvas
from kdcache.errors import IntegrityError, UsageError
from kdcache.models.names import folder_name, is_factory
from kdcache.models.preprocessing import preprocessing
from kdcache.system.files import translated_os_errors
from kdcache.system.locks import locked_if_possible
from kdcache.system.progress import Progress, Silent
from kdcache.teachers.config import USUAL, DumpConfig, Precision
from kdcache.teachers.registry import Teacher
from kdcache.training.tested import drawable_filter
from kdcache.views.policy import ViewPolicy
from kdcache.workspace import Workspace, dataset_label

__all__ = ["DumpPlan", "begun_once", "folder_of", "going_on", "squashed_before"]


@dataclass(frozen=True)
class DumpPlan:
    """What a dump writes, as far as that is known before there is a teacher."""

    config: DumpConfig
    source: Source
    exact: str  # the teacher's exact name
    policy: ViewPolicy
    canvas: Canvas
    views: int
    precision: Precision
    batch_size: int

    def of(self, teacher: Teacher) -> "DumpPlan":
        """This plan with views as the teacher's configuration wants them, where the policy leaves that open."""
        if self.policy.filter != "auto":
            return self
        stated = teacher.record.get("interpolation")
        if stated is None:  # an older record; a function's model was trained on bilinear views then
            stated = "bilinear" if is_factory(self.exact) else preprocessing(self.exact, self.policy.size).interpolation
        own = drawable_filter(self.exact, stated)
        return replace(self, policy=self.policy.settled(own))

    def archive_name(self, teacher: Teacher | None) -> str:
        """The archive's name, by all that decides on its logits; without a teacher it is not the final one."""
        recipe = self.config.recipe
        decisive = [
            self.canvas.card.digest,
            self.canvas.digest,
            self.policy.settled().digest,
            teacher.record["weights_sha256"] if teacher else None,
            self.precision,
            self.batch_size,
            recipe.codec,
            recipe.layout,
            recipe.shard_rows,
        ]
        digest = hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:8]
        return f"{dataset_label(self.source)}--{folder_name(self.config.subject.teacher)}--{digest}"


@contextlib.contextmanager
def begun_once(plan: DumpPlan, teacher: Teacher, workspace: Workspace, progress: Progress) -> Iterator[DumpPlan]:
    """The plan as `going_on` has it. Inside, an archive that nobody has begun is begun by this process, while others wait.

    So processes on machines with other defaults come to one archive, too.
    """
    found = going_on(plan, teacher, workspace, progress)
    if plan.config.output is not None or _recorded(folder_of(found, teacher, workspace)) is not None:
        yield found
        return
    lock = workspace.archives / f".{dataset_label(plan.source)}--{folder_name(plan.config.subject.teacher)}.lock"
    with contextlib.ExitStack() as held:
        with translated_os_errors(lock):
            lock.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(
                locked_if_possible(lock, waiting=lambda: progress.say("waiting for another process to begin its archive"))
            )
            held.callback(lock.unlink, missing_ok=True)
        found = going_on(plan, teacher, workspace, Silent())
        if _recorded(folder_of(found, teacher, workspace)) is not None:
            held.close()
        yield found


def going_on(plan: DumpPlan, teacher: Teacher, workspace: Workspace, progress: Progress) -> DumpPlan:
    """The plan for this teacher, with what its archive was begun with where the options leave that open.

    UsageError where this process would begin an archive beside the one that other processes of a shared dump have begun.
    """
    plan = _in_earlier_version(plan.of(teacher), teacher, workspace, progress)
    found = _in_recorded_batches(plan, teacher, workspace)
    if found.batch_size != plan.batch_size:
        path = folder_of(found, teacher, workspace)
        progress.say(f"{path} was begun in batches of {found.batch_size} views, and goes on with them")
    _require_agreement(found, teacher, workspace)
    return found


def _in_recorded_batches(plan: DumpPlan, teacher: Teacher, workspace: Workspace) -> DumpPlan:
    """The plan in batches of the archive that it goes on with, unless a size is asked for: it may be another machine's usual."""
    if plan.config.recipe.batch_size is not None:
        return plan
    for size in dict.fromkeys((plan.batch_size, *(usual.batch_size for usual in USUAL.values()))):
        begun = _recorded(folder_of(replace(plan, batch_size=size), teacher, workspace))
        if begun is not None and begun.teacher is not None:
            return replace(plan, batch_size=begun.teacher.batch_size)
    return plan


def _require_agreement(plan: DumpPlan, teacher: Teacher, workspace: Workspace) -> None:
    config = plan.config
    own = folder_of(plan, teacher, workspace)
    if config.shard is None or config.recipe.precision is not None or config.output is not None or _recorded(own) is not None:
        return
    for precision in {usual.precision for usual in USUAL.values()} - {plan.precision}:
        path = folder_of(_in_recorded_batches(replace(plan, precision=precision), teacher, workspace), teacher, workspace)
        if _recorded(path) is not None and not (path / "kdcache.json").is_file():
            raise UsageError(
                f"this process would dump in {plan.precision}, as is usual on this machine; others write {path} in {precision}",
                why="shards of one archive have one precision, and --shard leaves the others of this one to nobody",
                fix=f"--precision {precision} writes shards of theirs, --precision {plan.precision} begins another archive",
            )


def _recorded(path: Path) -> ArchivePlan | None:
    """The plan of an archive; None where there is none, and of a damaged one, which is told when it is written."""
    with contextlib.suppress(IntegrityError):
        return recorded_plan(path) if path.is_dir() else None
    return None


def _in_earlier_version(plan: DumpPlan, teacher: Teacher, workspace: Workspace, progress: Progress) -> DumpPlan:
    """The plan with view policy version 1, where the archive that it names was begun so and goes on; and a note where not.

    An archive in the folder --output goes on as it was begun. One that has the same recipe but for the version goes on if all
    photographs are square, as its views are the same then.
    """
    if plan.policy.version == 1:
        return plan
    before = replace(plan, policy=plan.policy.as_version_1())
    # Version 1 knew no filter of the model: its presets are bilinear.
    candidates = [before, replace(before, policy=before.policy.model_copy(update={"filter": "bilinear"}))]
    spec = plan.config.recipe.shown.policy or plan.source.recipe.policy
    for candidate in (_in_recorded_batches(each, teacher, workspace) for each in candidates):
        path = folder_of(candidate, teacher, workspace)
        recorded = _recorded(path)
        if recorded is None or recorded.policy != candidate.policy:
            continue
        if plan.config.output is not None or (plan.canvas.all_square and candidate.policy.filter == plan.policy.filter):
            progress.say(f"{path} has view policy version 1, and goes on with it")
            return candidate
        again = f"--policy {spec}{',' if ':' in spec else ':'}version=1"
        new = f"resized {plan.policy.filter}" if plan.canvas.all_square else "in the photographs' own proportions"
        progress.say(f"{path} has these views in version 1: a new archive gets views {new}; {again} goes on with the old one")
    return plan


def squashed_before(plan: DumpPlan, teacher: Teacher) -> str | None:
    """A note on a teacher that learned from squashed photographs, where this dump shows them in their own proportions."""
    learned = teacher.record["training"].get("policy", {}).get("version", 2)
    if learned != 1 or plan.policy.version == 1 or plan.canvas.all_square:
        return None
    return (
        f"teacher {teacher.folder} was trained on squashed photographs (view policy version 1), and sees them in their own "
        "proportions now; train-teacher trains one on these"
    )


def folder_of(plan: DumpPlan, teacher: Teacher | None, workspace: Workspace) -> Path:
    return plan.config.output or workspace.archives / plan.archive_name(teacher)

"""What the runs cost, as far as they and their archives have recorded it, and what online distillation would have."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kdcache.archive import COST, TEACHER_COST, Archive, DumpCost
from kdcache.report.records import ArchiveArgs, RunRecord
from kdcache.system.energy import UNKNOWN, Spent, total

__all__ = ["ArchiveCosts", "costs"]


@dataclass(frozen=True)
class ArchiveCosts:
    """Of all students of one archive, of one average of archives, or of one and another for second views.

    None is what was not recorded. A pass is the teacher's (of an average, every teacher's) answer to one view of one sample.
    """

    name: str
    digest: str
    second: str  # name of the archive of second views, if there is one
    students: int
    epochs: int  # of all students, whatever became of them
    distill: Spent  # by all students
    dump: Spent  # of the archives
    teacher: Spent  # in the training of the archives' teachers
    bytes: int | None  # of the archives
    passes: int | None  # that the dumps made
    online: int | None  # that the same epochs would have made with the teacher in every step

    @property
    def saving(self) -> float | None:
        """Passes of online distillation for each one of the dump; below 1, the dump made more than it saved."""
        return None if self.passes is None or self.online is None else self.online / self.passes

    @property
    def reckoned(self) -> Spent:
        """What the passes of online distillation would take if each took what the dump's took: reckoned, not measured."""
        return UNKNOWN if self.saving is None else self.dump * self.saving

    @property
    def hours_saved(self) -> float | None:
        return None if self.reckoned.hours is None or self.dump.hours is None else self.reckoned.hours - self.dump.hours

    @property
    def break_even(self) -> float | None:
        """How many students, trained for as long as these, make as many passes online as the dump made."""
        return self.students / self.saving if self.saving else None


def costs(records: Sequence[RunRecord], archives: Mapping[str, Archive | None]) -> list[ArchiveCosts]:
    """A line for all students of the same archives; `archives` by digest, those of second views too."""
    groups: dict[tuple[str, str], list[RunRecord]] = {}
    for record in records:
        second = record.second_archive.archive_digest if record.second_archive else ""
        groups.setdefault((record.args.archive_digest, second), []).append(record)
    return [_cost(runs, archives) for runs in groups.values()]


def _cost(runs: Sequence[RunRecord], archives: Mapping[str, Archive | None]) -> ArchiveCosts:
    args, second = runs[0].args, runs[0].second_archive
    members = _opened(args.archives or (args,), archives)
    others = _opened((second,), archives) if second else members
    used = (
        None
        if members is None or others is None
        else list({member.manifest.digest: member for member in (*members, *others)}.values())
    )
    epochs, seconds = sum(run.epochs_done for run in runs), sum(run.second_views for run in runs)
    online = None if members is None or others is None else epochs * _samples(members) + seconds * _samples(others)
    begun = [run for run in runs if run.epochs_done]
    return ArchiveCosts(
        name=args.archive_name,
        digest=args.archive_digest,
        second=second.archive_name if second else "",
        students=len(runs),
        epochs=epochs,
        distill=total(run.spent for run in begun) if begun else UNKNOWN,
        dump=UNKNOWN if used is None else total(map(_dump, used)),
        teacher=UNKNOWN if used is None else total(_teachers(used)),
        bytes=None if used is None else sum(archive.nbytes for archive in used),
        passes=None if used is None else sum(map(_passes, used)),
        online=online,
    )


def _opened(args: Sequence[ArchiveArgs], archives: Mapping[str, Archive | None]) -> list[Archive] | None:
    """The archives, if all of them are there."""
    opened = [archives.get(archive_args.archive_digest) for archive_args in args]
    known = [archive for archive in opened if archive is not None]
    return known if len(known) == len(opened) else None


def _samples(archives: Sequence[Archive]) -> int:
    return sum(archive.num_samples for archive in archives)


def _passes(archive: Archive) -> int:
    return archive.num_views * archive.num_samples


def _dump(archive: Archive) -> Spent:
    """What all passes of an archive took; of some of them it says nothing, as in a part of a larger archive."""
    cost = DumpCost.of(archive.manifest.provenance.get(COST))
    return cost.spent if cost.passes == _passes(archive) else UNKNOWN


def _teachers(archives: Sequence[Archive]) -> list[Spent]:
    """What training took, of each teacher once."""
    cards = [(archive.manifest.teacher, archive.manifest.provenance.get(TEACHER_COST)) for archive in archives]
    return [*{card.weights_sha256 if card else "": Spent.of(cost) for card, cost in cards}.values()]

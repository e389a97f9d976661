"""Costs of runs, from records in runs and archives, and the estimated costs of online distillation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kdcache.archive import COST, TEACHER_COST, Archive, DumpCost
from kdcache.report.records import ArchiveArgs, RunRecord
from kdcache.system.energy import UNKNOWN, Spent, total

__all__ = ["ArchiveCosts", "costs"]


@dataclass(frozen=True)
class ArchiveCosts:
    """Costs of the students that share the same archives.

    None is unknown. A pass is one teacher's forward pass on one view of one sample.
    """

    name: str
    digest: str
    second: str  # name of the archive of second views; empty without one
    students: int
    epochs: int  # summed over the students, unfinished ones included
    distill: Spent  # spent by the students
    dump: Spent  # spent by the dumps of the archives
    teacher: Spent  # spent on training the archives' teachers
    bytes: int | None  # size of the archives
    passes: int | None  # passes of the dumps
    online: int | None  # passes that online distillation needs for the same epochs

    @property
    def saving(self) -> float | None:
        """Online passes per pass of the dump. Below 1, the dump cost more passes than it saved."""
        return None if self.passes is None or self.online is None else self.online / self.passes

    @property
    def reckoned(self) -> Spent:
        """Estimated cost of the online passes: as many as `online`, each at the dump's cost per pass."""
        return UNKNOWN if self.saving is None else self.dump * self.saving

    @property
    def hours_saved(self) -> float | None:
        return None if self.reckoned.hours is None or self.dump.hours is None else self.reckoned.hours - self.dump.hours

    @property
    def break_even(self) -> float | None:
        """Number of such students whose online passes equal the dump's passes."""
        return self.students / self.saving if self.saving else None


def costs(records: Sequence[RunRecord], archives: Mapping[str, Archive | None]) -> list[ArchiveCosts]:
    """One `ArchiveCosts` per set of shared archives. `archives` maps digests to archives, those of second views too."""
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
    """The archives; None if one of them is missing."""
    opened = [archives.get(archive_args.archive_digest) for archive_args in args]
    known = [archive for archive in opened if archive is not None]
    return known if len(known) == len(opened) else None


def _samples(archives: Sequence[Archive]) -> int:
    return sum(archive.num_samples for archive in archives)


def _passes(archive: Archive) -> int:
    return archive.num_views * archive.num_samples


def _dump(archive: Archive) -> Spent:
    """Cost of an archive's dump. Unknown if the record covers other passes, as in a part of a larger archive."""
    cost = DumpCost.of(archive.manifest.provenance.get(COST))
    return cost.spent if cost.passes == _passes(archive) else UNKNOWN


def _teachers(archives: Sequence[Archive]) -> list[Spent]:
    """Training cost of each distinct teacher."""
    cards = [(archive.manifest.teacher, archive.manifest.provenance.get(TEACHER_COST)) for archive in archives]
    return [*{card.weights_sha256 if card else "": Spent.of(cost) for card, cost in cards}.values()]

"""Archives of several teachers over the same views, read as one."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from kdcache.archive.format.manifest import Manifest
from kdcache.archive.format.rows import Rows
from kdcache.archive.reading.comparison import facts, other_views, shared_views, view_range
from kdcache.archive.reading.reader import Archive
from kdcache.archive.reading.statistics import spread
from kdcache.errors import IncompatibleError, UsageError, unknown_name
from kdcache.system.progress import Progress

__all__ = ["AnyArchive", "Average", "Ensemble"]

Average = Literal["logits", "probabilities"]
LONGEST_NAME = 100


class Ensemble:
    """K archives read as one, with averaged rows. An ensemble of one archive gives its rows unchanged.

    `average="logits"` gives rows z = mean_k z_k. `average="probabilities"` means p = mean_k softmax(z_k / tau), which
    depends on tau: rows keep all teachers' logits `[n, K, C]`, and `kdcache.targets.averaged` turns them into tau log p.

    The order of the members has no effect. An ensemble has the part of the interface of `Archive` that training needs,
    and the views that all members have. Raises IncompatibleError for archives whose rows do not belong together.
    """

    def __init__(self, members: Sequence[Archive], average: Average = "logits") -> None:
        if not members:
            raise ValueError("an ensemble has at least one member")
        if average not in get_args(Average):
            raise unknown_name("average", average, get_args(Average))
        self.members = tuple(sorted(members, key=lambda archive: archive.manifest.digest))
        self.average = average
        for other in self.members[1:]:
            _require_aligned(self.members[0], other)
        self.views = shared_views(*self.members)
        if not self.views:
            raise IncompatibleError(
                f"no view is in all of the archives {self.location}",
                why=f"they hold views {', '.join(view_range(archive.views) for archive in members)}",
                fix="dump the same views with each teacher",
            )

    @property
    def manifest(self) -> Manifest:
        """The first member's manifest. Policy, source and canvas are the same in all; digest, teacher and files are not."""
        return self.members[0].manifest

    @property
    def digest(self) -> str:
        """Digest of the members' digests and the kind of average."""
        digests = [archive.manifest.digest for archive in self.members]
        return digests[0] if len(digests) == 1 else hashlib.sha256(json.dumps([self.average, *digests]).encode()).hexdigest()

    @property
    def name(self) -> str:
        """The members' names joined, shortened if long; for names of folders."""
        names = "+".join(sorted(archive.name for archive in self.members))
        return names if len(self.members) == 1 or len(names) <= LONGEST_NAME else f"{names[:LONGEST_NAME]}-{self.digest[:8]}"

    @property
    def location(self) -> str:
        return " + ".join(sorted(archive.location for archive in self.members))

    @property
    def num_views(self) -> int:
        return len(self.views)

    @property
    def num_samples(self) -> int:
        return self.manifest.num_samples

    @property
    def num_classes(self) -> int:
        return self.manifest.num_classes

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.manifest.class_names

    def labels(self) -> NDArray[np.int64] | None:
        """Label of every sample, int64 `[N]`; None if the first archive has no labels."""
        return self.members[0].labels()

    def keys(self) -> list[str] | None:
        """Key of every sample, `[N]`; None if the first archive has no keys."""
        return self.members[0].keys()

    def take(self, view: int, positions: NDArray[np.int64]) -> Rows:
        """Rows at any `positions` of `view`: `logits` `[n, C]`, or `[n, K, C]`; the first member's other fields.

        Raises IncompatibleError if the members' rows are not of the same views.
        """
        rows = [archive.take(view, positions) for archive in self.members]
        if len(rows) == 1:
            return rows[0]
        for archive, others in zip(self.members[1:], rows[1:], strict=True):
            if (differs := other_views(self.members[0], rows[0], archive, others)).any():
                raise _other_views(self.members[0], archive, view, np.asarray(positions)[differs])
        logits = np.stack([part.logits for part in rows], axis=1)
        if self.average == "logits":
            logits = logits.mean(axis=1, dtype=np.float64).astype(np.float32)
        return rows[0].with_logits(logits)

    def prefetch(self, *views: int) -> None:
        """Start fetching the files of these views of remote members. Returns at once."""
        for archive in self.members:
            archive.prefetch(*views)

    def fetch(self, view: int, progress: Progress | None = None) -> None:
        """Fetch all files of a view, so that any process on this machine can read it."""
        for archive in self.members:
            archive.fetch(view, progress)

    def spread_logits(self) -> Iterator[NDArray[np.float32]]:
        """Logits of at most 65,536 evenly spaced rows, in float32 blocks `[n, C]` or `[n, K, C]`, as in `take`."""
        for block in spread(self.views, self.num_samples):
            yield np.concatenate([self.take(view, positions).logits for view, positions in block])


AnyArchive = Archive | Ensemble  # students are trained from either


def _require_aligned(a: Archive, b: Archive) -> None:
    if a.manifest.digest == b.manifest.digest:
        raise UsageError(
            f"archives {a.location} and {b.location} hold the same logits",
            why="their average is each of them",
            fix="name either of them once, or another teacher's archive",
        )
    differing = [fact for fact in facts(a, b) if fact.meaning == "other rows" and not fact.same]
    if differing:
        raise IncompatibleError(
            f"archives {a.location} and {b.location} differ in {', '.join(fact.name for fact in differing)}",
            why="; ".join(
                f"{fact.name}: {' against '.join(fact.shown)}" + (f" ({fact.note})" if fact.note else "") for fact in differing
            ),
            fix="dump each teacher with the same --dataset, --policy, --view-seed, --size and --canvas",
        )


def _other_views(a: Archive, b: Archive, view: int, positions: NDArray[np.int64]) -> IncompatibleError:
    shown = ", ".join(map(str, positions[:8])) + (", ..." if len(positions) > 8 else "")
    return IncompatibleError(
        f"view {view} of archive {b.location} is not that of archive {a.location} at positions {shown} ({len(positions)} in all)",
        why="their stored samples or fingerprints of views differ, so their teachers saw other images there",
        fix="see which of them is right: kdcache verify ARCHIVE --replay 1000; and dump the other again",
    )

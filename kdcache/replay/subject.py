"""What students are planned by: as much of an archive as is known before it is written. Nothing here needs torch."""

from dataclasses import dataclass

from kdcache.archive import AnyArchive
from kdcache.datasets import DATASETS
from kdcache.errors import IncompatibleError, UsageError
from kdcache.views.policy import ViewPolicy

__all__ = ["Subject", "require_batch_size", "require_second"]


@dataclass(frozen=True)
class Subject:
    """An archive, or one that is to be: its `views` of so many `samples`, drawn by `policy`, and the `classes` of its logits."""

    name: str
    digest: str
    location: str
    views: range
    samples: int
    classes: tuple[str, ...]
    policy: ViewPolicy | None
    dataset: str | None  # where its dump found the images

    @classmethod
    def of(cls, archive: AnyArchive) -> "Subject":
        manifest = archive.manifest
        dataset = manifest.provenance.get("dataset")
        return cls(
            archive.name,
            archive.digest,
            archive.location,
            archive.views,
            archive.num_samples,
            archive.class_names,
            manifest.policy,
            # Records have registered names: what else an archive says is looked for nowhere.
            dataset if isinstance(dataset, str) and dataset.partition(":")[0] in DATASETS else None,
        )


def require_second(first: Subject, second: Subject) -> None:
    """UsageError or IncompatibleError unless `second` has second views for those of `first`, of the same size and classes."""
    if first.policy == second.policy and len(second.views) == 1 and second.views[0] in first.views:
        raise UsageError(
            f"two views of a sample from archive {second.location}",
            why="it holds one view" + ("" if second.digest == first.digest else f", which is also in {first.location}"),
            fix="dump more with --views; or name another archive of the same images with --second-archive; or use mlkd:views=1",
        )
    sizes = [each.policy.size if each.policy else None for each in (first, second)]
    if sizes[0] != sizes[1] or first.classes != second.classes:
        raise IncompatibleError(
            f"the views of archive {second.location} do not go with those of {first.location}",
            why=f"they are of {sizes[1]} px and {len(second.classes)} classes, against {sizes[0]} px and {len(first.classes)}",
            fix="dump both over the same dataset, with the same --size",
        )


def require_batch_size(batch_size: int, num_samples: int, parts: int = 1) -> None:
    """UsageError for a batch size that `num_samples` do not fill, or that cannot be divided into equal `parts`."""
    if not 1 <= batch_size <= num_samples:
        raise UsageError(
            f"batch size {batch_size} with {num_samples} samples",
            why="an epoch needs at least one full batch",
            fix=f"use --batch-size {max(1, min(64, num_samples))}",
        )
    if batch_size % parts:
        raise UsageError(
            f"batch size {batch_size} with {parts} processes",
            why="each of them takes an equal part of every batch",
            fix=f"use --batch-size {max(parts, batch_size // parts * parts)}, or --parallel students (or teachers)",
        )

"""Small archives of made-up logits. Nothing here imports torch: processes that are killed are made in milliseconds."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.archive import Archive, ArchiveWriter, Noise, TeacherCard
from kdcache.views.policy import ViewPolicy


def teacher_card(**changes: Any) -> TeacherCard:
    """The card of some teacher."""
    card = TeacherCard(
        alias="t",
        name="test_resnet",
        weights_sha256="3" * 64,
        input_size=16,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        precision="fp32",
        batch_size=8,
    )
    return card.model_copy(update=changes)


SAMPLES, CLASSES, SHARD_ROWS = 21, 4, 8  # three shards a view
NAMES = [f"class {i}" for i in range(CLASSES)]
LABELS = np.arange(SAMPLES) % CLASSES
KEYS = [f"k/{i}" for i in range(SAMPLES)]
TEACHER = teacher_card(noise=Noise(views=4, kl_mean=1e-7, kl_max=1e-6, max_logit_difference=0.01))


def logits(view: int) -> NDArray[np.float32]:
    rng = np.random.default_rng(view)
    return (rng.integers(-10_000, 10_000, (SAMPLES, CLASSES)) / 512).astype(np.float32)


def writer(path: Path, num_views: int = 2, **changes: Any) -> ArchiveWriter:
    options: dict[str, Any] = {
        "num_samples": SAMPLES,
        "class_names": NAMES,
        "labels": LABELS,
        "keys": KEYS,
        "shard_rows": SHARD_ROWS,
        "policy": ViewPolicy(size=16),
        "teacher": TEACHER,
        "provenance": {"command": "kdcache dump-teacher --teacher t"},
    } | changes
    if len(options["labels"] if options["labels"] is not None else []) != options["num_samples"]:
        options |= {"labels": None, "keys": None}
    return ArchiveWriter(path, num_views=num_views, **options)


def write_shard(to: ArchiveWriter, view: int, block: int) -> None:
    rows = np.array(to.positions(block))
    to.write(view, block, logits(view)[rows])


def finish(to: ArchiveWriter) -> Archive:
    for view, block in to.missing():
        write_shard(to, view, block)
    return to.finalize()


def files(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}

"""Replay checks: whether newly rendered views equal those that the teacher saw, with a diagnosis if not."""

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.archive import AnyArchive, Archive, Failure, Verification
from kdcache.datasets.canvas import Canvas
from kdcache.datasets.classes import how_classes_differ, how_samples_differ
from kdcache.errors import IncompatibleError
from kdcache.replay.prefetch import Rendered, render_batches
from kdcache.system.files import set_aside
from kdcache.system.progress import Progress, Silent
from kdcache.views.diagnosis import Cause, Diagnosis, diagnose
from kdcache.views.policy import RendererChoice, ViewPolicy, without_policy
from kdcache.views.probe import grids

__all__ = ["check_views", "replay", "require_replayable"]


def require_replayable(archive: AnyArchive, canvas: Canvas) -> ViewPolicy:
    """The archive's policy. Raises IncompatibleError if its views are not of this canvas's samples."""
    policy = archive.manifest.policy
    if policy is None:
        raise without_policy(archive.location)
    source = archive.manifest.source
    if archive.num_samples != len(canvas) or (source is not None and source.digest != canvas.card.digest):
        raise IncompatibleError(
            f"archive {archive.location} has {archive.num_samples} samples of other images than the {len(canvas)} here",
            why=f"since the dump: {_how_they_differ(archive, canvas)}",
            fix="restore the dataset as it was, or dump again",
        )
    recorded = archive.manifest.canvas
    if recorded is not None and recorded.size != canvas.size:
        raise IncompatibleError(
            f"the canvas is {canvas.size} px, the archive's was {recorded.size} px",
            why="views are cut from the canvas, so its size is part of them",
            fix=f"use --canvas {recorded.size}",
        )
    if recorded is not None and recorded.sizes_digest not in (None, canvas.sizes_digest):
        raise IncompatibleError(
            f"the photographs' sizes in canvas {canvas.path} are not those of the dump",
            why="crops are drawn in the proportions of the photographs, so their sizes are part of the views",
            fix="restore the dataset as it was at the dump, or dump again",
        )
    labels = archive.labels()
    if labels is not None and (labels != canvas.labels).any():
        changed = np.flatnonzero(labels != canvas.labels)
        raise IncompatibleError(
            f"{len(changed)} samples have another label than in archive {archive.location}, "
            f"the first is {canvas.keys[changed[0]]}",
            why=f"its label is {canvas.labels[changed[0]]} here, {labels[changed[0]]} there",
            fix=f"set the canvas aside, and it is built again: {set_aside(canvas.path)}",
        )
    return policy


def _how_they_differ(archive: AnyArchive, canvas: Canvas) -> str:
    """The difference of the samples, as far as the archive tells which ones it has."""
    classes = how_classes_differ(archive.class_names, canvas.card.class_names)
    keys, labels = archive.keys(), archive.labels()
    if classes or keys is None or labels is None:
        return classes or "files, names or labels changed"
    samples = how_samples_differ((keys, labels.tolist()), (canvas.keys, canvas.labels.tolist()), archive.class_names)
    return samples or "these samples are those of another split"


def check_views(item: Rendered, archive: AnyArchive, canvas: Canvas, allow_drift: int = 0) -> int:
    """Compare rendered views with the archive's digests. Returns the number of views accepted as drifted.

    Raises IncompatibleError, with a diagnosis, if views differ. Views of a canvas that was decoded differently are
    accepted if their grid means are within `allow_drift` grey levels.
    """
    differs = _differing(item)
    if not differs.any():
        return 0
    levels = _levels(item, differs)
    if allow_drift > 0 and levels <= allow_drift and _decoded_otherwise(archive, canvas) and not _moved(item).any():
        return int(differs.sum())
    diagnosis = _diagnose(item, archive, canvas, differs)
    keys = ", ".join(canvas.keys[sample] for sample in item.rows.sample[differs][:4])
    raise IncompatibleError(
        f"view {item.rows.view} of {keys}{', ...' if differs.sum() > 4 else ''} is not what the teacher saw "
        f"({_extent(item, differs)})",
        why=str(diagnosis),
        fix=_fix(diagnosis.cause, levels, archive, canvas),
    )


def replay(
    archive: Archive,
    canvas: Canvas,
    views: int,
    seed: int = 0,
    progress: Progress | None = None,
    *,
    renderer: RendererChoice = "auto",
    device: torch.device | str = "cpu",
) -> Verification:
    """Render `views` randomly chosen views again, and compare their digests with the archive's."""
    policy, progress = require_replayable(archive, canvas), progress or Silent()
    result = Verification(f"replay {views}")
    diagnosis: Diagnosis | None = None
    total = archive.num_views * archive.num_samples
    chosen = np.random.default_rng(seed).choice(total, size=min(views, total), replace=False)
    for number in np.unique(chosen // archive.num_samples):
        view = archive.views[number]
        positions = np.sort(chosen[chosen // archive.num_samples == number] % archive.num_samples)
        items = [(view, positions[i : i + 64]) for i in range(0, len(positions), 64)]
        for item in render_batches(canvas, policy, items, archive=archive, renderer=renderer, device=device):
            differs = _differing(item)
            if differs.any():
                if diagnosis is None:  # one diagnosis is enough, since it is slow
                    diagnosis = _diagnose(item, archive, canvas, differs)
                    result.error = IncompatibleError(
                        f"view {view} is not what the teacher saw ({_extent(item, differs)})",
                        why=str(diagnosis),
                        fix=_fix(diagnosis.cause, _levels(item, differs), archive, canvas),
                    )
                result.failures.append(Failure(f"view {view}", "the stored digests", f"{_extent(item, differs)}; {diagnosis}"))
            result.checked += len(item.positions)
            progress.update("replay", result.checked, len(chosen))
    return result


def _moved(item: Rendered) -> NDArray[np.bool_]:
    """Positions with another sample than in the archive: bool `[B]`."""
    assert item.stored is not None
    moved: NDArray[np.bool_] = item.rows.sample != item.stored.sample
    return moved


def _differing(item: Rendered) -> NDArray[np.bool_]:
    """Views that differ from the stored ones: bool `[B]`."""
    assert item.stored is not None
    other: NDArray[np.bool_] = item.digest != item.stored.digest
    return other | _moved(item)


def _levels(item: Rendered, differs: NDArray[np.bool_]) -> int:
    """Largest difference between rendered and stored grid means, in grey levels."""
    assert item.stored is not None
    return int(np.abs(grids(item.images).astype(int) - item.stored.probe.astype(int))[differs].max())


def _extent(item: Rendered, differs: NDArray[np.bool_]) -> str:
    positions = item.positions[differs]
    shown = ", ".join(map(str, positions[:8])) + (", ..." if len(positions) > 8 else "")
    return f"positions {shown} ({len(positions)} in all), grid means up to {_levels(item, differs)} grey levels apart"


def _decoded_otherwise(archive: AnyArchive, canvas: Canvas) -> bool:
    recorded = archive.manifest.canvas
    return recorded is not None and recorded.digest != canvas.digest


def _diagnose(item: Rendered, archive: AnyArchive, canvas: Canvas, differs: NDArray[np.bool_]) -> Diagnosis:
    """Diagnosis of a batch in which some views differ from the stored ones."""
    assert item.stored is not None
    if (moved := _moved(item)).any():
        return Diagnosis("order", f"other samples sit at {moved.sum()} of these positions than when the archive was written")

    def canvas_changed() -> str | None:
        if _decoded_otherwise(archive, canvas):
            return "its images are not those of the dump (other files, or decoded by another library)"
        return None if canvas.intact else "its pixels were changed after it was built"

    return diagnose(
        canvas.pixels,
        item.rows.policy.parameters(item.rows.view, len(canvas), canvas.sizes),
        item.positions[differs],
        item.stored.digest[differs],
        canvas_changed,
        archive.manifest.probe_version,
    )


def _fix(cause: Cause, levels: int, archive: AnyArchive, canvas: Canvas) -> str:
    if cause == "canvas" and _decoded_otherwise(archive, canvas):
        accepting = f"--allow-drift {max(1, levels)} would accept this batch"
        return f"restore the images of the dump, or dump again; if they were only decoded by another library, {accepting}"
    return {
        "canvas": f"set the canvas aside, and it is built again: {set_aside(canvas.path)}",
        "order": "restore the dataset as it was at the dump, or dump again",
        "mixing": "use the version of kdcache that wrote the archive, or dump again",
        "policy": "use the version of kdcache that wrote the archive, or dump again",
        "renderer": "use --renderer reference, and please report this",
        "rendering": "install the library versions that the manifest names (kdcache info ARCHIVE --json), or dump again",
    }[cause]

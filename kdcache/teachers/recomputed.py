"""Verification with the teacher at hand: its logits once more, compared with the stored ones."""

import numpy as np

from kdcache.archive import Archive, Failure, Verification
from kdcache.codecs import CODECS
from kdcache.datasets.canvas import Canvas
from kdcache.replay.check import replay
from kdcache.replay.prefetch import render_batches
from kdcache.system.progress import Progress, Silent
from kdcache.teachers.forward import Forward, batches
from kdcache.teachers.registry import Teacher, load_teacher
from kdcache.training.devices import resolve_device
from kdcache.views.policy import RendererChoice
from kdcache.workspace import Workspace

__all__ = ["matching_teacher", "replay_with_teacher"]


def replay_with_teacher(
    archive: Archive,
    canvas: Canvas,
    views: int,
    teacher: Teacher | None,
    progress: Progress | None = None,
    *,
    device: str = "cpu",
    renderer: RendererChoice = "auto",
) -> Verification:
    """Replay views; with the teacher at hand, recompute their logits too, and compare within its own noise and the codec."""
    result = replay(archive, canvas, views, progress=progress, renderer=renderer)
    card, policy = archive.manifest.teacher, archive.manifest.policy
    if result.failures:
        return result
    if teacher is None or card is None or policy is None:
        result.notes.append("logits were not recomputed: the teacher is not in this workspace")
        return result
    # The same batches as in the dump, since a batch's size may move a logit's last bits.
    rows = min(archive.manifest.block_rows(0), -(-views // card.batch_size) * card.batch_size)
    model, normalise = load_teacher(teacher)
    target = resolve_device(device)
    forward = Forward(model.to(target), normalise, target, card.precision)
    items = [(archive.views.start, batch) for batch in batches(range(rows), card.batch_size)]
    rendered = render_batches(canvas, policy, items, renderer=renderer, device=target)
    logits = np.concatenate([forward(item.images) for item in rendered])
    coding, view = CODECS.from_dict(archive.manifest.codec), archive.views.start
    stored = archive.stored(view, 0)
    noise = 2 * (card.noise.max_logit_difference if card.noise else 0) + 1e-3
    allowed = float(coding.max_error(stored).max()) + noise
    difference = float(np.abs(logits - coding.decode(stored)[:rows]).max())
    if difference > allowed:
        result.failures.append(
            Failure(f"view {view}", f"logits within {allowed:.2g} of the teacher's", f"a difference of {difference:.3g}")
        )
    result.notes.append(f"{rows} logit vectors recomputed: largest difference {difference:.2g}, allowed {allowed:.2g}")
    return result


def matching_teacher(archive: Archive, workspace: Workspace, progress: Progress | None = None) -> Teacher | None:
    """The trained teacher in the workspace whose weights the archive's logits came from."""
    card = archive.manifest.teacher
    for folder, record in workspace.teacher_records(progress or Silent()):
        if card is not None and record["weights_sha256"] == card.weights_sha256:
            return Teacher(folder, record)
    return None

"""Verification with the teacher at hand: its logits once more, compared with the stored ones."""

import math
import shlex
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kdcache.archive import DEVICE, Archive, Failure, Verification, shards_by_device
from kdcache.codecs import CODECS
from kdcache.datasets.canvas import Canvas
from kdcache.errors import IncompatibleError
from kdcache.models.names import is_factory
from kdcache.replay.check import replay
from kdcache.replay.prefetch import render_batches
from kdcache.system.files import set_aside
from kdcache.system.progress import Progress, Silent
from kdcache.system.remote import is_url
from kdcache.system.room import numbers
from kdcache.teachers.config import Precision
from kdcache.teachers.examination import tolerance
from kdcache.teachers.forward import Forward, batches
from kdcache.teachers.registry import Teacher, load_teacher
from kdcache.training.devices import device_kind, enough_memory, memory_elsewhere, resolve_device
from kdcache.views.policy import RendererChoice
from kdcache.workspace import Workspace, versions

__all__ = ["matching_teacher", "replay_with_teacher"]

FLOOR = 1e-3  # of a logit, beside codec and noise: other library versions move more than the noise of a few views shows
ESTIMATED = 64  # views from which the effect of half precision is estimated


def replay_with_teacher(
    archive: Archive,
    canvas: Canvas,
    views: int,
    teacher: Teacher | None,
    progress: Progress | None = None,
    *,
    device: str = "cpu",
    renderer: RendererChoice = "auto",
    named: str | None = None,
) -> Verification:
    """Replay views; with the teacher at hand, recompute their logits too, and compare within its own noise and the codec.

    A teacher that a function makes is run only if that function is `named`, as records may be a stranger's. One whose logits are
    others each time is computed twice, said to be random, and compared with nothing.

    Both are done on `device`. Logits that differ by more make the result's error an IncompatibleError: whether files are
    damaged is told by their checksums alone. RetryError where views or a batch find too little memory.
    """
    target = resolve_device(device)
    with enough_memory(f"no memory to render views on {target}", fix=memory_elsewhere(target)):
        result = replay(archive, canvas, views, progress=progress, renderer=renderer, device=target)
    card, policy = archive.manifest.teacher, archive.manifest.policy
    if result.failures:
        return result
    if teacher is None or card is None or policy is None:
        result.notes.append("logits were not recomputed: the teacher is not in this workspace")
        return result
    if is_factory(name := str(teacher.record.get("name", ""))) and name != named:
        asked = f"typed: --teacher {shlex.quote(name)}" + (f", not {named}" if named else "")
        result.notes.append(
            f"logits were not recomputed: {teacher.folder} names a function, which is run only where it is {asked}"
        )
        return result
    # The same batches as in the dump, since a batch's size may move a logit's last bits.
    rows = min(archive.manifest.block_rows(0), -(-views // card.batch_size) * card.batch_size)
    items = [(archive.views.start, batch) for batch in batches(range(rows), card.batch_size)]
    with enough_memory(
        f"no memory for batches of {card.batch_size} views on {target}, as in the dump",
        fix=memory_elsewhere(target),
    ):
        model, normalise = load_teacher(teacher)
        forward = Forward(model.to(target), normalise, target, card.precision, card.memory_format)
        rendered = render_batches(canvas, policy, items, renderer=renderer, device=target)
        logits, first, apart = [], None, 0.0
        for item in rendered:
            logits.append(forward(item.images))
            if first is None:
                first = item.images[:ESTIMATED]
                apart = float(np.abs(forward(item.images) - logits[0]).max())
        assert first is not None
        if not apart <= tolerance(forward, logits[0]):
            result.notes.append(
                f"logits were not compared: this teacher's are others each time, up to {apart:.3g} apart in two passes"
            )
            return result
        coding, view = CODECS.from_dict(archive.manifest.codec), archive.views.start
        stored = archive.stored(view, 0)
        difference = np.abs(np.concatenate(logits) - coding.decode(stored)[:rows]).max(axis=1)
        codec, noise = float(coding.max_error(stored).max()), card.known_noise
        moved = noise.max_logit_difference if noise else 0.0
        allowed = codec + FLOOR + 2 * moved  # both sides may be off by as much
        if difference.max() > allowed and not (noise and card.precision == "fp32"):
            # This device may be further off in half precision than the dump's. Float32 of unknown noise may have been computed
            # with TF32, before it was IEEE's everywhere: that moves logits about as far as float16, which has as many bits.
            here: tuple[Precision, ...] = (card.precision,) if card.precision != "fp32" else ("fp16", "bf16")
            allowed = codec + FLOOR + 2 * max(moved, _moved(forward, first, here))
    largest = float(difference.max())
    most, permitted = numbers(largest, allowed)
    result.notes.append(f"{rows} logit vectors recomputed on {target}: largest difference {most}, allowed {permitted}")
    if not largest <= allowed:
        command = f"kdcache verify {shlex.quote(archive.location)} --replay {views} --device auto"
        _tell(result, archive, difference, allowed, device_kind(target), command)
    return result


def _moved(forward: Forward, views: Tensor, precisions: Sequence[Precision]) -> float:
    """How far the first of these half precisions that stays finite moves this teacher's logits from those in float32."""
    exact = forward.in_float32(views)
    for precision in precisions:
        half = Forward(forward.model, forward.normalise, forward.device, precision, forward.memory_format).launch(views)
        moved = float((half - exact).abs().max())
        if math.isfinite(moved):
            return moved
    return 0.0


def _tell(result: Verification, archive: Archive, difference: NDArray, allowed: float, here: str, again: str) -> None:
    """Make a result say that logits differ, in some rows by more than is allowed; `again` verifies them once more."""
    view, many = archive.views.start, int((~(difference <= allowed)).sum())
    largest, bound = numbers(float(difference.max()), allowed)
    extent = f"differences of up to {largest} in {many} of {len(difference)} logit vectors"
    result.failures.append(Failure(f"view {view}", f"logits within {bound} of the teacher's", extent))
    provenance, torch_here = archive.manifest.provenance, versions()["torch"]
    kinds = shards_by_device(archive.manifest)
    there = f"several kinds of device ({', '.join(kinds)})" if kinds else str(provenance.get(DEVICE, "an unknown device"))
    recorded = provenance.get("versions")
    torch_there = str(recorded.get("torch")) if isinstance(recorded, dict) else "unknown"
    aside = "" if is_url(archive.location) else f"set it aside ({set_aside(archive.path)}), and "
    anew = f"{aside}dump it again"  # a dump leaves an archive alone that is complete
    if (there, torch_there) == (here, torch_here):
        why, fix = "this device and this torch computed them: they are another model's, or were changed", anew
    else:
        why = f"they were computed on {there} with torch {torch_there}, here on {here} with torch {torch_here}"
        fix = f"compare on such a device, with such a torch: {again}; if they differ there too, {anew}"
    result.error = IncompatibleError(
        f"the logits of view {view} are not what this teacher gives here: {extent}, allowed {bound}", why=why, fix=fix
    )


def matching_teacher(archive: Archive, workspace: Workspace, progress: Progress | None = None) -> Teacher | None:
    """The trained teacher in the workspace whose weights the archive's logits came from."""
    card = archive.manifest.teacher
    for folder, record in workspace.teacher_records(progress or Silent()):
        if card is not None and record["weights_sha256"] == card.weights_sha256:
            return Teacher(folder, record)
    return None

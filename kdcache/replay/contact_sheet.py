"""Contact sheets: the views that the teacher saw, with partner, lambda and the teacher's top classes under each."""

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kdcache.archive import AnyArchive
from kdcache.datasets.canvas import Canvas
from kdcache.errors import UsageError
from kdcache.replay.check import check_views, require_replayable
from kdcache.replay.prefetch import render_batches
from kdcache.stats import softmax
from kdcache.views.policy import MIX_CUTMIX, MIX_NONE, ViewTable

__all__ = ["contact_sheet"]

_MOST = 300  # samples or views; matplotlib's images have at most 65,536 pixels a side


def contact_sheet(
    archive: AnyArchive,
    canvas: Canvas,
    samples: Sequence[int] | NDArray[np.int64],
    views: Sequence[int],
    *,
    allow_drift: int = 0,
) -> bytes:
    """A PNG with one row per sample: its canvas in the photograph's proportions, then the given views with captions.

    Raises IncompatibleError if the views are not those that the teacher saw.
    """
    from matplotlib.figure import Figure

    policy = require_replayable(archive, canvas)
    samples = np.asarray(samples, np.int64)
    if max(len(samples), len(views)) > _MOST:
        raise UsageError(
            f"a sheet of {len(samples)} samples and {len(views)} views",
            why=f"a picture has room for {_MOST} of either",
            fix="draw fewer, or several sheets",
        )
    width, height = 1.35 * (len(views) + 1), 1.75 * len(samples) + 0.25  # inches
    figure = Figure(figsize=(width, height), dpi=110)
    # Places are computed here: matplotlib's own layouts take minutes for some hundred pictures.
    figure.subplots_adjust(left=0.05 / width, right=1 - 0.05 / width, top=1 - 0.25 / height, bottom=0.5 / height, hspace=0.45)
    axes = figure.subplots(len(samples), len(views) + 1, squeeze=False)
    for row, sample in enumerate(samples):
        label = archive.class_names[canvas.labels[sample]]
        width_px, height_px = canvas.sizes[sample]
        caption = f"{canvas.keys[sample][-18:]}\n{label}"
        _show(axes[row, 0], canvas.pixels[sample], caption, proportions=float(height_px / width_px))
    for column, view in enumerate(views):
        table = policy.parameters(view, len(canvas), canvas.sizes)
        where = np.argsort(table.sample)[samples]
        [item] = render_batches(canvas, policy, [(view, where)], archive=archive, renderer="reference")
        check_views(item, archive, canvas, allow_drift)
        assert item.stored is not None
        for row, image in enumerate(item.images.numpy()):
            # With the separate logits of several teachers, show their mean.
            probs = softmax(item.stored.logits[row]).reshape(-1, archive.num_classes).mean(axis=0)
            guess = "\n".join(f"{archive.class_names[c][:12]} {probs[c]:.2f}" for c in np.argsort(-probs)[:3])
            mixed = _mixing(table, int(where[row]), canvas, archive)
            _show(axes[row, column + 1], image, f"{mixed}\n{guess}")
    for column, view in enumerate(views):
        axes[0, column + 1].set_title(f"view {view}", fontsize=8)
    axes[0, 0].set_title("canvas", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _mixing(table: ViewTable, position: int, canvas: Canvas, archive: AnyArchive) -> str:
    if table.mix[position] == MIX_NONE:
        return "not mixed"
    kind = "CutMix" if table.mix[position] == MIX_CUTMIX else "MixUp"
    partner = archive.class_names[canvas.labels[table.partner[position]]]
    return f"{kind} {table.lam[position]:.2f}, rest {partner[:10]}"


def _show(axis: object, image: NDArray[np.uint8], caption: str, proportions: float = 1.0) -> None:
    axis.imshow(image.transpose(1, 2, 0), interpolation="nearest", aspect=proportions)  # type: ignore[attr-defined]
    axis.set_xlabel(caption, fontsize=6, parse_math=False)  # type: ignore[attr-defined]
    axis.set_xticks([])  # type: ignore[attr-defined]
    axis.set_yticks([])  # type: ignore[attr-defined]

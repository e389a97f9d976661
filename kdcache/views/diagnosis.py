"""Why a view is not what the teacher saw: experiments that draw it in other ways until one gives the stored fingerprint."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kdcache.views.policy import MIX_CUTMIX, MIX_MIXUP, MIX_NONE, PROBE_VERSION, ViewTable
from kdcache.views.probe import digests
from kdcache.views.reference import FILTERS
from kdcache.views.rendering import render_positions

__all__ = ["Cause", "Drift", "diagnose"]

Cause = Literal["order", "mixing", "policy", "renderer", "canvas", "rendering"]
_TRIED = 6  # views that are drawn again


@dataclass(frozen=True)
class Drift:
    """What differs between the stored and the rendered views of one batch."""

    positions: NDArray[np.int64]
    levels: int  # largest difference of a grid mean, grey levels
    cause: Cause
    explanation: str

    @property
    def blame(self) -> str:
        return f"{self.cause}: {self.explanation}"

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.positions[:8])) + (", ..." if len(self.positions) > 8 else "")
        return f"positions {shown} ({len(self.positions)} in all), grid means up to {self.levels} grey levels apart"


def diagnose(
    pixels: NDArray[np.uint8],
    table: ViewTable,
    positions: NDArray[np.int64],
    stored_digest: NDArray[np.uint32],
    canvas_changed: Callable[[], str | None],
    probe_version: int = PROBE_VERSION,
) -> tuple[Cause, str]:
    """Why the views at `positions`, drawn from `pixels [N, 3, R, R]`, have not the digests `stored_digest [B]`.

    `table` holds all rows of the view. `canvas_changed` says how the canvas differs from the recorded one, if it does; it
    may be slow, and is only asked when no experiment explains the difference.
    """
    tried, wanted = positions[:_TRIED], stored_digest[:_TRIED]
    if np.array_equal(digests(render_positions(pixels, table, tried, "reference"), probe_version), wanted):
        return "renderer", "the reference renderer draws these views as stored, so the device renderer errs on this machine"
    for explanation, variant in _other_policies(table):
        if np.array_equal(digests(render_positions(pixels, variant, tried, "reference"), probe_version), wanted):
            return "policy", f"the stored views are those of {explanation}"
    position, stored = int(positions[0]), int(stored_digest[0])
    for explanation, variant, place in _other_mixings(table, position):
        if int(digests(render_positions(pixels, variant, np.array([place]), "reference"), probe_version)[0]) == stored:
            return "mixing", f"at position {position} the stored view {explanation}"
    changed = canvas_changed()
    if changed:
        samples = np.unique(np.concatenate([table.sample[positions], table.partner[positions]]))
        shown = ", ".join(map(str, samples[samples >= 0][:8]))
        return "canvas", f"{changed} (samples involved: {shown}{', ...' if (samples >= 0).sum() > 8 else ''})"
    if (table.mix == MIX_NONE).any() and (table.mix[positions] != MIX_NONE).all():
        return "mixing", "only mixed views differ"
    return "rendering", "this installation draws the policy differently (compare the library versions in the manifest)"


def _other_policies(table: ViewTable) -> Iterator[tuple[str, ViewTable]]:
    """The same draws under policies that differ in one number."""
    policy = table.policy

    def variant(**changes: object) -> ViewTable:
        return dataclasses.replace(table, policy=policy.model_copy(update=changes))

    for filter in FILTERS:
        if filter != policy.filter:
            yield f"resize filter {filter}, not {policy.filter}", variant(filter=filter)
    yield "no horizontal flip", dataclasses.replace(table, flip=np.zeros_like(table.flip))
    if policy.randaugment is None:
        return
    options = policy.randaugment
    for m in range(options.bins):
        if m != options.m:
            other = options.model_copy(update={"m": m})
            yield f"RandAugment magnitude m={m}, not m={options.m}", variant(randaugment=other)
    for interpolation in ("nearest", "bilinear"):
        if interpolation != options.interpolation:
            other = options.model_copy(update={"interpolation": interpolation})
            yield f"RandAugment interpolation {interpolation}, not {options.interpolation}", variant(randaugment=other)
    yield "no RandAugment", variant(randaugment=None)


def _other_mixings(table: ViewTable, position: int) -> Iterator[tuple[str, ViewTable, int]]:
    """The view at `position` mixed otherwise, as a small table and the place of the view in it."""
    row = np.array([position])
    alone = dataclasses.replace(table[row], mix=np.array([MIX_NONE], np.uint8), partner=np.array([-1]))
    yield "is not mixed", alone, 0
    own = table[row]
    if own.mix[0] == MIX_NONE:
        return
    if own.mix[0] == MIX_CUTMIX:
        pair = table[np.array([position & ~1, position | 1])]
        mixup = np.where(pair.mix == MIX_CUTMIX, MIX_MIXUP, pair.mix).astype(np.uint8)
        yield "is mixed by MixUp, not CutMix", dataclasses.replace(pair, mix=mixup), position % 2
    partner = position ^ 1
    for other in [position + step for step in (1, -1, 2, -2, 3, -3)]:
        if other != partner and 0 <= other < len(table):
            pair = table[np.array([position, other])]
            pair = dataclasses.replace(
                pair, mix=np.array([own.mix[0], MIX_NONE], np.uint8), partner=np.array([pair.sample[1], -1])
            )
            yield f"is mixed with position {other}, not {partner}", pair, 0

"""Diagnosis of views that differ from the teacher's: draw them in other ways until one gives the stored fingerprint."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdcache.views.policy import MIX_CUTMIX, MIX_MIXUP, MIX_NONE, PROBE_VERSION, ViewTable
from kdcache.views.probe import digests
from kdcache.views.reference import FILTERS
from kdcache.views.rendering import render_positions

__all__ = ["Cause", "Diagnosis", "diagnose"]

Cause = Literal["order", "mixing", "policy", "renderer", "canvas", "rendering"]
_TRIED = 6  # differing views that are drawn again


class Diagnosis(NamedTuple):
    """The cause of a difference, and the evidence for it."""

    cause: Cause
    explanation: str

    def __str__(self) -> str:
        return f"{self.cause}: {self.explanation}"


def diagnose(
    pixels: NDArray[np.uint8],
    table: ViewTable,
    positions: NDArray[np.int64],
    stored_digest: NDArray[np.uint32],
    canvas_changed: Callable[[], str | None],
    probe_version: int = PROBE_VERSION,
) -> Diagnosis:
    """Find why the views at `positions`, drawn from `pixels [N, 3, R, R]`, do not have the digests `stored_digest [B]`.

    `table` holds all rows of the view. `canvas_changed` describes how the canvas differs from the recorded one, if it
    does. It may be slow, so it is called only if no experiment explains the difference.
    """
    tried, wanted = positions[:_TRIED], stored_digest[:_TRIED]

    def gives(table: ViewTable, positions: NDArray[np.int64], wanted: NDArray[np.uint32]) -> bool:
        return np.array_equal(digests(render_positions(pixels, table, positions, "reference"), probe_version), wanted)

    if gives(table, tried, wanted):
        why = "the reference renderer draws these views as stored, so the device renderer errs on this machine"
        return Diagnosis("renderer", why)
    for explanation, variant in _other_policies(table):
        if gives(variant, tried, wanted):
            return Diagnosis("policy", f"the stored views are those of {explanation}")
    position = int(positions[0])
    for explanation, variant, place in _other_mixings(table, position):
        if gives(variant, np.array([place]), stored_digest[:1]):
            return Diagnosis("mixing", f"at position {position} the stored view {explanation}")
    if changed := canvas_changed():
        samples = np.unique(np.concatenate([table.sample[positions], table.partner[positions]]))
        samples = samples[samples >= 0]
        shown = ", ".join(map(str, samples[:8])) + (", ..." if len(samples) > 8 else "")
        return Diagnosis("canvas", f"{changed} (samples involved: {shown})")
    if (table.mix == MIX_NONE).any() and (table.mix[positions] != MIX_NONE).all():
        return Diagnosis("mixing", "only mixed views differ")
    why = "this installation draws the policy differently (compare the library versions in the manifest)"
    return Diagnosis("rendering", why)


def _other_policies(table: ViewTable) -> Iterator[tuple[str, ViewTable]]:
    """The same draws under policies that differ in one setting: (description, table)."""
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
    """The view at `position`, mixed in other ways: (description, small table, the view's row in it)."""
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

"""The records that a dump writes before its first shard: its plan, and its samples' labels and keys."""

import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import ValidationError
from pydantic_core import from_json

from kdcache.archive.format.manifest import INT32, MANIFEST_LIMIT, MANIFEST_NAME, WORK, ArchivePlan, first_error
from kdcache.archive.format.store import LocalStore
from kdcache.archive.layouts import LAYOUTS
from kdcache.archive.layouts.base import unit_bytes_rows
from kdcache.archive.reading.reader import dump_command, open_archive
from kdcache.codecs import CODECS
from kdcache.datasets.classes import how_classes_differ, how_samples_differ
from kdcache.datasets.labels import label_numbers, require_names
from kdcache.errors import IncompatibleError, IntegrityError, KdcacheError, UsageError
from kdcache.given import in_order
from kdcache.system.documents import is_text, parse_json
from kdcache.system.files import set_aside
from kdcache.views.policy import PROBE_VERSION

__all__ = [
    "PLAN",
    "SAMPLES",
    "begun_plan",
    "load_plan",
    "load_samples",
    "new_plan",
    "recorded_plan",
    "require_same",
    "samples_record",
]

PLAN, SAMPLES = f"{WORK}/plan.json", f"{WORK}/samples.json"
SHARD_BYTES = 64 << 20  # bytes of logits


def new_plan(
    *,
    num_views: int,
    num_samples: int,
    class_names: Sequence[str],
    codec: str = "i16",
    layout: str = "zarr",
    shard_rows: int | None = None,
    **described: Any,
) -> ArchivePlan:
    """The plan of a new archive. `described` holds the plan's optional fields. Raises UsageError for an impossible plan."""
    counted = {"num_views": (num_views, 1), "num_samples": (num_samples, 1), "first_view": (described.get("first_view", 0), 0)}
    for name, (value, least) in (counted | ({} if shard_rows is None else {"shard_rows": (shard_rows, 1)})).items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or not least <= value <= INT32:
            raise UsageError(
                f"an archive of {value!r:.80} {name.removeprefix('num_')}",
                why=f"it is a whole number from {least} to {INT32}",
                fix=f"give an int for {name}; there is nothing in an archive without views or samples",
            )
    class_names = in_order(class_names, "class names")
    if len(class_names) < 2:
        raise UsageError(
            f"an archive of {len(class_names)} classes", why="distillation needs at least two", fix="give all class names"
        )
    require_names(class_names, "an archive")
    coding = CODECS.parse(codec)
    try:
        plan = ArchivePlan(
            num_views=int(num_views),
            num_samples=int(num_samples),
            class_names=tuple(class_names),
            codec=CODECS.to_dict(coding),
            layout={},
            shard_rows=_shard_rows(shard_rows, coding.dtype.itemsize * len(class_names), num_samples),
            probe_version=PROBE_VERSION,
            rows_hash="blake3",
            **described,
        )
        from_json(plan.model_dump_json())
    except ValidationError as error:
        field, wrong, why = first_error(error)
        raise UsageError(f"an archive with {field} {wrong!r}", why=why, fix="correct it, or leave it out") from None
    except ValueError as error:  # of what the manifest's JSON could not hold, such as arrays and numbers of a thousand digits
        raise UsageError(
            "an archive with a provenance that is no JSON",
            why=" ".join(str(error).split())[:200],
            fix="give texts, numbers and lists of them, such as float(value) for a NumPy number",
        ) from None
    return plan.model_copy(update={"layout": LAYOUTS.to_dict(LAYOUTS.parse(layout).fit(plan))})


def recorded_plan(path: str | os.PathLike[str]) -> ArchivePlan | None:
    """The plan of the finished or unfinished archive in a folder; None if there is none. IntegrityError if it is damaged."""
    store = LocalStore(path)
    if store.exists(MANIFEST_NAME):
        return open_archive(path).manifest
    return load_plan(store) if store.exists(PLAN) else None


def begun_plan(store: LocalStore) -> ArchivePlan | None:
    """The plan of the dump in progress; None if there is none, or if it is damaged."""
    try:
        return load_plan(store) if store.exists(PLAN) else None
    except IntegrityError:
        return None


def load_plan(store: LocalStore) -> ArchivePlan:
    try:
        plan = ArchivePlan.model_validate_json(store.read(PLAN, limit=MANIFEST_LIMIT))
        CODECS.from_dict(plan.codec), LAYOUTS.from_dict(plan.layout)
    except (ValidationError, KdcacheError) as error:
        raise IntegrityError(
            f"{store.path(PLAN)} is not the plan of a dump any more",
            why=str(error.errors()[0]["msg"]) if isinstance(error, ValidationError) else error.what,
            fix="run the dump-teacher command again: finished views are kept"
            if store.exists(MANIFEST_NAME)
            else f"set the folder aside ({set_aside(store.root)}) and run its dump-teacher command again",
        ) from None
    return plan


def load_samples(store: LocalStore, plan: ArchivePlan) -> dict[str, Any]:
    """The recorded labels and keys, None for either if absent. The lists are checked, as the archive may be a stranger's."""
    try:
        samples = parse_json(store.read(SAMPLES))
        for name, kind in (("labels", int), ("keys", str)):
            values = samples[name]
            if values is not None and not (len(values) == plan.num_samples and all(type(value) is kind for value in values)):
                raise ValueError(f"its {name} are not {plan.num_samples} values")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise IntegrityError(
            f"{store.path(SAMPLES)} does not hold the labels and keys of a dump any more",
            why=str(error).splitlines()[0],
            fix=f"{set_aside(store.path(SAMPLES))}; it is written anew by: {dump_command(plan.provenance)}",
        ) from None
    return dict(samples)


def samples_record(plan: ArchivePlan, labels: Any, keys: Sequence[str] | None) -> dict[str, Any]:
    """The record of labels and keys. Raises UsageError if they do not fit the plan's samples and classes."""
    labels = None if labels is None else label_numbers(labels, plan.class_names, "sample label")
    keys = None if keys is None else in_order(keys, "keys")
    for name, values in (("labels", labels), ("keys", keys)):
        if values is not None and len(values) != plan.num_samples:
            raise UsageError(
                f"{len(values)} {name} for {plan.num_samples} samples",
                why=f"there is one of the {name} per sample",
                fix="pass them all",
            )
    for key in keys or ():
        if not isinstance(key, str) or not is_text(key):
            raise UsageError(
                f"key {key!r:.200}",
                why="keys are text that UTF-8 can hold, without the character NUL",
                fix="pass strings, str(key) for example",
            )
    wrong = [label for label in labels or () if not 0 <= label < plan.num_classes]
    if wrong:
        raise UsageError(
            f"label {wrong[0]} with {plan.num_classes} classes",
            why=f"labels are numbers of classes, 0 to {plan.num_classes - 1}",
            fix="pass the place of each sample's class in class_names",
        )
    return {
        "labels": labels,
        "keys": keys,
    }


def require_same(store: LocalStore, earlier: ArchivePlan, plan: ArchivePlan, samples: dict[str, Any] | None) -> None:
    """Raises IncompatibleError, naming what differs, unless `earlier` in the folder is `plan`, with `samples` where known."""
    was, now = (_normalised(archive_plan.identity) for archive_plan in (earlier, plan))
    for key in (key for key in ArchivePlan.model_fields if now.get(key) != was.get(key)):
        if key in {"num_samples", "source"} and samples is not None:
            _require_same_samples(store, earlier, samples)
        theirs, ours = _differing(was.get(key), now.get(key))
        said = f"it has {json.dumps(theirs)[:160]}, this dump has {json.dumps(ours)[:160]}"
        raise IncompatibleError(
            f"{store.root} holds {'a part of another archive' if key == 'subset_of' else f'a dump with another {key}'}",
            why=how_classes_differ(earlier.class_names, plan.class_names) if key == "class_names" else said,
            fix=f"write to another folder, or set that one aside: {set_aside(store.root)}",
        )

    if samples is not None:
        _require_same_samples(store, earlier, samples)


def _differing(was: Any, now: Any) -> tuple[Any, Any]:
    """Both values; of two records, the fields that differ."""
    if not (isinstance(was, dict) and isinstance(now, dict)):
        return was, now
    names = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    return tuple({name: record[name] for name in names if name in record} for record in (was, now))  # type: ignore[return-value]


def _normalised(identity: dict[str, Any]) -> dict[str, Any]:
    """An identity with every option of codec and layout, including options newer than the record."""
    layout, codec = LAYOUTS.from_dict(identity["layout"]), CODECS.from_dict(identity["codec"])
    return {**identity, "layout": LAYOUTS.to_dict(layout), "codec": CODECS.to_dict(codec)}


def _require_same_samples(store: LocalStore, plan: ArchivePlan, samples: dict[str, Any]) -> None:
    if store.exists(SAMPLES):
        earlier = load_samples(store, plan)
    elif store.exists(MANIFEST_NAME):
        finished = open_archive(store.root)
        labels = finished.labels()
        earlier = {"labels": None if labels is None else labels.tolist(), "keys": finished.keys()}
    else:
        return  # the record was lost before anything used it
    for name, values in samples.items():
        if values != earlier[name]:
            raise IncompatibleError(
                f"{store.root} holds a dump with other {name}",
                why=_how_samples_differ(earlier, samples, plan.class_names)
                or f"the {name} of its samples are not those of this dump",
                fix=f"write to another folder, or set that one aside: {set_aside(store.root)}",
            )


def _how_samples_differ(was: dict[str, Any], now: dict[str, Any], names: Sequence[str]) -> str:
    """Which samples changed; empty where one of the two has no keys or labels."""
    if None in (was["keys"], was["labels"], now["keys"], now["labels"]):
        return ""
    return how_samples_differ((was["keys"], was["labels"]), (now["keys"], now["labels"]), names)


def _shard_rows(wanted: int | None, row_bytes: int, num_samples: int) -> int:
    """Rows of a shard: whole units in every layout, so that every archive converts to every layout."""
    unit = min(unit_bytes_rows(row_bytes), num_samples, wanted or num_samples)
    unit = unit if unit % 2 == 0 or unit >= num_samples else 2 * unit  # an even number keeps mixing pairs in one unit
    rows = wanted or max(1, SHARD_BYTES // row_bytes)
    return -(-num_samples // unit) * unit if rows >= num_samples else max(1, rows // unit) * unit

"""Comparison of two archives: whether they hold the same views, by which teachers, and how far apart the logits are."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kdcache.archive.format.manifest import Manifest
from kdcache.archive.format.rows import Rows
from kdcache.archive.reading.reader import Archive
from kdcache.archive.reading.statistics import PAPER_TAUS, spread
from kdcache.codecs import CODECS
from kdcache.datasets.classes import first_differing_class
from kdcache.stats import log_softmax
from kdcache.system.progress import Progress, Silent
from kdcache.views.policy import ViewPolicy

__all__ = ["Comparison", "Distance", "Fact", "compare", "facts", "other_views", "shared_views", "view_range"]

ROWS = 1 << 14
BLOCK_VALUES = 1 << 22  # logits held as float64 at a time, per archive
ABSENT = "unknown"
_SHA256 = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{52}\b")
Meaning = Literal["other rows", "other contents", "other form"]


@dataclass(frozen=True)
class Fact:
    """One property of two archives, with its values `a` and `b` as text, and the meaning of a difference in it.

    "other rows": rows of one archive have no counterpart in the other. "other contents": they have, but come from another
    teacher, precision or number of views. "other form": the contents are the same, only named or stored differently.
    """

    name: str
    a: str
    b: str
    same: bool
    meaning: Meaning
    note: str = ""

    @property
    def shown(self) -> tuple[str, str]:
        """`a` and `b` for people, with each sha256 shortened."""
        return _SHA256.sub(r"\1...", self.a), _SHA256.sub(r"\1...", self.b)


@dataclass(frozen=True)
class Distance:
    """Distance of the softmaxes of two archives at one temperature, over the compared rows. KL is in nats.

    `kl_ab` is KL(p_a || p_b). Entropies are relative, H / log C. `entropy_correlation` is None where either is constant.
    """

    tau: float
    kl_ab_mean: float
    kl_ab_max: float
    kl_ba_mean: float
    kl_ba_max: float
    max_probability: float  # largest |p_a - p_b| of a class
    entropy_a: float
    entropy_b: float
    entropy_difference: float  # mean |H_a - H_b|
    entropy_correlation: float | None


@dataclass(frozen=True)
class Comparison:
    """Result of `compare`. Logits are compared only if both archives have them, of the same views and classes."""

    a: str
    b: str
    facts: tuple[Fact, ...]
    views: range  # views that both archives have
    rows: int = 0  # compared rows
    agreement: float | None = None  # percent of the rows with the same argmax
    max_logit: float | None = None  # largest difference of two logits
    distances: tuple[Distance, ...] = ()

    @property
    def differences(self) -> list[Fact]:
        """The facts in which rows or contents differ."""
        return [fact for fact in self.facts if not fact.same and fact.meaning != "other form"]

    @property
    def comparable(self) -> bool:
        """Whether the rows of the two archives belong together, as far as is known."""
        return bool(self.views) and all(fact.same for fact in self.facts if fact.meaning == "other rows")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `views` as [first, stop]."""
        return {**dataclasses.asdict(self), "views": [self.views.start, self.views.stop]}


def facts(a: Archive, b: Archive) -> Iterator[Fact]:
    """Facts from the manifests: views, teachers and storage, and each policy field in which the two differ."""

    def fact(name: str, of_a: object, of_b: object, meaning: Meaning, note: str = "") -> Fact:
        x, y = (ABSENT if value is None else str(value) for value in (of_a, of_b))
        return Fact(name, x, y, x == y, meaning, "" if x == y else note)

    m, n = a.manifest, b.manifest
    s, t = m.teacher, n.teacher
    yield fact("digest", m.digest, n.digest, "other form")
    yield fact("samples", m.num_samples, n.num_samples, "other rows")
    yield _classes(m.class_names, n.class_names)
    yield fact("dataset", _dataset(m), _dataset(n), "other form")
    yield fact("data", m.source and m.source.digest, n.source and n.source.digest, "other rows", "other files, labels or classes")
    yield fact("canvas size", m.canvas and m.canvas.size, n.canvas and n.canvas.size, "other rows")
    yield fact(
        "canvas", m.canvas and m.canvas.digest, n.canvas and n.canvas.digest, "other rows", "other images, or decoded otherwise"
    )
    yield fact("policy", m.policy_digest, n.policy_digest, "other rows")
    for field, of_a, of_b in _differing_fields(m.policy, n.policy):
        yield fact(f"policy.{field}", of_a, of_b, "other rows")
    yield fact("views", view_range(a.views), view_range(b.views), "other contents")
    yield fact("contents", m.contents, n.contents, "other contents")
    yield fact("teacher", s and f"{s.alias} = {s.name}", t and f"{t.alias} = {t.name}", "other form")
    yield fact("weights", s and s.weights_sha256, t and t.weights_sha256, "other contents")
    yield fact("precision", s and s.precision, t and t.precision, "other contents")
    yield fact("batch size", s and s.batch_size, t and t.batch_size, "other contents", "changes last bits at most")
    if any(card.memory_format != "contiguous" for card in (s, t) if card):
        yield fact("memory format", s and s.memory_format, t and t.memory_format, "other contents", "changes last bits at most")
    yield fact("codec", _component(m.codec), _component(n.codec), "other form")
    yield fact("layout", _component(m.layout), _component(n.layout), "other form")
    yield fact("shard rows", m.shard_rows, n.shard_rows, "other form")


def compare(
    a: Archive, b: Archive, taus: Sequence[float] = PAPER_TAUS, rows: int = ROWS, progress: Progress | None = None
) -> Comparison:
    """Compare two archives: manifests, fingerprints of their shared views, and the logits of at most `rows` rows.

    Rows are matched by (view, sample). The rows whose logits are compared are evenly spaced. Layout, codec and shards may
    differ. Memory holds one view's columns, or a few thousand rows of logits, at a time.
    """
    progress = progress or Silent()
    comparison = Comparison(a.location, b.location, tuple(facts(a, b)), shared_views(a, b))
    if comparison.comparable:
        comparison = dataclasses.replace(comparison, facts=(*comparison.facts, *_stored_views(a, b, progress)))
    if comparison.comparable and a.manifest.contents == b.manifest.contents == "all":
        return _with_distances(comparison, a, b, taus, rows, progress)
    return comparison


def shared_views(*archives: Archive) -> range:
    """Numbers of the views that all archives have."""
    first = max(archive.views.start for archive in archives)
    return range(first, max(first, min(archive.views.stop for archive in archives)))


def other_views(a: Archive, rows_a: Rows, b: Archive, rows_b: Rows) -> NDArray[np.bool_]:
    """Whether each row pair shows different views, by sample numbers and stored fingerprints: bool `[n]`."""
    evidence = _evidence(a, b)
    differs = np.atleast_2d((getattr(rows_a, evidence) != getattr(rows_b, evidence)).T).any(axis=0)
    result: NDArray[np.bool_] = differs | (rows_a.sample != rows_b.sample)
    return result


def _evidence(a: Archive, b: Archive) -> str:
    """The column that identifies views: the digest, or the probe where digests were computed by different rules."""
    return "digest" if a.manifest.probe_version == b.manifest.probe_version else "probe"


def _stored_views(a: Archive, b: Archive, progress: Progress) -> Iterator[Fact]:
    """Facts from stored columns: whether the rows of the shared views show the same views, and in the same order."""
    evidence, views = _evidence(a, b), shared_views(a, b)
    total, moved, other = len(views) * a.num_samples, 0, 0
    stored, examples = False, list[str]()
    for done, view in enumerate(views, 1):
        samples = [archive.column("sample", view) for archive in (a, b)]
        columns = [archive.column(evidence, view) for archive in (a, b)]
        stored |= any(column.any() for column in columns)
        if away := int((samples[0] != samples[1]).sum()):
            moved += away
            columns = [column[np.argsort(sample)] for column, sample in zip(columns, samples, strict=True)]
            samples = [np.sort(sample) for sample in samples]
        differs = np.atleast_2d((columns[0] != columns[1]).T).any(axis=0) | (samples[0] != samples[1])
        other += int(differs.sum())
        examples += [f"view {view} of sample {sample}" for sample in samples[0][differs][: 3 - len(examples)]]
        progress.update("comparing views", done, len(views))
    yield Fact("order", *_counts(total, moved, "in the same place"), moved == 0, "other contents")
    if stored:
        yield Fact("fingerprints", *_counts(total, other, "the same"), other == 0, "other rows", _such_as(examples))
    else:
        yield Fact("fingerprints", ABSENT, ABSENT, True, "other rows", "that these are the same views is not recorded")


def _with_distances(
    comparison: Comparison, a: Archive, b: Archive, taus: Sequence[float], rows: int, progress: Progress
) -> Comparison:
    measured: dict[float, list[NDArray[np.float64]]] = {tau: [] for tau in taus}
    agreeing, moved, unequal, largest, done = 0, 0, 0, 0.0, 0
    count = min(rows, len(comparison.views) * a.num_samples)
    for block in spread(comparison.views, a.num_samples, rows, max(1, BLOCK_VALUES // a.num_classes)):
        of_a = [a.take(view, positions) for view, positions in block]
        of_b = [_of_samples(b, view, positions, part.sample) for (view, positions), part in zip(block, of_a, strict=True)]
        x, y = (np.concatenate([part.logits for part in parts]) for parts in (of_a, of_b))
        agreeing += sum(int((p.argmax == q.argmax).sum()) for p, q in zip(of_a, of_b, strict=True))
        apart = np.abs(x.astype(np.float64) - y).max(axis=1)
        unequal += int((apart > 0).sum())
        moved += int((apart > 1.01 * (_rounding(a, x) + _rounding(b, y))).sum())
        largest = max(largest, float(apart.max()))
        for tau, parts in measured.items():
            parts.append(_row_distances(x, y, tau))
        done += len(x)
        progress.update("comparing logits", done, count)
    note = f"up to {largest:.3g} apart" + ("" if moved else ", by what the codecs round")
    logits = Fact("logits", *_counts(done, unequal, "equal"), moved == 0, "other contents", note if unequal else "")
    return dataclasses.replace(
        comparison,
        facts=(*comparison.facts, logits),
        rows=done,
        agreement=100.0 * agreeing / done,
        max_logit=largest,
        distances=tuple(_distance(tau, np.concatenate(parts, axis=1)) for tau, parts in measured.items()),
    )


def _of_samples(archive: Archive, view: int, positions: NDArray[np.int64], samples: NDArray[np.int64]) -> Rows:
    """Rows of `samples`. Tries `positions` first, since a search by sample reads a whole column."""
    rows = archive.take(view, positions)
    return rows if np.array_equal(rows.sample, samples) else archive.find(view, samples)


def _rounding(archive: Archive, logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """The largest rounding error of the codec in each row, `[n]`. Encoding stored logits again gives the same codes."""
    codes = CODECS.from_dict(archive.manifest.codec)
    return codes.max_error(codes.encode(logits))


def _row_distances(a: NDArray[np.float32], b: NDArray[np.float32], tau: float) -> NDArray[np.float64]:
    """Per row: KL(a || b), KL(b || a), largest |p_a - p_b|, relative entropies of a and b. Float64 `[5, n]`."""
    log_p, log_q = log_softmax(a, tau), log_softmax(b, tau)
    p, q = np.exp(log_p), np.exp(log_q)
    ratio = log_p - log_q
    return np.stack(
        [
            np.maximum((p * ratio).sum(axis=1), 0),
            np.maximum(-(q * ratio).sum(axis=1), 0),
            np.abs(p - q).max(axis=1),
            -(p * log_p).sum(axis=1) / math.log(p.shape[1]),
            -(q * log_q).sum(axis=1) / math.log(q.shape[1]),
        ]
    )


def _distance(tau: float, rows: NDArray[np.float64]) -> Distance:
    kl_ab, kl_ba, probability, entropy_a, entropy_b = rows
    constant = min(entropy_a.std(), entropy_b.std()) < 1e-12
    return Distance(
        tau=tau,
        kl_ab_mean=float(kl_ab.mean()),
        kl_ab_max=float(kl_ab.max()),
        kl_ba_mean=float(kl_ba.mean()),
        kl_ba_max=float(kl_ba.max()),
        max_probability=float(probability.max()),
        entropy_a=float(entropy_a.mean()),
        entropy_b=float(entropy_b.mean()),
        entropy_difference=float(np.abs(entropy_a - entropy_b).mean()),
        entropy_correlation=None if constant else float(np.corrcoef(entropy_a, entropy_b)[0, 1]),
    )


def _dataset(manifest: Manifest) -> str | None:
    return f"{manifest.source.name}, {manifest.source.split} split" if manifest.source else None


def view_range(views: range) -> str:
    """View numbers as text, such as "0 to 9"."""
    return f"{views.start} to {views.stop - 1}" if len(views) > 1 else str(views.start)


def _component(stored: Mapping[str, Any]) -> str:
    options = ", ".join(f"{key} {value}" for key, value in stored.items() if key != "name")
    return f"{stored['name']}" + (f" ({options})" if options else "")


def _classes(a: Sequence[str], b: Sequence[str]) -> Fact:
    if (first := first_differing_class(a, b)) is None:
        return Fact("classes", str(len(a)), str(len(b)), True, "other rows")
    x, y = (f"{len(names)}, number {first.number} is {name or 'none'}" for names, name in ((a, first.a), (b, first.b)))
    return Fact("classes", x, y, False, "other rows", first.kind)


def _differing_fields(a: ViewPolicy | None, b: ViewPolicy | None) -> Iterator[tuple[str, object, object]]:
    """Dotted name and both values of every differing policy field."""
    if a and b:
        x, y = (_flat(policy.model_dump(mode="json")) for policy in (a, b))
        for name in x | y:
            if x.get(name) != y.get(name):
                yield name, x.get(name, "none"), y.get(name, "none")


def _flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _counts(total: int, differing: int, alike: str) -> tuple[str, str]:
    return f"{total:,} rows", f"{total - differing:,} of them {alike}" if differing else f"all {alike}"


def _such_as(examples: Sequence[str]) -> str:
    return f"not the same: {', '.join(examples)}, ..." if examples else ""

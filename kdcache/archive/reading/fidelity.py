"""Fidelity of codecs: how another codec would change an archive's logits, measured as divergence, ranks, entropies and bytes.

The archive's rows count as the truth here. The loss of the archive's own codec cannot be measured afterwards; its bound
says how large it can be.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kdcache.archive.layouts import COMPRESSIONS, Compression, compressed_bytes
from kdcache.codecs import CODECS, UnstorableError, kl_bound
from kdcache.stats import relative_entropy, softmax
from kdcache.system.progress import Progress

__all__ = ["CodecFidelity", "TauFidelity", "measure_fidelity", "rank_correlation"]

CHUNK = 1 << 17  # logits; layouts compress this many at a time, and they stay in a core's cache

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class TauFidelity:
    """Changes by a codec at one temperature, as mean and maximum over the rows."""

    tau: float
    kl_mean: float  # KL(p || p^), nats
    kl_max: float
    kl_bound: float  # largest bound of the codec over these rows
    bound_share: float  # the largest KL as a fraction of its own row's bound; at most 1
    probability_max: float  # |p - p^|
    entropy_mean: float  # |change of H^(p)|
    entropy_max: float
    entropy_rest_mean: float  # |change of H^(p-bar)|
    entropy_rest_max: float


@dataclass(frozen=True)
class CodecFidelity:
    """Loss and size of one codec. If the codec cannot hold these rows, `refused` says why and the figures are unset."""

    codec: str
    rows: int
    refused: str = ""
    bytes_per_logit: float = 0.0  # includes the row's parameters
    compressed: dict[str, float] = field(default_factory=dict)  # bytes per logit, by lossless compression
    logit_max: float = 0.0  # largest change of a logit
    logit_bound: float = 0.0  # largest bound of the codec over these rows
    argmax_changes: int = 0
    rank_mean: float | None = None  # Spearman's correlation of the classes below the top one; None: nowhere defined
    rank_min: float | None = None
    per_tau: tuple[TauFidelity, ...] = ()


def measure_fidelity(
    blocks: Iterable[NDArray[np.float32]], rows: int, codecs: Sequence[str], taus: Sequence[float], progress: Progress
) -> list[CodecFidelity]:
    """Encode and decode `blocks` of logits, float32 `[n, C]` with `rows` rows in all, with each codec; compare at every tau."""
    trials = [_Trial(name, len(taus)) for name in codecs]
    done = 0
    for block in blocks:
        step = max(1, CHUNK // block.shape[1])
        for part in (block[start : start + step] for start in range(0, len(block), step)):
            _compare(part, [trial for trial in trials if trial.store(part)], taus)
            done += len(part)
            progress.update("fidelity", done, rows)
    return [trial.result(rows, taus) for trial in trials]


def _compare(truth: NDArray[np.float32], trials: Sequence["_Trial"], taus: Sequence[float]) -> None:
    top = truth.argmax(axis=1)
    for trial in trials:
        change = np.abs(trial.decoded.astype(np.float64) - truth).max(axis=1)
        trial.logit.add(change)
        trial.logit_bound.add(trial.allowed)
        trial.argmax_changes += int((trial.decoded.argmax(axis=1) != top).sum())
        trial.ranks.add(rank_correlation(_without(truth, top), _without(trial.decoded, top)))
    for number, tau in enumerate(taus):
        p = softmax(truth, tau)
        h, rest = relative_entropy(truth, tau)
        for trial in trials:
            kl, bound = _divergence(p, truth, trial.decoded, tau), kl_bound(trial.allowed, tau)
            other_h, other_rest = relative_entropy(trial.decoded, tau)
            measured = {
                "kl": kl,
                "bound": bound,
                "share": np.divide(kl, bound, out=np.where(kl > 0, np.inf, 0.0), where=bound > 0),
                "probability": np.abs(softmax(trial.decoded, tau) - p).max(axis=1),
                "entropy": np.abs(other_h - h),
                "entropy_rest": np.abs(other_rest - rest),
            }
            for name, values in measured.items():
                trial.per_tau[number].setdefault(name, _Summary()).add(values)


def _divergence(p: Floats, truth: NDArray[np.float32], decoded: NDArray[np.float32], tau: float) -> Floats:
    """KL(p || p^) of each row, in nats: float64 `[n]`.

    Let x be the change of z / tau minus its mean under p. Then KL = log E_p[e^x] = log1p(E_p[e^x - 1 - x]). This is exact
    even for x of 1e-6 and a divergence of 1e-12, where a difference of two logarithms loses all digits.
    """
    x = (decoded.astype(np.float64) - truth) / tau
    x -= np.einsum("nc,nc->n", p, x)[:, None]
    kl: Floats = np.log1p(np.einsum("nc,nc->n", p, np.expm1(x) - x))
    return np.maximum(kl, 0.0)


def rank_correlation(truth: NDArray, other: NDArray) -> Floats:
    """Spearman's rank correlation of the rows of two arrays `[n, C]`: float64 `[n]`. Ties share their mean rank.

    NaN where the row of `truth` is constant; 0 where only the row of `other` is.
    """
    a, b = (ranks - ranks.mean(axis=1, keepdims=True) for ranks in (_ranks(truth), _ranks(other)))
    norm_a, norm_b = (np.sqrt(np.einsum("nc,nc->n", x, x)) for x in (a, b))
    product = np.einsum("nc,nc->n", a, b)
    correlation: Floats = np.divide(product, norm_a * norm_b, out=np.zeros(len(a)), where=norm_a * norm_b > 0)
    return np.where(norm_a > 0, correlation, np.nan)


def _ranks(values: NDArray) -> Floats:
    """Ranks within each row, from 0; ties share their mean rank."""
    order = values.argsort(axis=1)
    ascending = np.take_along_axis(values, order, axis=1)
    place = np.broadcast_to(np.arange(values.shape[1]), values.shape)
    differs = np.diff(ascending, axis=1) != 0
    edge = np.ones((len(values), 1), bool)
    first = np.maximum.accumulate(np.where(np.hstack([edge, differs]), place, 0), axis=1)
    last = np.minimum.accumulate(np.where(np.hstack([differs, edge]), place, values.shape[1])[:, ::-1], axis=1)[:, ::-1]
    ranks = np.empty(values.shape)
    np.put_along_axis(ranks, order, (first + last) / 2, axis=1)
    return ranks


def _without(logits: NDArray[np.float32], top: NDArray[np.int64]) -> NDArray[np.float32]:
    """All columns but `top [n]`: `[n, C - 1]`, in no particular order."""
    others = logits.copy()
    np.put_along_axis(others, top[:, None], logits[:, -1:], axis=1)
    return others[:, :-1]


class _Summary:
    """Mean and extremes of values that arrive in parts. NaNs are ignored."""

    def __init__(self) -> None:
        self.total, self.count, self.min, self.max = 0.0, 0, np.inf, -np.inf

    def add(self, values: Floats) -> None:
        values = values[~np.isnan(values)]
        self.total += float(values.sum())
        self.count += len(values)
        self.min = min(self.min, float(values.min(initial=np.inf)))
        self.max = max(self.max, float(values.max(initial=-np.inf)))

    @property
    def mean(self) -> float:
        return self.total / self.count


class _Trial:
    """One codec under trial: its encoding of the current rows, and the summaries so far."""

    def __init__(self, name: str, taus: int) -> None:
        self.name, self.codec = name, CODECS.build(name)
        self.refused = ""
        self.logits, self.bytes = 0, 0
        self.compressed: dict[Compression, int] = dict.fromkeys(COMPRESSIONS, 0)
        self.logit, self.logit_bound, self.ranks, self.argmax_changes = _Summary(), _Summary(), _Summary(), 0
        self.per_tau: list[dict[str, _Summary]] = [{} for _ in range(taus)]

    def store(self, rows: NDArray[np.float32]) -> bool:
        """Encode and decode `rows`. Returns False if the codec refuses them, or has refused rows before."""
        if self.refused:
            return False
        try:
            stored = self.codec.encode(rows)
        except UnstorableError as error:
            self.refused = f"{error.why}; one is {error.value:.6g}"
            return False
        self.decoded, self.allowed = self.codec.decode(stored), self.codec.max_error(stored)
        self.logits += rows.size
        self.bytes += sum(values.nbytes for values in stored.values())
        beside = sum(values.nbytes for name, values in stored.items() if name != "logits")
        for name in list(self.compressed):
            if (size := compressed_bytes(name, stored["logits"])) is None:
                del self.compressed[name]
            else:
                self.compressed[name] += size + beside
        return True

    def result(self, rows: int, taus: Sequence[float]) -> CodecFidelity:
        if self.refused:
            return CodecFidelity(self.name, rows, self.refused)
        per_tau = [
            TauFidelity(
                tau=tau,
                kl_mean=summaries["kl"].mean,
                kl_max=summaries["kl"].max,
                kl_bound=summaries["bound"].max,
                bound_share=summaries["share"].max,
                probability_max=summaries["probability"].max,
                entropy_mean=summaries["entropy"].mean,
                entropy_max=summaries["entropy"].max,
                entropy_rest_mean=summaries["entropy_rest"].mean,
                entropy_rest_max=summaries["entropy_rest"].max,
            )
            for tau, summaries in zip(taus, self.per_tau, strict=True)
        ]
        return CodecFidelity(
            codec=self.name,
            rows=rows,
            bytes_per_logit=self.bytes / self.logits,
            compressed={str(name): size / self.logits for name, size in self.compressed.items()},
            logit_max=self.logit.max,
            logit_bound=self.logit_bound.max,
            argmax_changes=self.argmax_changes,
            rank_mean=self.ranks.mean if self.ranks.count else None,
            rank_min=self.ranks.min if self.ranks.count else None,
            per_tau=tuple(per_tau),
        )

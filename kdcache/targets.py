"""Targets: what a student is trained towards, made from teacher logits at training time.

A *control* turns targets into other targets, to show what the teacher's knowledge is worth: label smoothing of the
same entropy, the teacher's own logits with all but the top k shuffled (temperature study, sections 4.2 and 4.3), or what
is left of them where only the top k were kept.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import UsageError
from kdcache.registry import FITTED, Registry
from kdcache.stats import entropy, softmax, sorted_mean_softmax
from kdcache.system.lazy import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")

__all__ = ["CONTROLS", "Control", "Targets", "averaged", "control", "match_entropy", "row_keys"]


@dataclass(frozen=True)
class Targets:
    """Teacher `logits` float32 `[B, C]` at temperature `tau`, and the labels of the mix where there are any.

    `lam [B]` is the share of `label_a`; the rest is `label_b`'s. `second` are the targets of another view of the same
    samples, for methods that compare two.
    """

    logits: Tensor
    tau: float
    label_a: Tensor | None = None
    label_b: Tensor | None = None
    lam: Tensor | None = None
    second: Targets | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.logits, torch.Tensor) or not self.logits.is_floating_point():
            kind = f" of {self.logits.dtype}" if hasattr(self.logits, "dtype") else ""
            raise ValueError(f"logits must be a tensor of floats, got {type(self.logits).__name__}{kind}")
        if self.logits.ndim != 2:
            raise ValueError(f"logits must be [B, C], got {list(self.logits.shape)}")
        if not 0 < self.tau < math.inf:
            raise ValueError(f"tau must be positive and finite, got {self.tau}")

    @property
    def probs(self) -> Tensor:
        """softmax(logits / tau), float32 `[B, C]`."""
        return torch.softmax(self.logits.float() / self.tau, dim=1)

    def with_logits(self, logits: Tensor) -> Targets:
        return dataclasses.replace(self, logits=logits)

    def to(self, device: torch.device | str) -> Targets:
        parts = vars(self).items()
        moved: dict[str, Any] = {name: part.to(device) for name, part in parts if isinstance(part, torch.Tensor | Targets)}
        return dataclasses.replace(self, **moved)


def averaged(logits: Tensor, tau: float) -> Tensor:
    """Target logits float32 `[B, C]` at `tau` of several teachers' `logits [B, K, C]`; those of one, `[B, C]`, stay as they are.

    With p = mean_k softmax(z_k / tau) they are tau log p, whose softmax at tau is p. Computed from log softmaxes in float64,
    so that no p is 0.
    """
    if logits.ndim == 2:
        return logits
    log_p = torch.log_softmax(logits.double() / tau, dim=2).logsumexp(dim=1) - math.log(logits.shape[1])
    return (tau * log_p).float()


class Control(ABC):
    """Maps targets to other targets of the same shape, temperature, labels and dtype."""

    source: ClassVar[str] = ""  # paper and section
    needs: ClassVar[tuple[str, ...]] = ()
    smooths: ClassVar[bool] = False  # whether it is label smoothing, of an entropy that is matched at tau

    def check(self, num_classes: int) -> None:  # noqa: B027  # most mean something with any number
        """Raises UsageError where the control means nothing with so many classes."""

    def fit(self, blocks: Iterable[NDArray[np.float32]], tau: float) -> Self:
        """The control as it is to be used at `tau` on an archive whose logits are the `blocks [n, C]`."""
        return self

    @abstractmethod
    def __call__(self, targets: Targets, rng_key: Tensor) -> Targets:
        """Other targets. `rng_key` int64 `[B, 2]` are the rows' keys (see `row_keys`), for what is random."""


CONTROLS: Registry[Control] = Registry("control", entry_points="kdcache.controls", base=Control)


def control(name: str, **options: Any) -> Control:
    """The control `name` with its options."""
    return CONTROLS.build(name, **options)


@CONTROLS.register("none")
@dataclass(frozen=True)
class Unchanged(Control):
    """The teacher's own logits."""

    def __call__(self, targets: Targets, rng_key: Tensor) -> Targets:
        return targets


@CONTROLS.register("ls-instance")
@dataclass(frozen=True)
class InstanceSmoothing(Control):
    """Label smoothing of the teacher's argmax, with every sample's own entropy at tau (temperature study, section 4.2)."""

    smooths: ClassVar[bool] = True

    def __call__(self, targets: Targets, rng_key: Tensor) -> Targets:
        log_p = torch.log_softmax(targets.logits.double() / targets.tau, dim=1)
        p, classes = log_p.exp(), log_p.shape[1]
        # H and log C - H, each directly: the difference of two nearly equal numbers would lose the former of confident rows,
        # whose top class has a log p that rounds to 0 besides, and the latter at large tau.
        deficit = (p * (log_p + math.log(classes))).sum(dim=1)
        others = p.scatter(1, log_p.argmax(dim=1, keepdim=True), 0.0)
        share = others.sum(dim=1)
        entropy = -(others * log_p).sum(dim=1) - (1 - share) * torch.log1p(-share)
        return _smoothed(targets, _log_odds(deficit, entropy, classes))


@CONTROLS.register("ls-global")
@dataclass(frozen=True)
class GlobalSmoothing(Control):
    """Label smoothing of the teacher's argmax, one strength for all: that of the archive's average softmax at tau.

    `average` says how the average is formed, which the paper leaves open: the entropy of the mean of the *sorted*
    softmax vectors, the mean of the entropies, or the entropy of the plain class-wise mean (near uniform on balanced data).
    """

    average: Literal["sorted-mean", "mean-entropy", "plain-mean"] = "sorted-mean"
    deficit: float | None = dataclasses.field(
        default=None, metadata=FITTED
    )  # log C - H in nats at the tau it was fitted for; found by `fit`
    smooths: ClassVar[bool] = True

    def fit(self, blocks: Iterable[NDArray[np.float32]], tau: float) -> Self:
        rows = 0
        total: Any = 0.0
        for block in blocks:
            rows += len(block)
            if self.average == "mean-entropy":
                total = total + entropy(block, tau).sum()
            elif self.average == "sorted-mean":
                total = total + sorted_mean_softmax(block, tau) * len(block)
            else:
                total = total + softmax(block, tau).sum(axis=0)
            classes = block.shape[1]
        if not rows:
            raise ValueError("ls-global needs at least one row to average")
        mean = total / rows
        if self.average == "mean-entropy":
            return dataclasses.replace(self, deficit=float(math.log(classes) - mean))
        mean = mean[mean > 0]
        return dataclasses.replace(self, deficit=float((mean * np.log(mean * classes)).sum()))

    def __call__(self, targets: Targets, rng_key: Tensor) -> Targets:
        if self.deficit is None:
            raise UsageError(
                "control ls-global was not fitted",
                why="its strength is that of an archive's average softmax at tau",
                fix="use what control.fit(archive.spread_logits(), tau) gives",
            )
        return _smoothed(targets, _one_log_odds(self.deficit, targets.logits.shape[1]))


@CONTROLS.register("bottom")
@dataclass(frozen=True)
class BottomShuffled(Control):
    """Keep the `k` largest logits where they are and permute the other C - k (temperature study, section 4.2).

    Logits are permuted, once for every temperature: softmax follows the permutation, so both entropies stay as they were.
    The study does not say how long a permutation lasts: `per` view, it is another one each time that a sample is shown; `per`
    sample, always the same.
    """

    k: int
    seed: int = 0
    per: Literal["view", "sample"] = "view"

    def __post_init__(self) -> None:
        _require_top("bottom", self.k)

    def check(self, num_classes: int) -> None:
        _require_rest("bottom", self.k, num_classes, "to permute")

    def __call__(self, targets: Targets, rng_key: Tensor) -> Targets:
        logits = targets.logits
        self.check(logits.shape[1])
        bottom = _bottom(logits, self.k)
        key = rng_key[:, 0 if self.per == "view" else 1]
        draws = _mix64(
            _mix64(key + _signed(self.seed * _GOLDEN))[:, None] + torch.arange(bottom.shape[1], device=logits.device) * _GOLDEN
        )
        source = bottom.gather(1, draws.argsort(dim=1, stable=True))
        return targets.with_logits(logits.scatter(1, bottom, logits.gather(1, source)))


@CONTROLS.register("topk")
@dataclass(frozen=True)
class TopK(Control):
    """What a sparse cache keeps: the `k` largest probabilities at tau 1, and what is left in equal parts for the other C - k.

    Such caches (FKD and its kin) store probabilities, so that a larger tau tempers the same flattened rest.
    """

    k: int

    def __post_init__(self) -> None:
        _require_top("topk", self.k)

    def check(self, num_classes: int) -> None:
        _require_rest("topk", self.k, num_classes, "to flatten")

    def __call__(self, targets: Targets, rng_key: Tensor) -> Targets:
        logits = targets.logits
        self.check(logits.shape[1])
        bottom = _bottom(logits, self.k)
        # The logit of each of n classes that share their whole mass: logsumexp - log n.
        flat = logits.gather(1, bottom).double().logsumexp(dim=1, keepdim=True) - math.log(bottom.shape[1])
        return targets.with_logits(logits.scatter(1, bottom, flat.to(logits.dtype).expand(bottom.shape)))


def _bottom(logits: Tensor, k: int) -> Tensor:
    """The classes of all but the `k` largest `logits [B, C]`: int64 `[B, C - k]`; of a tie at rank k, the later ones."""
    return logits.argsort(dim=1, descending=True, stable=True)[:, k:]


def _require_top(name: str, k: int) -> None:
    if k < 1:
        raise UsageError(f"control {name}:{k}", why="at least the top class is kept", fix=f"use k >= 1, such as {name}:5")


def _require_rest(name: str, k: int, classes: int, purpose: str) -> None:
    if k >= classes - 1:
        raise UsageError(
            f"control {name}:{k} with {classes} classes",
            why=f"only {max(classes - k, 0)} class(es) would be left {purpose}, so nothing would change",
            fix=f"use k <= {classes - 2}" if classes > 2 else "use another control",
        )


def match_entropy(deficit: Tensor, classes: int) -> Tensor:
    """d = 1 - alpha of the label smoothing whose entropy is log C - `deficit`: float64 `[B]`, with a relative error below 1e-13.

    The smoothed vector has 1 - alpha + alpha/C at the top and alpha/C elsewhere, and its deficit is
    D(d) = (1 + d(C-1))/C log(1 + d(C-1)) + (C-1)/C (1-d) log(1-d), strictly increasing from 0 to log C on [0, 1].
    """
    return torch.sigmoid(_log_odds(deficit, _left(deficit, classes), classes))


def _left(deficit: Tensor, classes: int) -> Tensor:
    """The entropy log C - `deficit`, as far as float64 has it: at least half of what rounding moves log C by."""
    return (math.log(classes) - deficit.double()).clamp(min=math.log(classes) * 2.0**-54)


def _log_odds(deficit: Tensor, entropy: Tensor, classes: int) -> Tensor:
    """log(d / (1 - d)) of `match_entropy`: float64 `[B]`, -inf where `deficit` is not positive.

    It is a smooth function of log(D / H), and interpolated in a table of it: a handful of kernels on a GPU, which no value makes
    the host wait for. Neither end loses accuracy: not a tiny d, as at large tau, nor a tiny 1 - d, if `entropy` has all its
    digits.
    """
    if classes < 2:
        return torch.full_like(deficit, -math.inf, dtype=torch.float64)
    knots, cubics = _inverse_on(deficit.device, classes)
    deficit = deficit.double()
    x = (deficit / entropy).log().clamp(*_ends(classes))
    start, c0, c1, c2, c3 = cubics.index_select(0, torch.searchsorted(knots, x, right=True)).unbind(1)
    x = x - start
    odds = torch.addcmul(c0, x, torch.addcmul(c1, x, torch.addcmul(c2, x, c3)))
    return odds.masked_fill(deficit <= 0, -math.inf)


@lru_cache(maxsize=256)
def _one_log_odds(deficit: float, classes: int) -> float:
    """`_log_odds` of a single deficit, solved once."""
    only = torch.tensor([deficit], dtype=torch.float64)
    return float(_log_odds(only, _left(only, classes), classes))


@lru_cache(maxsize=16)
def _inverse_on(device: torch.device, classes: int) -> tuple[Tensor, Tensor]:
    x, cubics = _inverse(classes)
    # Waited for, once, so that any stream may use them later.
    return torch.from_numpy(x[1:-1].copy()).to(device), torch.from_numpy(cubics).to(device)


def _ends(classes: int) -> tuple[float, float]:
    x, _ = _inverse(classes)
    return float(x[0]), float(x[-1])


@lru_cache(maxsize=16)
def _inverse(classes: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Knots x `[n]` of log(D / (log C - D)), and `[n - 1, 5]` for each interval: its first knot, and the cubic from there whose
    values and slopes at both ends are those of log(d / (1 - d)).
    """
    # Below, d is nothing beside what float32 logits hold; above, 1 - d is next to what float64 holds, and has few bends.
    odds = np.concatenate([np.linspace(-60.0, 30 * math.log(10), 1 << 15), np.linspace(30 * math.log(10), 650.0, 1 << 13)[1:]])
    d, rest, log_alpha = 1 / (1 + np.exp(-odds)), classes - 1, -np.logaddexp(0, odds)
    alpha = np.exp(log_alpha)
    small = d < 0.03
    # (1 + x) log(1 + x) - x of both terms of D, whose -x cancel: a sum of products that are never negative.
    of_rest = np.where(small, _bent(np.where(small, -d, 0)), alpha * log_alpha + d)
    deficit = (_bent(rest * d) + rest * of_rest) / classes
    share = alpha * rest / classes
    entropy = -(1 - share) * np.log1p(-share) - share * (log_alpha - math.log(classes))
    x = np.log(deficit) - np.log(entropy)
    slope = rest / classes * (np.log1p(rest * d) - log_alpha) * d * alpha  # of the deficit, by the log odds
    slope = 1 / (slope * (1 / deficit + 1 / entropy))
    width, secant = np.diff(x), np.diff(odds) / np.diff(x)
    second = (3 * secant - 2 * slope[:-1] - slope[1:]) / width
    third = (slope[:-1] + slope[1:] - 2 * secant) / width**2
    return x, np.stack([x[:-1], odds[:-1], slope[:-1], second, third], axis=1)


def _bent(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """(1 + x) log(1 + x) - x for x > -1, by its series where the difference would lose digits."""
    near = np.where(np.abs(x) < 0.03, x, 0.0)
    series = np.zeros_like(near)
    for k in range(12, 1, -1):
        series = (series + (-1) ** k / (k * (k - 1))) * near
    return np.where(np.abs(x) < 0.03, series * near, (1 + x) * np.log1p(x) - x)


def _smoothed(targets: Targets, log_odds: Tensor | float) -> Targets:
    """Targets whose softmax at their tau is the smoothed one: the top logit is tau log(1 + C d / (1 - d)), the others 0."""
    logits = torch.zeros_like(targets.logits, dtype=torch.promote_types(targets.logits.dtype, torch.float32))
    best, classes = targets.logits.argmax(dim=1, keepdim=True), targets.logits.shape[1]
    if isinstance(log_odds, float):
        return targets.with_logits(logits.scatter_(1, best, targets.tau * math.log1p(classes * math.exp(log_odds))))
    top = targets.tau * torch.log1p(classes * log_odds.exp())
    return targets.with_logits(logits.scatter_(1, best, top.to(logits.dtype)[:, None]))


def _signed(value: int) -> int:
    """`value` modulo 2^64, as an int64."""
    value %= 1 << 64
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)


def _mix64(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64: counter to random number, the same on every device (Steele et al. 2014)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def row_keys(archive_digest: str, view: int, sample: Tensor) -> Tensor:
    """Random keys int64 `[B, 2]` of rows, from the archive's digest and the `sample` numbers int64 `[B]`.

    The first is also the view's; the second is one sample's in all views.
    """
    return torch.stack([_mix64(_mix64(sample * _GOLDEN) ^ _base(f"{archive_digest} {which}")) for which in (view, "all")], dim=1)


def _base(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)

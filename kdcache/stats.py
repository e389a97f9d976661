"""Entropies and other summaries of logits, in NumPy, computed in float64.

Formulas: H(p) = logsumexp(z) - sum_c p_c z_c with z = logits / tau, in nats. The *relative* entropies of the
temperature study (arXiv 2603.02430, section 4.3) are H(p) / log C and H(p-bar) / log(C - 1), where p-bar drops the
argmax class and renormalises, that is, the softmax of the remaining logits.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kdcache.errors import UsageError
from kdcache.given import as_array

__all__ = [
    "entropies_and_argmax",
    "entropy",
    "label_smoothing",
    "log_softmax",
    "logit_moments",
    "matched_smoothing",
    "power_sums",
    "relative_entropy",
    "softmax",
    "sorted_mean_softmax",
    "summarise_ranked",
]

Floats = NDArray[np.float64]
CACHED = 1 << 16  # float64 numbers, 512 kB: with their exponentials, a core's second-level cache
UNDERFLOW = -1000.0  # e^-1000 is 0 in float64, and so is -1000 e^-1000


def _tempered(logits: ArrayLike, tau: float) -> Floats:
    """logits / tau, shifted so that each row's maximum is 0, which does not change the softmax."""
    _require_tau(tau)
    z = _numbers(logits).astype(np.float64, copy=False) / tau
    shifted: Floats = z - z.max(axis=-1, keepdims=True)
    return shifted


def _numbers(logits: ArrayLike) -> NDArray:
    """`logits` as an array of real numbers `[..., C]`. UsageError for others, such as masked and complex ones."""
    array = as_array(logits, "logits")
    if array.dtype.kind not in "fiu" or not array.ndim:
        raise UsageError(
            f"logits are {array.dtype} {list(array.shape)}",
            why="they are real numbers [..., C], one for every class",
            fix="give an array of float32",
        )
    return array


def _require_tau(tau: float) -> None:
    if not 0 < tau < np.inf:
        raise UsageError(f"tau is {tau}", why="a temperature is positive and finite", fix="give a number such as 1, 4 or 20")


def softmax(logits: ArrayLike, tau: float = 1.0) -> Floats:
    """Softmax of `logits [..., C]` at temperature `tau`: float64 `[..., C]`."""
    e = np.exp(_tempered(logits, tau))
    probs: Floats = e / e.sum(axis=-1, keepdims=True)
    return probs


def log_softmax(logits: ArrayLike, tau: float = 1.0) -> Floats:
    """Log of the softmax of `logits [..., C]` at temperature `tau`: float64 `[..., C]`, finite for finite logits."""
    z = _tempered(logits, tau)
    log_probs: Floats = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
    return log_probs


def _entropy(z: Floats) -> Floats:
    """Entropy of the softmax of rows whose maximum is 0: log sum e^z - sum e^z z / sum e^z."""
    e = np.exp(z)
    total = e.sum(axis=-1)
    h: Floats = np.log(total) - np.einsum("...c,...c->...", e, z) / total
    return np.maximum(h, 0.0)


def entropy(logits: ArrayLike, tau: float = 1.0) -> Floats:
    """Shannon entropy of the tempered softmax of `logits [..., C]`: float64 `[...]`, nats."""
    return _entropy(_tempered(logits, tau))


def relative_entropy(logits: ArrayLike, tau: float = 1.0) -> tuple[Floats, Floats]:
    """Relative entropies `(h, h_rest)` of `logits [..., C]`, each float64 `[...]` in [0, 1].

    `h` is H(p) / log C. `h_rest` is H(p-bar) / log(C - 1), where p-bar leaves out the argmax class (the first one of a
    tie); it is 1 for C = 2, with a single remaining class. Source: temperature study (arXiv 2603.02430), section 4.3. Its
    text does not say whether H(p-bar) is divided by log C or log(C - 1); only the latter reaches 1 for a uniform rest.
    """
    h, h_rest, _ = entropies_and_argmax(logits, tau)
    return h, h_rest


def entropies_and_argmax(logits: ArrayLike, tau: float = 1.0) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """(h, h_rest) of `relative_entropy`, and the argmax, int64 `[...]` (the first one of a tie)."""
    logits = _numbers(logits)
    _require_tau(tau)
    classes = logits.shape[-1]
    if classes < 2:
        raise ValueError(f"relative entropy needs at least 2 classes, got {classes}")
    flat = logits.reshape(-1, classes)
    h, rest = np.empty(len(flat)), np.empty(len(flat))
    top = np.empty(len(flat), np.int64)
    # Process as many rows at a time as stay in a core's cache: memory traffic costs more than the arithmetic.
    step = max(1, CACHED // classes)
    z, e = np.empty((2, min(step, len(flat)), classes))  # allocated once: fresh memory costs more than the exponentials
    for first in range(0, len(flat), step):
        rows = slice(first, min(first + step, len(flat)))
        tempered, room = z[: rows.stop - first], e[: rows.stop - first]
        tempered[...] = flat[rows]
        if tau != 1:
            tempered /= tau
        top[rows] = flat[rows].argmax(axis=1)
        h[rows], rest[rows] = _entropies(tempered, top[rows], room)
    h, rest = _relative(h, rest, classes)
    shape = logits.shape[:-1]
    return h.reshape(shape), rest.reshape(shape), top.reshape(shape)


def _relative(h: Floats, rest: Floats, classes: int) -> tuple[Floats, Floats]:
    """Entropies in nats as fractions of the largest possible ones. With a single remaining class, the rest's is 1."""
    rest = rest / np.log(classes - 1) if classes > 2 else np.ones_like(rest)
    return np.clip(h / np.log(classes), 0, 1), np.clip(rest, 0, 1)


def _entropies(z: Floats, top: NDArray[np.int64], e: Floats) -> tuple[Floats, Floats]:
    """Entropies in nats of the softmax of `z [n, C]`, with and without the class `top [n]` of each row.

    Overwrites `z`, and the work array `e` of the same shape.
    """
    row = np.arange(len(z))
    gap = z[row, top]
    z[row, top] = -np.inf
    second = z.max(axis=1)
    gap -= second
    z -= second[:, None]
    z[row, top] = UNDERFLOW  # adds exactly nothing to either sum
    np.exp(z, out=e)
    h, rest, _ = _join(gap, e.sum(axis=1), np.einsum("nc,nc->n", e, z))
    return h, rest


def _join(gap: Floats, s: Floats, d: Floats) -> tuple[Floats, Floats, Floats]:
    """(H(p), H(p-bar), probability of the top class) of rows, from sums over the other classes. Entropies are in nats.

    Logits are shifted by the second largest one. Then s is the sum of e^z and d the sum of e^z z over the classes below the
    top one, and the top class lies `gap` = g above 0. With w = e^-g and t = 1 + s w:
    H(p) = log t - (d - g s) w / t, and H(p-bar) = log s - d / s. There is no cancellation, however large g is.
    (log1p(s w) is closer by 1e-16, but would change the last digits of archives of format version 1.)
    """
    w = np.exp(-gap)
    t = 1 + s * w
    return np.log(t) - (d - gap * s) * w / t, np.log(s) - d / s, 1 / t


def logit_moments(logits: ArrayLike) -> tuple[Floats, Floats]:
    """Mean and population standard deviation over the classes of `logits [..., C]`: float64 `[...]` each."""
    z = _numbers(logits).astype(np.float64, copy=False)
    return z.mean(axis=-1), z.std(axis=-1)


def sorted_mean_softmax(logits: ArrayLike, tau: float) -> Floats:
    """Mean over rows of the descending softmax of `logits [B, C]`: float64 `[C]` (temperature study, Fig. 4)."""
    probs = softmax(logits, tau)
    probs.sort(axis=-1)
    mean: Floats = probs[..., ::-1].reshape(-1, probs.shape[-1]).mean(axis=0)
    return mean


def summarise_ranked(ranked: NDArray, tau: float) -> tuple[Floats, Floats, Floats, Floats]:
    """(h, h_rest, sum of the softmax vectors, 1 / p of the top class) of descending logits `ranked [B, C]`.

    Float64 `[B]`, `[B]`, `[C]` and `[B]`. The entropies are those of `relative_entropy`. One sort serves every tau, and one
    exponential per logit all results.
    """
    classes = ranked.shape[1]
    h, rest, mass = np.empty((3, len(ranked)))
    total = np.zeros(classes)
    step = max(1, CACHED // classes)
    for first in range(0, len(ranked), step):
        rows = slice(first, first + step)
        z = np.divide(ranked[rows], tau, dtype=np.float64)
        gap = z[:, 0] - z[:, 1]
        z = z[:, 1:] - z[:, 1:2]
        e = np.exp(z)
        h[rows], rest[rows], top = _join(gap, e.sum(axis=1), np.einsum("nc,nc->n", e, z))
        mass[rows] = 1 / top
        total[0] += top.sum()
        total[1:] += (top * np.exp(-gap)) @ e
    return *_relative(h, rest, classes), total, mass


def power_sums(logits: ArrayLike, tau: float) -> Floats:
    """U = sum_c p_c^(1/tau) of the softmax p of `logits [..., C]`: float64 `[...]` in [1, C^(1 - 1/tau)].

    The weights of wttm (TTM, arXiv 2402.11148, section 4), as exp(lse(z / tau) - lse(z) / tau), in which nothing underflows.
    """
    z = _tempered(logits, 1.0)
    sums: Floats = np.exp(z / tau).sum(axis=-1) * np.exp(z).sum(axis=-1) ** (-1 / tau)
    return sums


def matched_smoothing(h: ArrayLike, classes: int) -> Floats:
    """Coefficient alpha of the label smoothing whose relative entropy is `h [...]`: float64 `[...]` in [0, 1].

    The smoothed vector has 1 - alpha + alpha / C at the top and alpha / C elsewhere. With d = 1 - alpha its entropy is
    log C - D(d), where D(d) = (1 + d (C-1)) / C log1p(d (C-1)) + (C-1) / C (1-d) log1p(-d) increases strictly from 0 to
    log C on [0, 1]. The solver bisects log d: Newton's slope is 0 at one end and infinite at the other, and at large tau,
    where alpha is close to 1, this keeps 1 - alpha as exact as float64 knows `h`.
    """
    deficit = np.clip(1 - np.asarray(h, np.float64), 0, 1) * np.log(classes)

    def of(d: Floats) -> Floats:
        below = np.log1p(-np.minimum(d, np.nextafter(1, 0)))
        value: Floats = ((1 + d * (classes - 1)) * np.log1p(d * (classes - 1)) + (classes - 1) * (1 - d) * below) / classes
        return value

    low, high = np.full_like(deficit, -60.0), np.zeros_like(deficit)  # log d
    for _ in range(64):
        middle = (low + high) / 2
        less = of(np.exp(middle)) < deficit
        low, high = np.where(less, middle, low), np.where(less, high, middle)
    alpha: Floats = np.where(deficit > 0, -np.expm1(high), 1.0)
    return alpha


def label_smoothing(alpha: float, classes: int) -> Floats:
    """The smoothed one-hot vector, its top class first: float64 `[C]`."""
    smoothed = np.full(classes, alpha / classes)
    smoothed[0] += 1 - alpha
    return smoothed

"""Entropies and other summaries of logits, in NumPy and float64 inside.

Formulas: H(p) = logsumexp(z) - sum_c p_c z_c with z = logits / tau, in nats. The *relative* entropies of the
temperature study (arXiv 2603.02430, section 4.3) are H(p) / log C and H(p-bar) / log(C - 1), where p-bar drops the
argmax class and renormalises, that is, the softmax of the remaining logits.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["entropy", "logit_moments", "power_sum", "relative_entropy", "softmax", "sorted_mean_softmax"]

Floats = NDArray[np.float64]


def _tempered(logits: ArrayLike, tau: float) -> Floats:
    """Logits over tau, shifted so that each row's maximum is 0 (the softmax is unchanged)."""
    z = np.asarray(logits, dtype=np.float64) / tau
    shifted: Floats = z - z.max(axis=-1, keepdims=True)
    return shifted


def softmax(logits: ArrayLike, tau: float = 1.0) -> Floats:
    """Softmax of `logits [..., C]` at temperature `tau`: float64 `[..., C]`."""
    e = np.exp(_tempered(logits, tau))
    probs: Floats = e / e.sum(axis=-1, keepdims=True)
    return probs


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

    `h` is H(p) / log C; `h_rest` is H(p-bar) / log(C - 1) with the argmax class (the first one of a tie) left out,
    and 1 where C is 2, since a single remaining class is all there is. Temperature study, section 4.3. Its text does
    not say whether p-bar is divided by log C or log(C - 1); only the latter reaches 1 for a uniform rest.
    """
    z = _tempered(logits, tau)
    classes = z.shape[-1]
    if classes < 2:
        raise ValueError(f"relative entropy needs at least 2 classes, got {classes}")
    h = _entropy(z) / np.log(classes)
    if classes == 2:
        return np.minimum(h, 1.0), np.ones(z.shape[:-1])
    # The argmax column is overwritten by the last one, and the last one is then cut off: no [.., C-1] gather is needed.
    top = z.argmax(axis=-1)[..., None]
    np.put_along_axis(z, top, z[..., -1:], axis=-1)
    rest = z[..., :-1]
    rest = rest - rest.max(axis=-1, keepdims=True)
    return np.minimum(h, 1.0), np.minimum(_entropy(rest) / np.log(classes - 1), 1.0)


def power_sum(logits: ArrayLike, tau: float) -> Floats:
    """U = sum_c p_c^(1/tau) with p the softmax at tau 1: float64 `[...]` in [1, C^(1 - 1/tau)].

    The sample weight of WTTM (arXiv 2402.11148, eq. 13), as exp(lse(z / tau) - lse(z) / tau), which never underflows.
    """
    z = _tempered(logits, 1.0)
    u: Floats = np.exp(np.log(np.exp(z / tau).sum(axis=-1)) - np.log(np.exp(z).sum(axis=-1)) / tau)
    return u


def logit_moments(logits: ArrayLike) -> tuple[Floats, Floats]:
    """Mean and (population) standard deviation over the classes of `logits [..., C]`, each `[...]`."""
    z = np.asarray(logits, dtype=np.float64)
    return z.mean(axis=-1), z.std(axis=-1)


def sorted_mean_softmax(logits: ArrayLike, tau: float) -> Floats:
    """Mean over the rows of `logits [B, C]` of the descending softmax: float64 `[C]` (temperature study, Fig. 4)."""
    probs = softmax(logits, tau)
    probs.sort(axis=-1)
    mean: Floats = probs[..., ::-1].reshape(-1, probs.shape[-1]).mean(axis=0)
    return mean

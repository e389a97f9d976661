"""Metrics of predictions. Inputs are logits `[B, C]` and labels int64 `[B]`; results are in percent unless stated otherwise."""

import math

import torch
from torch import Tensor

__all__ = [
    "agreement",
    "calibration_error",
    "correlation",
    "divergence",
    "mean_relative_entropy",
    "moments",
    "relative_entropies",
    "share_in_top",
]


def share_in_top(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """Share of rows whose label is among the `k` largest logits, or among all classes if there are fewer: float32, 0-d."""
    best = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (best == labels[:, None]).any(dim=1).float().mean()


def agreement(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Percent of rows with the teacher's argmax, as a 0-d tensor, without synchronising the device."""
    return 100.0 * (logits.argmax(dim=1) == teacher_logits.argmax(dim=1)).float().mean()


def relative_entropies(logits: Tensor) -> Tensor:
    """H(q) / log C of every row at tau 1: float32 `[B]` in [0, 1]."""
    return _entropies(logits) / math.log(logits.shape[1])


def mean_relative_entropy(logits: Tensor) -> Tensor:
    """Mean of H(q) / log C at tau 1, a 0-d tensor in [0, 1]."""
    return _entropies(logits).mean() / math.log(logits.shape[1])


def _entropies(logits: Tensor) -> Tensor:
    log_q = torch.log_softmax(logits.float(), dim=1)
    return -(log_q.exp() * log_q).sum(dim=1)


def correlation(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Mean of the rows' Pearson correlations with the teacher's logits, a 0-d tensor in [-1, 1]; that of a constant row is 0.

    It is the cosine of the rows' z-scores, whatever the temperatures: as in max-logit temperature, Fig. 1.
    """
    z, v = (x - x.mean(dim=1, keepdim=True) for x in (logits.float(), teacher_logits.float()))
    return torch.nn.functional.cosine_similarity(z, v, dim=1, eps=1e-12).mean()


def divergence(logits: Tensor, teacher_logits: Tensor, tau: float) -> Tensor:
    """Mean of D(p_tau || q) in nats, with the student's q at tau 1, a 0-d tensor: as in TTM's Fig. 2 (arXiv 2402.11148)."""
    log_p, log_q = torch.log_softmax(teacher_logits.float() / tau, dim=1), torch.log_softmax(logits.float(), dim=1)
    return torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def moments(logits: Tensor) -> Tensor:
    """Each row's mean and population standard deviation over the classes: `[2, B]`."""
    std, mean = torch.std_mean(logits.float(), dim=1, correction=0)
    return torch.stack((mean, std))


def calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> Tensor:
    """Expected calibration error in percent: mean |accuracy - confidence| over equal-width bins (Guo et al. 2017, eq. 5).

    A 0-d float64 tensor.
    """
    confidence, predicted = torch.softmax(logits.float(), dim=1).max(dim=1)
    correct = (predicted == labels).float()
    which = (confidence * bins).long().clamp(0, bins - 1)  # NaN becomes any number
    # In float64 on a GPU, which adds in any order.
    dtype = torch.float32 if logits.device.type == "cpu" else torch.float64
    gaps = torch.zeros(bins, dtype=dtype, device=logits.device).scatter_add_(0, which, (correct - confidence).to(dtype))
    return 100.0 * gaps.abs().sum().double() / len(labels)

"""The losses as METHODS.md writes them, in plain float64 PyTorch: what the methods are compared with.

Nothing here is stable or quick: probabilities are summed before their logarithm is taken, Gram matrices are formed whole.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor, float], Tensor]  # student and teacher logits [B, C], labels [B], tau


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Of every row; terms where p is 0 are 0."""
    return torch.where(p > 0, p * (p.clamp(min=1e-300).log() - q.log()), 0.0).sum(dim=1)


def soft(x: Tensor, tau: float | Tensor) -> Tensor:
    return torch.softmax(x / tau, dim=1)


def z_score(x: Tensor, unbiased: bool = True, eps: float = 1e-7) -> Tensor:
    return (x - x.mean(dim=1, keepdim=True)) / (eps + x.std(dim=1, keepdim=True, unbiased=unbiased))


def kd(z: Tensor, v: Tensor, y: Tensor, tau: float) -> Tensor:
    return tau**2 * kl(soft(v, tau), soft(z, tau)).mean()


def row_tau(v: Tensor) -> Tensor:
    """`[B, 1]` of z-scores."""
    return (1 + math.sqrt(3)) / 2 * v.amax(dim=1, keepdim=True)


def maxlogit(z: Tensor, v: Tensor, y: Tensor, tau: float) -> Tensor:
    z, v = z_score(z, False, 0.0), z_score(v, False, 0.0)
    own = row_tau(v)
    return (own[:, 0] ** 2 * kl(soft(v, own), soft(z, own))).mean()


def ttm(z: Tensor, v: Tensor, y: Tensor, tau: float) -> Tensor:
    return kl(soft(v, tau), soft(z, 1)).mean()


def wttm(z: Tensor, v: Tensor, y: Tensor, tau: float) -> Tensor:
    return ((soft(v, 1) ** (1 / tau)).sum(dim=1) * kl(soft(v, tau), soft(z, 1))).mean()


def wttm_unit(z: Tensor, v: Tensor, y: Tensor, tau: float) -> Tensor:
    return wttm(z, v, y, tau) / (soft(v, 1) ** (1 / tau)).sum(dim=1).mean()


def split(p: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(p_y, 1 - p_y) `[B, 2]`, and the other classes renormalised `[B, C - 1]`."""
    at = p.gather(1, y[:, None])
    others = torch.stack([torch.cat([row[:label], row[label + 1 :]]) for row, label in zip(p, y.tolist(), strict=True)])
    rest = others.sum(dim=1, keepdim=True)
    return torch.cat([at, rest], dim=1), others / rest


def dkd_rows(z: Tensor, v: Tensor, y: Tensor, tau: float, alpha: float = 1, beta: float = 8) -> Tensor:
    (bp, p), (bq, q) = split(soft(v, tau), y), split(soft(z, tau), y)
    return tau**2 * (alpha * kl(bp, bq) + beta * kl(p, q))


def dkd(z: Tensor, v: Tensor, y: Tensor, tau: float) -> Tensor:
    return dkd_rows(z, v, y, tau).mean()


def maxlogit_dkd(z: Tensor, v: Tensor, y: Tensor, tau: float) -> Tensor:
    z, v = z_score(z, False, 0.0), z_score(v, False, 0.0)
    own = row_tau(v)
    (bp, p), (bq, q) = split(soft(v, own), y), split(soft(z, own), y)
    return (own[:, 0] ** 2 * (kl(bp, bq) + 8 * kl(p, q))).mean()


def rld(z: Tensor, v: Tensor, y: Tensor, tau: float, own: float = 1.0) -> Tensor:
    bp, bq = split(soft(v, own), v.argmax(dim=1))[0], split(soft(z, own), y)[0]
    total = own**2 * kl(bp, bq).mean()
    for row in range(len(z)):
        keep = v[row] < v[row, y[row]]
        if keep.any():
            total = total + 8 * tau**2 * kl(soft(v[row : row + 1, keep], tau), soft(z[row : row + 1, keep], tau)).sum() / len(z)
    return total


def nkd(z: Tensor, v: Tensor, y: Tensor, tau: float) -> Tensor:
    p_y, q_y = (soft(x, 1).gather(1, y[:, None])[:, 0] for x in (v, z))
    (_, p), (_, q) = split(soft(v, tau), y), split(soft(z, tau), y)
    return (-p_y * q_y.log()).mean() + 1.5 * tau**2 * -(p * q.log()).sum(dim=1).mean()


def wsld(z: Tensor, v: Tensor, y: Tensor, tau: float) -> Tensor:
    student, teacher = (-soft(x, 1).gather(1, y[:, None])[:, 0].log() for x in (z, v))
    weights = (1 - torch.exp(-student / (teacher + 1e-7))).detach()
    return 2.25 * tau**2 * (weights * -(soft(v, tau) * soft(z, tau).log()).sum(dim=1)).mean()


def dist(z: Tensor, v: Tensor, y: Tensor, tau: float) -> Tensor:
    def rho(a: Tensor, b: Tensor) -> Tensor:
        a, b = a - a.mean(dim=1, keepdim=True), b - b.mean(dim=1, keepdim=True)
        return (a * b).sum(dim=1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)

    q, p = soft(z, tau), soft(v, tau)
    return tau**2 * (1 - rho(q, p).mean() + 1 - rho(q.T, p.T).mean())


def ctkd(z: Tensor, v: Tensor, y: Tensor, tau: float) -> Tensor:
    return kd(z, v, y, 1 + 20 / (1 + math.exp(-1)))


def mlkd(z: Tensor, v: Tensor, y: Tensor, tau: float, of_kd: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    p1 = soft(v, 1)
    f_s = (p1.amax(dim=1) <= p1.amax(dim=1).median()).double().mean()
    f_c = (p1.sum(dim=0) <= p1.sum(dim=0).median()).double().mean()
    total = z.new_zeros(())
    for t in (tau, 3.0, 5.0, 2.0, 6.0):
        p, q = soft(v, t), soft(z, t)
        cc = (p.T @ p - q.T @ q).square().sum() / z.shape[1]
        bc = (p @ p.T - q @ q.T).square().sum() / z.shape[0]
        total = total + f_s * kd(of_kd(z), of_kd(v), y, t) + f_c * cc + f_s * bc
    return 0.9 * total


def entropy(x: Tensor, tau: float) -> Tensor:
    p = soft(x, tau)
    return -(p * (p + 1e-10).log()).sum(dim=1)


def ea_weights(z: Tensor, v: Tensor) -> Tensor:
    of_teacher, of_student = entropy(v, 3.0), entropy(z, 3.0)
    return ((of_teacher + of_teacher * of_student / math.log(z.shape[1])) / 2).detach()


def ce(z: Tensor, v: Tensor, y: Tensor, tau: float) -> Tensor:
    return -soft(z, 1).gather(1, y[:, None]).log().mean()


def eakd(z: Tensor, v: Tensor, y: Tensor, tau: float) -> Tensor:
    return (ea_weights(z, v) * tau**2 * kl(soft(v, tau), soft(z, tau))).mean()


def eadkd(z: Tensor, v: Tensor, y: Tensor, tau: float) -> Tensor:
    return (ea_weights(z, v) * dkd_rows(z, v, y, tau)).mean()


def z_scored(loss: Loss) -> Loss:
    return lambda z, v, y, tau: loss(z_score(z), z_score(v), y, tau)


FORMULAS: dict[str, Loss] = {
    "ce": ce,
    "kd": kd,
    "zkd": z_scored(kd),
    "maxlogit": maxlogit,
    "maxlogit-dkd": maxlogit_dkd,
    "ttm": ttm,
    "wttm": wttm,
    "wttm-unit": wttm_unit,
    "dkd": dkd,
    "zdkd": z_scored(dkd),
    "rld": rld,
    "zrld": z_scored(lambda z, v, y, tau: rld(z, v, y, tau, tau)),
    "nkd": nkd,
    "wsld": wsld,
    "dist": dist,
    "ctkd": ctkd,
    "zctkd": z_scored(ctkd),
    "mlkd": mlkd,
    "zmlkd": lambda z, v, y, tau: mlkd(z, v, y, tau, z_score),
    "eakd": eakd,
    "eadkd": eadkd,
}

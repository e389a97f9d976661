"""Benchmark of the losses: each against plain PyTorch of the same formula, and all together against a student's step.

The plain versions follow the papers literally. They are right for ordinary logits, and overflow or lose digits elsewhere.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcache.bench.turns import Result, taking_turns
from kdcache.methods import METHODS, build
from kdcache.models.creation import create_model
from kdcache.system.progress import Progress
from kdcache.targets import Targets
from kdcache.training.devices import seeded

__all__ = ["ONE_VIEW", "PLAIN", "methods"]

BATCH, CLASSES, TAU = 256, 1000, 4.0
STEP_BATCH = 32
ONE_VIEW = {"mlkd": {"views": 1}, "zmlkd": {"views": 1}}

Loss = Callable[[Tensor, Tensor, Tensor, float], Tensor]  # student and teacher logits [B, C], labels [B], tau


def methods(seconds: float, folder: Path, progress: Progress) -> list[Result]:
    """Measure forward and backward of every method at B = 256, C = 1000, and of all against a step of resnet18 at 224 px."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(BATCH, CLASSES, generator=generator).mul(3).to(device) for _ in range(2))
    labels = torch.randint(0, CLASSES, (BATCH,), generator=generator).to(device)
    targets = Targets(teacher, TAU, labels)

    def timed(loss_of: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def turn() -> None:
            z = student.clone().requires_grad_()
            loss_of(z).backward()  # type: ignore[no-untyped-call]
            if device.type == "cuda":
                torch.cuda.synchronize()

        return turn

    with seeded(0):
        model, normalise = create_model("resnet18", CLASSES, input_size=224)
    model.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    images = torch.randint(0, 256, (STEP_BATCH, 3, 224, 224), dtype=torch.uint8, device=device)

    def step() -> None:
        loss = F.cross_entropy(model(normalise(images)), labels[:STEP_BATCH])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    [one_step] = taking_turns("bench methods: resnet18", seconds / 4, progress, step)
    results, total = [], 0.0
    for name in METHODS:
        if name not in PLAIN:  # a plugin's method
            continue
        built, plain = build(name, **ONE_VIEW.get(name, {})).fit([teacher.cpu().numpy()], TAU), PLAIN[name]
        state = built.new_state().to(device)
        state.epoch = 1000  # warmed up
        ours, theirs = taking_turns(
            f"bench methods: {name}",
            seconds * 3 / 4 / len(PLAIN),
            progress,
            timed(lambda z, built=built, state=state: built(z, targets, state)),  # type: ignore[misc]
            timed(lambda z, plain=plain: plain(z, teacher, labels, TAU)),  # type: ignore[misc]
        )
        total += ours
        results.append(Result(f"{name}, 256 x 1000", "forward and backward", "plain PyTorch", ours / theirs, 1.3))
    share = total / (one_step * BATCH / STEP_BATCH)
    results.append(Result(f"all {len(results)} methods", "forward and backward", "step of resnet18/224", share, 0.03))
    return results


def _kl(v: Tensor, z: Tensor) -> Tensor:
    """KL divergence of the softmaxes, per row: `[B]`."""
    terms: Tensor = F.kl_div(F.log_softmax(z, 1), F.softmax(v, 1), reduction="none")
    return terms.sum(1)


def _z_scores(x: Tensor, unbiased: bool = True, eps: float = 1e-7) -> Tensor:
    return (x - x.mean(1, keepdim=True)) / (eps + x.std(1, keepdim=True, unbiased=unbiased))


def _binary(p: Tensor, q: Tensor) -> Tensor:
    return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()


def _at(x: Tensor, y: Tensor) -> Tensor:
    return x.gather(1, y[:, None])[:, 0]


def _without(x: Tensor, mask: Tensor) -> Tensor:
    return x.masked_fill(mask, -1000.0)


def kd(z: Tensor, v: Tensor, y: Tensor, tau: float) -> Tensor:
    return tau**2 * F.kl_div(F.log_softmax(z / tau, 1), F.softmax(v / tau, 1), reduction="batchmean")


def _per_row(z: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both logits as z-scores, at per-row temperatures."""
    z, v = _z_scores(z, False, 0.0), _z_scores(v, False, 0.0)
    own = (1 + math.sqrt(3)) / 2 * v.amax(1, keepdim=True)
    return z / own, v / own, own[:, 0]


def maxlogit(z: Tensor, v: Tensor, y: Tensor, tau: float) -> Tensor:
    z, v, own = _per_row(z, v)
    return (own**2 * _kl(v, z)).mean()


def maxlogit_dkd(z: Tensor, v: Tensor, y: Tensor, tau: float) -> Tensor:
    z, v, own = _per_row(z, v)
    return (own**2 * _dkd_rows(z, v, y, 1.0)).mean()


def ttm(z: Tensor, v: Tensor, y: Tensor, tau: float) -> Tensor:
    return F.kl_div(F.log_softmax(z, 1), F.softmax(v / tau, 1), reduction="batchmean")


def wttm(z: Tensor, v: Tensor, y: Tensor, tau: float) -> Tensor:
    power = F.softmax(v, 1) ** (1 / tau)
    total = power.sum(1)
    return (total * F.kl_div(F.log_softmax(z, 1), power / total[:, None], reduction="none").sum(1)).mean()


def wttm_unit(z: Tensor, v: Tensor, y: Tensor, tau: float) -> Tensor:
    return wttm(z, v, y, tau) / F.softmax(v, 1).pow(1 / tau).sum(1).mean()


def _dkd_rows(z: Tensor, v: Tensor, y: Tensor, tau: float) -> Tensor:
    own = F.one_hot(y, z.shape[1]).bool()
    tckd = _binary(_at(F.softmax(v / tau, 1), y), _at(F.softmax(z / tau, 1), y))
    return tau**2 * (tckd + 8 * _kl(_without(v / tau, own), _without(z / tau, own)))


def dkd(z: Tensor, v: Tensor, y: Tensor, tau: float) -> Tensor:
    return _dkd_rows(z, v, y, tau).mean()


def rld(z: Tensor, v: Tensor, y: Tensor, tau: float, own: float = 1.0) -> Tensor:
    scd = _binary(F.softmax(v / own, 1).amax(1), _at(F.softmax(z / own, 1), y))
    mask = v >= v.gather(1, y[:, None])
    return (own**2 * scd + 8 * tau**2 * _kl(_without(v / tau, mask), _without(z / tau, mask))).mean()


def nkd(z: Tensor, v: Tensor, y: Tensor, tau: float) -> Tensor:
    own = F.one_hot(y, z.shape[1]).bool()
    p, log_q = F.softmax(_without(v / tau, own), 1), F.log_softmax(_without(z / tau, own), 1)
    others = -(p * log_q).sum(1)
    return (-_at(F.softmax(v, 1), y) * _at(F.log_softmax(z, 1), y) + 1.5 * tau**2 * others).mean()


def wsld(z: Tensor, v: Tensor, y: Tensor, tau: float) -> Tensor:
    weights = 1 - torch.exp(-F.cross_entropy(z, y, reduction="none") / (F.cross_entropy(v, y, reduction="none") + 1e-7))
    return 2.25 * tau**2 * (weights.detach() * -(F.softmax(v / tau, 1) * F.log_softmax(z / tau, 1)).sum(1)).mean()


def dist(z: Tensor, v: Tensor, y: Tensor, tau: float) -> Tensor:
    q, p = F.softmax(z / tau, 1), F.softmax(v / tau, 1)

    def loss(dim: int) -> Tensor:
        a, b = q - q.mean(dim, keepdim=True), p - p.mean(dim, keepdim=True)
        norms: Tensor = a.norm(dim=dim) * b.norm(dim=dim)
        return 1 - ((a * b).sum(dim) / (norms + 1e-8)).mean()

    return tau**2 * (loss(0) + loss(1))


def ctkd(z: Tensor, v: Tensor, y: Tensor, tau: float) -> Tensor:
    return kd(z, v, y, 1 + 20 / (1 + math.exp(-1)))


def mlkd(z: Tensor, v: Tensor, y: Tensor, tau: float, scores: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    confident = F.softmax(v, 1)
    top, mass = confident.amax(1), confident.sum(0)
    of_samples, of_classes = ((x <= x.median()).float().mean() for x in (top, mass))
    total = z.new_zeros(())
    for t in (tau, 3.0, 5.0, 2.0, 6.0):
        p, q = F.softmax(v / t, 1), F.softmax(z / t, 1)
        classes, samples = (p.T @ p - q.T @ q).square().sum() / p.shape[1], (p @ p.T - q @ q.T).square().sum() / p.shape[0]
        total = total + of_samples * kd(scores(z), scores(v), y, t) + of_classes * classes + of_samples * samples
    return 0.9 * total


def _weights(z: Tensor, v: Tensor) -> Tensor:
    of_student, of_teacher = (-(F.softmax(x / 3, 1) * F.log_softmax(x / 3, 1)).sum(1) for x in (z.detach(), v))
    return (of_teacher + of_teacher * of_student / math.log(z.shape[1])) / 2


def ce(z: Tensor, v: Tensor, y: Tensor, tau: float) -> Tensor:
    return F.cross_entropy(z, y)


def eakd(z: Tensor, v: Tensor, y: Tensor, tau: float) -> Tensor:
    return (_weights(z, v) * tau**2 * _kl(v / tau, z / tau)).mean()


def eadkd(z: Tensor, v: Tensor, y: Tensor, tau: float) -> Tensor:
    return (_weights(z, v) * _dkd_rows(z, v, y, tau)).mean()


def _scored(loss: Loss) -> Loss:
    return lambda z, v, y, tau: loss(_z_scores(z), _z_scores(v), y, tau)


PLAIN: dict[str, Loss] = {
    "ce": ce,
    "kd": kd,
    "zkd": _scored(kd),
    "maxlogit": maxlogit,
    "maxlogit-dkd": maxlogit_dkd,
    "ttm": ttm,
    "wttm": wttm,
    "wttm-unit": wttm_unit,
    "dkd": dkd,
    "zdkd": _scored(dkd),
    "rld": rld,
    "zrld": _scored(lambda z, v, y, tau: rld(z, v, y, tau, tau)),
    "nkd": nkd,
    "wsld": wsld,
    "dist": dist,
    "ctkd": ctkd,
    "zctkd": _scored(ctkd),
    "mlkd": mlkd,
    "zmlkd": lambda z, v, y, tau: mlkd(z, v, y, tau, _z_scores),
    "eakd": eakd,
    "eadkd": eadkd,
}

"""Every method: a finite loss whose gradient a student can follow; and each one against its formula in METHODS.md."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import special

from kdcache.errors import UsageError
from kdcache.methods import build
from kdcache.targets import Targets
from tests.contracts.examples import examples

TAUS = (1.0, 4.0, 20.0, 40.0)


def problem(rows: int = 16, classes: int = 37, scale: float = 3.0) -> tuple[NDArray[np.float64], NDArray[np.float64], Targets]:
    """Student and teacher logits in float64, and the targets (tau 4, mixed labels) as a batch would bring them."""
    rng = np.random.default_rng(7)
    student, teacher = rng.normal(0, scale, (2, rows, classes)).astype(np.float32).astype(np.float64)
    labels = torch.from_numpy(rng.integers(0, classes, (2, rows)))
    targets = Targets(
        torch.from_numpy(teacher).float(), 4.0, labels[0], labels[1], torch.from_numpy(rng.random(rows).astype(np.float32))
    )
    return student, teacher, targets


def loss_and_gradient(method: Any, student: NDArray[np.float64], targets: Targets) -> tuple[float, NDArray[np.float64]]:
    z = torch.from_numpy(student).float().requires_grad_()
    loss = method(z, targets)
    loss.backward()
    assert z.grad is not None
    return loss.item(), z.grad.double().numpy()


def at(targets: Targets, tau: float) -> Targets:
    return Targets(targets.logits, tau, targets.label_a, targets.label_b, targets.lam)


# ---------------------------------------------------------------- all methods


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize(("name", "options"), examples("method"))
def test_the_loss_is_a_finite_scalar_with_a_finite_gradient(name: str, options: dict[str, Any], tau: float) -> None:
    student, _, targets = problem()
    z = torch.from_numpy(student).float().requires_grad_()
    loss = build(name, **options)(z, at(targets, tau))
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    loss.backward()
    assert torch.isfinite(loss)
    assert z.grad is not None
    assert torch.isfinite(z.grad).all()
    assert z.grad.abs().max() > 0
    assert targets.logits.grad is None
    torch.testing.assert_close(z.grad.sum(dim=1), torch.zeros(len(z)), atol=1e-3 * float(z.grad.abs().max()), rtol=0)


@pytest.mark.parametrize(("name", "options"), examples("method"))
def test_a_step_against_the_gradient_lowers_the_loss(name: str, options: dict[str, Any]) -> None:
    student, _, targets = problem()
    method = build(name, **options)
    loss, gradient = loss_and_gradient(method, student, targets)
    lower, _ = loss_and_gradient(method, student - 0.01 * gradient / np.abs(gradient).max(), targets)
    assert lower < loss


@pytest.mark.parametrize(("name", "options"), examples("method"))
def test_extreme_logits_and_a_batch_of_one_stay_finite(name: str, options: dict[str, Any]) -> None:
    extreme = torch.zeros(1, 10)
    extreme[0, 3] = 120.0
    label = torch.tensor([3])
    for student, teacher in ((extreme, extreme.roll(2)), (extreme.roll(2), extreme), (-extreme, extreme), (extreme, -extreme)):
        for tau in TAUS:
            z = student.clone().requires_grad_()
            loss = build(name, **options)(z, Targets(teacher, tau, label, label, torch.ones(1)))
            loss.backward()
            assert torch.isfinite(loss)
            assert z.grad is not None
            assert torch.isfinite(z.grad).all()


@pytest.mark.parametrize(("name", "options"), examples("method"))
def test_the_order_of_rows_and_the_order_of_classes_do_not_matter(name: str, options: dict[str, Any]) -> None:
    student, _, targets = problem()
    method = build(name, **options)
    loss, gradient = loss_and_gradient(method, student, targets)
    rows = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    assert targets.label_a is not None
    assert targets.label_b is not None
    assert targets.lam is not None
    other = Targets(targets.logits[rows], 4.0, targets.label_a[rows], targets.label_b[rows], targets.lam[rows])
    turned, turned_gradient = loss_and_gradient(method, student[rows.numpy()], other)
    assert turned == pytest.approx(loss, rel=1e-5)
    np.testing.assert_allclose(turned_gradient, gradient[rows.numpy()], atol=1e-5 * np.abs(gradient).max())

    classes = torch.randperm(37, generator=torch.Generator().manual_seed(1))
    rank = classes.argsort()
    other = Targets(targets.logits[:, classes], 4.0, rank[targets.label_a], rank[targets.label_b], targets.lam)
    turned, turned_gradient = loss_and_gradient(method, student[:, classes.numpy()], other)
    assert turned == pytest.approx(loss, rel=1e-5)
    np.testing.assert_allclose(turned_gradient, gradient[:, classes.numpy()], atol=1e-5 * np.abs(gradient).max())


@pytest.mark.parametrize("tau", [4.0, 40.0])
@pytest.mark.parametrize(("name", "options"), examples("method"))
def test_half_precision_students_lose_no_more_than_their_own_rounding(name: str, options: dict[str, Any], tau: float) -> None:
    student, _, targets = problem()
    half = torch.from_numpy(student).bfloat16()
    method = build(name, **options)
    z = half.clone().requires_grad_()
    loss = method(z, at(targets, tau))
    loss.backward()
    assert z.grad is not None
    exact, gradient = loss_and_gradient(method, half.double().numpy(), at(targets, tau))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact, rel=1e-5)
    np.testing.assert_allclose(z.grad.double().numpy(), gradient, atol=0.005 * np.abs(gradient).max())  # bf16 keeps 8 bits


# ---------------------------------------------------------------- kd, METHODS.md section 1


def plain_kd(student: NDArray[np.float64], teacher: NDArray[np.float64], tau: float) -> float:
    """<KL(p_t || q_t)>, in float64."""
    log_p, log_q = (special.log_softmax(z / tau, axis=1) for z in (teacher, student))
    return float((np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean())


@pytest.mark.parametrize("tau", TAUS)
def test_kd_is_tau_squared_times_the_mean_divergence(tau: float) -> None:
    student, teacher, targets = problem()
    loss, _ = loss_and_gradient(build("kd"), student, at(targets, tau))
    assert loss == pytest.approx(tau**2 * plain_kd(student, teacher, tau), rel=1e-3)


@pytest.mark.parametrize("tau", TAUS)
def test_kds_gradient_is_tau_times_the_difference_of_the_softmaxes(tau: float) -> None:
    student, teacher, targets = problem()
    _, gradient = loss_and_gradient(build("kd"), student, at(targets, tau))
    q, p = (special.softmax(z / tau, axis=1) for z in (student, teacher))
    expected = tau * (q - p) / len(student)
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("tau", TAUS)
def test_kds_gradient_is_that_of_its_loss_by_finite_differences(tau: float) -> None:
    student, teacher, targets = problem(rows=3, classes=5)
    _, gradient = loss_and_gradient(build("kd"), student, at(targets, tau))
    step = 1e-4
    for i, j in np.ndindex(student.shape):
        ahead, behind = student.copy(), student.copy()
        ahead[i, j] += step
        behind[i, j] -= step
        slope = tau**2 * (plain_kd(ahead, teacher, tau) - plain_kd(behind, teacher, tau)) / (2 * step)
        assert gradient[i, j] == pytest.approx(slope, abs=2e-4 * np.abs(gradient).max())


@pytest.mark.parametrize("tau", TAUS)
def test_without_tau_squared_loss_and_gradient_are_smaller_by_it(tau: float) -> None:
    student, _, targets = problem()
    loss, gradient = loss_and_gradient(build("kd"), student, at(targets, tau))
    bare, bare_gradient = loss_and_gradient(build("kd", tau_squared=False), student, at(targets, tau))
    assert bare * tau**2 == pytest.approx(loss, rel=1e-6)
    np.testing.assert_allclose(bare_gradient * tau**2, gradient, rtol=0, atol=1e-5 * np.abs(gradient).max())


def test_kd_of_a_student_that_equals_its_teacher_is_zero() -> None:
    _, teacher, targets = problem()
    for tau in TAUS:
        loss, gradient = loss_and_gradient(build("kd"), teacher + 5, at(targets, tau))  # a shift changes no softmax
        assert loss == pytest.approx(0, abs=1e-4)
        assert np.abs(gradient).max() < 1e-5


@pytest.mark.parametrize("mixed", [True, False])
def test_cross_entropy_is_against_the_mixed_labels_at_temperature_one(mixed: bool) -> None:
    student, teacher, targets = problem()
    assert targets.label_a is not None
    assert targets.label_b is not None
    assert targets.lam is not None
    if not mixed:
        targets = Targets(targets.logits, 4.0, targets.label_a)
    loss, gradient = loss_and_gradient(build("kd", kd_weight=0.9, ce_weight=0.1), student, targets)
    log_q = special.log_softmax(student, axis=1)
    rows = np.arange(len(student))
    lam = targets.lam.double().numpy() if targets.lam is not None else np.ones(len(student))
    label_b = targets.label_b if targets.label_b is not None else targets.label_a
    truth = np.zeros_like(student)
    truth[rows, targets.label_a] += lam
    truth[rows, label_b] += 1 - lam
    expected = 0.9 * 16 * plain_kd(student, teacher, 4.0) - 0.1 * (truth * log_q).sum(axis=1).mean()
    assert loss == pytest.approx(expected, rel=1e-5)
    q, p = (special.softmax(z / 4, axis=1) for z in (student, teacher))
    slope = (0.9 * 4 * (q - p) + 0.1 * (np.exp(log_q) - truth)) / len(student)
    np.testing.assert_allclose(gradient, slope, rtol=0, atol=1e-4 * np.abs(slope).max())


def test_only_cross_entropy_is_torchs_own_for_unmixed_labels() -> None:
    student, _, targets = problem()
    targets = Targets(targets.logits, 4.0, targets.label_a, targets.label_b, torch.ones(16))
    z = torch.from_numpy(student).float()
    loss = build("kd", kd_weight=0.0, ce_weight=1.0)(z, targets)
    assert loss.item() == pytest.approx(F.cross_entropy(z, targets.label_a).item(), rel=1e-6)


def test_cross_entropy_without_labels_says_what_is_missing() -> None:
    with pytest.raises(UsageError, match="labels"):
        build("kd", ce_weight=0.5)(torch.zeros(2, 3), Targets(torch.zeros(2, 3), 1.0))


def test_the_kd_loss_of_hand_computed_numbers() -> None:
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3), 0.0]])
    kl = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert build("kd")(student, Targets(teacher, 1.0)).item() == pytest.approx(kl)
    assert build("kd")(student, Targets(2 * teacher, 2.0)).item() == pytest.approx(4 * kl)

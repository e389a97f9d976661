"""The contract of methods: a finite loss whose gradient a student can follow, whatever the order of a batch and its precision."""

import dataclasses
import math
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.errors import UsageError
from kdcache.methods import METHODS, Method
from kdcache.registry import Registry
from kdcache.targets import Targets
from kdcache.testing.components import ComponentContract

__all__ = ["MethodContract", "at_tau", "loss_and_gradient", "problem", "value_and_gradient"]

TAUS = (1.0, 4.0, 20.0, 40.0)
NEEDS = {"labels", "two views", "batch", "state"}


def problem(
    rows: int = 16, classes: int = 37, scale: float = 3.0, views: int = 1
) -> tuple[NDArray[np.float64], NDArray[np.float64], Targets]:
    """Logits float64 of a student `[views * rows, classes]` and of the teacher `[rows, classes]`, and the targets.

    These are at tau 4, with mixed labels, as a batch brings them. All numbers are such that float32 holds them.
    """
    rng = np.random.default_rng(7)
    student, teacher = (_logits(rng, rows, classes, scale) for _ in range(2))
    targets = _mixed(rng, teacher)
    if views == 2:
        strong, other = (_logits(rng, rows, classes, scale) for _ in range(2))
        targets = dataclasses.replace(targets, second=_mixed(rng, other))
        student = np.concatenate([student, strong])
    return student, teacher, targets


def _logits(rng: np.random.Generator, rows: int, classes: int, scale: float) -> NDArray[np.float64]:
    return np.asarray(rng.normal(0, scale, size=(rows, classes)), np.float32).astype(np.float64)


def _mixed(rng: np.random.Generator, teacher: NDArray[np.float64]) -> Targets:
    rows, classes = teacher.shape
    labels = torch.from_numpy(rng.integers(0, classes, (2, rows)))
    lam = torch.from_numpy(rng.random((rows,)).astype(np.float32))
    return Targets(torch.from_numpy(teacher).float(), 4.0, labels[0], labels[1], lam)


def changed(targets: Targets, **changes: Any) -> Targets:
    """`targets`, and those of the second view if there is one, with functions of what they hold in its place."""
    new = {name: change(getattr(targets, name)) for name, change in changes.items()}
    second = None if targets.second is None else changed(targets.second, **changes)
    return dataclasses.replace(targets, **new, second=second)


def at_tau(targets: Targets, tau: float) -> Targets:
    """`targets` at another temperature."""
    return changed(targets, tau=lambda _: tau)


def value_and_gradient(
    method: Any, student: NDArray[np.float64], targets: Targets, *, dtype: torch.dtype
) -> tuple[float, NDArray[np.float64]]:
    """The loss of a `method` for a student of this `dtype`, and its gradient to the student's logits."""
    z = torch.from_numpy(student).to(dtype).requires_grad_()
    value = method(z, targets)
    value.backward()
    assert z.grad is not None
    return value.item(), z.grad.double().numpy()


def loss_and_gradient(method: Any, student: NDArray[np.float64], targets: Targets) -> tuple[float, NDArray[np.float64]]:
    """Loss and gradient of a `method` for a student in float32."""
    return value_and_gradient(method, student, targets, dtype=torch.float32)


class MethodContract(ComponentContract):
    """The method `spec`.

    `shift_invariant`: a number that is added to all logits of a row changes nothing, as in a softmax. `detached`: some factor of
    the loss is not differentiated, so that the gradient is not the slope of the loss. `largest_gap`: between logits of a row.
    """

    registry: ClassVar[Registry[Any]] = METHODS
    shift_invariant: ClassVar[bool] = True
    detached: ClassVar[bool] = False
    largest_gap: ClassVar[float] = 120.0

    @pytest.fixture
    def method(self, component: Method) -> Method:
        """The component, fitted to a teacher's logits."""
        return component.fit([problem()[1].astype(np.float32)], 4.0)

    def test_what_training_has_to_know_of_it_makes_sense(self, method: Method) -> None:
        assert method.views_per_step in {1, 2}
        assert set(method.needs) <= NEEDS
        assert ("two views" in method.needs) >= (method.views_per_step == 2)
        assert method.ramp_epochs >= 0
        assert method.largest_tau > 0
        assert all(isinstance(doubt, str) for doubt in method.doubts({1.0, 20.0}, 1))

    @pytest.mark.parametrize("tau", TAUS)
    def test_the_loss_is_a_finite_scalar_with_a_finite_gradient(self, method: Method, tau: float) -> None:
        student, _, targets = problem(views=method.views_per_step)
        before = targets.logits.clone()
        z = torch.from_numpy(student).float().requires_grad_()
        loss = method(z, at_tau(targets, tau))
        assert loss.shape == ()
        assert loss.dtype == torch.float32
        loss.backward()  # type: ignore[no-untyped-call]
        assert torch.isfinite(loss)
        assert z.grad is not None
        assert torch.isfinite(z.grad).all()
        assert z.grad.abs().max() > 0
        assert targets.logits.grad is None
        assert torch.equal(targets.logits, before), "what was passed is overwritten"
        if self.shift_invariant:
            torch.testing.assert_close(z.grad.sum(dim=1), torch.zeros(len(z)), atol=1e-3 * float(z.grad.abs().max()), rtol=0)

    def test_a_step_against_the_gradient_lowers_the_loss(self, method: Method) -> None:
        student, _, targets = problem(views=method.views_per_step)
        loss, gradient = loss_and_gradient(method, student, targets)
        lower, _ = loss_and_gradient(method, student - 0.01 * gradient / np.abs(gradient).max(), targets)
        assert lower < loss

    def test_extreme_logits_and_a_batch_of_one_stay_finite(self, method: Method) -> None:
        extreme = torch.zeros(1, 10)
        extreme[0, 3] = self.largest_gap
        label = torch.tensor([3])
        for student, teacher in (
            (extreme, extreme.roll(2)),
            (extreme.roll(2), extreme),
            (-extreme, extreme),
            (extreme, -extreme),
        ):
            for tau in TAUS:
                targets = Targets(teacher, tau, label, label, torch.ones(1))
                if method.views_per_step == 2:
                    targets = dataclasses.replace(targets, second=targets)
                z = student.repeat(method.views_per_step, 1).requires_grad_()
                loss = method(z, targets)
                loss.backward()  # type: ignore[no-untyped-call]
                assert torch.isfinite(loss)
                assert z.grad is not None
                assert torch.isfinite(z.grad).all()

    def test_the_order_of_rows_and_the_order_of_classes_do_not_matter(self, method: Method) -> None:
        views = method.views_per_step
        student, _, targets = problem(views=views)
        loss, gradient = loss_and_gradient(method, student, targets)
        order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
        rows = torch.cat([order + 16 * view for view in range(views)]).numpy()
        other = changed(targets, **dict.fromkeys(("logits", "label_a", "label_b", "lam"), lambda column: column[order]))
        turned, turned_gradient = loss_and_gradient(method, student[rows], other)
        assert turned == pytest.approx(loss, rel=1e-5)
        np.testing.assert_allclose(turned_gradient, gradient[rows], atol=1e-5 * np.abs(gradient).max())

        classes = torch.randperm(37, generator=torch.Generator().manual_seed(1))
        rank = classes.argsort()
        moved = dict.fromkeys(("label_a", "label_b"), lambda label: rank[label])
        other = changed(targets, logits=lambda logits: logits[:, classes], **moved)
        turned, turned_gradient = loss_and_gradient(method, student[:, classes.numpy()], other)
        assert turned == pytest.approx(loss, rel=1e-5)
        np.testing.assert_allclose(turned_gradient, gradient[:, classes.numpy()], atol=1e-5 * np.abs(gradient).max())

    @pytest.mark.parametrize("tau", [4.0, 40.0])
    def test_half_precision_students_lose_no_more_than_their_own_rounding(self, method: Method, tau: float) -> None:
        student, _, targets = problem(views=method.views_per_step)
        half = torch.from_numpy(student).bfloat16()
        z = half.clone().requires_grad_()
        loss = method(z, at_tau(targets, tau))
        loss.backward()  # type: ignore[no-untyped-call]
        assert z.grad is not None
        exact, gradient = loss_and_gradient(method, half.double().numpy(), at_tau(targets, tau))
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(exact, rel=1e-5)
        np.testing.assert_allclose(z.grad.double().numpy(), gradient, atol=0.005 * np.abs(gradient).max())  # bf16 keeps 8 bits

    def test_options_that_are_no_numbers_or_choices_are_refused(self, component: Method) -> None:
        wrong: dict[type, tuple[Any, ...]] = {float: (math.nan, math.inf, "x"), int: (1.5, "x"), bool: ("perhaps",)}
        for field in dataclasses.fields(component):  # type: ignore[arg-type]
            for value in wrong.get(type(getattr(component, field.name)), ()):
                with pytest.raises(UsageError, match=field.name):
                    self.made_with(component, **{field.name: value})

    def test_logits_of_another_shape_than_the_targets_are_refused(self, method: Method) -> None:
        student, _, targets = problem(views=method.views_per_step)
        z = torch.from_numpy(student)
        for wrong in (z[:1], z[:, :5], torch.cat([z, z, z])):
            with pytest.raises((UsageError, ValueError, IndexError, RuntimeError)):
                method(wrong, targets)

    def test_gradients_are_those_of_the_loss(self, method: Method) -> None:
        if self.detached:
            pytest.skip("the gradient is not meant to be the slope of the loss")
        student, teacher, targets = problem(4, 6, scale=1.5, views=method.views_per_step)
        targets = changed(at_tau(targets, 3.0), logits=lambda logits: logits.double())
        targets = dataclasses.replace(targets, logits=torch.from_numpy(teacher))
        z = torch.from_numpy(student).requires_grad_()
        assert torch.autograd.gradcheck(lambda z: method(z, targets), z)

    def test_autocast_changes_nothing(self, method: Method) -> None:
        student, _, targets = problem(views=method.views_per_step)
        z = torch.from_numpy(student).float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = method(z, targets)
        assert cast.dtype == torch.float32
        assert torch.equal(cast, method(z, targets))

    def test_a_shift_of_a_row_changes_nothing(self, method: Method) -> None:
        if not self.shift_invariant:
            pytest.skip("logits are compared as they are")
        student, _, targets = problem(views=method.views_per_step)
        targets = changed(targets, logits=lambda logits: logits.double())
        shift = torch.linspace(-9, 9, len(targets.logits), dtype=torch.float64)[:, None]
        loss, gradient = value_and_gradient(method, student, targets, dtype=torch.float64)
        other = changed(targets, logits=lambda logits: logits - shift)
        all_shifts = shift.repeat(method.views_per_step, 1).numpy()
        moved, slope = value_and_gradient(method, student + all_shifts, other, dtype=torch.float64)
        assert moved == pytest.approx(loss, rel=1e-9)
        np.testing.assert_allclose(slope, gradient, rtol=0, atol=1e-9 * np.abs(gradient).max())

    def test_its_state_begins_with_the_first_epoch_and_what_it_learns_gets_a_gradient(self, method: Method) -> None:
        state = method.new_state()
        learner = method.new_optimizer(state)
        assert state.epoch == 1
        assert (learner is not None) == ("state" in method.needs) == bool(list(state.parameters()))
        student, _, targets = problem(views=method.views_per_step)
        z = torch.from_numpy(student).float().requires_grad_()
        loss = method(z, targets, state)
        loss.backward()  # type: ignore[no-untyped-call]
        assert torch.isfinite(loss)
        before: list[Tensor] = [parameter.detach().clone() for parameter in state.parameters()]
        if learner is not None:
            learner.step()
        assert all(not torch.equal(old, new) for old, new in zip(before, state.parameters(), strict=True))
        assert all(figure.ndim == 0 and not figure.requires_grad for figure in method.figures(state).values())

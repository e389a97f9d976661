"""The contract of controls: targets stay targets, whatever batch they come in."""

from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from kdcache.registry import Registry
from kdcache.targets import CONTROLS, Control, Targets, row_keys
from kdcache.testing.components import ComponentContract

__all__ = ["ControlContract", "keys_of", "teacher_logits"]

CLASSES, ROWS = 12, 40


def teacher_logits() -> Tensor:
    """Logits float32 `[40, 12]`: made up, with one row that is nearly one-hot, one that is nearly uniform, and one with ties."""
    logits = torch.from_numpy(np.random.default_rng(2).normal(0, 4, (ROWS, CLASSES)).astype(np.float32))
    logits[0] *= 20
    logits[1] /= 1000
    logits[2, 3:] = logits[2, 3]
    return logits


def keys_of(view: int = 0, samples: Tensor | None = None) -> Tensor:
    """The rows' random keys int64 `[B, 2]`, of all samples unless some are given."""
    return row_keys("12" * 32, view, torch.arange(ROWS) if samples is None else samples)


class ControlContract(ComponentContract):
    """The control `spec`. One that is meant to move the teacher's top class sets `keeps_the_top_class` to False."""

    registry: ClassVar[Registry[Any]] = CONTROLS
    keeps_the_top_class: ClassVar[bool] = True

    def fitted(self, component: Control, tau: float) -> Control:
        logits = teacher_logits().numpy()
        return component.fit([logits[:15], logits[15:]], tau)

    @pytest.mark.parametrize("tau", [1.0, 4.0, 40.0])
    def test_shape_temperature_labels_and_the_teachers_top_class_stay(self, component: Control, tau: float) -> None:
        batch, labels = teacher_logits(), torch.arange(ROWS) % CLASSES
        before = batch.clone()
        targets = Targets(batch, tau, labels, labels.flip(0), torch.full((ROWS,), 0.7))
        made = self.fitted(component, tau)(targets, keys_of())
        assert torch.equal(batch, before), "what was passed is overwritten"
        assert made.logits.shape == batch.shape
        assert made.logits.dtype == torch.float32
        assert torch.isfinite(made.logits).all()
        assert made.tau == tau
        assert made.label_a is targets.label_a
        assert made.label_b is targets.label_b
        assert made.lam is targets.lam
        torch.testing.assert_close(made.probs.sum(dim=1), torch.ones(ROWS))
        if self.keeps_the_top_class:
            assert torch.equal(made.logits[torch.arange(ROWS), batch.argmax(dim=1)], made.logits.max(dim=1).values)

    def test_a_row_does_not_depend_on_its_batch_or_on_the_order_in_it(self, component: Control) -> None:
        batch, control = teacher_logits(), self.fitted(component, 4.0)
        whole = control(Targets(batch, 4.0), keys_of()).logits
        rng = np.random.default_rng(0)
        for _ in range(5):
            chosen = torch.from_numpy(rng.permutation(ROWS)[: int(rng.integers(1, ROWS))])
            part = control(Targets(batch[chosen], 4.0), keys_of(samples=chosen)).logits
            assert torch.equal(part, whole[chosen])

    def test_the_same_targets_come_out_every_time(self, component: Control) -> None:
        first = self.fitted(component, 4.0)(Targets(teacher_logits(), 4.0), keys_of()).logits
        torch.manual_seed(99)
        again = self.fitted(component, 4.0)(Targets(teacher_logits(), 4.0), keys_of()).logits
        assert torch.equal(first, again)

    def test_a_fitted_control_is_stored_and_made_again(self, component: Control) -> None:
        control = self.fitted(component, 4.0)
        assert self.registry.name_of(control) == self.registry.name_of(component)
        again = self.registry.from_dict(self.registry.to_dict(control))
        targets = Targets(teacher_logits(), 4.0)
        assert torch.equal(control(targets, keys_of()).logits, again(targets, keys_of()).logits)

    def test_it_says_with_how_many_classes_it_means_something(self, component: Control) -> None:
        component.check(CLASSES)
        assert isinstance(component.smooths, bool)

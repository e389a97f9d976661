"""Every control: targets stay targets, whatever the batch they come in."""

from typing import Any

import numpy as np
import pytest
import torch

from kdcache.targets import CONTROLS, Control, Targets, row_keys
from tests.contracts.examples import examples

CLASSES, ROWS = 12, 40


@pytest.fixture(scope="module")
def batch() -> torch.Tensor:
    logits = torch.from_numpy(np.random.default_rng(2).normal(0, 4, (ROWS, CLASSES)).astype(np.float32))
    logits[0] *= 20  # nearly one-hot
    logits[1] /= 1000  # nearly uniform
    logits[2, 3:] = logits[2, 3]  # ties
    return logits


def fitted(name: str, options: dict[str, Any], batch: torch.Tensor, tau: float) -> Control:
    return CONTROLS.build(name, **options).fit([batch.numpy()[:15], batch.numpy()[15:]], tau)


def keys(view: int = 0, samples: torch.Tensor | None = None) -> torch.Tensor:
    return row_keys("12" * 32, view, torch.arange(ROWS) if samples is None else samples)


@pytest.mark.parametrize("tau", [1.0, 4.0, 40.0])
@pytest.mark.parametrize(("name", "options"), examples("control"))
def test_a_control_keeps_shape_temperature_labels_and_the_teachers_top_class(
    name: str, options: dict[str, Any], tau: float, batch: torch.Tensor
) -> None:
    labels = torch.arange(ROWS) % CLASSES
    before = batch.clone()
    targets = Targets(batch, tau, labels, labels.flip(0), torch.full((ROWS,), 0.7))
    made = fitted(name, options, batch, tau)(targets, keys())
    assert torch.equal(batch, before)  # what was passed is not overwritten
    assert made.logits.shape == batch.shape
    assert made.logits.dtype == torch.float32
    assert torch.isfinite(made.logits).all()
    assert made.tau == tau
    assert made.label_a is targets.label_a
    assert made.label_b is targets.label_b
    assert made.lam is targets.lam
    torch.testing.assert_close(made.probs.sum(dim=1), torch.ones(ROWS))
    rows = torch.arange(ROWS)
    assert torch.equal(made.logits[rows, batch.argmax(dim=1)], made.logits.max(dim=1).values)


@pytest.mark.parametrize(("name", "options"), examples("control"))
def test_a_row_does_not_depend_on_its_batch_or_on_the_order_in_it(
    name: str, options: dict[str, Any], batch: torch.Tensor
) -> None:
    control = fitted(name, options, batch, 4.0)
    whole = control(Targets(batch, 4.0), keys()).logits
    rng = np.random.default_rng(0)
    for _ in range(5):
        chosen = torch.from_numpy(rng.permutation(ROWS)[: int(rng.integers(1, ROWS))])
        part = control(Targets(batch[chosen], 4.0), keys(samples=chosen)).logits
        assert torch.equal(part, whole[chosen])


@pytest.mark.parametrize(("name", "options"), examples("control"))
def test_the_same_targets_come_out_every_time(name: str, options: dict[str, Any], batch: torch.Tensor) -> None:
    first = fitted(name, options, batch, 4.0)(Targets(batch, 4.0), keys()).logits
    torch.manual_seed(99)
    again = fitted(name, options, batch, 4.0)(Targets(batch, 4.0), keys()).logits
    assert torch.equal(first, again)


@pytest.mark.parametrize(("name", "options"), examples("control"))
def test_a_fitted_control_is_stored_and_made_again(name: str, options: dict[str, Any], batch: torch.Tensor) -> None:
    control = fitted(name, options, batch, 4.0)
    assert CONTROLS.name_of(control) == name
    again = CONTROLS.from_dict(CONTROLS.to_dict(control))
    assert torch.equal(control(Targets(batch, 4.0), keys()).logits, again(Targets(batch, 4.0), keys()).logits)


def test_none_changes_nothing(batch: torch.Tensor) -> None:
    assert torch.equal(CONTROLS.build("none")(Targets(batch, 4.0), keys()).logits, batch)

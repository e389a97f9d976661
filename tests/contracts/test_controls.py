"""Every control keeps its contract."""

from typing import Any

import pytest
import torch

from kdcache.targets import Targets, control
from kdcache.testing import ControlContract
from kdcache.testing.controls import keys_of, teacher_logits
from tests.contracts.examples import cases


class TestEveryControl(ControlContract):
    @pytest.fixture(params=cases("control"))
    def component(self, request: pytest.FixtureRequest) -> Any:
        name, options = request.param
        return self.registry.build(name, **options)


def test_none_changes_nothing() -> None:
    assert torch.equal(control("none")(Targets(teacher_logits(), 4.0), keys_of()).logits, teacher_logits())

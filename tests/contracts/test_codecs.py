"""Every codec keeps its contract."""

from typing import Any

import pytest

from kdcache.testing import CodecContract
from tests.contracts.examples import cases


class TestEveryCodec(CodecContract):
    @pytest.fixture(params=cases("codec"))
    def component(self, request: pytest.FixtureRequest) -> Any:
        name, options = request.param
        return self.registry.build(name, **options)

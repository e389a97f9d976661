"""What is asked of every component: it is frozen, and its name and options make it again."""

import dataclasses
import json
from typing import Any, ClassVar

import pytest

from kdcache.errors import UsageError
from kdcache.registry import FITTED, Registry

__all__ = ["ComponentContract"]


class ComponentContract:
    """The component `spec` of a `registry`."""

    registry: ClassVar[Registry[Any]]
    spec: ClassVar[str]

    @pytest.fixture
    def component(self) -> Any:
        return self.registry.parse(self.spec)

    def test_it_survives_json(self, component: Any) -> None:
        stored = json.loads(json.dumps(self.registry.to_dict(component)))
        assert stored["name"] == self.registry.name_of(component)
        assert self.registry.from_dict(stored) == component

    def test_it_survives_its_command_line_form(self, component: Any) -> None:
        spec = self.registry.spec(component)
        assert spec.partition(":")[0] == self.registry.name_of(component)
        assert self.registry.parse(spec) == component

    def test_it_is_frozen_and_its_options_can_be_listed(self, component: Any) -> None:
        described = self.registry.describe(self.registry.name_of(component))
        for field in dataclasses.fields(component):
            assert (field.name in described) == (field.metadata != FITTED)
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(component, field.name, None)
        hash(component)

    def test_an_unknown_option_is_refused(self, component: Any) -> None:
        with pytest.raises(UsageError, match="unknown option"):
            self.registry.build(self.registry.name_of(component), no_such_option=1)

    def test_it_says_what_it_is(self, component: Any) -> None:
        assert type(component).__doc__, "lists of components show the docstring"

    def made_with(self, component: Any, **options: Any) -> Any:
        """The same component with other `options`, checked as those of a user."""
        own = {field.name: getattr(component, field.name) for field in dataclasses.fields(component)}
        fitted = {field.name for field in dataclasses.fields(component) if field.metadata.get("fitted")}
        own = {name: value for name, value in own.items() if name not in fitted}
        return self.registry.build(self.registry.name_of(component), **own | options)

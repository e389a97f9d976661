"""Protects names and options: what a manifest, a run record or a command line says of a component makes it again."""

import abc
import dataclasses
import importlib.metadata
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.errors import UsageError
from kdcache.registry import Registry
from tests.contracts.examples import EXAMPLES, REGISTRIES, with_files


@pytest.mark.parametrize("kind", REGISTRIES)
def test_every_registered_component_has_an_example_that_can_be_made(kind: str, datasets_in_small: Path) -> None:
    registry = REGISTRIES[kind]
    assert list(registry) == sorted(set(registry))
    for name in registry:
        for options in EXAMPLES.get(kind, {}).get(name, ({},)):
            try:
                registry.build(name, **with_files(options, datasets_in_small))
            except UsageError as error:
                pytest.fail(
                    f"{kind} {name!r} cannot be made from {options}: {error.why}. Add options that suit it to "
                    f"tests/contracts/examples.py: EXAMPLES[{kind!r}][{name!r}] = ({{'option': value, ...}},)"
                )


def test_no_example_is_left_of_a_component_that_is_gone() -> None:
    left = [(kind, name) for kind, table in EXAMPLES.items() for name in table if name not in REGISTRIES[kind]]
    assert not left, f"remove these from tests/contracts/examples.py: {left}"


@pytest.mark.parametrize("kind", REGISTRIES)
def test_a_mistyped_name_or_option_is_answered_with_the_closest_one(kind: str) -> None:
    registry = REGISTRIES[kind]
    for name in registry:
        with pytest.raises(UsageError, match=f"unknown {kind}") as caught:
            registry[name + "x"]
        assert repr(name) in caught.value.fix
        with pytest.raises(UsageError, match="unknown option") as caught:
            registry.build(name, no_such_option=1)
        assert "no_such_option" in caught.value.what
        with pytest.raises(UsageError):
            registry.parse(f"{name}:no_such_option=1")


@pytest.mark.parametrize("stored", [{}, {"name": 3}, {"name": ["kd"]}, {"name": None}, {"name": "nothing", "x": 1}])
@pytest.mark.parametrize("kind", REGISTRIES)
def test_a_stored_component_without_a_proper_name_is_a_usage_error(kind: str, stored: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        REGISTRIES[kind].from_dict(stored)


# ---------------------------------------------------------------- a registry of its own


@given(label=st.text())
def test_any_text_survives_its_command_line_form(shapes: Registry[Any], label: str) -> None:
    box = shapes.build("box", side=3, label=label)
    assert shapes.parse(shapes.spec(box)) == box


@pytest.fixture
def shapes() -> Registry[Any]:
    registry: Registry[Any] = Registry("shape")

    @registry.register("box")
    @dataclasses.dataclass(frozen=True)
    class Box:
        side: int
        colour: Literal["red", "blue"] = "red"
        scale: float | None = None
        open: bool = False
        label: str = ""

    return registry


@pytest.mark.parametrize(
    ("spec", "changed"),
    [
        ("box:3", {}),
        ("box:side=3", {}),
        ("box:3,colour=blue", {"colour": "blue"}),
        ("box:side=3,scale=0.5,open=yes", {"scale": 0.5, "open": True}),
        ("box:3,scale=none,open=0", {"scale": None, "open": False}),
        ("box:3,label=a=b", {"label": "a=b"}),
    ],
)
def test_specs_are_read_by_the_types_of_the_options(shapes: Registry[Any], spec: str, changed: dict[str, Any]) -> None:
    made = shapes.parse(spec)
    assert made == shapes.build("box", **{"side": 3} | changed)
    assert shapes.parse(shapes.spec(made)) == made


@pytest.mark.parametrize(
    "spec",
    ["box", "box:", "box:three", "box:side=", "box:3,green", "box:3,colour=green", "box:3,open=perhaps", "box:3,4", "ball:1"],
)
def test_specs_that_make_no_sense_are_usage_errors(shapes: Registry[Any], spec: str) -> None:
    with pytest.raises(UsageError) as caught:
        shapes.parse(spec)
    assert caught.value.fix


def test_only_frozen_dataclasses_and_new_names_can_be_registered(shapes: Registry[Any]) -> None:
    @dataclasses.dataclass
    class Thawed:
        side: int = 1

    class Plain:
        pass

    for wrong in (Thawed, Plain):
        with pytest.raises(TypeError, match="frozen dataclass"):
            shapes.register("other")(wrong)
    with pytest.raises(ValueError, match="twice"):
        shapes.register("box")(dataclasses.dataclass(frozen=True)(Plain))
    with pytest.raises(KeyError, match="not a registered shape"):
        shapes.name_of(Plain())


class Shape(abc.ABC):
    corners: ClassVar[int] = 4

    @abc.abstractmethod
    def area(self) -> int: ...

    @property
    def name(self) -> str:
        return "shape"


def test_a_component_without_the_base_gets_what_the_base_says_and_keeps_what_it_says_itself() -> None:
    registry: Registry[Any] = Registry("shape", base=Shape)

    @registry.register("square")
    @dataclasses.dataclass(frozen=True)
    class Square:
        side: int = 2
        name: ClassVar[str] = "square"

        def area(self) -> int:
            return self.side**2

    made = registry.parse("square:3")
    assert (made.area(), made.corners, made.name) == (9, 4, "square")
    assert isinstance(made, Shape)
    assert made == Square(3)
    assert registry.name_of(Square()) == "square"
    assert (registry.spec(made), registry.to_dict(made)) == ("square:3", {"name": "square", "side": 3})


def test_a_component_without_what_the_base_asks_for_is_a_type_error() -> None:
    registry: Registry[Any] = Registry("shape", base=Shape)

    @dataclasses.dataclass(frozen=True)
    class Nothing:
        side: int = 2

    with pytest.raises(TypeError, match="Nothing cannot be registered as shape: it has no area"):
        registry.register("nothing")(Nothing)


@dataclasses.dataclass(frozen=True)
class FromPlugin:
    """What an installed package would bring."""

    power: int = 2


def test_installed_packages_add_components_when_a_name_is_first_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []

    def entry_points(group: str) -> list[importlib.metadata.EntryPoint]:
        loaded.append(group)
        return [importlib.metadata.EntryPoint("mine", f"{__name__}:FromPlugin", group)]

    registry: Registry[Any] = Registry("shape", entry_points="test.shapes")
    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    assert loaded == []
    assert registry.parse("mine:3") == FromPlugin(3)
    assert list(registry) == ["mine"]
    assert loaded == ["test.shapes"]

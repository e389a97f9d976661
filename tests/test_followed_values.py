"""Names, options and arrays that are wrong: what the fix of the error says is taken in their place."""

import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdcache.archive import open_archive, write_archive
from kdcache.cli import run
from kdcache.codecs import CODECS
from kdcache.given import as_logits, whole_numbers
from kdcache.methods import METHODS
from kdcache.methods.presets import preset
from kdcache.targets import CONTROLS, Targets
from kdcache.views import ViewPolicy
from tests.following import followed


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def used(fix: str) -> str:
    """What a fix says to use or write, without the quotes."""
    found = re.search(r"\b(?:use|write|such as|choose one of:) '?([^\s',;]+)", fix)
    assert found, fix
    return found[1]


def after(says: str, value: Any) -> Callable[[str], Any]:
    def mend(fix: str) -> Any:
        assert says in fix, fix
        return value

    return mend


def method_of(spec: str) -> Any:
    return METHODS.parse(spec)


def fitted(spec: str) -> Any:
    control = CONTROLS.parse(spec)
    control.check(10)
    return control


SPECS: dict[str, tuple[Callable[[str], Any], str, Callable[[str], str]]] = {
    "a slip": (method_of, "kdd", used),
    "another word": (method_of, "zzzz", used),
    "an unknown option": (method_of, "kd:ce_wieght=1", lambda fix: f"kd:{used(fix)}=1"),
    "a bare value": (method_of, "dkd:1,2", lambda fix: re.sub(r"=\.\.\.", "=1", used(fix).partition("=...")[0] + "=1")),
    "a value without options": (fitted, "none:3", lambda fix: fix.removeprefix("write ").partition(" alone")[0]),
    "an option twice": (method_of, "kd:ce_weight=1,ce_weight=2", after("leave one out", "kd:ce_weight=1")),
    "a missing option": (fitted, "bottom", lambda fix: fix.partition("give it one: ")[2].replace("...", "5")),
    "a text for a number": (method_of, "kd:ce_weight=abc", lambda fix: f"kd:ce_weight={fix.rpartition(' ')[2]}"),
    "below 0": (method_of, "kd:ce_weight=-1", lambda fix: f"kd:ce_weight={fix.rpartition(' ')[2]}"),
    "no weight": (method_of, "kd:kd_weight=0", after("give one of the two a weight above 0", "kd:kd_weight=0,ce_weight=1")),
    "a network": (method_of, "ctkd:instance=true", lambda fix: used(fix.replace("the global form, ", ""))),
    "no class kept": (fitted, "bottom:0", lambda fix: fix.rpartition(" ")[2]),
    "all classes kept": (fitted, "topk:10", lambda fix: f"topk:{fix.rpartition(' ')[2]}"),
    "no preset": (preset, "paper:dkd:imagenet", lambda fix: used(fix.replace("(", ","))),
    "no such pair": (preset, "paper:kd:cifar100:a-b", lambda fix: fix.rpartition(": ")[2]),
    "no such preset": (preset, "paper:kd:cifar1000", after("kdcache methods --presets", "paper:kd:cifar100")),
    "no policy": (ViewPolicy.load, "petz", used),
    "no field": (ViewPolicy.load, "pets:flip=1", after("kdcache policy pets shows all fields", "pets:hflip=1")),
    "no value": (ViewPolicy.load, "pets:hflip", lambda fix: used(fix.replace("for example: ", ""))),
    "a wrong value": (ViewPolicy.load, "pets:hflip=2", lambda fix: f"pets:hflip={fix.partition(';')[0].rpartition(' ')[2]}"),
    "a text": (ViewPolicy.load, "pets:hflip=abc", lambda fix: f"pets:hflip={fix.partition(';')[0].rpartition(' ')[2]}"),
    "no such crop": (ViewPolicy.load, "pets:crop.kind=x", lambda fix: f"pets:crop.kind={used(fix.replace('one of ', ''))}"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPECS)
def test_names_and_options_are_understood_as_the_fix_writes_them(case: str) -> None:
    attempt, wrong, mend = SPECS[case]
    assert followed(attempt, wrong, mend) is not None


@pytest.mark.parametrize("text", [None, "[1, 2]", "a: [", "\xff"])
def test_a_policy_file_is_begun_with_the_command_of_the_fix(text: str | None) -> None:
    if text is not None:
        Path("own.yaml").write_text(text, encoding="latin1")

    def mend(fix: str) -> str:
        if "kdcache" not in fix:
            assert fix == "correct the file"
            Path("own.yaml").write_text("size: 32\n")
            return "own.yaml"
        command = re.search(r"kdcache (policy pets) > (own\.yaml)", fix)
        assert command, fix
        import contextlib

        with Path(command[2]).open("w") as file, contextlib.redirect_stdout(file):
            assert run(command[1].split()) == 0
        return "own.yaml"

    assert followed(ViewPolicy.load, "own.yaml", mend).size


ORDER = np.array([np.arange(5)] * 2)  # sample numbers [V, N]
LOGITS = np.random.default_rng(3).normal(0, 4, (2, 5, 3)).astype(np.float32)
MASKED = np.ma.masked_array(LOGITS, LOGITS > 9)
MASKED[0, 0, 0] = np.ma.masked
GIVEN: dict[str, tuple[Callable[[Any], Any], Any, str, Any]] = {
    "complex": (as_logits, LOGITS * (1 + 0j), "logits.real", LOGITS),
    "texts": (as_logits, LOGITS.astype(str), "float32", LOGITS),
    "ragged": (as_logits, [[1, 2], [3]], "rows of one length", [[1, 2], [3, 4]]),
    "masked": (as_logits, MASKED, "or fill them in", MASKED.filled(0)),
    "rows left out": (as_logits, MASKED, "leave such rows out", MASKED[1:]),
    "words": (whole_numbers, ["a"], "int64", np.array([1], np.int64)),
    "fractions": (whole_numbers, [1.5], "correct it", [1.0]),
}


@pytest.mark.parametrize("case", GIVEN)
def test_arrays_are_taken_when_they_are_given_as_the_fix_says(case: str) -> None:
    function, wrong, says, right = GIVEN[case]
    followed(lambda values: function(values, "values"), wrong, after(says, right))


def written(changed: dict[str, Any]) -> Any:
    given: dict[str, Any] = {"logits": LOGITS, "class_names": ["a", "b", "c"], "path": "w"} | changed
    return write_archive(given.pop("path"), given.pop("logits"), given.pop("class_names"), **given)


def spoiled(place: tuple[int, ...], value: float) -> np.ndarray[Any, Any]:
    changed = LOGITS.copy()
    changed[place] = value
    return changed


ARCHIVES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "one view": ({"logits": LOGITS[0]}, "add the view axis with logits[None]", {"logits": LOGITS[0][None]}),
    "fewer names": ({"class_names": [*"ab"]}, "correct the names", {"class_names": [*"abc"]}),
    "one class": (
        {"logits": LOGITS[..., :1], "class_names": ["a"]},
        "give all class names",
        {"logits": LOGITS, "class_names": [*"abc"]},
    ),
    "nothing": ({"logits": LOGITS[:, :0]}, "give an int", {"logits": LOGITS}),
    "sample numbers": ({"sample": np.arange(5)}, "one row of numbers for every view", {"sample": ORDER}),
    "a sample twice": ({"sample": ORDER // 2}, "pass which sample sits at each position", {"sample": ORDER}),
    "other samples": ({"sample": ORDER + 1}, "pass which sample sits at each position", {"sample": ORDER}),
    "a label too many": ({"labels": [0, 1, 2, 0, 1, 2]}, "pass them all", {"labels": [0, 1, 2, 0, 1]}),
    "too few keys": ({"keys": ["a"]}, "pass them all", {"keys": [*"abcde"]}),
    "numbers as keys": ({"keys": [1, 2, 3, 4, 5]}, "str(key)", {"keys": [*"12345"]}),
    "a label of no class": ({"labels": [0, 1, 3, 0, 1]}, "the place of each sample's class", {"labels": [0, 1, 2, 0, 1]}),
    "a name of no class": ({"labels": [*"abxab"]}, "correct it, or name its class", {"labels": [*"abcab"]}),
    "a number as a name": ({"class_names": ["a", "b", 3]}, "give texts, such as '3'", {"class_names": ["a", "b", "3"]}),
    "no name": ({"class_names": ["a", "b", None]}, "give every class a name of its own", {"class_names": ["a", "b", "c"]}),
    "not a number": ({"logits": spoiled((1, 2, 0), np.nan)}, "use another teacher checkpoint", {"logits": LOGITS}),
    "too large": ({"logits": spoiled((1, 2, 0), 900)}, "--codec", {"codec": "f32"}),
    "too large for f16": ({"logits": spoiled((1, 2, 0), 90_000), "codec": "f16"}, "--codec", {"codec": "f32"}),
}  # fmt: skip


@pytest.mark.parametrize("case", ARCHIVES)
def test_archives_are_written_of_what_the_fix_asks_for(case: str) -> None:
    wrong, says, right = ARCHIVES[case]

    def mend(fix: str) -> dict[str, Any]:
        assert says in fix, fix
        codec = re.search(r"--codec (\w+)", fix)
        return wrong | right | ({"codec": codec[1]} if codec else {})

    assert followed(written, wrong, mend).verify().ok


def test_a_folder_that_is_taken_is_set_aside_by_the_command_of_the_fix() -> None:
    written({})

    def mend(fix: str) -> dict[str, Any]:
        subprocess.run(fix.rpartition(": ")[2], shell=True, check=True)
        return {}

    assert followed(written, {}, mend).verify().ok
    assert open_archive("w.aside").verify().ok


TARGETS = Targets(torch.from_numpy(LOGITS[0]), 4.0)
LABELLED = replace(TARGETS, label_a=torch.tensor([0, 1, 2, 0, 1]), label_b=torch.tensor([1, 1, 2, 0, 1]), lam=torch.ones(5))
LOSSES = {
    "no labels": (("kd:ce_weight=1", TARGETS, 1), "an archive with labels", ("kd:ce_weight=1", LABELLED, 1)),
    "without the weight": (("kd:ce_weight=1", TARGETS, 1), "a method without ce_weight", ("kd", TARGETS, 1)),
    "rule": (("dkd:label_rule=pair", TARGETS, 1), "label_rule=teacher_argmax", ("dkd:label_rule=teacher_argmax", TARGETS, 1)),
    "one view": (("mlkd", LABELLED, 1), "give the method views=1", ("mlkd:views=1", LABELLED, 1)),
    "two views": (("kd", TARGETS, 2), "take the logits of the images", ("kd", TARGETS, 1)),
}  # fmt: skip


@pytest.mark.parametrize("case", LOSSES)
def test_losses_are_computed_of_what_the_fix_asks_for(case: str) -> None:
    wrong, says, right = LOSSES[case]

    def loss(given: tuple[str, Targets, int]) -> torch.Tensor:
        spec, targets, views = given
        return METHODS.parse(spec)(torch.zeros(views * 5, 3), targets)

    assert torch.isfinite(followed(loss, wrong, after(says, right)))


def test_a_control_is_fitted_as_the_fix_says() -> None:
    archive = written({})
    control = CONTROLS.parse("ls-global")

    def mend(fix: str) -> Any:
        return eval(fix.partition("use what ")[2].removesuffix(" gives"), {"control": control, "archive": archive, "tau": 4.0})

    keys = torch.zeros((5, 2), dtype=torch.int64)
    assert torch.isfinite(followed(lambda fitted: fitted(TARGETS, keys).logits, control, mend)).all()


def test_stored_components_have_names() -> None:
    assert followed(CODECS.from_dict, {"step": 1}, after("give it a name", {"name": "i16"}))

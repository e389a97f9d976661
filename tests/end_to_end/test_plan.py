"""plan: what it says before anything is there, against what is there afterwards."""

import json
import math

import pytest

from kdcache.archive import open_archive
from kdcache.students import costs as plan

GRID = ["plan", "--teacher", "test_vit", "--dataset", "digits", "--views", "3", "--epochs", "2", "--tau", "1,4,20"]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch) -> None:
    monkeypatch.setattr(plan, "PATIENCE", 0.02)
    monkeypatch.setattr(plan, "TURNS", 1)


@pytest.fixture
def planned(kdcache, tmp_path):
    def call(*arguments: object, teacher: bool = True) -> dict:
        outcome = kdcache(*(GRID if teacher else GRID[:1]), *arguments, "--json", "--home", tmp_path)
        assert outcome.status == 0, outcome.err
        return json.loads(outcome.out) | {"said": outcome.err}

    return call


def test_the_archive_has_the_size_that_was_planned_and_planning_leaves_nothing(planned, archive, tmp_path) -> None:
    before = set(tmp_path.rglob("*"))
    costs = planned()
    assert set(tmp_path.rglob("*")) == before
    assert 0 <= open_archive(archive).nbytes - costs["storage"]["archive"] < 50 * 1438  # keys, labels, descriptions
    assert (costs["samples"], costs["classes"], costs["views"]) == (1438, 10, 3)
    canvases = sum(file.stat().st_size for file in (archive.parent.parent / "data").rglob("pixels.npy"))
    assert costs["storage"]["canvases"] == pytest.approx(canvases, rel=0.01)


def test_canvases_that_are_there_take_no_more_room(kdcache, home) -> None:
    outcome = kdcache(*GRID, "--json", "--home", home)
    assert json.loads(outcome.out)["storage"]["canvases"] == 0


def test_hours_are_those_of_the_speeds_that_were_measured(planned) -> None:
    costs = planned("--seed", "0-1", "--student", "test_resnet,test_vit", "--control", "none,ls-global")
    assert costs["groups"] == [12, 12]  # a stream for each seed; temperatures, controls and students share it
    assert [(one["name"], one["students"]) for one in costs["students"]] == [("test_resnet", 12), ("test_vit", 12)]
    shown, tested = 2 * 1438, 2 * costs["tested"]
    steps = sum(one["students"] * (shown * one["step"] + tested * one["test"]) for one in costs["students"])
    assert costs["hours"]["distill"] * 3600 == pytest.approx(2 * shown * costs["render"] + steps)
    teaching = 24 * shown * (costs["render"] + costs["teacher"])
    assert costs["hours"]["online"] * 3600 == pytest.approx(teaching + steps)
    assert costs["hours"]["dump"] * 3600 == pytest.approx(3 * 1438 * (costs["render"] + costs["teacher"]))
    # A dump of three epochs, and one rendering for all, for students of two that would each render and ask the teacher.
    rendering = costs["render"] / (costs["render"] + costs["teacher"])
    assert costs["break_even_students"] == math.floor(1.5 + rendering) + 1
    assert costs["break_even_epochs"] >= 3
    assert 0 < costs["further"] < 1


def test_students_that_do_not_fit_take_turns(planned, monkeypatch) -> None:
    whole = planned()
    memory = whole["students"][0]["memory"]
    monkeypatch.setattr(plan, "room", lambda *_: 2 * memory["kept"] + memory["passing"])
    assert planned()["groups"] == [2, 1]


def test_two_views_cost_twice(planned) -> None:
    costs = planned("--method", "mlkd", "--tau", "4")
    assert [one["views"] for one in costs["students"]] == [2]
    step = 2 * 1438 * 2 * (costs["render"] + costs["students"][0]["step"]) / 3600
    assert costs["hours"]["distill"] == pytest.approx(step + 2 * costs["tested"] * costs["students"][0]["test"] / 3600)


def test_a_dataset_that_is_not_there_is_not_fetched(planned, kdcache, tmp_path) -> None:
    small = (
        "--size",
        "32",
        "--canvas",
        "40",
        "--teacher",
        "test_vit",
        "--student",
        "test_resnet",
        "--views",
        "2",
        "--epochs",
        "1",
    )
    costs = planned(*small, "--dataset", "pets", teacher=False)
    assert (costs["samples"], costs["tested"], costs["classes"]) == (3680, 3669, 37)
    assert costs["storage"]["canvases"] == (3680 + 3669) * 3 * 40**2
    assert not list(tmp_path.iterdir())
    costs = planned(*small, "--dataset", "pets", "--samples", "1000", "--classes", "20", teacher=False)
    assert (costs["samples"], costs["classes"]) == (1000, 20)
    outcome = kdcache("plan", *small, "--dataset", f"folder:{tmp_path}/nothing", "--home", tmp_path)
    assert outcome.status == 3
    assert "--samples" in outcome.err


def test_little_room_is_said_and_refuses_nothing(kdcache, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(plan, "free_bytes", lambda path: 1000)
    monkeypatch.setattr(plan, "room", lambda *_: 1000)
    outcome = kdcache(*GRID, "--home", tmp_path)
    assert outcome.status == 0
    assert "will be needed" in outcome.err
    assert "may not fit" in outcome.err
    assert "3 x 1" in outcome.out  # one student at a time


def test_a_grid_that_makes_no_sense_is_refused_as_by_distill(kdcache, tmp_path) -> None:
    outcome = kdcache(*GRID, "--method", "wttm", "--home", tmp_path)
    assert outcome.status == 2
    assert "--force" in outcome.err

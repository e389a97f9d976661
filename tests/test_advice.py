"""Protects the advice on temperatures: findings are quoted with place and numbers, and kept to where they hold."""

from typing import Any

import numpy as np
import pytest

from kdcache.archive import PAPER_TAUS, ArchivePlan, Statistics, measure_logits
from kdcache.datasets import SourceCard
from kdcache.report.advice import BOTH, LARGE, SMALL, Advice, advise, first_temperatures
from kdcache.system.progress import Silent
from kdcache.views.policy import ViewPolicy
from tests.archives import teacher_card

ORIGIN, OVERLAP, TRAINING, DIFFERENCES, SCORES, MATCHING = range(6)
TITLES = ("other classes", "pretraining", "student is trained", "small differences", "z-score", "temper the teacher only")


def plan(
    classes: int = 37, *, start: str | None = "timm", top1: float | None = 92.0, data: str | None = None, mix: bool = False
) -> ArchivePlan:
    names = tuple(f"class {c}" for c in range(classes))
    training = None if start is None else {"start": start, "epochs": 20}
    return ArchivePlan(
        num_views=1,
        num_samples=10,
        class_names=names,
        codec={"name": "i16"},
        layout={"name": "zarr"},
        shard_rows=10,
        policy=ViewPolicy.load("pets" if mix else "none"),
        source=data and SourceCard(name=data, split="train", num_samples=10, class_names=names, licence=None, digest="1" * 64),
        teacher=teacher_card(alias="vit_s", training=training, top1_clean=top1),
    )


def statistics(classes: int = 37, taus: tuple[float, ...] = PAPER_TAUS, spread: float = 1.0, **at_one: float) -> Statistics:
    """Of random rows whose deviations lie a factor `spread` apart; `rest` and `whole` replace the means at tau 1."""
    rng = np.random.default_rng(0)
    rows = rng.normal(0, 1, (400, classes)) * np.geomspace(2, 2 * spread, 400)[:, None]
    found = measure_logits([rows.astype(np.float32)], 400, taus, Silent())
    first = found.per_tau[0].model_copy(
        update={"entropy_rest_mean": at_one.get("rest", 0.9), "entropy_mean": at_one.get("whole", 0.3)}
    )
    return found.model_copy(update={"per_tau": (first, *found.per_tau[1:])})


def advice(which: int, plan: ArchivePlan, statistics: Statistics) -> Advice:
    [piece] = [piece for piece in advise(plan, statistics) if TITLES[which] in piece.finding.title]
    return piece


def test_every_piece_cites_its_place_and_numbers_of_the_archive() -> None:
    pieces = advise(plan(data="pets"), statistics())
    assert len(pieces) == len(TITLES)
    for piece in pieces:
        assert any(paper in piece.finding.source for paper in ("2603.02430", "CVPR 2024", "2402.11148"))
        assert any(place in piece.finding.source for place in ("section", "Table"))
        assert any(character.isdigit() for character in piece.numbers)
        assert piece.limits.endswith(".")
        assert piece.applies in {"yes", "in part", "no"}


@pytest.mark.parametrize(
    ("rest", "taus", "said"),
    [
        (0.90, LARGE, "no teacher finetuned for long had less than 0.925"),
        (0.94, BOTH, "this may be either"),
        (0.96, (*SMALL, 10.0), "teachers finetuned for 400 epochs had 0.952 to 0.972"),
        (0.98, (*SMALL, 10.0), "no teacher had more than 0.972"),
    ],
)
def test_the_rest_entropy_orders_the_temperatures(rest: float, taus: tuple[float, ...], said: str) -> None:
    pieces = advise(plan(), statistics(rest=rest))
    assert first_temperatures(pieces) == pieces[0].taus == taus
    assert pieces[0].applies == "yes"
    assert f"H^(p-bar) = {rest:.3f} and H^(p) = 0.300" in pieces[0].numbers
    assert said in pieces[0].numbers


def test_a_teacher_from_scratch_starts_small_whatever_its_entropy() -> None:
    piece = advice(ORIGIN, plan(start="random"), statistics(rest=0.90))
    assert piece.taus[0] == 1
    assert "start: random, 20 epochs" in piece.numbers
    assert advice(OVERLAP, plan(start="random"), statistics()).applies == "no"


@pytest.mark.parametrize(
    ("described", "figures", "doubt"),
    [
        ({"classes": 10}, {"classes": 10}, "10 classes lie outside that study's 37 to 200"),
        ({"classes": 1000}, {"classes": 1000}, "1000 classes lie outside"),
        ({"top1": 55.0}, {}, "right on 55.0 %"),
        ({"top1": None}, {}, "how often the teacher is right is unknown"),
        ({"mix": True}, {}, "views are mixed"),
        ({}, {"whole": 0.1}, "surer than any"),
        ({}, {"rest": 0.7}, "extrapolated"),
    ],
)
def test_what_the_study_did_not_cover_applies_in_part_and_says_so(
    described: dict[str, Any], figures: dict[str, Any], doubt: str
) -> None:
    piece = advice(ORIGIN, plan(**described), statistics(**figures))
    assert piece.applies == "in part"
    assert doubt.lower() in piece.limits.lower()


def test_unknown_origins_are_said_and_do_not_by_themselves_make_a_finding_doubtful() -> None:
    for start in (None, "checkpoint"):
        piece = advice(ORIGIN, plan(start=start), statistics())
        assert "not recorded here" in piece.limits
        assert piece.applies == "yes"


def test_two_classes_have_nothing_below_the_top_to_advise_on() -> None:
    pieces = advise(plan(2), statistics(2))
    assert [piece.applies for piece in pieces if piece.finding.title.startswith(("what the", "small", "z-score"))] == ["no"] * 3
    assert "1 by definition" in pieces[0].limits
    assert first_temperatures(pieces) == BOTH


def test_foreign_classes_come_first_and_reverse_the_order() -> None:
    pieces = advise(plan(196, data="cars"), statistics(196, rest=0.90))
    assert TITLES[OVERLAP] in pieces[0].finding.title
    assert first_temperatures(pieces) == SMALL


@pytest.mark.parametrize(
    ("data", "applies", "said"),
    [
        ("pets", "yes", "fine-grained: the gain lasts"),
        ("cifar100", "yes", "coarse-grained: the gain levels off earlier"),
        ("folder", "in part", "compare the names"),
        (None, "in part", "compare the names"),
    ],
)
def test_datasets_of_the_study_are_known_and_others_are_not(data: str | None, applies: str, said: str) -> None:
    piece = advice(OVERLAP, plan(data=data), statistics())
    assert (piece.applies, said in piece.limits) == (applies, True)
    assert "class 0, class 1, class 2" in piece.numbers


def test_small_differences_are_measured_at_tau_ten() -> None:
    found = statistics()
    assert found.details is not None
    mean = found.details.per_tau[PAPER_TAUS.index(10)].sorted_mean
    piece = advice(DIFFERENCES, plan(), found)
    assert f"leads by {mean[0] - mean[1]:.2g}" in piece.numbers
    assert f"spans {mean[18] - mean[36]:.2g}" in piece.numbers
    assert "bottom:5" in piece.limits
    assert advice(DIFFERENCES, plan(5), statistics(5)).limits.count("bottom:3") == 1
    assert advice(DIFFERENCES, plan(), statistics(taus=(1, 4))).applies == "no"
    assert advice(DIFFERENCES, plan(), found.model_copy(update={"details": None})).applies == "no"


def test_z_scores_matter_where_rows_deviate_differently() -> None:
    alike, apart = (advice(SCORES, plan(100), statistics(100, spread=spread)) for spread in (1.0, 4.0))
    assert (alike.applies, apart.applies) == ("in part", "yes")
    assert "rows deviate alike" in alike.limits
    assert "softens an average row as tau = 4.0" in alike.numbers
    assert advice(SCORES, plan(), statistics().model_copy(update={"details": None})).applies == "no"


def test_teacher_only_temperatures_stay_in_the_range_that_was_tried() -> None:
    piece = advice(MATCHING, plan(), statistics())
    assert piece.taus == (3, 4, 5, 7, 10)
    assert "at tau 40" in piece.limits
    assert advice(MATCHING, plan(), statistics(taus=(1, 2))).taus == ()


def test_without_figures_at_tau_one_the_entropies_order_nothing() -> None:
    pieces = advise(plan(), statistics(taus=(4, 10)))
    assert advice(ORIGIN, plan(), statistics(taus=(4, 10))).applies == "no"
    assert first_temperatures(pieces) == BOTH

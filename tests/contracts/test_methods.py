"""Every method: a finite loss whose gradient a student can follow; and each one against its formula in METHODS.md."""

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import special

from kdcache.bench.methods import ONE_VIEW, PLAIN
from kdcache.errors import UsageError
from kdcache.methods import METHODS, build
from kdcache.methods.presets import PRESETS, preset
from kdcache.methods.published import ours, published
from kdcache.targets import Targets
from kdcache.testing import MethodContract
from kdcache.testing.methods import at_tau, loss_and_gradient, problem
from tests.contracts.examples import cases, examples
from tests.contracts.formulas import FORMULAS, z_score

TAUS = (1.0, 4.0, 20.0, 40.0)
TWO_VIEWS = [pytest.param((name, {}), id=f"{name}-two-views") for name in ("mlkd", "zmlkd")]


def ready(name: str, teacher: Any, tau: float, **options: Any) -> Any:
    """The method `name`, fitted to the teacher's logits at `tau`."""
    return build(name, **options).fit([np.asarray(teacher)], tau)


# ---------------------------------------------------------------- all methods

# Their weights or temperatures are detached, so that the gradient is not the loss's slope; the formulas below detach them too.
DETACHED = {"eadkd", "eakd", "maxlogit", "maxlogit-dkd", "wsld"}


class TestEveryMethod(MethodContract):
    @pytest.fixture(params=[*cases("method"), *TWO_VIEWS])
    def component(self, request: pytest.FixtureRequest) -> Any:
        name, options = request.param
        return self.registry.build(name, **options)

    def test_gradients_are_those_of_the_loss(self, method: Any) -> None:
        if METHODS.name_of(method) in DETACHED:
            pytest.skip("its gradient is not meant to be the slope of its loss")
        super().test_gradients_are_those_of_the_loss(method)

    def test_options_that_are_no_numbers_or_choices_are_refused(self, component: Any) -> None:
        super().test_options_that_are_no_numbers_or_choices_are_refused(component)
        name = METHODS.name_of(component)
        for field in dataclasses.fields(component):
            kind = type(getattr(component, field.name))
            wrong = {float: (-1.0, None), int: (-1,), str: ("unheard-of",)}
            for value in wrong.get(kind, ((), "x") if kind is not bool else ()):
                if value is None and field.name in {"confidence_tau", "student_tau"}:
                    continue
                with pytest.raises(UsageError, match=f"{field.name} of method {name}"):
                    self.made_with(component, **{field.name: value})
        with pytest.raises(UsageError, match="always be 0"):
            self.made_with(component, kd_weight=0, ce_weight=0)


@pytest.mark.parametrize(("name", "options"), examples("method"))
def test_logits_of_another_shape_are_refused_with_both_shapes(name: str, options: dict[str, Any]) -> None:
    student, _, targets = problem()
    z = torch.from_numpy(student)
    for wrong in (z[:1], z[:, :5], torch.cat([z, z, z])):
        with pytest.raises(UsageError, match=r"logits \[\d+, \d+\] for targets \[16, 37\]"):
            ready(name, targets.logits, 4.0, **options)(wrong, targets)


def test_methods_on_other_methods_keep_their_defaults() -> None:
    pairs = {"zkd": "kd", "zdkd": "dkd", "maxlogit-dkd": "dkd", "zmlkd": "mlkd", "zctkd": "ctkd", "eadkd": "dkd"}
    for name, other in pairs.items():
        derived, base = (dataclasses.asdict(build(each)) for each in (name, other))  # type: ignore[call-overload]
        assert {key: derived[key] for key in base} == base


# ---------------------------------------------------------------- each against its formula


def value_and_gradient(
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    student: NDArray[np.float64],
    teacher: NDArray[np.float64],
    dtype: torch.dtype,
) -> tuple[float, NDArray[np.float64]]:
    z = torch.from_numpy(student).to(dtype).requires_grad_()
    value = loss(z, torch.from_numpy(teacher).to(dtype))
    value.backward()
    assert z.grad is not None
    return value.item(), z.grad.double().numpy()


def test_every_method_is_compared_with_a_formula() -> None:
    assert list(METHODS) == sorted(FORMULAS)


@pytest.mark.grid
@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("classes", [3, 37, 100])
@pytest.mark.parametrize("name", FORMULAS)
def test_losses_and_gradients_are_those_of_the_formula(name: str, classes: int, tau: float) -> None:
    student, teacher, targets = problem(classes=classes)
    label = targets.label_a
    assert label is not None
    built = ready(name, teacher, tau, **ONE_VIEW.get(name, {}))
    expected, slope = value_and_gradient(lambda z, v: FORMULAS[name](z, v, label, tau), student, teacher, torch.float64)
    size = np.abs(slope).max()
    tolerance = 1e-6 if name.startswith("ea") else 1e-8  # the published code adds 1e-10 within its logarithms
    exact, gradient = value_and_gradient(lambda z, v: built(z, Targets(v, tau, label)), student, teacher, torch.float64)
    assert exact == pytest.approx(expected, rel=tolerance)
    np.testing.assert_allclose(gradient, slope, rtol=0, atol=tolerance * size)
    single, gradient = value_and_gradient(lambda z, v: built(z, Targets(v, tau, label)), student, teacher, torch.float32)
    assert single == pytest.approx(expected, rel=1e-3)
    np.testing.assert_allclose(gradient, slope, rtol=0, atol=1e-4 * size)


CASES = {
    "plain": lambda z: z,
    "a gap of 120": lambda z: z.index_fill(1, torch.tensor([1]), 120.0),
    "a gap of -120": lambda z: z.index_fill(1, torch.tensor([1]), -120.0),
    "constant rows": lambda z: torch.full_like(z, 3.3),
    "ties": lambda z: z.round(),
    "far from 0": lambda z: z + 300,
    "hardly anything": lambda z: z * 0.01,
}


@pytest.mark.exhaustive
@pytest.mark.grid
@pytest.mark.parametrize("classes", [2, 3, 1000, 21841])
@pytest.mark.parametrize("name", FORMULAS)
def test_losses_stay_finite_and_near_their_float64_selves(name: str, classes: int) -> None:
    student, teacher, targets = (torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in problem(4, classes))
    built = ready(name, teacher, 4.0, **ONE_VIEW.get(name, {}))
    every = list(CASES.items())
    pairs = list(itertools.product(every, every)) if classes < 1000 else list(zip(every, every[::-1], strict=True))
    for tau in (1.0, 40.0):
        usual: tuple[float, float] | None = None  # loss and largest slope of plain logits, the first case
        for (student_case, change), (teacher_case, other) in pairs:
            z, v = change(student).float(), other(teacher).float()  # the very numbers that both precisions get
            made = []
            for dtype in (torch.float32, torch.float64):
                leaf = z.to(dtype, copy=True).requires_grad_()
                loss = built(leaf, Targets(v.to(dtype), tau, targets.label_a, targets.label_b, targets.lam))
                loss.backward()
                assert leaf.grad is not None
                case = f"student: {student_case}; teacher: {teacher_case}; tau {tau}, {dtype}"
                assert torch.isfinite(loss), case
                assert torch.isfinite(leaf.grad).all(), case
                made.append((loss.item(), leaf.grad.double()))
            (single, gradient), (exact, slope) = made
            size = slope.abs().max().item()
            usual = usual or (abs(exact), size)
            # Where hardly anything is left to learn, float32's rounding of terms that are multiplied by t^2 remains.
            noise = 1e-5 * max(tau, 16) ** 2 * (10 if classes >= 1000 else 1)
            if name == "dist" and (teacher_case == "constant rows" or "hardly anything" in {student_case, teacher_case}):
                continue  # a correlation of roundings, divided by 1e-8
            assert abs(single - exact) <= 2e-3 * max(abs(exact), 0.01 * usual[0]) + noise, (case, single, exact)
            error = (gradient - slope).abs().max().item()
            assert error <= 1e-4 * max(size, 0.1 * usual[1]) + 3e-7 * max(tau, 16), (case, size, error)


@pytest.mark.parametrize("name", sorted(PLAIN))
def test_what_the_benchmark_compares_with_is_the_same_loss(name: str) -> None:
    student, teacher, targets = problem()
    label = targets.label_a
    assert label is not None
    built, plain = ready(name, teacher, 4.0, **ONE_VIEW.get(name, {})), PLAIN[name]
    ours, slope = value_and_gradient(lambda z, v: built(z, Targets(v, 4.0, label)), student, teacher, torch.float64)
    theirs, other = value_and_gradient(lambda z, v: plain(z, v, label, 4.0), student, teacher, torch.float64)
    assert ours == pytest.approx(theirs, rel=1e-6)
    np.testing.assert_allclose(slope, other, rtol=0, atol=1e-6 * np.abs(slope).max())


def test_every_preset_is_a_method_with_the_weights_it_states() -> None:
    for found in PRESETS.values():
        built = found.build()
        assert METHODS.name_of(built) == found.name.split(":")[1]
        assert found.tau > 0
        assert preset(found.name) == found
        assert found.name.startswith("paper:")
    published = {  # name: kd_weight, ce_weight, tau
        "kd:cifar100": (0.9, 0.1, 4),
        "zkd:cifar100": (9, 0.1, 2),
        "maxlogit:cifar100": (9, 0.1, 1),
        "maxlogit-dkd:cifar100": (9, 1, 1),
        "dist:imagenet": (2, 1, 1),
        "ttm:cifar100:wrn40_2-wrn16_2": (101, 1, 10),
        "wttm:imagenet:resnet34-resnet18": (1.6, 1, 1.25),
        "wttm:cifar100:resnet56-resnet20:no-ce": (1, 0, 1 / 0.6),
    }
    for name, expected in published.items():
        how: Any = preset(f"paper:{name}").build()
        assert (how.kd_weight, how.ce_weight, preset(f"paper:{name}").tau) == expected


def test_every_preset_stands_beside_what_was_published_and_differs_only_where_it_is_said() -> None:
    rows = published()
    assert sorted(rows) == sorted(PRESETS)
    for name, row in rows.items():
        made = ours(PRESETS[name])
        assert row.note, name
        assert row.ours == pytest.approx(made, rel=1e-5), f"{name}: write what ours is into PRESETS.md"
        for where in (row.paper, row.code):
            assert where.keys() <= made.keys(), name
            assert {key for key, value in where.items() if made[key] != pytest.approx(value)} <= set(row.differs), name
        assert all(made[key] not in (row.paper.get(key), row.code.get(key)) or (row.paper and row.code) for key in row.differs)
    assert {name for name, row in rows.items() if row.differs} == {
        "paper:zdkd:cifar100",
        "paper:eadkd:imagenet:resnet34-resnet18",
    }
    unknown = {name.split(":")[1] for name, row in rows.items() if not row.paper and not row.code}
    assert unknown == {"zkd", "dist", "wttm"}, "what was found since belongs into the table"


# ---------------------------------------------------------------- what they have to do with each other


def rows_of(name: str, student: NDArray[np.float64], teacher: NDArray[np.float64], tau: float, **options: Any) -> float:
    label = torch.from_numpy(teacher.argmax(axis=1))
    loss = build(name, **options)(torch.from_numpy(student), Targets(torch.from_numpy(teacher), tau, label))
    return float(loss)


@pytest.mark.parametrize("tau", TAUS)
def test_kd_is_tckd_and_nckd_weighted_by_what_the_teacher_leaves(tau: float) -> None:
    for row in range(8):
        student, teacher = (x[row : row + 1] for x in problem()[:2])
        p = special.softmax(teacher / tau, axis=1)[0, teacher.argmax()]
        parts = [rows_of("dkd", student, teacher, tau, alpha=a, beta=b) for a, b in ((1, 0), (0, 1))]
        assert rows_of("kd", student, teacher, tau) == pytest.approx(parts[0] + (1 - p) * parts[1], rel=1e-10)


def test_of_both_models_the_larger_score_sets_the_temperature() -> None:
    """Of kd, and of both parts of dkd."""
    for row in range(8):
        student, teacher = ((x[row : row + 1] - x[row].mean()) / x[row].std() for x in problem()[:2])
        for which, largest in (("teacher", teacher.max()), ("both", max(teacher.max(), student.max()))):
            tau = (1 + math.sqrt(3)) / 2 * largest
            parts = [rows_of("maxlogit-dkd", student, teacher, 4.0, which=which, alpha=a, beta=b) for a, b in ((1, 0), (0, 1))]
            expected = [rows_of("dkd", student, teacher, tau, alpha=a, beta=b) for a, b in ((1, 0), (0, 1))]
            assert parts == pytest.approx(expected, rel=1e-9)
            whole = rows_of("maxlogit", student, teacher, 4.0, which=which)
            assert whole == pytest.approx(rows_of("kd", student, teacher, tau), rel=1e-9)


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_weights_of_mean_one_are_wttms_by_their_mean_over_the_teachers_rows(tau: float) -> None:
    """TTM (arXiv 2402.11148), section 5.3: beta of wttm is that of ttm by U-bar, which is not that of a batch."""
    student, teacher, _ = problem()
    mean = (special.softmax(teacher, axis=1) ** (1 / tau)).sum(axis=1).mean()
    fitted = build("wttm-unit").fit(iter([teacher[:10], teacher[10:]]), tau)
    few = Targets(torch.from_numpy(teacher[:4]), tau)
    assert fitted(torch.from_numpy(student[:4]), few).item() == pytest.approx(
        rows_of("wttm", student[:4], teacher[:4], tau) / mean
    )
    with pytest.raises(UsageError, match="not fitted"):
        build("wttm-unit")(torch.from_numpy(student[:4]), few)
    with pytest.raises(ValueError, match="at least one row"):
        build("wttm-unit").fit([], tau)


def test_labels_alone_ask_nothing_of_the_teacher_and_can_be_smoothed() -> None:
    """TTM, eq. 5: (1 - s) H(y, q) + s H(uniform, q)."""
    student, teacher, targets = problem()
    z, label = torch.from_numpy(student), targets.label_a
    assert label is not None
    plain = [build("ce")(z, Targets(torch.from_numpy(v), tau, label)) for v in (teacher, -teacher) for tau in (1.0, 4.0)]
    assert all(torch.equal(one, plain[0]) for one in plain)
    torch.testing.assert_close(plain[0], F.cross_entropy(z, label))
    smooth = build("ce", smoothing=0.5)(z, Targets(torch.from_numpy(teacher), 1.0, label))
    torch.testing.assert_close(smooth, F.cross_entropy(z, label, label_smoothing=0.5))
    with pytest.raises(UsageError, match="no labels"):
        build("ce")(z, Targets(torch.from_numpy(teacher), 1.0))


@pytest.mark.parametrize("tau", TAUS)
def test_rld_of_the_teachers_top_class_is_dkd(tau: float) -> None:
    student, teacher, targets = problem()
    z, v = torch.from_numpy(student), torch.from_numpy(teacher)
    made = [
        build(name, label_rule="teacher_argmax", **options)(z, Targets(v, tau, targets.label_a))
        for name, options in (("rld", {"confidence_tau": None}), ("dkd", {}), ("zrld", {}), ("zdkd", {}))
    ]
    torch.testing.assert_close(made[0], made[1], rtol=1e-12, atol=0)
    torch.testing.assert_close(made[2], made[3], rtol=1e-12, atol=0)
    unlabelled = build("rld", confidence_tau=None)(z, Targets(v, tau))
    assert torch.equal(unlabelled, made[0])


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("name", ["kd", "dkd"])
def test_one_step_of_a_z_score_alone_is_its_formula_and_a_shift_is_not_seen(name: str, tau: float) -> None:
    """Table 4 of logit standardization: z - mean is kd again, and z / deviation is the whole z-score."""
    student, teacher, _ = problem()
    centred, scaled = build(f"z{name}", score="centred"), build(f"z{name}", score="scaled")
    z = torch.from_numpy(teacher)
    deviation = z.std(dim=1, keepdim=True) + 1e-7
    torch.testing.assert_close(centred.scores(z), z - z.mean(dim=1, keepdim=True))
    torch.testing.assert_close(scaled.scores(z), z / deviation)
    assert rows_of(f"z{name}", student, teacher, tau, score="centred") == pytest.approx(
        rows_of(name, student, teacher, tau), rel=1e-9
    )
    whole = rows_of(f"z{name}", student, teacher, tau)
    assert rows_of(f"z{name}", student, teacher, tau, score="scaled") == pytest.approx(whole, rel=1e-9)
    assert rows_of(name, student, teacher, tau) != pytest.approx(whole, rel=1e-2)
    assert not centred.unit_variance
    assert scaled.unit_variance


def test_an_option_that_came_later_changes_no_record_of_before() -> None:
    """Names of runs and archives are made of these records."""
    before = {"name": "zkd", "kd_weight": 9.0, "ce_weight": 0.1, "tau_squared": True, "std": "sample", "eps": 1e-7}
    assert METHODS.to_dict(METHODS.parse("zkd:kd_weight=9,ce_weight=0.1")) == before
    assert METHODS.from_dict(before) == METHODS.parse("zkd:kd_weight=9,ce_weight=0.1,score=z")
    later = METHODS.parse("zkd:score=scaled")
    assert METHODS.to_dict(later)["score"] == "scaled"
    assert METHODS.from_dict(METHODS.to_dict(later)) == later
    assert METHODS.spec(later) == "zkd:score=scaled"


@pytest.mark.parametrize("tau", [2.0, 4.0, 20.0])
def test_ttm_is_kd_and_a_renyi_term(tau: float) -> None:
    """Transformed teacher matching, eq. 15: D(p_T || q) = T D(p_T || q_T) - (T - 1) H_(1/T)(q) + (T - 1) H(p_T)."""
    student, teacher, _ = problem()
    q, p_t = special.softmax(student, axis=1), special.softmax(teacher / tau, axis=1)
    renyi = np.log((q ** (1 / tau)).sum(axis=1)) / (1 - 1 / tau)
    shannon = -(p_t * np.log(p_t)).sum(axis=1)
    kd = rows_of("kd", student, teacher, tau, tau_squared=False)
    expected = tau * kd - (tau - 1) * renyi.mean() + (tau - 1) * shannon.mean()
    assert rows_of("ttm", student, teacher, tau) == pytest.approx(expected, rel=1e-9)


def test_mixed_labels_by_each_rule() -> None:
    student, teacher, targets = problem()
    z, v, a, b, lam = torch.from_numpy(student), torch.from_numpy(teacher), targets.label_a, targets.label_b, targets.lam
    assert a is not None
    assert b is not None
    assert lam is not None
    mixed = Targets(v, 4.0, a, b, lam)
    for name in ("dkd", "zdkd", "maxlogit-dkd", "rld", "nkd", "wsld", "eadkd"):
        of = {rule: build(name, label_rule=rule)(z, mixed) for rule in ("dominant", "pair", "teacher_argmax")}
        assert torch.equal(of["dominant"], build(name)(z, mixed))
        assert torch.equal(of["dominant"], build(name)(z, Targets(v, 4.0, torch.where(lam >= 0.5, a, b))))
        assert torch.equal(of["teacher_argmax"], build(name)(z, Targets(v, 4.0)))
        pair = [
            share * build(name)(z[row : row + 1], Targets(v[row : row + 1], 4.0, label[row : row + 1]))
            for row in range(len(z))
            for label, share in ((a, lam[row].double()), (b, 1 - lam[row].double()))
        ]
        torch.testing.assert_close(of["pair"], torch.stack(pair).sum() / len(z), rtol=1e-10, atol=0)
        with pytest.raises(UsageError, match="without labels"):
            build(name, label_rule="pair")(z, Targets(v, 4.0))


def test_warm_up_counts_epochs_from_one() -> None:
    student, teacher, targets = problem()
    z, built = torch.from_numpy(student), build("dkd", warmup_epochs=4)
    whole = built(z, Targets(torch.from_numpy(teacher), 4.0, targets.label_a))
    state = built.new_state()
    for epoch, share in ((1, 0.25), (3, 0.75), (4, 1.0), (9, 1.0)):
        state.epoch = epoch
        torch.testing.assert_close(built(z, Targets(torch.from_numpy(teacher), 4.0, targets.label_a), state), share * whole)


def test_ctkds_temperature_is_learned_against_the_student() -> None:
    student, teacher, _ = problem()
    z, targets, built = torch.from_numpy(student), Targets(torch.from_numpy(teacher), 1.0), build("ctkd")
    state = built.new_state().double()
    for epoch, strength in ((1, math.cos(math.pi / 10) / 2 - 0.5), (10, -1.0), (30, -1.0)):
        state.epoch = epoch
        [reversed_slope] = torch.autograd.grad(built(z, targets, state), state.theta)
        ahead, behind = (built(z, targets, _moved(state, step)).item() for step in (1e-5, -1e-5))
        assert reversed_slope.item() == pytest.approx(strength * (ahead - behind) / 2e-5, rel=1e-5)
    with pytest.raises(UsageError, match="never published"):
        build("ctkd", instance=True)


def _moved(state: Any, step: float) -> Any:
    moved = copy.deepcopy(state)
    with torch.no_grad():
        moved.theta += step
    return moved


def two_views(tau: float = 4.0) -> tuple[NDArray[np.float64], NDArray[np.float64], Targets]:
    """Student and teacher logits of two views, `[2B, C]` and `[2, B, C]`, and the targets."""
    (weak, teacher, targets), rng = problem(), np.random.default_rng(9)
    strong, other = rng.normal(0, 3, (2, *weak.shape))
    labels = (targets.label_a, targets.label_b, targets.lam)
    both = Targets(torch.from_numpy(teacher), tau, *labels, second=Targets(torch.from_numpy(other), tau, *labels))
    return np.concatenate([weak, strong]), np.stack([teacher, other]), both


@pytest.mark.parametrize("name", ["mlkd", "zmlkd"])
def test_mlkd_of_two_views_adds_the_strong_ones_but_for_two_and_six(name: str) -> None:
    student, (teacher, other), targets = two_views()
    weak, strong = student[:16], student[16:]
    kd = "kd" if name == "mlkd" else "zkd"
    single = rows_of(name, weak, teacher, 4.0, views=1)
    both = float(build(name)(torch.from_numpy(student), targets))
    added = sum(rows_of(kd, strong, other, tau) for tau in (4, 3, 5)) + sum(rows_of(kd, weak, teacher, tau) for tau in (2, 6))
    assert both - single == pytest.approx(0.9 * added, rel=1e-9)
    with_ce = float(build(name, ce_weight=0.1)(torch.from_numpy(student), targets))
    alone = build("kd", kd_weight=0.0, ce_weight=0.1)
    second = targets.second
    assert second is not None
    labels = sum(float(alone(torch.from_numpy(z), x)) for z, x in ((weak, targets), (strong, second)))
    assert with_ce - both == pytest.approx(labels, rel=1e-9)


@pytest.mark.parametrize("name", ["mlkd", "zmlkd"])
def test_mlkd_of_two_views_is_differentiable_and_the_same_in_float32(name: str) -> None:
    student, _, targets = two_views()
    built = build(name, ce_weight=0.1)
    few = Targets(targets.logits[:3, :5], 4.0, second=Targets(targets.logits[3:6, :5], 4.0))
    z = torch.from_numpy(student[:6, :5]).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: build(name)(z, few), z)
    single, double = (built(torch.from_numpy(student).to(dtype), targets) for dtype in (torch.float32, torch.float64))
    assert single.item() == pytest.approx(double.item(), rel=1e-4)


def test_mlkd_without_tau_squared_weighs_its_temperatures_alike() -> None:
    student, teacher, _ = problem()
    made = [rows_of("mlkd", student, teacher, 4.0, views=1, tau_squared=squared) for squared in (True, False)]
    confident = special.softmax(teacher, axis=1).max(axis=1)
    share = (confident <= np.sort(confident)[(len(confident) - 1) // 2]).mean()  # torch's median is the lower one
    kds = [rows_of("kd", student, teacher, tau, tau_squared=False) * (tau**2 - 1) for tau in (4, 3, 5, 2, 6)]
    assert made[0] - made[1] == pytest.approx(0.9 * share * sum(kds), rel=1e-9)


def test_mlkd_says_which_views_are_missing() -> None:
    student, _, targets = two_views()
    z = torch.from_numpy(student)
    alone = Targets(targets.logits, 4.0)
    for views, logits, what, words in (
        (2, z, alone, "no second view"),
        (2, z[:16], targets, "compares two views"),
        (1, z, targets, "are \\[B, C\\]"),
    ):
        with pytest.raises(UsageError, match=words):
            build("mlkd", views=views)(logits, what)
    with pytest.raises(UsageError, match="views of method mlkd"):
        build("mlkd", views=3)


def test_the_published_bound_of_entropies_can_be_had() -> None:
    student, teacher, _ = problem()
    plain, shipped = (rows_of("eakd", student, teacher, 4.0, entropy_bound=bound) for bound in ("logC", 100.0))
    assert shipped < plain
    assert METHODS.parse("eakd:entropy_bound=100") == build("eakd", entropy_bound=100.0)
    for name in ("eakd", "eadkd"):
        with pytest.raises(UsageError, match=f"entropy_bound of method {name}") as raised:
            build(name, entropy_bound=-1.0)
        assert raised.value.fix == "use 'logC', or give a number above 0"


# ---------------------------------------------------------------- kd, METHODS.md section 1


def plain_kd(student: NDArray[np.float64], teacher: NDArray[np.float64], tau: float) -> float:
    """<KL(p_t || q_t)>, in float64."""
    log_p, log_q = (special.log_softmax(z / tau, axis=1) for z in (teacher, student))
    return float((np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean())


@pytest.mark.parametrize("tau", TAUS)
def test_kd_is_tau_squared_times_the_mean_divergence(tau: float) -> None:
    student, teacher, targets = problem()
    loss, _ = loss_and_gradient(build("kd"), student, at_tau(targets, tau))
    assert loss == pytest.approx(tau**2 * plain_kd(student, teacher, tau), rel=1e-3)


@pytest.mark.parametrize("tau", TAUS)
def test_kds_gradient_is_tau_times_the_difference_of_the_softmaxes(tau: float) -> None:
    student, teacher, targets = problem()
    _, gradient = loss_and_gradient(build("kd"), student, at_tau(targets, tau))
    q, p = (special.softmax(z / tau, axis=1) for z in (student, teacher))
    expected = tau * (q - p) / len(student)
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("tau", TAUS)
def test_kds_gradient_is_that_of_its_loss_by_finite_differences(tau: float) -> None:
    student, teacher, targets = problem(rows=3, classes=5)
    _, gradient = loss_and_gradient(build("kd"), student, at_tau(targets, tau))
    step = 1e-4
    for i, j in np.ndindex(student.shape):
        ahead, behind = student.copy(), student.copy()
        ahead[i, j] += step
        behind[i, j] -= step
        slope = tau**2 * (plain_kd(ahead, teacher, tau) - plain_kd(behind, teacher, tau)) / (2 * step)
        assert gradient[i, j] == pytest.approx(slope, abs=2e-4 * np.abs(gradient).max())


@pytest.mark.parametrize("tau", TAUS)
def test_without_tau_squared_loss_and_gradient_are_smaller_by_it(tau: float) -> None:
    student, _, targets = problem()
    loss, gradient = loss_and_gradient(build("kd"), student, at_tau(targets, tau))
    bare, bare_gradient = loss_and_gradient(build("kd", tau_squared=False), student, at_tau(targets, tau))
    assert bare * tau**2 == pytest.approx(loss, rel=1e-6)
    np.testing.assert_allclose(bare_gradient * tau**2, gradient, rtol=0, atol=1e-5 * np.abs(gradient).max())


@pytest.mark.parametrize("name", ["kd", "zkd"])
@pytest.mark.parametrize(("tau", "own"), [(1.0, 4.0), (20.0, 3.0), (40.0, 1.0), (4.0, 4.0)])
def test_a_temperature_of_the_students_own_is_in_its_softmax_alone(name: str, tau: float, own: float) -> None:
    student, teacher, targets = problem()
    z, v = (z_score(torch.from_numpy(x)) if name == "zkd" else torch.from_numpy(x) for x in (student, teacher))
    log_p, log_q = torch.log_softmax(v / tau, dim=1), torch.log_softmax(z / own, dim=1)
    divergence = float((log_p.exp() * (log_p - log_q)).sum(dim=1).mean())
    for squared, scale in ((True, tau * own), (False, 1.0)):
        loss, gradient = loss_and_gradient(build(name, student_tau=own, tau_squared=squared), student, at_tau(targets, tau))
        assert loss == pytest.approx(scale * divergence, rel=1e-3)
        if own == tau:
            shared, slope = loss_and_gradient(build(name, tau_squared=squared), student, at_tau(targets, tau))
            assert loss == pytest.approx(shared, rel=1e-5)
            np.testing.assert_allclose(gradient, slope, rtol=0, atol=1e-5 * np.abs(slope).max())


@pytest.mark.parametrize("value", [0, -1, 1e5, "warm", math.nan])
def test_a_students_temperature_that_is_none_is_refused_by_name(value: Any) -> None:
    with pytest.raises(UsageError, match="student_tau of method kd"):
        build("kd", student_tau=value)


def test_records_without_a_temperature_of_the_students_own_keep_their_form() -> None:
    assert METHODS.to_dict(build("kd")) == {"name": "kd", "kd_weight": 1.0, "ce_weight": 0.0, "tau_squared": True}
    assert METHODS.to_dict(build("kd", student_tau=2))["student_tau"] == 2.0
    assert METHODS.from_dict(METHODS.to_dict(build("zkd"))) == build("zkd")


def test_kd_of_a_student_that_equals_its_teacher_is_zero() -> None:
    _, teacher, targets = problem()
    for tau in TAUS:
        loss, gradient = loss_and_gradient(build("kd"), teacher + 5, at_tau(targets, tau))  # a shift changes no softmax
        assert loss == pytest.approx(0, abs=1e-4)
        assert np.abs(gradient).max() < 1e-5


@pytest.mark.parametrize("mixed", [True, False])
def test_cross_entropy_is_against_the_mixed_labels_at_temperature_one(mixed: bool) -> None:
    student, teacher, targets = problem()
    assert targets.label_a is not None
    assert targets.label_b is not None
    assert targets.lam is not None
    if not mixed:
        targets = Targets(targets.logits, 4.0, targets.label_a)
    loss, gradient = loss_and_gradient(build("kd", kd_weight=0.9, ce_weight=0.1), student, targets)
    log_q = special.log_softmax(student, axis=1)
    rows = np.arange(len(student))
    lam = targets.lam.double().numpy() if targets.lam is not None else np.ones(len(student))
    label_b = targets.label_b if targets.label_b is not None else targets.label_a
    truth = np.zeros_like(student)
    truth[rows, targets.label_a] += lam
    truth[rows, label_b] += 1 - lam
    expected = 0.9 * 16 * plain_kd(student, teacher, 4.0) - 0.1 * (truth * log_q).sum(axis=1).mean()
    assert loss == pytest.approx(expected, rel=1e-5)
    q, p = (special.softmax(z / 4, axis=1) for z in (student, teacher))
    slope = (0.9 * 4 * (q - p) + 0.1 * (np.exp(log_q) - truth)) / len(student)
    np.testing.assert_allclose(gradient, slope, rtol=0, atol=1e-4 * np.abs(slope).max())


def test_only_cross_entropy_is_torchs_own_for_unmixed_labels() -> None:
    student, _, targets = problem()
    targets = Targets(targets.logits, 4.0, targets.label_a, targets.label_b, torch.ones(16))
    z = torch.from_numpy(student).float()
    loss = build("kd", kd_weight=0.0, ce_weight=1.0)(z, targets)
    assert loss.item() == pytest.approx(F.cross_entropy(z, targets.label_a).item(), rel=1e-6)


def test_cross_entropy_without_labels_says_what_is_missing() -> None:
    with pytest.raises(UsageError, match="labels"):
        build("kd", ce_weight=0.5)(torch.zeros(2, 3), Targets(torch.zeros(2, 3), 1.0))


def test_the_kd_loss_of_hand_computed_numbers() -> None:
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3), 0.0]])
    kl = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert build("kd")(student, Targets(teacher, 1.0)).item() == pytest.approx(kl)
    assert build("kd")(student, Targets(2 * teacher, 2.0)).item() == pytest.approx(4 * kl)

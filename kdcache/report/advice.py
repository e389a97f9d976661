"""Advice on the temperatures to try first with an archive: findings of the papers, judged by the archive's numbers.

Each piece of advice names a finding, its source, the numbers of this archive that support it, and the reasons why it may
not apply. Ranges are those that the papers report, without interpolation.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from kdcache.archive import ArchivePlan, LogitMoments, Statistics, TauStatistics

__all__ = ["Advice", "Finding", "advise", "first_temperatures"]


@dataclass(frozen=True)
class Finding:
    """A paper's finding in our words, and its source."""

    title: str
    text: str
    source: str


STUDY = "temperature study (arXiv 2603.02430)"
ORIGIN = Finding(
    "what the teacher says about the other classes",
    "Large temperatures (10 and more) do best with teachers that were pretrained and then finetuned briefly. Longer finetuning "
    "lowers H^(p), raises H^(p-bar) towards 1 and makes the targets resemble label smoothing: students get worse, and small "
    "temperatures catch up. With teachers trained from scratch tau = 1 is often best.",
    f"{STUDY}, section 4.3 and Table 1",
)
OVERLAP = Finding(
    "whether the teacher's pretraining knew these classes",
    "Where nearly all classes occur in the pretraining data (Pets, CIFAR100, Tiny ImageNet and ImageNet-1K), accuracy rises with "
    "tau; where they are finer than those (Cars, finer-grained birds) it falls. Fine-grained classes want larger temperatures "
    "than coarse ones, each of which relates to 2 or 3 others only.",
    f"{STUDY}, section 4.5 with Figs. 6 and 7",
)
TRAINING = Finding(
    "how the student is trained",
    "AdamW hardly minds the temperature; accuracy mostly rises from tau 1 to 10 and stays level up to 40. With SGD small "
    "temperatures win short trainings and large ones long trainings, and a larger batch moves that crossover later. Students "
    "that were pretrained or finetuned also gain from large temperatures, though less.",
    f"{STUDY}, section 4.2 with Figs. 2 and 3, section 4.4 with Table 2",
)
DIFFERENCES = Finding(
    "small differences at large temperatures",
    "At tau 10 the top class led by less than 0.01 and the bottom classes differed by less than 0.0001, and yet those "
    "differences carried the knowledge: label smoothing of the same entropy and shuffled bottom classes lost accuracy.",
    f"{STUDY}, section 4.2 with Figs. 4 and 5",
)
STANDARDIZATION = Finding(
    "z-score methods",
    "A shared temperature asks the student for the mean and the spread of the teacher's logits, which a smaller network cannot "
    "match; z-scores leave only their relations. The base temperature then divides scores of unit variance; the ablation has 2.",
    "logit standardization (CVPR 2024), sections 4.2, 4.3 and 5 with Table 4 and Fig. 5",
)
MATCHING = Finding(
    "methods that temper the teacher only (TTM, WTTM)",
    "The student's own softmax has to become as smooth as the teacher's tempered one. On CIFAR-100 the exponents 1/T lay between "
    "0.1 and 0.4, that is, temperatures from 2.5 to 10; on ImageNet they were 0.7 and 0.8.",
    "transformed teacher matching (arXiv 2402.11148), section 3 and appendix A.4",
)

# The study's Table 1, over both datasets and all architectures.
BRIEF_REST = (0.886, 0.950)  # H^(p-bar) of the teachers with the shortest finetuning: 20 epochs on Pets, 40 on CIFAR100
LONGER_REST = 0.925  # smallest H^(p-bar) of teachers with longer finetuning
LONG_REST = (0.952, 0.972)  # H^(p-bar) after 400 epochs from pretrained weights; from scratch 0.952 to 0.971
ALL_WHOLE = (0.216, 0.543)  # H^(p) of all teachers
STUDIED_CLASSES = (37, 200)  # Pets, Tiny ImageNet
STUDIED_ACCURACY = 86.0  # percent; the teachers of Table 2 reach 86.3 to 93.3
# Sections 4.5 and 5: datasets with nearly all classes in ImageNet-1K, by granularity; and a dataset without overlap.
OVERLAPPING = {"pets": "fine-grained", "cifar100": "coarse-grained", "tiny-imagenet": "coarse-grained"}
FOREIGN = ("cars",)
SMALL, LARGE, BOTH = (1.0, 2.0, 4.0), (10.0, 20.0, 4.0), (1.0, 4.0, 10.0, 20.0)
MATCHING_RANGE = (2.5, 10.0)
EVEN = 1.5  # below this ratio of the 95 % to the 5 % quantile of rows' deviations, z-scores act like one temperature

Applies = Literal["yes", "in part", "no"]


@dataclass(frozen=True)
class Advice:
    """A finding and its meaning for one archive. `taus`: temperatures to try first, in order; may be empty."""

    finding: Finding
    taus: tuple[float, ...]
    numbers: str  # the archive's numbers that support it
    applies: Applies
    limits: str


def advise(plan: ArchivePlan, statistics: Statistics) -> list[Advice]:
    """Advice on an archive from its plan (or manifest) and statistics. The finding that orders temperatures comes first."""
    origin, overlap = _origin(plan, statistics), _overlap(plan)
    # Classes that the pretraining did not contain reverse the trend, whatever the entropies are.
    leading = [overlap, origin] if overlap.taus == SMALL else [origin, overlap]
    return [
        *leading,
        _training(statistics),
        _differences(plan, statistics),
        _standardization(plan, statistics),
        _matching(statistics),
    ]


def first_temperatures(pieces: Iterable[Advice]) -> tuple[float, ...]:
    """The first temperatures for plain distillation: small and large ones, unless a finding orders them."""
    return next((piece.taus for piece in pieces if piece.taus and piece.finding in (ORIGIN, OVERLAP)), BOTH)


def _origin(plan: ArchivePlan, statistics: Statistics) -> Advice:
    """Advice from the information that the teacher gives about the classes below the top one."""
    figures = _at(statistics, 1)
    if figures is None or plan.num_classes == 2:
        why = (
            "with 2 classes H^(p-bar) is 1 by definition: nothing is left to relate"
            if figures
            else "there are no figures for tau 1"
        )
        return Advice(ORIGIN, (), f"{plan.num_classes} classes", "no", _sentences([why]))
    training = (plan.teacher.training if plan.teacher else None) or {}
    start, rest = training.get("start"), figures.entropy_rest_mean
    taus: tuple[float, ...]
    numbers = [f"H^(p-bar) = {rest:.3f} and H^(p) = {figures.entropy_mean:.3f} at tau 1, over {statistics.rows:,} rows"]
    doubts = _doubts(plan, statistics, figures)
    if start:
        numbers.append(f"teacher's start: {start}, {training.get('epochs', 'unknown')} epochs")
    if start == "random":
        taus = (*SMALL, 10.0)
    elif rest >= LONG_REST[0]:
        taus = (*SMALL, 10.0)
        low, high = LONG_REST
        numbers.append(
            f"teachers finetuned for 400 epochs had {low:.3f} to {high:.3f}"
            if rest <= high
            else f"no teacher had more than {high:.3f}"
        )
    elif rest > LONGER_REST:
        taus = BOTH
        numbers.append(
            f"briefly finetuned teachers had {BRIEF_REST[0]:.3f} to {BRIEF_REST[1]:.3f}, longer finetuned ones {LONGER_REST:.3f} "
            "and more: this may be either"
        )
    else:
        taus = LARGE
        numbers.append(f"no teacher finetuned for long had less than {LONGER_REST:.3f}")
        if rest < BRIEF_REST[0]:
            doubts.append(f"no teacher at all had less than {BRIEF_REST[0]:.3f}: this end is extrapolated")
    applies: Applies = "in part" if doubts else "yes"
    if start in (None, "checkpoint"):
        doubts.append("what the teacher was trained on before is not recorded here")
    doubts.append("the paper does not say at which temperature or on which images it took its entropies; tau 1 is assumed")
    return Advice(ORIGIN, taus, "; ".join(numbers), applies, _sentences(doubts))


def _doubts(plan: ArchivePlan, statistics: Statistics, figures: TauStatistics) -> list[str]:
    """Reasons why the ranges of the study's Table 1 may not hold for this archive."""
    doubts = []
    low, high = STUDIED_CLASSES
    if not low <= plan.num_classes <= high:
        doubts.append(f"{plan.num_classes} classes lie outside that study's {low} to {high}")
    if plan.policy and plan.policy.mix:
        doubts.append("these views are mixed: the partner's class raises H^(p) and, as a second peak, lowers H^(p-bar)")
    accuracy = plan.teacher.top1_clean if plan.teacher else None
    if accuracy is not None and accuracy < STUDIED_ACCURACY:
        doubts.append(
            f"the teacher is right on {accuracy:.1f} % of clean images, those of the study on {STUDIED_ACCURACY:.0f} % and more"
        )
    elif accuracy is None and statistics.top1_views is None:
        doubts.append("how often the teacher is right is unknown: neither its accuracy nor labels are recorded")
    if figures.entropy_mean < ALL_WHOLE[0]:
        doubts.append(f"the teacher is surer than any of that table, whose H^(p) are {ALL_WHOLE[0]} to {ALL_WHOLE[1]}")
    return doubts


def _overlap(plan: ArchivePlan) -> Advice:
    """Advice from the overlap with the pretraining classes, and from granularity."""
    name = plan.source.name if plan.source else "unknown"
    numbers = f"data {name}, {plan.num_classes} classes such as {', '.join(plan.class_names[:3])}"
    training = (plan.teacher.training if plan.teacher else None) or {}
    if training.get("start") == "random":
        return Advice(OVERLAP, (), numbers, "no", "This teacher was trained from scratch: there was no pretraining.")
    if name in FOREIGN:
        return Advice(
            OVERLAP, SMALL, numbers, "yes", "Not if the teacher's pretraining went beyond ImageNet-1K and had these classes."
        )
    if name in OVERLAPPING:
        gain = (
            "lasts up to large temperatures"
            if OVERLAPPING[name] == "fine-grained"
            else "levels off earlier than on fine-grained ones"
        )
        limits = f"These classes are {OVERLAPPING[name]}: the gain {gain}. It takes a teacher pretrained on ImageNet-1K."
        return Advice(OVERLAP, LARGE, numbers, "yes", limits)
    limits = "Whether these classes occur in the teacher's pretraining data cannot be told from logits: compare the names."
    return Advice(OVERLAP, (), numbers, "in part", limits)


def _training(statistics: Statistics) -> Advice:
    """Advice on optimiser, batch size, duration and initialisation."""
    return Advice(
        TRAINING,
        (),
        f"how far these targets are softened: {_entropies(statistics, (1, 4, 10, 40))}",
        "yes",
        "The archive cannot know the student's training; long means 1024 epochs on Pets and 512 on CIFAR100. Eq. 1 there shows "
        "no factor tau^2, which SGD would feel; kdcache's kd has it unless told otherwise (--method kd:tau_squared=0).",
    )


def _differences(plan: ArchivePlan, statistics: Statistics) -> Advice:
    details, taus = statistics.details, [figures.tau for figures in statistics.per_tau]
    if plan.num_classes < 4 or 10 not in taus or details is None:
        few = plan.num_classes < 4
        why = "With so few classes there is no bottom to shuffle." if few else "The sorted softmax at tau 10 is not known."
        return Advice(DIFFERENCES, (), f"{plan.num_classes} classes", "no", why)
    detail = details.per_tau[taus.index(10)]
    mean = detail.sorted_mean
    middle = next(n for n, rank in enumerate(details.ranks) if rank > plan.num_classes // 2)
    return Advice(
        DIFFERENCES,
        (),
        f"at tau 10 the top class leads by {mean[0] - mean[1]:.2g} on average, and the lower half of the classes spans "
        f"{mean[middle] - mean[-1]:.2g}; label smoothing with alpha = {detail.smoothing_sorted_mean:.4f} has the same entropy",
        "yes" if plan.num_classes >= STUDIED_CLASSES[0] else "in part",
        f"Whether it is so here is for controls to show: --control none,ls-instance,bottom:{min(5, plan.num_classes - 2)}. What "
        "a codec changes: kdcache stats --fidelity.",
    )


def _standardization(plan: ArchivePlan, statistics: Statistics) -> Advice:
    if plan.num_classes == 2 or statistics.details is None:
        why = (
            "Two logits have the z-scores +1 and -1 in every row."
            if plan.num_classes == 2
            else "The logits' moments are not known."
        )
        return Advice(STANDARDIZATION, (), f"{plan.num_classes} classes", "no", why)
    moments = statistics.details.moments
    low, high = _deviations(moments)
    even = high < EVEN * low
    limits = ["the temperature study (section 4.1, Fig. 1) found no method that beats a plain shared temperature consistently"]
    if even:
        limits.insert(0, "all rows deviate alike: on the teacher's side z-scores are little but another common temperature")
    return Advice(
        STANDARDIZATION,
        (2.0, 3.0, 4.0),
        f"a row's logits have standard deviation {moments.std:.2f} in the mean, in nine rows of ten {low:.2f} to {high:.2f}: "
        f"base temperature 2 softens an average row as tau = {2 * moments.std:.1f} does, 20 as tau = {20 * moments.std:.0f}",
        "in part" if even else "yes",
        _sentences(limits),
    )


def _deviations(moments: LogitMoments) -> tuple[float, float]:
    """The 5 % and 95 % quantiles of the rows' standard deviations, to the precision of a histogram bin."""
    counts = np.array(moments.counts).sum(axis=0)
    edges, share = np.linspace(*moments.std_range, len(counts) + 1), np.cumsum(counts) / counts.sum()
    return float(edges[np.searchsorted(share, 0.05)]), float(edges[np.searchsorted(share, 0.95) + 1])


def _matching(statistics: Statistics) -> Advice:
    low, high = MATCHING_RANGE
    taus = tuple(f.tau for f in statistics.per_tau if low <= f.tau <= high)
    limits = ["the paper trained with the labels' cross entropy beside it; its runs without used exponents of 0.2 to 0.6"]
    if beyond := [f for f in statistics.per_tau if f.tau > high]:
        limits.insert(
            0,
            f"larger temperatures were not tried there: an untempered student would have to reach H^(p) = "
            f"{beyond[-1].entropy_mean:.4f} at tau {beyond[-1].tau:g}, that is, to know next to nothing",
        )
    return Advice(MATCHING, taus, _entropies(statistics, (2, 4, 10, 20, 40)), "yes" if taus else "in part", _sentences(limits))


def _at(statistics: Statistics, tau: float) -> TauStatistics | None:
    return next((figures for figures in statistics.per_tau if figures.tau == tau), None)


def _entropies(statistics: Statistics, taus: Sequence[float]) -> str:
    known = [figures for figures in statistics.per_tau if figures.tau in taus] or statistics.per_tau
    return "H^(p) = " + ", ".join(f"{figures.entropy_mean:.3f} at tau {figures.tau:g}" for figures in known)


def _sentences(parts: Sequence[str]) -> str:
    return " ".join(part[0].upper() + part[1:] + "." for part in parts)

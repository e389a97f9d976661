"""Whether a teacher knows a dataset's classes in another order: the best assignment of outputs, against their own."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["ClassOrder", "class_order", "exchanged", "told_cycles", "told_outputs"]

CERTAIN = 1e-3  # chance that outputs in the right order look as wrong as this
SUSPECT = 0.05  # likewise, from which on more images are worth a look
ONE_TO_ONE = 0.8  # least share of classes that move, of those whose images agree on an output, that have it for themselves
GAIN = 0.1  # least mean gain in recall, of classes that change places, in the images that the order is taken from


@dataclass(frozen=True)
class ClassOrder:
    """What `images` say of the order: `outputs[i]` is the output that is class i under the best assignment.

    `as_is` and `reordered` are accuracies in percent, of images that the order was not taken from. `better` says whether the
    other order is clearly better, and `suspect` whether more images may show that it is.
    """

    images: int
    outputs: tuple[int, ...]
    as_is: float
    reordered: float
    better: bool
    suspect: bool

    @property
    def moved(self) -> list[int]:
        """The classes whose output is another one's."""
        return [number for number, output in enumerate(self.outputs) if output != number]


def class_order(predicted: NDArray, labels: NDArray, classes: int) -> ClassOrder:
    """Compare the outputs `predicted [N]` with `labels [N]` as they are, and under the best assignment to the classes.

    With few images of a class, the best assignment of the same images is better than the own order by chance alone. So the
    images of each class are halved: the order that one half suggests is judged by the other, and the reverse. It is clearly
    better if, among images of classes that it moves, those that only it makes right are so many more than those that it makes
    wrong that this has a chance of 1e-3 at most (sign test), if it at least doubles what is right, and if classes that move have
    outputs of their own. The last two conditions spare weak teachers that take one class for another: they have no better order,
    or a little better one, or take several classes for the same. Recalls are assigned
    rather than counts, so that no class gets an output for being frequent, and cycles of classes that hardly gain in their own
    half are left in place.
    """
    halves = _halves(labels)
    won = lost = right = moved_right = as_is = 0
    for judged in (halves, ~halves):
        outputs = _assigned(predicted[~judged], labels[~judged], classes)
        truth, seen = labels[judged], predicted[judged]
        moved = outputs[truth] != truth
        own, other = seen == truth, seen == outputs[truth]
        won, lost = won + int((other & ~own).sum()), lost + int((own & ~other).sum())
        as_is, right = as_is + int(own.sum()), right + int(other.sum())
        moved_right += int((own & moved).sum())
    chance = _sign_test(won, lost) if won >= max(1, 2 * moved_right) else 1.0
    number = max(1, len(labels))
    outputs = _assigned(predicted, labels, classes)
    own_outputs = chance <= SUSPECT and _one_to_one(predicted, labels, classes)
    better, suspect = own_outputs and chance <= CERTAIN, own_outputs
    return ClassOrder(len(labels), tuple(outputs.tolist()), 100 * as_is / number, 100 * right / number, better, suspect)


def _one_to_one(predicted: NDArray, labels: NDArray, classes: int) -> bool:
    """Whether classes whose images agree on another output than their own are few to share one, as in no order they do."""
    told = _agreed(predicted, labels, classes)
    moved = [output for number, output in told.items() if output != number]
    shared = np.bincount(list(told.values()), minlength=classes) > 1
    return bool(moved) and sum(not shared[output] for output in moved) >= ONE_TO_ONE * len(moved)


def told_outputs(predicted: NDArray, labels: NDArray, classes: int) -> dict[int, int]:
    """The output of each class whose images themselves tell it, and that no other class has.

    The others are left out, as the best assignment gives them whatever is left. Where most classes have their own outputs, so
    do others whose images do not tell, unless it is taken.
    """
    told = _agreed(predicted, labels, classes)
    shared = np.bincount(list(told.values()), minlength=classes) > 1
    told = {number: output for number, output in told.items() if not shared[output]}
    if 2 * sum(number == output for number, output in told.items()) > len(told):
        told |= {number: number for number in range(classes) if number not in told and number not in set(told.values())}
    return dict(sorted(told.items()))


def told_cycles(predicted: NDArray, labels: NDArray, classes: int) -> list[list[int]]:
    """Classes that seem to have changed places: the images of each agree on the output of the next, and the last on the first's.

    A few images of each class show that by chance too, or where two classes look alike: others have to confirm it.
    """
    told = _agreed(predicted, labels, classes)
    cycles, seen = [], set[int]()
    for start in told:
        path: list[int] = []
        each = start
        while each in told and each not in seen:
            seen.add(each)
            path.append(each)
            each = told[each]
        if each in path and len(cycle := path[path.index(each) :]) > 1:
            cycles.append(cycle)
    return cycles


def exchanged(predicted: NDArray, labels: NDArray, cycles: Sequence[Sequence[int]], classes: int) -> ClassOrder | None:
    """The order in which `cycles` have changed places that these images confirm; None if they confirm none of them.

    The images are of those classes, and others than the cycles were found by. Each class of a cycle must have twice as many
    that the next one's output makes right as its own, and all together so many more that this has a chance of 1e-3 at most
    (sign test, divided among the cycles).
    """
    outputs = np.arange(classes)
    for cycle in cycles:
        own, other = np.array(cycle), np.roll(cycle, -1)
        won = np.array([int((predicted[labels == i] == j).sum()) for i, j in zip(own, other, strict=True)])
        lost = np.array([int((predicted[labels == i] == i).sum()) for i in own])
        if (won > 2 * lost).all() and _sign_test(int(won.sum()), int(lost.sum())) <= CERTAIN / len(cycles):
            outputs[own] = other
    among = outputs[labels] != labels
    if not among.any():
        return None
    truth, seen = labels[among], predicted[among]
    as_is, right = 100 * float((seen == truth).mean()), 100 * float((seen == outputs[truth]).mean())
    return ClassOrder(len(truth), tuple(outputs.tolist()), as_is, right, better=True, suspect=False)


def _agreed(predicted: NDArray, labels: NDArray, classes: int) -> dict[int, int]:
    """The output of each class with which at least two of its images answer, and more than with any other."""
    pairs, counts = np.unique(labels.astype(np.int64) * classes + predicted, return_counts=True)
    of_class, output = np.divmod(pairs, classes)
    by_count = np.lexsort((-counts, of_class))
    first = np.r_[True, of_class[by_count][1:] != of_class[by_count][:-1]]
    best = by_count[first]
    second = np.zeros(classes, np.int64)
    np.maximum.at(second, of_class[by_count[~first]], counts[by_count[~first]])
    clear = (counts[best] >= 2) & (counts[best] > second[of_class[best]])
    return {int(of_class[i]): int(output[i]) for i in best[clear]}


def _halves(labels: NDArray) -> NDArray[np.bool_]:
    """Every second image of each class: bool `[N]`."""
    order = np.argsort(labels, kind="stable")
    ordered = labels[order]
    place = np.arange(len(labels)) - np.searchsorted(ordered, ordered)
    half = np.empty(len(labels), np.bool_)
    half[order] = place % 2 == 0
    return half


def _assigned(predicted: NDArray, labels: NDArray, classes: int) -> NDArray[np.int64]:
    """The output of each class, int64 `[C]`, that gives the largest sum of recalls; its own where others are no better."""
    from scipy.optimize import linear_sum_assignment
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    own = np.arange(classes)
    # Only classes and outputs that occur beside the diagonal can move; a matrix of 21,841 classes would be large.
    off = predicted != labels
    _, group = connected_components(
        coo_array((np.ones(int(off.sum())), (labels[off], predicted[off])), shape=(classes, classes)), directed=False
    )
    open_ = np.flatnonzero(np.bincount(group)[group] > 1)
    if not len(open_):
        return own
    index = np.full(classes, -1)
    index[open_] = np.arange(len(open_))
    kept = index[labels] >= 0
    recall = np.zeros((len(open_), len(open_)))
    np.add.at(recall, (index[labels[kept]], index[predicted[kept]]), 1)
    recall /= np.maximum(recall.sum(axis=1, keepdims=True), 1)
    rows, columns = linear_sum_assignment(recall + 1e-6 * np.eye(len(open_)), maximize=True)
    gain = recall[rows, columns] - recall.diagonal()
    found, result = open_[columns], own.copy()
    result[open_] = found
    seen = np.zeros(classes, np.bool_)
    gains = dict(zip(open_.tolist(), gain.tolist(), strict=True))
    for start in open_.tolist():
        cycle, each = [], start
        while not seen[each]:
            seen[each] = True
            cycle.append(each)
            each = int(result[each])
        if len(cycle) > 1 and sum(gains[one] for one in cycle) < GAIN * len(cycle):
            own_again = np.array(cycle)
            result[own_again] = own_again
    return result


def _sign_test(won: int, lost: int) -> float:
    """The chance of so many wins or more where wins and losses are equally likely."""
    from scipy.stats import binom

    return float(binom.sf(won - 1, won + lost, 0.5)) if won + lost else math.nan

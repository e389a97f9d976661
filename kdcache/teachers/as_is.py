"""Weights that are taken as they are: which of their outputs are the classes of a dataset, and the model that has only these."""

import json
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from kdcache.errors import IncompatibleError, UsageError
from kdcache.models.classes import WNID, ClassMap, Match, Outputs, Stated, imagenet, labelled, listed, match, read_classes
from kdcache.models.creation import (
    Normalisation,
    checkpoint_classes,
    create_model,
    create_whole,
    load_weights,
    published,
)
from kdcache.models.heads import SelectedOutputs, select_rows
from kdcache.models.names import is_factory, public_name
from kdcache.models.preprocessing import configuration
from kdcache.teachers.config import TeacherAndData

__all__ = ["AsIs", "Start", "create_recorded", "require_use", "take"]

Start = Literal["checkpoint", "factory", "random", "timm"]
Made = tuple[nn.Module, Normalisation]
CERTAIN_FROM = 10_000  # classes: subsets of ImageNet of that size are known by it alone


@dataclass(frozen=True)
class AsIs:
    """Weights as they are: the mapping of classes, and a function that makes the model of the dataset's classes."""

    mapping: ClassMap
    make: Callable[[], Made]
    created_for: int  # classes that a function was asked for

    def note(self) -> list[str]:
        """Lines about the mapping; none where the names say that all outputs are used in their own order."""
        if not self.mapping.whole:
            return self.mapping.lines()
        if self.mapping.by:
            return []
        taken = "that the dataset's classes are in the order of the weights' is taken for granted: names do not tell"
        return [f"{taken} (--classes FILE settles it)", *self.mapping.lines()[1:]]

    def record(self) -> dict[str, Any] | None:
        """The mapping for teacher.json, or None where all outputs are used in their own order."""
        return None if self.mapping.whole else self.mapping.record() | {"created_for": self.created_for}


def require_use(classes: Path | None, durations: Sequence[int], head_epochs: int | None = None, flag: str = "--epochs 0") -> None:
    """Raises UsageError for `--classes` where no weights are taken as they are."""
    if classes is not None and head_epochs:
        raise UsageError(
            f"--classes {classes} with --head-epochs {head_epochs}",
            why="a head that is trained has the dataset's own classes",
            fix="leave one of them out",
        )
    if classes is not None and 0 not in durations:
        raise UsageError(
            f"--classes {classes} for teachers of {', '.join(map(str, durations))} epochs",
            why="a teacher that is trained gets a classifier of the dataset's own classes",
            fix=f"take its weights as they are: {flag}; or leave --classes out",
        )


class _Taking:
    """One model's weights and one dataset's classes."""

    def __init__(
        self,
        exact: str,
        names: tuple[str, ...],
        subject: TeacherAndData,
        checkpoint: Path | None,
        classes: Path | None,
        size: int,
    ) -> None:
        self.exact, self.names, self.subject, self.classes, self.size = exact, names, subject, classes, size
        self.stated = read_classes(classes, names) if classes else Stated()
        self.weights = str(checkpoint) if checkpoint else public_name(exact)
        self._checkpoint = f" --checkpoint {shlex.quote(str(checkpoint))}" if checkpoint else ""

    def known(self, own: Outputs | None, count: int) -> Outputs | None:
        """What the outputs are called, by the user or else the model. Raises UsageError for another number of names."""
        outputs = self.stated.outputs or (own if own is not None and len(own) == count else None)
        if outputs is not None and len(outputs) != count:
            raise UsageError(
                f"--classes {self.classes} names {len(outputs)} outputs, {self.weights} has {count}",
                why="every output has a name, in order",
                fix=f"give {count} names; or JSON that says which output is which class of {self.subject.dataset}",
            )
        return outputs

    def mapped(self, own: Outputs | None, count: int) -> ClassMap:
        """The mapping to a model of `count` outputs that are called `own`. Raises IncompatibleError where it is not certain."""
        known, names = self.known(own, count), self.names
        if self.stated.in_order:
            if count != len(names):
                raise self._others(count, f"{count} outputs cannot be {len(names)} classes in order")
            return ClassMap(names, tuple(range(count)), count, by=dict.fromkeys(names, "--classes"))
        assert self.classes is not None or not self.stated.chosen
        chosen = self.stated.resolved(known, count, self.classes) if self.classes else {}
        if known is None:
            if len(chosen) == len(names):
                found = match(names, Outputs(()), chosen)
                if not found.certain:
                    raise self._unclear(found, Outputs(("",) * count))
                return ClassMap.of(names, found, None, count)
            if count == len(names) and not chosen:
                return ClassMap.in_order(names)
            if self.classes is not None:
                raise self._lacking(count, chosen)
            raise self._others(count, "what its outputs are called is not known")
        if names in (known.names, known.described) and not chosen:
            return replace(ClassMap.in_order(names, known), by=dict.fromkeys(names, "name"))
        found = match(names, known, chosen)
        if found.certain:
            return ClassMap.of(names, found, known, count)
        if self._in_order_by_all_that_is_known(found, known):
            return ClassMap.in_order(names, known)
        if not found.outputs and not found.ambiguous:
            raise self._others(count, "none of the dataset's is among them, by name or WordNet id")
        raise self._unclear(found, known)

    def _in_order_by_all_that_is_known(self, found: Match, known: Outputs) -> bool:
        """Whether there are as many outputs as classes, and no name says that their order differs."""
        if len(known) != len(self.names) or self.classes is not None:
            return False
        by_id = any(map(WNID.fullmatch, known.names))
        for i, name in enumerate(self.names):
            fitting = found.ambiguous.get(name) or ((found.outputs[name],) if name in found.outputs else ())
            if (fitting and i not in fitting) or (not fitting and by_id and WNID.fullmatch(name)):
                return False
        return True

    def _others(self, count: int, why: str) -> IncompatibleError:
        return IncompatibleError(
            f"{self.weights} has {count} classes, dataset {self.subject.dataset} has {len(self.names)}",
            why=f"only weights of the same classes can be taken as they are, and {why}",
            fix=f"{self._finetune}; or say which output is which class: --classes FILE",
        )

    def _lacking(self, count: int, chosen: Mapping[str, int]) -> IncompatibleError:
        lacking = [name for name in self.names if name not in chosen]
        return IncompatibleError(
            f"--classes {self.classes} lacks {len(lacking)} of the {len(self.names)} classes of dataset {self.subject.dataset}: "
            f"{_some(map(repr, lacking))}",
            why=f"what the {count} outputs of {self.weights} are called is not known, so that no class is found by its name",
            fix=f"add the number of their outputs, from 0 to {count - 1}: {{{json.dumps(lacking[0])}: NUMBER}}",
        )

    def _unclear(self, found: Match, known: Outputs) -> IncompatibleError:
        reasons = []
        if found.missing:
            reasons.append(f"no output is called {_some(map(repr, found.missing))}")
        for name, outputs in list(found.ambiguous.items())[:3]:
            reasons.append(f"{name!r} may be {listed(known, outputs)}")
        for one, other in found.doubled[:3]:
            reasons.append(f"{one!r} and {other!r} would be the same output, {listed(known, [found.outputs[other]])}")
        unclear = dict.fromkeys([*found.missing, *found.ambiguous, *(name for pair in found.doubled for name in pair)])
        example = f"{{{json.dumps(next(iter(unclear)))}: NUMBER OR NAME}}"
        return IncompatibleError(
            f"{len(unclear)} of the {len(self.names)} classes of dataset {self.subject.dataset} cannot be told among the "
            f"{len(known)} of {self.weights}: {_some(unclear)}",
            why="; ".join(reasons),
            fix=f"say which output they are, in a JSON file for --classes: {example}; or {self._finetune}",
        )

    @property
    def _finetune(self) -> str:
        command = ["kdcache", "train-teacher", "--teacher", self.subject.teacher, "--dataset", self.subject.dataset]
        return f"finetune them: {shlex.join(command)}{self._checkpoint} --epochs 20"

    # ------------------------------------------------------------ by where the weights come from

    def published(self) -> AsIs:
        known = published(self.exact)
        if known is None:  # there are none to be had, which create_model says
            return AsIs(ClassMap.in_order(self.names), lambda: self._created(len(self.names), pretrained=True), 0)
        if not known.num_classes:
            raise IncompatibleError(
                f"{self.weights} has no classifier",
                why="its weights give features of images, no logits",
                fix=f"{self._finetune}; or, of a CLIP-like model, make a zero-shot teacher: kdcache.models.zeroshot",
            )
        mapping = self.mapped(known.outputs, known.num_classes)

        def make() -> Made:
            return self._reduced(self._created(mapping.num_outputs, pretrained=True), mapping)

        return AsIs(mapping, make, mapping.num_outputs)

    def checkpoint(self, file: Path) -> AsIs:
        asked = len(self.names)
        model, normalise, found = self._whole(asked)
        count = checkpoint_classes(model, file) or found
        of_function = is_factory(self.exact)
        mapping = self.mapped(_labels(model) if of_function else self._known_to_checkpoint(count), count)
        if not (of_function or mapping.whole) and count == len(self.names) and self.classes is None:
            raise IncompatibleError(
                f"{file} may know its {count} classes in the order of dataset {self.subject.dataset}, or in that of the "
                f"published weights of {public_name(self.exact)}",
                why="both have these classes, in another order, and a checkpoint does not say which is its own",
                fix="say it: --classes dataset; or name the classes of its outputs in order: --classes "
                + ("imagenet-1k" if count == 1000 else "FILE"),
            )
        if count != found:
            asked = count
            model, normalise, found = self._whole(asked)
        load_weights(model, file)
        reduced = self._reduced((model, normalise), mapping)
        return AsIs(mapping, lambda: reduced, asked)

    def _known_to_checkpoint(self, count: int) -> Outputs | None:
        """What the outputs of a checkpoint of so many classes are called, by the published weights of its architecture."""
        known = published(self.exact)
        if known is not None and known.num_classes == count:
            return known.outputs
        of_imagenet = known is not None and known.outputs is not None and known.outputs == imagenet(known.num_classes)
        return imagenet(count) if count >= CERTAIN_FROM or (of_imagenet and count in {1000, 1001}) else None

    def factory(self) -> AsIs:
        asked = self.stated.outputs.names if self.stated.outputs else self.names
        model, normalise, count = create_whole(self.exact, len(asked), input_size=self.size, class_names=asked)
        mapping = self.mapped(_labels(model), count)
        kept = self._reduced((model, normalise), mapping)
        return AsIs(mapping, lambda: kept, len(asked))

    def _created(self, count: int, *, pretrained: bool = False) -> Made:
        return create_model(self.exact, count, input_size=self.size, pretrained=pretrained)

    def _whole(self, asked: int) -> tuple[nn.Module, Normalisation, int]:
        """A model made for `asked` classes, and the number of its outputs, which is for a function to decide."""
        if not is_factory(self.exact):
            return *self._created(asked), asked
        names = self.names if asked == len(self.names) else None
        return create_whole(self.exact, asked, input_size=self.size, class_names=names)

    def _reduced(self, made: Made, mapping: ClassMap) -> Made:
        if mapping.whole:
            return made
        if is_factory(self.exact):  # whose classifier is not known; `create_recorded` makes it in the same way
            return SelectedOutputs(made[0], mapping.outputs, mapping.num_outputs), made[1]
        model, _ = self._created(len(self.names))
        select_rows(made[0], model, mapping.outputs, mapping.num_outputs, input_size=self.size)
        return model, made[1]


def _labels(model: nn.Module) -> Outputs | None:
    """What a function's model says that its outputs are called."""
    labels = configuration(model).get("label_names")
    return labelled(labels) if labels else None


def _some(names: Iterable[Any]) -> str:
    names = list(names)
    return ", ".join(map(str, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def take(
    exact: str,
    names: tuple[str, ...],
    subject: TeacherAndData,
    start: Start,
    *,
    checkpoint: Path | None,
    classes: Path | None,
    input_size: int,
) -> AsIs:
    """Weights of model `exact` as they are, for a dataset of classes `names`.

    Published weights are not fetched before the model is made; those of a checkpoint and of a function are here already.
    Raises IncompatibleError if it is not certain which outputs these classes are, and UsageError for a wrong `classes`.
    """
    taking = _Taking(exact, names, subject, checkpoint, classes, input_size)
    if start == "timm":
        return taking.published()
    if checkpoint is None:
        return taking.factory()
    return taking.checkpoint(checkpoint)


def create_recorded(name: str, record: dict[str, Any]) -> Made:
    """The model of a teacher by exact name, as `record` describes it, without its weights."""
    names, size, mapping = record["class_names"], record["input_size"], record.get("classes")
    if mapping is None or not is_factory(name):
        return create_model(name, len(names), input_size=size, class_names=names)
    asked = mapping["created_for"]
    given = names if asked == len(names) else None
    model, normalise, _ = create_whole(name, asked, input_size=size, class_names=given)
    return SelectedOutputs(model, mapping["outputs"], mapping["num_outputs"]), normalise

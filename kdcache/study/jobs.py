"""From a study to its jobs: command lines of kdcache, each of which is there once however many students need it.

A job is identified by what decides on its result: its options, and the jobs whose outputs it works on. So a study that is
changed keeps the jobs that the change does not touch.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from kdcache.archive import LAYOUTS, stored_bytes
from kdcache.codecs import CODECS
from kdcache.datasets import Counts, Source, published_name
from kdcache.errors import KdcacheError, NotFoundError, UsageError
from kdcache.models.names import resolve
from kdcache.options import Options, as_text
from kdcache.replay.subject import Subject
from kdcache.students.config import DistillConfig
from kdcache.students.grid import plan_ahead
from kdcache.study.schema import ArchiveSpec, StudentsSpec, Study
from kdcache.teachers.config import DumpConfig, TeacherConfig
from kdcache.teachers.recipes import teacher_recipe
from kdcache.training.optimizers import require_optimizer
from kdcache.views.policy import ViewPolicy
from kdcache.workspace import Workspace, parse_dataset

__all__ = ["Job", "StudyPlan", "plan_study"]

Kind = Literal["train", "dump", "distill", "stats", "report"]
COMMANDS: dict[Kind, str] = {
    "train": "train-teacher",
    "dump": "dump-teacher",
    "distill": "distill",
    "stats": "stats",
    "report": "report",
}


@dataclass(frozen=True)
class Job:
    """One command line. `{ID}` among its arguments stands for the outputs of job ID, which has to be done before."""

    id: str
    kind: Kind
    title: str
    arguments: tuple[str, ...]
    after: tuple[str, ...] = ()
    alone: str = ""  # jobs of one such name never run at once: they have students in common

    @property
    def needs_gpu(self) -> bool:
        return self.kind in {"train", "dump", "distill"}


@dataclass(frozen=True)
class StudyPlan:
    """All jobs of a study, each after those that it needs, and how much there will be."""

    name: str
    jobs: tuple[Job, ...]
    students: int
    images: int | None  # that students are trained on, each view of each epoch; None: not known
    archive_bytes: int | None
    missing: tuple[KdcacheError, ...]  # what has to be there before the study can run

    def as_json(self) -> dict[str, Any]:
        return {"name": self.name, "jobs": [asdict(job) for job in self.jobs]}


def plan_study(study: Study, file: Path, workspace: Workspace, *, smoke: bool = False) -> StudyPlan:
    """Expand a study, or its smoke version, which `file` holds. UsageError or NotFoundError for names, options and combinations
    that its commands would refuse.
    """
    return _Expansion(study, file, workspace, smoke).plan()


@dataclass(frozen=True)
class _Archive:
    """An archive of the study with the job that dumps it."""

    dump: Job
    config: DumpConfig
    spec: ArchiveSpec
    source: Source
    counts: Counts | None  # None: not known
    bytes: int | None

    @property
    def views(self) -> int:
        return self.config.recipe.views or self.source.recipe.student_epochs

    @property
    def policy(self) -> ViewPolicy:
        recipe = self.config.recipe
        return ViewPolicy.load(recipe.shown.policy or self.source.recipe.policy, size=recipe.shown.size, seed=recipe.view_seed)

    def as_subject(self, name: str) -> Subject:
        """As much of it as students are planned by."""
        counts = self.counts or Counts(1_000_000, 1, 1_000)  # so large that nothing is refused for its sake
        policy, dataset = self.config.recipe.shown.policy, self.config.subject.dataset
        place = f"{self.config.subject.teacher} on {dataset}" + (f", policy {policy}" if policy else "")
        classes = tuple(map(str, range(counts.classes)))
        return Subject(name, name, place, range(self.views), counts.train, classes, self.policy, dataset)


class _Expansion:
    def __init__(self, study: Study, file: Path, workspace: Workspace, smoke: bool) -> None:
        self.study, self.file, self.workspace, self.smoke = study, file, workspace, smoke
        self.name = f"{file.stem}-smoke" if smoke else file.stem
        self.jobs: dict[str, Job] = {}
        self.missing: dict[str, KdcacheError] = {}
        self.counted: dict[str, Any] = {}

    def plan(self) -> StudyPlan:
        archives = {name: list(self._archives(spec)) for name, spec in self.study.archives.items()}
        trained: dict[tuple[str, str], str] = {}  # student of an archive -> the job that has it
        images, total = 0, True
        for block in self.study.students:
            chosen = list({archive.dump.id: archive for name in block.archive for archive in archives[name]}.values())
            for group in [chosen] if "average" in block.model_fields_set else [[archive] for archive in chosen]:
                second = _second(block, group, archives[block.second_archive]) if block.second_archive else None
                for options in _combinations(block, "epochs", "batch_size"):
                    shown = self._distill(options, group, second, trained)
                    images += shown or 0
                    total = total and shown is not None
        if self.study.stats is not None:
            for archive in {each.dump.id: each for each in itertools.chain(*archives.values())}.values():
                self._stats(archive)
        # Without students, it is the archives that the report is of.
        kinds = ("distill",) if self.study.students else ("dump",)
        self._report([job for job in self.jobs.values() if job.kind in kinds])
        sizes = {archive.dump.id: archive.bytes for archive in itertools.chain(*archives.values())}
        return StudyPlan(
            self.name,
            tuple(self.jobs.values()),
            len(trained),
            images if total else None,
            sum(size or 0 for size in sizes.values()) if None not in sizes.values() else None,
            tuple(self.missing.values()),
        )

    def _add(
        self, kind: Kind, title: str, arguments: Sequence[str], after: Sequence[Job] = (), quoted: Any = (), **more: Any
    ) -> Job:
        arguments, needed = (COMMANDS[kind], *arguments), tuple(dict.fromkeys(job.id for job in after))
        digest = hashlib.sha256(json.dumps([arguments, needed, *quoted]).encode()).hexdigest()[:8]
        job = Job(f"{kind}-{digest}", kind, title, arguments, needed, **more)
        return self.jobs.setdefault(job.id, job)

    # ------------------------------------------------------------ archives

    def _archives(self, spec: ArchiveSpec) -> Iterator[_Archive]:
        sizes = {"size": spec.size, "canvas": spec.canvas}
        for name, teacher in itertools.product(spec.dataset, spec.teacher):
            source, counts = self._source(name)
            resolve(teacher, "teacher", run=False)
            for training in _combinations(spec.train, "epochs", "seed"):
                trained = self._train(teacher, name, training | sizes)
                for options in _combinations(spec.dump, "policy"):
                    place = Path(f"{{{trained.id}}}")
                    of = {"teacher": teacher, "dataset": name, "teacher_folder": place}
                    config = DumpConfig.model_validate(options | sizes | of)
                    policy, views = config.recipe.shown.policy, config.recipe.views or source.recipe.student_epochs
                    ViewPolicy.load(policy or source.recipe.policy, size=spec.size, seed=config.recipe.view_seed)
                    _ = CODECS.parse(config.recipe.codec), LAYOUTS.parse(config.recipe.layout)
                    size = None
                    if counts is not None:
                        size = stored_bytes(config.recipe.rows(views, counts.train, list(map(str, range(counts.classes)))))
                    title = f"{views} views of {trained.title}" + (f", policy {policy}" if policy else "")
                    arguments = config.arguments(first=("teacher", "dataset", "teacher_folder", "size", "canvas"))
                    yield _Archive(self._add("dump", title, arguments, [trained]), config, spec, source, counts, size)

    def _train(self, model: str, name: str, options: Mapping[str, Any]) -> Job:
        source, _ = self._source(name)
        config = TeacherConfig.model_validate({**options, "teacher": model, "dataset": name})
        teacher_recipe(config.recipe, resolve(model, "teacher", run=False), published_name(source))
        if {"opt", "opt_betas"} & set(options):
            require_optimizer(config.training.opt, config.training.opt_betas)
        start = {True: " from scratch", False: " from pretrained weights", None: ""}[config.from_scratch]
        epochs = f", {config.epochs[0]} epochs" if config.epochs else ""
        seed = f", seed {config.seed}" if config.seed else ""
        arguments = config.arguments(first=("teacher", "dataset", "size", "canvas"))
        return self._add("train", f"{model} on {name}{start}{epochs}{seed}", arguments)

    def _source(self, name: str) -> tuple[Source, Any]:
        """A dataset, and how many images and classes it has, as far as that is known without fetching it."""
        source = parse_dataset(name)
        if name not in self.counted:
            self.counted[name] = getattr(source, "counts", None)
            root = getattr(source, "root", "")
            try:
                if root and not Path(root).expanduser().exists():
                    raise NotFoundError(
                        f"dataset {name}: there is no {root}",
                        why=f"study {self.name} reads images from there",
                        fix="write where yours are into a copy of the study, or take that dataset out of it",
                    )
                # A repository would be asked for, and a function called: a plan does neither.
                if self.counted[name] is None and not (getattr(source, "repo", "") or getattr(source, "function", "")):
                    images = source.open(self.workspace.data, fetch=False)
                    train, test = (len(images.samples(split)) for split in ("train", "test"))
                    self.counted[name] = Counts(train, test, len(images.class_names()))
            except KdcacheError as error:
                self.missing[name] = error
        return source, self.counted[name]

    # ------------------------------------------------------------ students

    def _distill(
        self, options: Mapping[str, Any], group: Sequence[_Archive], second: _Archive | None, trained: dict[tuple[str, str], str]
    ) -> int | None:
        """Add the job that trains students from the archives of a group; how many images it shows them, if known."""
        first = group[0]
        read = [each.dump for each in (*group, second) if each is not None]
        places: dict[str, Any] = {"archive": tuple(f"{{{each.dump.id}}}" for each in group), "second_archive": None}
        if second is not None:
            places["second_archive"] = f"{{{second.dump.id}}}"
        config = DistillConfig.model_validate({**options, **places})
        before, grid = list(read), config.grid
        for init in dict.fromkeys(grid.init):
            if init in {"target", "finetuned"}:
                sizes = {"size": first.spec.size, "canvas": first.spec.canvas}
                (training,) = _combinations(self.study.starts[init], "epochs", "seed")
                for model in grid.student or (first.source.recipe.student,):
                    start = training | sizes | {"from_scratch": init == "target"}
                    before.append(self._train(model, first.config.subject.dataset, start))
        shown_options = ("student", "method", "preset", "control", "epochs", "batch_size")
        students = ", ".join(f"{name.replace('_', ' ')} {as_text(options[name])}" for name in shown_options if name in options)
        titles = " + ".join(each.dump.title for each in group) + (f", second views: {second.dump.title}" if second else "")
        arguments = config.arguments(first=("archive", "second_archive"))
        job = self._add("distill", f"{students or 'students'} of {titles}", arguments, before)

        other_views = None if second is None else second.as_subject("plan" if second.dump.id == first.dump.id else second.dump.id)
        shown = 0
        archives = "+".join(each.dump.id for each in group)
        for spec, init in plan_ahead(grid, first.as_subject("plan"), self.workspace, other_views):
            key = (archives, f"{init}/{spec.folder.name}")
            other = trained.setdefault(key, job.id)
            if other == job.id:
                shown += spec.settings.epochs * spec.method.views_per_step
            elif not job.alone or not self.jobs[other].alone:
                for each in (job.id, other):
                    self.jobs[each] = replace(self.jobs[each], alone=archives)
        return shown * first.counts.train if first.counts else None

    def _stats(self, archive: _Archive) -> None:
        assert self.study.stats is not None
        place = self.workspace.reports.absolute() / self.name / archive.dump.id
        arguments = [f"{{{archive.dump.id}}}", *self.study.stats.arguments(), "--plot", str(place)]
        self._add("stats", f"figures of {archive.dump.title}", arguments, [archive.dump])

    def _report(self, runs: Sequence[Job]) -> None:
        place = self.workspace.reports.absolute() / self.name
        arguments = [*(f"{{{job.id}}}" for job in runs), "--output", str(place), "--study", str(self.file.absolute())]
        quoted = astuple(self.study.experiment(smoke=self.smoke))
        self._add("report", "report", arguments + ["--smoke"] * self.smoke, runs, quoted)


def _second(block: StudentsSpec, group: Sequence[_Archive], candidates: Sequence[_Archive]) -> _Archive:
    """The archive for second views that has a group's dataset. If several have, the one of its teacher, trained as it was."""
    first, candidates = group[0], list(candidates)
    tests: list[Callable[[_Archive], object]] = [lambda archive: archive.config.subject.dataset]
    if len(group) == 1:
        tests += [lambda archive: archive.config.subject.teacher, lambda archive: archive.dump.after]
    for same in tests:
        if len(chosen := [archive for archive in candidates if same(archive) == same(first)]) == 1:
            return chosen[0]
        candidates = chosen
    raise UsageError(
        f"second-archive {block.second_archive} is {len(candidates)} archives for students of {first.dump.title}",
        why="second views come from one archive, of the same dataset and, where there are several, of the same teacher",
        fix="name one that has such an archive, and a single policy: a block of students for each, if need be",
    )


def _combinations(form: Options, *several: str) -> Iterator[dict[str, Any]]:
    """The options of each job: one value of those that may have `several`."""
    options = {name: value for name, value in form.given().items() if (name, value) != ("seed", (0,))}  # which needs no flag
    names = [name for name in several if options.get(name)]
    for values in itertools.product(*(options[name] for name in names)):
        yield options | dict(zip(names, values, strict=True))

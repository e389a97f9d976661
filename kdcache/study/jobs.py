"""From a study to its jobs: command lines of kdcache, each of which is there once however many students need it.

A job is identified by what decides on its result: its options, and the jobs whose outputs it works on. So a study that is
changed keeps the jobs that the change does not touch.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kdcache.archive import stored_bytes
from kdcache.datasets import DATASETS, Source
from kdcache.errors import KdcacheError, NotFoundError, UsageError
from kdcache.study.schema import ArchiveSpec, StudentsSpec, Study, TrainSpec
from kdcache.workspace import Workspace, parse_dataset

if TYPE_CHECKING:
    from pydantic import BaseModel

    from kdcache.students.grid import DistillConfig
    from kdcache.teachers.dump import DumpConfig
    from kdcache.views.policy import ViewPolicy

__all__ = ["Job", "StudyPlan", "distill_config", "plan_study"]

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
    students: dict[str, Any] = field(default_factory=dict)  # of distill, as in the study

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
    config: "DumpConfig"
    spec: ArchiveSpec
    source: Source
    counts: Any  # kdcache.datasets.Counts; None: not known
    bytes: int | None

    @property
    def views(self) -> int:
        return self.config.views or self.source.recipe.student_epochs

    @property
    def policy(self) -> "ViewPolicy":
        from kdcache.views.policy import ViewPolicy

        config = self.config
        return ViewPolicy.load(config.policy or self.source.recipe.policy, size=config.size, seed=config.view_seed)


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
            chosen = list({one.dump.id: one for name in block.archive for one in archives[name]}.values())
            for group in [chosen] if block.average else [[one] for one in chosen]:
                second = _second(block, group, archives[block.second_archive]) if block.second_archive else None
                for epochs, batch in itertools.product(block.epochs or (None,), block.batch_size or (None,)):
                    one = block.model_copy(update={"epochs": epochs and (epochs,), "batch_size": batch and (batch,)})
                    shown = self._distill(one, group, second, trained)
                    images += shown or 0
                    total = total and shown is not None
        if self.study.stats is not None:
            for found in {each.dump.id: each for each in itertools.chain(*archives.values())}.values():
                self._stats(found)
        if runs := [job for job in self.jobs.values() if job.kind == "distill"]:
            self._report(runs)
        sizes = {one.dump.id: one.bytes for one in itertools.chain(*archives.values())}
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
        arguments, needed = (COMMANDS[kind], *arguments), tuple(dict.fromkeys(one.id for one in after))
        digest = hashlib.sha256(json.dumps([arguments, needed, *quoted]).encode()).hexdigest()[:8]
        job = Job(f"{kind}-{digest}", kind, title, arguments, needed, **more)
        return self.jobs.setdefault(job.id, job)

    # ------------------------------------------------------------ archives

    def _archives(self, spec: ArchiveSpec) -> Iterator[_Archive]:
        from kdcache.archive import LAYOUTS
        from kdcache.codecs import CODECS
        from kdcache.models.creation import resolve
        from kdcache.teachers.dump import DumpConfig, rows_of_dump
        from kdcache.views.policy import ViewPolicy

        for name, teacher in itertools.product(spec.dataset, spec.teacher):
            source, counts = self._source(name)
            resolve(teacher, "teacher")
            for train in _each_teacher(spec.train):
                trained = self._train(teacher, name, spec, train)
                for policy in spec.dump.policy or (None,):
                    dump = spec.dump.model_copy(update={"policy": policy and (policy,)})
                    config = DumpConfig(
                        teacher=teacher,
                        dataset=name,
                        views=dump.views,
                        policy=policy,
                        view_seed=dump.view_seed,
                        size=spec.size,
                        canvas=spec.canvas,
                        codec=dump.codec or "i16",
                        layout=dump.layout or "zarr",
                        shard_rows=dump.shard_rows,
                    )
                    ViewPolicy.load(policy or source.recipe.policy, size=spec.size, seed=dump.view_seed)
                    _ = CODECS.parse(config.codec), LAYOUTS.parse(config.layout)
                    views = dump.views or source.recipe.student_epochs
                    size = None
                    if counts is not None:
                        classes = list(map(str, range(counts.classes)))
                        size = stored_bytes(rows_of_dump(config, views, counts.train, classes))
                    arguments = ["--teacher", teacher, "--dataset", name, "--teacher-folder", f"{{{trained.id}}}"]
                    arguments += [*_sizes(spec), *_options(dump)]
                    title = f"{views} views of {trained.title}" + (f", policy {policy}" if policy else "")
                    yield _Archive(self._add("dump", title, arguments, [trained]), config, spec, source, counts, size)

    def _train(self, model: str, name: str, spec: ArchiveSpec, train: TrainSpec) -> Job:
        from kdcache.models.creation import resolve
        from kdcache.teachers.recipes import teacher_recipe
        from kdcache.training.learner import require_optimizer

        source, _ = self._source(name)
        teacher_recipe(train.recipe, resolve(model, "teacher"), DATASETS.name_of(source))
        if train.opt is not None:
            require_optimizer(train.opt)
        how = {True: " from scratch", False: " from pretrained weights", None: ""}[train.from_scratch]
        epochs = f", {train.epochs[0]} epochs" if train.epochs else ""
        seed = f", seed {train.seed[0]}" if train.seed != (0,) else ""
        return self._add(
            "train",
            f"{model} on {name}{how}{epochs}{seed}",
            ["--teacher", model, "--dataset", name, *_sizes(spec), *_options(train)],
        )

    def _source(self, name: str) -> tuple[Source, Any]:
        """A dataset, and how many images and classes it has, as far as that is known without fetching it."""
        source = parse_dataset(name)
        if name not in self.counted:
            from kdcache.datasets import Counts

            self.counted[name] = getattr(source, "counts", None)
            root = getattr(source, "root", "")
            try:
                if root and not Path(root).expanduser().exists():
                    raise NotFoundError(
                        f"dataset {name}: there is no {root}",
                        why=f"study {self.name} reads images from there",
                        fix="write where yours are into a copy of the study, or take that dataset out of it",
                    )
                if self.counted[name] is None and not getattr(source, "repo", ""):  # a repository would be asked for
                    images = source.open(self.workspace.data, fetch=False)
                    train, test = (len(images.samples(split)) for split in ("train", "test"))
                    self.counted[name] = Counts(train, test, len(images.class_names()))
            except KdcacheError as error:
                self.missing[name] = error
        return source, self.counted[name]

    # ------------------------------------------------------------ students

    def _distill(
        self, block: StudentsSpec, group: Sequence[_Archive], second: _Archive | None, trained: dict[tuple[str, str], str]
    ) -> int | None:
        """Add the job that trains a block's students from the archives of a group; how many images it shows them, if known."""
        from kdcache.datasets import Counts
        from kdcache.students.costs import archive_to_be, grid_of

        first = group[0]
        read = [one.dump for one in (*group, second) if one is not None]
        before = list(read)
        for init in dict.fromkeys(block.init or ()):
            if init in {"target", "finetuned"}:
                start = self.study.starts[init].model_copy(update={"from_scratch": init == "target"})
                for model in block.student or (first.source.recipe.student,):
                    before.append(self._train(model, first.config.dataset, first.spec, start))
        arguments = [part for one in group for part in ("--archive", f"{{{one.dump.id}}}")]
        arguments += ["--second-archive", f"{{{second.dump.id}}}"] if second else []
        arguments += _options(block, skip={"archive", "second_archive"})
        what = ", ".join(
            f"{option.replace('_', ' ')} {_text(getattr(block, option))}"
            for option in ("student", "method", "preset", "control", "epochs", "batch_size")
            if getattr(block, option) is not None
        )
        titles = " + ".join(one.dump.title for one in group) + (f", second views: {second.dump.title}" if second else "")
        stored = {"archives": [dump.id for dump in read], **block.model_dump(mode="json", exclude={"archive"})}
        job = self._add("distill", f"{what or 'students'} of {titles}", arguments, before)
        if not job.students:
            self.jobs[job.id] = job = replace(job, students=stored)

        counts = first.counts or Counts(1_000_000, 1, 1_000)  # so large that nothing is refused for its sake
        shows = None
        if second is not None and second.dump.id != first.dump.id:
            shows = archive_to_be(second.dump.id, second.config, counts, second.views, second.policy)
        config = distill_config(block, ())
        specs = grid_of(config, first.config, counts, first.views, first.policy, self.workspace, second=shows)
        shown = 0
        archives = "+".join(one.dump.id for one in group)
        starts = dict.fromkeys(block.init or ("random",))
        for spec, init in zip(specs, itertools.cycle(starts), strict=False):
            key = (archives, f"{init}/{spec.folder.name}")
            other = trained.setdefault(key, job.id)
            if other == job.id:
                shown += spec.settings.epochs * spec.method.views_per_step
            elif not job.alone or not self.jobs[other].alone:
                for each in (job.id, other):
                    self.jobs[each] = replace(self.jobs[each], alone=archives)
        return shown * counts.train if first.counts else None

    def _stats(self, found: _Archive) -> None:
        assert self.study.stats is not None
        place = self.workspace.reports.absolute() / self.name / found.dump.id
        arguments = [f"{{{found.dump.id}}}", *_options(self.study.stats), "--plot", str(place)]
        self._add("stats", f"figures of {found.dump.title}", arguments, [found.dump])

    def _report(self, runs: Sequence[Job]) -> None:
        place = self.workspace.reports.absolute() / self.name
        arguments = [*(f"{{{job.id}}}" for job in runs), "--output", str(place), "--study", str(self.file.absolute())]
        quoted = astuple(self.study.experiment(smoke=self.smoke))
        self._add("report", "report", arguments + ["--smoke"] * self.smoke, runs, quoted)


def _second(block: StudentsSpec, group: Sequence[_Archive], found: Sequence[_Archive]) -> _Archive:
    """Of the archives for second views, that of a group's dataset; of several, that of its teacher, and trained as it was."""
    first, found = group[0], list(found)
    tests: list[Callable[[_Archive], object]] = [lambda one: one.config.dataset]
    if len(group) == 1:
        tests += [lambda one: one.config.teacher, lambda one: one.dump.after]
    for same in tests:
        if len(chosen := [one for one in found if same(one) == same(first)]) == 1:
            return chosen[0]
        found = chosen
    raise UsageError(
        f"second-archive {block.second_archive} is {len(found)} archives for students of {first.dump.title}",
        why="second views come from one archive, of the same dataset and, where there are several, of the same teacher",
        fix="name one that has such an archive, and a single policy: a block of students for each, if need be",
    )


def _each_teacher(train: TrainSpec) -> Iterator[TrainSpec]:
    for epochs, seed in itertools.product(train.epochs or (None,), train.seed):
        yield train.model_copy(update={"epochs": None if epochs is None else (epochs,), "seed": (seed,)})


def _sizes(spec: ArchiveSpec) -> list[str]:
    return [part for name in ("size", "canvas") if (value := getattr(spec, name)) for part in (f"--{name}", str(value))]


def _options(spec: "BaseModel", skip: set[str] | None = None) -> list[str]:
    """The options of a command as a study has them, in the order of their fields; those at their defaults are left out."""
    found: list[str] = []
    for name, kind in type(spec).model_fields.items():
        value, flag = getattr(spec, name), f"--{name.replace('_', '-')}"
        if name in (skip or ()) or value is None or value == kind.default:
            continue
        if name == "from_scratch":
            found.append("--from-scratch" if value else "--pretrained")
        else:
            found += [flag] if value is True else [flag, _text(value)]
    return found


def _text(value: object) -> str:
    """A value as it is typed; of several, each once, numbers in ascending order."""
    if isinstance(value, tuple):
        each = list(dict.fromkeys(value))
        return ",".join(map(_text, each if any(isinstance(one, str) for one in each) else sorted(each)))
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def distill_config(block: StudentsSpec, archives: Sequence[str]) -> "DistillConfig":
    """What `kdcache distill` makes of a block's options, and of the archives that its job reads: the last for second views."""
    from kdcache.students.grid import DistillConfig

    second = block.second_archive
    if second is not None and archives:
        *archives, second = archives
    usual = DistillConfig()
    given = {
        "taus": block.tau and tuple(sorted(set(block.tau))),
        "methods": block.method,
        "presets": block.preset,
        "controls": block.control,
        "students": block.student,
        "inits": block.init and tuple(dict.fromkeys(block.init)),
        "seeds": tuple(sorted(set(block.seed))),
        "epochs": block.epochs and block.epochs[0],
        "batch_size": block.batch_size and block.batch_size[0],
        "opts": block.opt,
        "lrs": block.lr and tuple(sorted(set(block.lr))),
        "momentum": block.momentum,
        "sched": block.sched,
        "decay_epochs": block.decay_epochs and tuple(sorted(set(block.decay_epochs))),
        "decay_rate": block.decay_rate,
        "ema_decay": block.model_ema_decay,
        "val_interval": block.val_interval,
        "weight_decay": block.weight_decay,
        "average": block.average,
    }
    return replace(
        usual,
        archives=archives,
        second_archive=second,
        share_order=block.share_order,
        amp=block.amp,
        force=block.force,
        channels_last=block.channels_last,
        compiled=block.compile,
        clip_grad=usual.clip_grad if block.clip_grad is None else block.clip_grad or None,
        **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
    )

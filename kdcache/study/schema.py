"""What a study's YAML file may say. Its options are those of `train-teacher`, `dump-teacher` and `distill`, under their names."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ByteSize, ConfigDict, Field, ValidationError, create_model, model_validator
from pydantic.fields import FieldInfo

from kdcache.errors import NotFoundError, UsageError, how_to_write, printable, unknown_name
from kdcache.models.aliases import ALIASES
from kdcache.options import Option, Options, Temperatures, integers
from kdcache.report.experiment import KNOWN_BY, Experiment, Published
from kdcache.students.config import DistillConfig
from kdcache.system.documents import read_yaml
from kdcache.system.files import lacking
from kdcache.teachers.config import Accepted, DumpRecipe, TeacherConfig

__all__ = ["ArchiveSpec", "StudentsSpec", "Study", "TrainSpec", "find_study", "load_study", "shipped", "shipped_folder"]

T = TypeVar("T")
LARGEST_FILE = 1 << 20  # bytes


def _listed(value: object) -> object:
    return value if isinstance(value, list | tuple) else [value]


Several = Annotated[tuple[T, ...], BeforeValidator(_listed), Field(min_length=1)]
Durations = Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(integers), Field(min_length=1)]
Counts = Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(integers), Field(min_length=1)]
Seeds = Annotated[tuple[int, ...], BeforeValidator(integers), Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]

# What a study decides for each of its jobs; and the options of a machine, which are set in the environment.
OF_A_JOB = {"archive", "dataset", "finetune", "output", "second_archive", "shard", "start_view", "strict"}
OF_A_JOB |= {"teacher", "teacher_epochs", "teacher_folder"}
OF_A_MACHINE = {"allow_drift", "checkpoint_interval", "device", "memory", "parallel", "renderer", "workers"}


class _StudyForm(Options):
    """An option that is null is not given. Repetitions in lists mean nothing, nor does the order of numbers."""

    @model_validator(mode="before")
    @classmethod
    def _given(cls, data: Any) -> Any:
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, Mapping) else data

    @model_validator(mode="after")
    def _tidied(self) -> Self:
        for name, field in type(self).model_fields.items():
            if _is_list(field):
                values = dict.fromkeys(getattr(self, name))
                object.__setattr__(self, name, tuple(values if get_args(field.annotation)[0] is str else sorted(values)))
        return self


def _is_list(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is tuple and get_args(field.annotation)[-1] is ...


def form(config: type[Options], *, without: Sequence[str] = (), several: Mapping[str, Any]) -> Any:
    """A base class with the options of a command as a study has them: `several` are those of which each value makes a job."""
    fields: dict[str, Any] = {}
    for option, declared in config.declared().items():
        if option in several:
            fields[option] = (Annotated[several[option], declared.option], ())
        elif option not in {*OF_A_JOB, *OF_A_MACHINE, *without}:
            kind = declared.field.annotation
            fields[option] = (Annotated[kind, Field(min_length=1)] if _is_list(declared.field) else kind, declared.field)
    return create_model(f"_{config.__name__}Form", __base__=_StudyForm, __module__=__name__, **fields)


class _Data(BaseModel):
    """Keys are spelled like options, `batch-size`; `batch_size` is the same."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        populate_by_name=True,
        alias_generator=lambda name: name.replace("_", "-"),
        allow_inf_nan=False,
        coerce_numbers_to_str=True,
    )


SIZES = ("size", "canvas")  # which teachers and dumps have in common


class TrainSpec(form(TeacherConfig, without=SIZES, several={"epochs": Durations, "seed": Seeds})):  # type: ignore[misc]
    """Options of train-teacher; of those with several values, each makes a teacher."""


class _Dump(DumpRecipe):
    accepted: Accepted = Accepted()


class DumpSpec(form(_Dump, without=SIZES, several={"policy": Several[str]})):  # type: ignore[misc]
    """Options of dump-teacher; of several policies, each makes an archive."""


class ArchiveSpec(_Data):
    """Archives: one for each teacher, trained in each way, on each dataset, by each policy."""

    dataset: Several[str]
    teacher: Several[str]
    size: Count | None = None
    canvas: Count | None = None
    train: TrainSpec = TrainSpec()
    dump: DumpSpec = DumpSpec()


class StudentsSpec(form(DistillConfig, several={"epochs": Counts, "batch_size": Counts})):  # type: ignore[misc]
    """Options of distill. Students of an archive are trained together, those of other durations and batch sizes by themselves."""

    archive: Several[str]
    second_archive: str | None = None  # where methods of two views get the second one, from the same dataset and teacher


class StatsSpec(Options):
    """Figures of every archive, drawn by `kdcache stats`."""

    tau: Annotated[Temperatures, Option("Temperatures.")] = ()


class Cost(_Data):
    """What a study is expected to cost; `note` says on what, and how that was found."""

    gpu_hours: float = Field(ge=0)
    archive_bytes: ByteSize
    note: str = ""


class PublishedTable(_Data):
    """A table of the paper: test top-1 in percent, in lines that begin with the values of `by`, over those of one more field."""

    table: str
    of: dict[str, str] = {}  # what holds for all of it
    by: tuple[str, ...]
    across: dict[str, tuple[str, ...]] = Field(min_length=1, max_length=1)
    rows: tuple[tuple[str | float | None, ...], ...]

    @model_validator(mode="after")
    def _whole(self) -> Self:
        ((field, columns),) = self.across.items()
        for name in (*self.of, *self.by, field):
            if name not in KNOWN_BY:
                raise unknown_name(f"field of published {self.table}", name, KNOWN_BY)
        for row in self.rows:
            numbers = row[len(self.by) :]
            known = all(each is None or (isinstance(each, float) and 0 <= each <= 100) for each in numbers)
            if len(numbers) != len(columns) or not known:
                form = " and ".join(filter(None, (", ".join(self.by), f"{len(columns)} accuracies in percent")))
                raise UsageError(
                    f"published {self.table}: {list(row)} is not {form}",
                    why="a line has as many values as `by` and `across` name",
                    fix="write the line as the paper has it, and null for what the paper leaves out",
                )
        return self

    def numbers(self) -> Iterator[Published]:
        ((field, columns),) = self.across.items()
        for row in self.rows:
            facts = {**self.of, **dict(zip(self.by, map(str, row), strict=False))}
            for column, number in zip(columns, row[len(self.by) :], strict=True):
                if number is not None:
                    assert isinstance(number, float)
                    known = {**facts, field: column}
                    if "student" in known:  # runs have its exact name
                        known["student"] = ALIASES.get(known["student"], known["student"])
                    yield Published(self.table, tuple(known.items()), number)


class Smoke(_Data):
    """What the smoke version replaces: of each option a value, or values one by one (`{old: new}`); nothing takes it away."""

    archives: dict[str, Any] = {}
    train: dict[str, Any] = {}
    dump: dict[str, Any] = {}
    students: dict[str, Any] = {}
    starts: dict[str, Any] = {}
    stats: dict[str, Any] = {}


class Study(_Data):
    """One experiment: what for, what varies, and from which archives which students are trained."""

    title: str
    paper: str
    question: str
    varies: str
    expected: str
    cost: Cost
    archives: dict[Annotated[str, Field(pattern=r"^[\w.+-]+$")], ArchiveSpec] = Field(min_length=1)
    starts: dict[
        Annotated[str, Field(pattern="^(target|finetuned)$")], TrainSpec
    ] = {}  # how students are trained that students start from
    students: tuple[StudentsSpec, ...] = ()
    stats: StatsSpec | None = None
    smoke: Smoke = Smoke()
    published: tuple[PublishedTable, ...] = ()

    def experiment(self, *, smoke: bool) -> Experiment:
        """What its report opens with; the smoke version's numbers are not those of the paper's models and data."""
        published = () if smoke else tuple(number for table in self.published for number in table.numbers())
        return Experiment(self.title, self.paper, self.question, self.varies, self.expected, smoke, published)

    @model_validator(mode="after")
    def _refers_to_what_is_there(self) -> "Study":
        for number, block in enumerate(self.students):
            for field, names in (("archive", block.archive), ("second-archive", (block.second_archive,))):
                for name in filter(None, names):
                    if name not in self.archives:
                        raise unknown_name(f"{field} in students.{number}", name, self.archives)
            for init in block.init:
                if init in {"target", "finetuned"} and init not in self.starts:
                    raise UsageError(
                        f"students.{number}.init: {init!r} without starts.{init}",
                        why="the study does not say how students are trained that these start from",
                        fix=f"add for example: starts: {{{init}: {{epochs: 20}}}}",
                    )
        for name, start in self.starts.items():
            if len(start.epochs) > 1 or len(start.seed) > 1:
                raise UsageError(
                    f"starts.{name} of several epochs or seeds",
                    why="students start from one model, and it would not be known which",
                    fix="keep one of them",
                )
        if not self.students and self.stats is None:
            raise UsageError(
                "a study without students and stats", why="nothing would come of its archives", fix="add students: or stats:"
            )
        return self


def load_study(file: Path, *, smoke: bool = False) -> Study:
    """The study of a YAML file, or its smoke version. UsageError naming the field that is wrong."""
    data = _mapping(file)
    study = _validated(data, file)
    return _validated(_in_small(data, study.smoke), file) if smoke else study


def shipped_folder() -> Path:
    """The Snakefile and the studies that kdcache brings: inside an installed package, or beside it in the repository."""
    package = Path(__file__).parents[1]
    return next(
        (path for path in (package / "pipelines", package.parent / "pipelines") if (path / "Snakefile").is_file()), package
    )


def shipped() -> dict[str, Path]:
    """The studies that kdcache brings, by name."""
    return {file.stem: file for file in sorted((shipped_folder() / "studies").glob("*.yaml"))}


def find_study(name: str) -> Path:
    """The file of a study: a path, or the name of one that kdcache brings."""
    if Path(name).is_file():
        return Path(name)
    if name in shipped():
        return shipped()[name]
    if Path(name).suffix or Path(name).name != name:
        ours = ", ".join(shipped())
        raise NotFoundError(
            f"no study at {name}", why=f"it {lacking(Path(name))}", fix=f"name a file, or one of kdcache's own: {ours}"
        )
    raise unknown_name("study", name, shipped(), error=NotFoundError)


def _mapping(file: Path) -> dict[str, Any]:
    try:
        data = read_yaml(file, limit=LARGEST_FILE)
        if not isinstance(data, dict):
            raise ValueError("it holds no mapping")
    except ValueError as error:
        raise UsageError(
            f"study {file} is not one",
            why=" ".join(str(error).split())[:200],
            fix=f"begin with a copy of one that works: {next(iter(shipped().values()), 'pipelines/studies/quickstart.yaml')}",
        ) from None
    return data


def _validated(data: Mapping[str, Any], file: Path) -> Study:
    try:
        return Study.model_validate(data)
    except ValidationError as error:
        raise _wrong(error, file) from None


def _wrong(error: ValidationError, file: Path) -> UsageError:
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if not re.search(r"[\[(]", str(part))]  # without pydantic's names of types
    field = ".".join(place)
    if first["type"] == "extra_forbidden":
        wrong = unknown_name("field", place[-1], _fields(place[:-1]))
        return UsageError(f"{file}: unknown field {field}", why=wrong.why, fix=wrong.fix)
    if first["type"] == "missing":
        return UsageError(f"{file}: no field {field}", why="a study says this", fix=f"add {place[-1]}:")
    fix = how_to_write(error.errors()[:1])
    if first["type"] in {"model_type", "dict_type"}:
        fix = f"write fields with their values, such as {', '.join(f'{name}: ...' for name in _fields(place)[:3])}"
    why = first["msg"].removeprefix("Value error, ").replace("\n", " ")
    return UsageError(f"{file}: {field} = {printable(first['input'])[:200]}", why=why, fix=fix)


def _fields(place: list[str]) -> list[str]:
    """The names that may stand at a place in a study."""
    kinds: dict[str, type[BaseModel]] = {
        "archives": ArchiveSpec,
        "train": TrainSpec,
        "starts": TrainSpec,
        "dump": DumpSpec,
        "students": StudentsSpec,
        "stats": StatsSpec,
        "cost": Cost,
        "smoke": Smoke,
    }
    kind = next((kinds[part] for part in reversed(place) if part in kinds), Study)
    return [name.replace("_", "-") for name in kind.model_fields]


# ---------------------------------------------------------------- the smoke version


def _in_small(data: Mapping[str, Any], smoke: Smoke) -> dict[str, Any]:
    """A study's data with what its smoke version replaces."""
    archives = {}
    for name, archive in data["archives"].items():
        archives[name] = _replaced(archive, smoke.archives)
        for part, replacements in (("train", smoke.train), ("dump", smoke.dump)):
            archives[name][part] = _replaced(archive.get(part) or {}, replacements)
    small = {**data, "archives": archives}
    small["starts"] = {name: _replaced(start or {}, smoke.starts) for name, start in (data.get("starts") or {}).items()}
    small["students"] = [_replaced(block, smoke.students) for block in data.get("students") or ()]
    if data.get("stats") is not None:
        small["stats"] = _replaced(data["stats"], smoke.stats)
    return small


def _replaced(options: Mapping[str, Any], replacements: Mapping[str, Any]) -> dict[str, Any]:
    replaced = {str(key).replace("_", "-"): value for key, value in options.items()}
    for option, new in ((key.replace("_", "-"), new) for key, new in replacements.items()):
        if isinstance(new, dict):
            if option in replaced:
                old = replaced[option]
                replaced[option] = (
                    list(dict.fromkeys(new.get(value, value) for value in old)) if isinstance(old, list) else new.get(old, old)
                )
        elif new is None:
            replaced.pop(option, None)
        else:
            replaced[option] = new
    return replaced

"""Export of a trained student or teacher as a folder that timm loads, with a model card; and its push to the Hub."""

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from pydantic import ValidationError
from safetensors.torch import save
from torch import nn

from kdcache.archive import Licences, code_span, licence_fields, markdown_escaped, open_archive
from kdcache.errors import IncompatibleError, IncompleteError, IntegrityError, KdcacheError, NotFoundError, UsageError
from kdcache.models.creation import Normalisation, create_model, load_weights, require_weights, timm_config, weights_digest
from kdcache.models.hf import is_hf
from kdcache.models.names import CONFIG, HUB, LOCAL, WEIGHTS, is_factory, kept, resolve
from kdcache.report import RunRecord, collect
from kdcache.sharing.hub import OF_THE_HUB, quiet_hub, told_by_the_hub
from kdcache.sharing.publishing import require_licences
from kdcache.system.documents import parse_json
from kdcache.system.files import is_temporary, set_aside, write_changed, written_alone
from kdcache.system.progress import Progress, Silent
from kdcache.system.remote import is_url
from kdcache.views.tested import WHOLE, TestViews
from kdcache.workspace import dataset_label, parse_dataset, read_record, read_teacher

__all__ = ["Export", "Which", "export", "hub_repository", "push_export", "require_known", "write_export"]

Which = Literal["last", "best", "ema"]
CARD = "README.md"
FILES = {WEIGHTS, CONFIG, CARD}
_HUB_MODEL = re.compile(r"(?:hf://(?:models/)?)?([\w.-]+/[\w.-]+)")
_CHOSEN: dict[Which, str] = {
    "last": "the weights after the last epoch",
    "best": "the weights of the epoch with the highest top-1 on the same test images, which flatters it",
    "ema": "the moving average of the weights, after the last epoch",
}


@dataclass(frozen=True)
class Export:
    """An exported model: `files` by name, and the licences of its data and weights, as far as they are known."""

    name: str  # exact name of the model
    files: Mapping[str, bytes]
    licences: Licences

    @property
    def nbytes(self) -> int:
        return sum(map(len, self.files.values()))


@dataclass(frozen=True)
class _Trained:
    """A finished run or teacher: its model, and the facts for its card."""

    name: str  # exact name of the model
    input_size: int
    class_names: tuple[str, ...]
    weights: Path
    licences: Licences
    title: str
    facts: Mapping[str, str]  # Markdown text by topic
    scores: Mapping[str, float]
    tested: TestViews
    normalise: Normalisation | None = None  # None: the model's own
    weights_sha256: str | None = None  # None: not recorded


def export(
    folder: Path,
    *,
    which: Which = "last",
    licences: Licences | None = None,
    repository: str | None = None,
    progress: Progress | None = None,
) -> Export:
    """The model of the finished run or trained teacher in `folder`. Writes nothing.

    `licences` declares unknown licences. `repository`: the card's address of the model on the Hub. Raises
    IncompatibleError for a model that timm cannot make again.
    """
    trained = _teacher(folder, which) if (folder / "teacher.json").is_file() else _run(folder, which)
    if is_factory(trained.name):
        raise IncompatibleError(
            f"{folder} cannot be exported: its model is made by the function {trained.name}",
            why="timm makes models by the name of their architecture, and has none for it",
            fix="share that function and the weights: "
            f"safetensors.torch.load_model(make(num_classes={len(trained.class_names)}), {str(trained.weights)!r})",
        )
    if not trained.weights.is_file():
        again = f"restore it from a copy; or {_trained_again(trained.weights.parent)}"
        raise NotFoundError(
            f"{folder} has no {trained.weights.name}",
            why="averaged weights are kept by runs with --model-ema-decay" if which == "ema" else "the file is missing",
            fix="export --last or --best of it" if which == "ema" else again,
        )
    model, own = create_model(kept(trained.name, folder), len(trained.class_names), input_size=trained.input_size)
    load_weights(model, trained.weights)
    if trained.weights_sha256 is not None:
        require_weights(model, trained.weights_sha256, trained.weights)
    config = timm_config(
        trained.name, model, trained.normalise or own, trained.tested.timm_fields(), trained.input_size, trained.class_names
    )
    assert config is not None
    licences = (licences or Licences()).otherwise(trained.licences)
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    files = {
        WEIGHTS: save(state, metadata={"format": "pt"}),
        CONFIG: config,
        CARD: _card(trained, model, which, licences, repository).encode(),
    }
    if progress is not None and None in licences.model_dump().values():
        progress.say("a licence is unknown; it has to be known, or named with --license, before the model is pushed")
    return Export(trained.name, files, licences)


def write_export(exported: Export, output: Path) -> None:
    """Write a model to a folder, which may hold an earlier export, and check that timm loads the same weights."""
    _require_own(output)
    with written_alone(output):
        _require_own(output)
        for name, data in exported.files.items():
            write_changed(output / name, data)
    settings = json.loads(exported.files[CONFIG])
    classes = settings.get("num_classes") or len(settings["id2label"])  # as timm writes it, and transformers
    size = settings["pretrained_cfg"]["input_size"][-1]
    again, _ = create_model(resolve(f"{LOCAL}{output}"), classes, input_size=size, pretrained=True)
    bare, _ = create_model(f"{LOCAL}{output}", classes, input_size=size)
    load_weights(bare, output / WEIGHTS)
    if weights_digest(again) != weights_digest(bare):
        raise IntegrityError(
            f"{output} is not loaded as it was written",
            why=f"timm changes weights of {exported.name} when it loads them",
            fix="report this; the run's own weights are as they were",
        )


def _trained_again(folder: Path) -> str:
    """How a run or a teacher that is finished is trained once more: its command alone would leave it as it is."""
    return f"set it aside, and train it again: {set_aside(folder)}"


def _require_own(output: Path) -> None:
    """Raise UsageError if a folder holds more than an export, or the beginning of one that was killed."""
    own = {*FILES, ".lock", *(f".{name}.tmp" for name in FILES)}
    if output.exists() and (
        not output.is_dir() or {file.name for file in output.iterdir() if not is_temporary(file, FILES)} - own
    ):
        raise UsageError(
            f"{output} is {'not empty' if output.is_dir() else 'a file'}",
            why="it holds more than an exported model",
            fix="name a folder that does not exist yet: --output FOLDER",
        )


# ---------------------------------------------------------------------------------------------- what was trained


def _run(folder: Path, which: Which) -> _Trained:
    runs = collect([folder])
    if len(runs) > 1:
        raise UsageError(
            f"{folder} holds {len(runs)} runs",
            why="one model is exported at a time",
            fix=f"kdcache export {shlex.quote(str(runs[0].folder))}",
        )
    run = runs[0]
    if run.status != "complete":
        raise IncompleteError(
            f"{folder} is {run.status}",
            why="only what has been trained to its end is exported",
            fix="repeat the distill command that it was begun with" if run.status == "unfinished" else "export another run",
        )
    args, more = run.args, run.args.model_extra or {}
    size, names = _shape(run)
    known = Licences.model_validate(more.get("licences", {}))
    if more.get("init", "random") not in {"random", "target"}:  # start weights have licence terms of their own
        own = more.get("student_licence")
        both = None if own is None or known.weights is None else " and ".join(dict.fromkeys((known.weights, own)))
        known = known.model_copy(update={"weights": both})
    teacher = more.get("teacher_name", args.teacher)
    tau = "its own temperature" if args.own_temperature else f"tau {args.tau:g}"
    tau = "labels alone" if args.without_teacher else tau
    archives = args.archives or (args,)
    facts = {
        "student": code_span(args.student),
        "started from": markdown_escaped(_started(more)),
        "teacher": code_span(str(teacher)),
        "archive of its logits": ", ".join(f"{code_span(a.archive_name)}, digest `{a.archive_digest}`" for a in archives),
        "data": markdown_escaped(_dataset(args.dataset)),
        "method": f"{code_span(args.method_spec)}, {tau}",
        "control of the targets": code_span(args.control_spec),
        "seed": str(args.seed),
        "epochs": str(args.epochs),
        "optimiser": _optimiser({**more, **args.model_dump()}),
    }
    return _Trained(
        name=args.student,
        input_size=size,
        class_names=names,
        weights=run.folder / f"{which}.safetensors",
        licences=known,
        title=f"{args.student} distilled from {teacher} on {_dataset(args.dataset)}",
        facts=facts,
        scores=_scores(run.curves, which),
        tested=_tested(more, run.folder / "args.yaml"),
    )


def _shape(run: RunRecord) -> tuple[int, tuple[str, ...]]:
    """(input size, class names), from timm's configuration in the run's folder, or else from its archive."""
    if (run.folder / CONFIG).is_file():
        config = read_record(run.folder / CONFIG)
        try:
            names = config["label_names"] if "label_names" in config else config["id2label"].values()
            return int(config["pretrained_cfg"]["input_size"][-1]), tuple(map(str, names))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):
            raise IntegrityError(
                f"{run.folder / CONFIG} is damaged",
                why="it does not say the size of images and the names of classes",
                fix=f"set it aside; it is made anew where the archive is at hand: {set_aside(run.folder / CONFIG)}",
            ) from None
    again = _trained_again(run.folder)
    archived = (run.args.archives or (run.args,))[0]
    if is_url(archived.archive):
        raise NotFoundError(
            f"{run.folder} has no {CONFIG}, and says that its archive is at {archived.archive}",
            why="nothing is fetched because a record says so, which may be a stranger's",
            fix=f"restore {CONFIG} from a copy; or {again}",
        )
    try:
        archive = open_archive(archived.archive)
    except KdcacheError as error:
        raise NotFoundError(
            f"{run.folder} does not say what its model looks like",
            why=f"it has no {CONFIG}, and its archive is not at hand: {error.what}",
            fix=f"bring the archive to where it was; or {again}",
        ) from None
    if archive.digest != archived.archive_digest:  # views may have been appended since; what they are of stays
        manifest, more = archive.manifest, run.args.model_extra or {}
        known = more.get("teacher_name"), run.args.dataset
        there = manifest.teacher and manifest.teacher.name, manifest.provenance.get("dataset")
        if run.args.archives or archive.name != archived.archive_name or known != there:
            raise IncompatibleError(
                f"{run.folder} was trained from another archive than {archive.location} is now",
                why=f"it has no {CONFIG}, so that its archive says what its model looks like, and that one's digest has changed",
                fix=f"bring that archive to where it was; or {again}",
            )
    if archive.manifest.policy is None:
        raise NotFoundError(
            f"{run.folder} has no {CONFIG}",
            why="its archive tells no size of views",
            fix=f"restore {CONFIG} from a copy; or {again}",
        )
    return archive.manifest.policy.size, archive.class_names


def _teacher(folder: Path, which: Which) -> _Trained:
    record = read_teacher(folder)
    training = record["training"]
    curves = folder / "metrics.jsonl"
    try:
        rows = [dict(parse_json(line)) for line in curves.read_bytes().splitlines()] if curves.is_file() else []
    except (ValueError, TypeError):
        raise IntegrityError(
            f"{curves} is damaged",
            why="not all of its lines are JSON objects",
            fix=f"restore it from a copy; or {_trained_again(folder)}",
        ) from None
    columns = {key: np.array([row.get(key) for row in rows], np.float64) for key in dict.fromkeys(k for row in rows for k in row)}
    label = record.get("dataset_label") or record.get("dataset", "")
    facts = {
        "model": code_span(record["name"]),
        "started from": markdown_escaped(
            {"timm": "pretrained weights", "random": "random weights"}.get(start := training.get("start"), str(start))
        ),
        "data": markdown_escaped(label),
        **({"label smoothing": f"{training['smoothing']:g}"} if "smoothing" in training else {}),
        **({"seed": str(training["seed"])} if "seed" in training else {}),
        **({"epochs of the head alone": str(training["head_epochs"])} if "head_epochs" in training else {}),
        **({"epochs": str(training["epochs"])} if "epochs" in training else {}),
        **({"optimiser": _optimiser(training)} if "opt" in training else {}),
    }
    try:
        data = parse_dataset(record["dataset"]).licence
    except (KdcacheError, KeyError):  # the dataset's package is not installed
        data = None
    return _Trained(
        name=record["name"],
        input_size=record["input_size"],
        class_names=tuple(record["class_names"]),
        weights=folder / (WEIGHTS if which == "last" else f"{which}.safetensors"),
        licences=Licences(data=data, weights=record.get("weights_licence")),
        title=f"{record['name']} trained on {label}",
        facts=facts,
        scores=_scores(columns, which) or {"top-1": record["top1_clean"]},
        tested=_tested(record, folder / "teacher.json"),
        normalise=Normalisation(tuple(record["mean"]), tuple(record["std"])),
        weights_sha256=record["weights_sha256"] if which == "last" else None,
    )


def _tested(record: Mapping[str, Any], file: Path) -> TestViews:
    """How test images were shown; records of before, which say nothing of it, mean the whole images."""
    try:
        return TestViews.model_validate(record.get("test_views", WHOLE))
    except ValidationError as error:
        raise IntegrityError(
            f"{file} is damaged",
            why=f"test_views: {error.errors()[0]['msg']}",
            fix=f"restore it from a copy; or {_trained_again(file.parent)}",
        ) from None


def _scores(curves: Mapping[str, Any], which: Which) -> dict[str, float]:
    """Scores of the chosen weights on the clean test images, by their names in the card."""
    if not len(curves.get("test_top1", ())):
        return {}
    row = int(np.nanargmax(curves["test_top1"])) if which == "best" else -1
    columns = {"top-1": "test_top1", "top-5": "test_top5", "calibration error": "test_ece"}
    if which == "ema":
        columns = {"top-1": "ema_top1"}
    scores = {shown: float(curves[column][row]) for shown, column in columns.items() if column in curves}
    return {shown: value for shown, value in scores.items() if np.isfinite(value)}


def _dataset(spec: str) -> str:
    """The dataset's name with that of its folder or repository, without its path."""
    try:
        return dataset_label(parse_dataset(spec))
    except KdcacheError:
        return spec.partition(":")[0]


def _started(args: Mapping[str, Any]) -> str:
    init = str(args.get("init", "random"))
    known = {
        "random": "random weights",
        "pretrained": "its pretrained weights",
        "target": "one trained on this dataset from random weights",
        "finetuned": "one finetuned on this dataset",
    }
    digest = str(args.get("student_weights_sha256", ""))
    return known.get(init, "weights of a file") + (f", sha256 {digest[:16]}..." if digest else "")


def _optimiser(settings: Mapping[str, Any]) -> str:
    phrases = [
        code_span(str(settings["opt"])),
        f"learning rate {settings['lr']:g}",
        f"weight decay {settings['weight_decay']:g}",
        f"batches of {settings['batch_size']}",
        f"schedule {markdown_escaped(str(settings.get('sched', 'cosine')))}",
    ]
    if settings.get("clip_grad") is not None:
        phrases.append(f"gradients of a layer clipped at {settings['clip_grad']:g}")
    if settings.get("amp"):
        phrases.append("bf16 where that is safe, also when tested")
    if settings.get("model_ema_decay") is not None:
        phrases.append(f"averaged with decay {settings['model_ema_decay']:g}")
    return ", ".join(phrases)


# ---------------------------------------------------------------------------------------------- the card


def _card(trained: _Trained, model: nn.Module, which: Which, licences: Licences, repository: str | None) -> str:
    library = "transformers" if is_hf(model) else "timm"
    metadata = {
        "library_name": library,
        "pipeline_tag": "image-classification",
        **licence_fields([licences.data, licences.weights]),
        "tags": ["image-classification", library, "kdcache", "knowledge-distillation"],
    }
    facts = dict(trained.facts)
    facts["these are"] = _CHOSEN[which]
    for shown, value in trained.scores.items():
        facts[f"{shown}, clean test images"] = f"{value:.2f} %"
    facts["licence of the data"] = markdown_escaped(licences.data or "unknown")
    facts["licence of the weights that it comes from"] = markdown_escaped(licences.weights or "unknown")
    zoo = type(model).__module__ == "kdcache.models.cifar"
    size = trained.input_size
    lines = [
        "---",
        yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        "",
        f"# {markdown_escaped(trained.title)}",
        "",
        f"An image classifier of {len(trained.class_names):,} classes for {size} x {size} pixels, trained and exported with "
        "[kdcache](https://pypi.org/project/kdcache).",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in facts.items()),
        "",
        f"How it was tested: once over the dataset's test images ({trained.tested.title}, antialiased, at {size} px), cut from "
        f"copies that had been made square. `config.json` has timm show them so; where images are decoded or resized by "
        "another library, figures may differ a little."
        + (
            " The calibration error is the expected one, in 15 bins of equal width."
            if "calibration error" in trained.scores
            else ""
        ),
        "",
        "## Using it",
        "",
    ]
    if zoo:
        lines += [
            "The architecture is one of kdcache's, which timm knows once `kdcache.zoo` is imported: `pip install kdcache`.",
            "",
        ]
    lines += [
        "```python",
        *(_code_of_transformers(model, repository) if is_hf(model) else _code_of_timm(zoo, repository)),
        "```",
        "",
    ]
    return "\n".join(lines)


def _code_of_transformers(model: nn.Module, repository: str | None) -> list[str]:
    flipped = getattr(model, "pretrained_cfg", {}).get("channels") == "BGR"
    return [
        "import timm",
        "import torch",
        "from PIL import Image",
        "from transformers import AutoModelForImageClassification",
        "",
        f'model = AutoModelForImageClassification.from_pretrained("{repository or "FOLDER"}").eval()',
        'settings = {key: value for key, value in model.config.pretrained_cfg.items() if key != "channels"}',
        "transform = timm.data.create_transform(**settings, is_training=False)",
        'image = transform(Image.open("image.jpg").convert("RGB"))' + (".flip(0)  # blue comes first" if flipped else ""),
        "with torch.inference_mode():",
        "    logits = model(image.unsqueeze(0)).logits",
        "print(model.config.id2label[int(logits.argmax())])",
    ]


def _code_of_timm(zoo: bool, repository: str | None) -> list[str]:
    return [
        "import timm",
        "import torch",
        "from PIL import Image",
        *(["import kdcache.zoo  # has timm know the architecture"] if zoo else []),
        "",
        f'model = timm.create_model("{HUB + repository if repository else LOCAL + "FOLDER"}", pretrained=True).eval()',
        "settings = timm.data.resolve_model_data_config(model)",
        "transform = timm.data.create_transform(**settings, is_training=False)",
        'image = transform(Image.open("image.jpg").convert("RGB"))',
        "with torch.inference_mode():",
        "    logits = model(image.unsqueeze(0))",
        'print(model.pretrained_cfg["label_names"][int(logits.argmax())])',
    ]


# ---------------------------------------------------------------------------------------------- the Hub


def hub_repository(destination: str) -> str:
    """`ORG/NAME` from `hf://models/ORG/NAME` or `ORG/NAME`. Raises UsageError for anything else."""
    match = _HUB_MODEL.fullmatch(destination)
    if not match or destination.startswith("hf://datasets/"):
        raise UsageError(
            f"--push {destination!r} is no model on the Hub",
            why="a model goes to a repository of its own",
            fix="--push ORG/NAME or --push hf://models/ORG/NAME",
        )
    return match[1]


def require_known(exported: Export, folder: Path) -> None:
    """Raise UsageError unless the licences of the model's data and weights are known."""
    require_licences(exported.licences, str(folder), "a model is made of its data and of its teacher's weights")


def push_export(exported: Export, repository: str, *, private: bool = False, progress: Progress | None = None) -> None:
    """Push a model to the Hub in one commit, replacing an earlier export. Raises UsageError if other files are there."""
    from huggingface_hub import CommitOperationAdd, HfApi

    progress, api, url = progress or Silent(), HfApi(), f"hf://models/{repository}"
    with told_by_the_hub(url, "model"), quiet_hub():
        api.create_repo(repository, repo_type="model", private=private, exist_ok=True)
        foreign = sorted(set(api.list_repo_files(repository)) - FILES - OF_THE_HUB)
        if foreign:
            raise UsageError(
                f"{url} is not empty",
                why=f"it holds {foreign[0]!r}, which is no file of an exported model",
                fix="name a repository that does not exist yet",
            )
        additions = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=data) for name, data in exported.files.items()]
        api.create_commit(repository, additions, commit_message=f"{exported.name}, exported by kdcache", repo_type="model")
    progress.update(f"push {url}", exported.nbytes, exported.nbytes)

"""Trained models given away: folders and repositories that timm loads, and models of others as teachers and students."""

import json
import re
import shutil
import sys

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from kdcache.archive import open_archive, write_archive
from kdcache.cli import run
from kdcache.models.creation import create_model, load_weights
from kdcache.workspace import read_teacher
from tests.end_to_end.conftest import with_images
from tests.end_to_end.test_distill import only
from tests.hub import WritableHub
from tests.servers import Answer, FaultyServer

TERMS = ["--license", "data=cc-by-4.0,weights=mit"]
NETS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3, 2), nn.Linear(8, num_classes)

    def forward(self, x):
        return self.fc(self.conv(x).relu().mean((2, 3)))
"""
LOADED = """
import sys, timm, torch, safetensors.torch
images, logits = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)), {}
for folder in sys.argv[2:]:
    if "cifar" in folder:
        import kdcache.zoo
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.inference_mode():
        logits[folder] = model(images)
    print(timm.data.resolve_model_data_config(model, use_test_size=True), model.pretrained_cfg["label_names"])
safetensors.torch.save_file(logits, sys.argv[1])
"""


@pytest.fixture(scope="module")
def shop(few_trained, tmp_path_factory):
    """A workspace with finished runs of two students with averaged weights; only to be read."""
    home = tmp_path_factory.mktemp("shop")
    archive = only(few_trained, "archives/*")
    how = ["--model-ema-decay", "0.5", "--epochs", "2", "--batch-size", "40", "--lr", "0.01"]
    students = ["--student", "test_vit,cifar_resnet8"]
    assert run(["distill", *students, *how, "--archive", *with_images(archive), "--home", str(home)]) == 0
    return home


@pytest.fixture
def hub(monkeypatch, tmp_path):
    content = WritableHub("secret")
    with FaultyServer(content) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "secret")
        yield server, content


def own_logits(name, weights):
    """What a run's weights give, without config.json and export."""
    model, _ = create_model(name, 10, input_size=32)
    load_weights(model, weights)
    return logits_of(model.eval())


def logits_of(model):
    with torch.inference_mode():
        return model(torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)))


@pytest.mark.exhaustive
def test_timm_loads_what_was_exported_with_the_same_logits(shop, kdcache, tmp_path, run_python):
    kept = {("test_vit", "ema"): "last", ("cifar_resnet8", "best"): "ema", ("test_vit", "last"): "ema"}
    folders = {key: tmp_path / "-".join(key) for key in kept}
    for (student, which), folder in folders.items():
        options = [] if which == "last" else [f"--{which}"]
        result = kdcache("export", only(shop, f"runs/*/{student}--*"), *options, "--output", folder)
        assert result.status == 0, result.err
        assert result.out.strip() == str(folder)
        assert {file.name for file in folder.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    done = run_python(LOADED, tmp_path / "logits.safetensors", *folders.values())
    logits = load_file(tmp_path / "logits.safetensors")
    for ((student, which), folder), said in zip(folders.items(), done.stdout.splitlines(), strict=True):
        run = only(shop, f"runs/*/{student}--*")
        assert torch.equal(logits[str(folder)], own_logits(student, run / f"{which}.safetensors"))
        assert not torch.equal(logits[str(folder)], own_logits(student, run / f"{kept[student, which]}.safetensors"))
        crop_pct, interpolation = {"test_vit": (0.95, "bicubic"), "cifar_resnet8": (1.0, "bicubic")}[student]  # timm's
        shown = f"'crop_pct': {crop_pct}", "'crop_mode': 'center'", f"'interpolation': '{interpolation}'"
        assert all(words in said for words in ("32, 32", *shown, "'9']")), said
    run, folder = only(shop, "runs/*/test_vit--*"), folders["test_vit", "ema"]
    assert kdcache("export", run, "--output", folder).status == 0  # over an earlier one
    assert (folder / "model.safetensors").read_bytes() == (folders["test_vit", "last"] / "model.safetensors").read_bytes()


def test_the_card_says_what_the_model_is_and_how_it_was_tested(shop, kdcache, tmp_path):
    run = only(shop, "runs/*/cifar_resnet8--*")
    assert kdcache("export", run, "--home", tmp_path).status == 0
    text = (tmp_path / "exports" / run.name / "README.md").read_text()
    metadata = yaml.safe_load(text.split("---\n")[1])
    assert (metadata["library_name"], metadata["license"]) == ("timm", "unknown")
    args = yaml.safe_load((run / "args.yaml").read_text())
    last = [json.loads(line) for line in (run / "metrics.jsonl").open()][-1]
    for words in (
        f"| top-1, clean test images | {last['test_top1']:.2f} % |",
        f"| top-5, clean test images | {last['test_top5']:.2f} % |",
        f"| calibration error, clean test images | {last['test_ece']:.2f} % |",
        args["archive_digest"],
        f"`{args['archive_name']}`",
        "| teacher | `test_vit` |",
        "| method | `kd`, tau 1 |",
        "| control of the targets | `none` |",
        "| epochs | 2 |",
        "learning rate 0.01",
        "batches of 40",
        "averaged with decay 0.5",
        "import kdcache.zoo",
    ):
        assert words in text, words
    assert str(shop) not in text + (tmp_path / "exports" / run.name / "config.json").read_text()
    assert str(args["archive"]) not in text


def test_the_cards_snippet_runs_as_it_stands(shop, tmp_path, monkeypatch, capsys):
    assert run(["export", str(only(shop, "runs/*/cifar_resnet8--*")), "--output", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    [snippet] = re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)
    Image.new("L", (40, 30), 99).save(tmp_path / "image.jpg")
    monkeypatch.chdir(tmp_path)
    exec(snippet.replace("local-dir:FOLDER", "local-dir:out"), {})
    assert capsys.readouterr().out.strip() in set("0123456789")


@pytest.mark.exhaustive
def test_a_teacher_is_exported_too_and_becomes_a_teacher_and_a_student_elsewhere(trained, kdcache, tmp_path):
    teacher = only(trained, "teachers/*")
    folder = tmp_path / "secret place" / "given"
    assert kdcache("export", teacher, *TERMS, "--output", folder).status == 0
    text = (folder / "README.md").read_text()
    assert f"| top-1, clean test images | {read_teacher(teacher)['top1_clean']:.2f} % |" in text
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(logits_of(model), own_logits("test_vit", teacher / "model.safetensors"))

    home, reference = tmp_path / "home", f"local-dir:{folder}"
    common = ["--teacher", reference, "--dataset", "digits", "--home", home]
    first = kdcache("train-teacher", *common, "--pretrained", "--epochs", "1")
    assert first.status == 0, first.err
    assert "local-dir:given@" in first.err
    assert "licence cc-by-4.0 and mit" in first.err
    dumped = kdcache("dump-teacher", *common, "--views", "1", "--no-finetune")
    assert dumped.status == 0, dumped.err
    assert "licence cc-by-4.0 and mit" in dumped.err
    archive = open_archive(dumped.out.strip())
    assert archive.path.name.startswith("digits--local-dir-given--")
    card = archive.manifest.teacher
    assert card.alias == "local-dir:given"
    assert card.name.startswith("local-dir:given@")
    assert card.weights_licence == "cc-by-4.0 and mit"

    student = ["distill", "--student", f"cifar_resnet8,{reference}", "--epochs", "1", "--batch-size", "719", "--home", home]
    assert "2 students" in kdcache(*student, "--dry-run").err
    result = kdcache("distill", "--student", reference, "--init", "pretrained,random", *student[3:])
    assert result.status == 0, result.err
    starts = {yaml.safe_load(file.read_text()).get("init", "random"): file.parent for file in home.glob("runs/*/*/args.yaml")}
    pretrained = yaml.safe_load((starts["pretrained"] / "args.yaml").read_text())
    assert pretrained["student"] == card.name
    assert pretrained["student_licence"] == "cc-by-4.0 and mit"
    assert pretrained["student_weights_sha256"] == read_teacher(teacher)["weights_sha256"]
    assert (
        yaml.safe_load((starts["random"] / "args.yaml").read_text())["student_weights_sha256"]
        != pretrained["student_weights_sha256"]
    )

    sent = tmp_path / "sent"
    assert kdcache("push", archive.path, sent, *TERMS).status == 0
    for file in sent.iterdir():
        if file.is_file():
            assert "secret place" not in file.read_text("utf-8", "replace")

    # Other weights in the folder are another teacher, and other students; and what was made of the old ones goes on to work.
    state = {key: value * 2 for key, value in load_file(folder / "model.safetensors").items()}
    save_file(state, folder / "model.safetensors")
    again = kdcache("dump-teacher", *common, "--views", "1", "--no-finetune")
    assert again.status == 3
    assert "0 of them trained already" in kdcache("distill", "--student", reference, *student[3:], "--dry-run").err
    for file in folder.iterdir():
        file.unlink()
    assert kdcache("export", starts["pretrained"], *TERMS, "--output", tmp_path / "again").status == 0
    assert kdcache("verify", archive.path, "--replay", "1", "--home", home).status == 0


def test_a_function_of_ones_own_makes_teachers_and_students(kdcache, tmp_path, monkeypatch):
    (tmp_path / "my_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    teacher = ["--teacher", "my_nets:Net", "--dataset", "digits", "--home", tmp_path]
    assert kdcache("train-teacher", *teacher, "--epochs", "1").status == 0
    dumped = kdcache("dump-teacher", *teacher, "--views", "1", "--precision", "bf16")
    assert dumped.status == 0, dumped.err
    noise = open_archive(dumped.out.strip()).manifest.teacher.noise
    assert 0 < noise.max_logit_difference < 0.05
    student = ["distill", "--student", "my_nets:Net", "--epochs", "1", "--batch-size", "719", "--home", tmp_path]
    result = kdcache(*student)
    assert result.status == 0, result.err
    assert "inputs normalised as ImageNet's" in result.err
    assert kdcache(*student, "--init", "pretrained").status == 2
    run = only(tmp_path, "runs/*/my_nets-Net--*")
    refused = kdcache("export", run)
    assert refused.status == 5
    assert "made by the function my_nets:Net" in refused.err
    monkeypatch.delitem(sys.modules, "my_nets")


def test_a_pushed_model_is_loaded_from_the_hub(shop, hub, kdcache, tmp_path):
    _, content = hub
    run, out = only(shop, "runs/*/test_vit--*"), tmp_path / "out"
    unknown = kdcache("export", run, "--push", "team/student", "--output", out)
    assert unknown.status == 2
    assert "--license data=NAME,weights=NAME" in unknown.err
    assert not out.exists()
    assert not content.repos
    tried = kdcache("export", run, "--push", "team/student", *TERMS, "--output", out, "--dry-run")
    assert "hf://models/team/student" in tried.out
    assert not out.exists()
    assert not content.repos
    result = kdcache("export", run, "--push", "hf://models/team/student", *TERMS, "--private", "--output", out)
    assert result.status == 0, result.err
    assert content.private == {"team/student": True}
    sent = content.repos["team/student"]["main"]
    assert {name: data for name, data in sent.items() if name != ".gitattributes"} == {
        file.name: file.read_bytes() for file in out.iterdir()
    }
    assert 'timm.create_model("hf-hub:team/student"' in sent["README.md"].decode()
    assert yaml.safe_load(sent["README.md"].decode().split("---\n")[1])["license"] == ["cc-by-4.0", "mit"]
    model = timm.create_model("hf-hub:team/student", pretrained=True).eval()
    assert torch.equal(logits_of(model), own_logits("test_vit", run / "last.safetensors"))

    how = ["--init", "pretrained", "--epochs", "1", "--batch-size", "80", "--data-dir", shop / "data", "--home", tmp_path]
    source = yaml.safe_load((run / "args.yaml").read_text())["archive"]
    result = kdcache("distill", "--student", "hf-hub:team/student", *how, "--archive", source)
    assert result.status == 0, result.err
    args = yaml.safe_load((only(tmp_path, "runs/*/hf-hub-team-student-pretrained--*") / "args.yaml").read_text())
    assert re.fullmatch("hf-hub:team/student@[0-9a-f]{40}", args["student"])
    assert args["student"] in result.err
    assert args["student_licence"] == "cc-by-4.0 and mit"
    assert args["student_weights_sha256"][:12] in result.err

    content.repos["team/student"]["main"]["notes.txt"] = b"mine"
    other = kdcache("export", run, "--push", "team/student", *TERMS, "--output", out)
    assert other.status == 2
    assert "notes.txt" in other.err


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["nowhere"], 3, "nowhere"),
        (["runs"], 2, "holds 2 runs"),
        (["RUN", "--best", "--ema"], 2, "use --best"),
        (["RUN", "--push", "student"], 2, "hf://models/ORG/NAME"),
        (["RUN", "--push", "hf://datasets/team/student"], 2, "hf://models/ORG/NAME"),
        (["RUN", "--license", "mit"], 2, "--license"),
        (["RUN", "--output", "."], 2, "is not empty"),
    ],
)
def test_exports_that_cannot_be_are_refused(shop, kdcache, monkeypatch, arguments, status, words):
    monkeypatch.chdir(shop)
    run = only(shop, "runs/*/test_vit--*")
    result = kdcache("export", *(run if word == "RUN" else word for word in arguments), "--home", shop)
    assert result.status == status, result.err
    assert words in result.err
    assert [line.partition(":")[0] for line in result.err.splitlines()[-3:]] == ["error", "why", "fix"]


@pytest.mark.parametrize("field", ["archive", "student"])
def test_a_run_of_a_stranger_has_nothing_fetched(shop, kdcache, tmp_path, monkeypatch, field):
    """What its record names may be anybody's server; the command that the fix tells of is the user's own."""
    run, fetched = tmp_path / "run", []

    def content(request):
        fetched.append(request.path)
        return Answer(404)

    with FaultyServer(content) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        shutil.copytree(only(shop, "runs/*/test_vit--*"), run)
        (run / "config.json").unlink()
        args = yaml.safe_load((run / "args.yaml").read_text())
        args[field] = f"{server.url}/archive" if field == "archive" else "hf-hub:evil/model@main"
        (run / "args.yaml").write_text(yaml.safe_dump(args))
        result = kdcache("export", run, "--output", tmp_path / "out")
    assert result.status == 3
    assert "may be a stranger's" in result.err
    assert not fetched
    if field == "student":
        assert "hf download evil/model config.json --revision main" in result.err
        commit = tmp_path / "cache/models--evil--model/snapshots/0123456789012345678901234567890123456789"
        commit.mkdir(parents=True)  # as that command leaves it
        shutil.copy(only(shop, "runs/*/test_vit--*") / "config.json", commit)
        args[field] = f"hf-hub:evil/model@{commit.name}"
        (run / "args.yaml").write_text(yaml.safe_dump(args))
        assert kdcache("export", run, "--output", tmp_path / "out").status == 0


def test_only_whole_runs_are_exported(shop, kdcache, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for file in only(shop, "runs/*/test_vit--*").iterdir():
        (run / file.name).write_bytes(file.read_bytes())
    (run / "config.json").unlink()  # of runs from before it was kept: the archive says the same
    assert kdcache("export", run, "--output", tmp_path / "out").status == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["label_names"] == list("0123456789")
    args = (run / "args.yaml").read_text()
    write_archive(tmp_path / "other", np.zeros((1, 8, 10)), [f"{number}" for number in range(9, -1, -1)])
    archive = next(line for line in args.splitlines() if line.startswith("archive: "))
    (run / "args.yaml").write_text(args.replace(archive, f"archive: {tmp_path / 'other'}"))
    other = kdcache("export", run, "--output", tmp_path / "other-out")
    assert other.status == 5, other.err
    assert "was trained from another archive than" in other.err
    (run / "args.yaml").write_text(args.replace("student: test_vit", "student: hf-hub:stranger/net"))
    fetching = kdcache("export", run, "--output", tmp_path / "other-out")
    assert fetching.status == 3
    assert "says that its model is hf-hub:stranger/net" in fetching.err
    (run / "args.yaml").write_text(args)
    (run / "ema.safetensors").unlink()
    assert kdcache("export", run, "--ema").status == 3
    (run / "best.safetensors").write_bytes((run / "best.safetensors").read_bytes()[:-1])
    assert kdcache("export", run, "--best").status == 4
    (run / "summary.json").unlink()
    unfinished = kdcache("export", run)
    assert unfinished.status == 6
    assert "is unfinished" in unfinished.err

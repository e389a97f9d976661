"""Models, datasets, students and views that are refused: what the fix of each error says is done, and all goes well."""

import hashlib
import importlib
import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tarfile
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision.datasets
from PIL import Image
from safetensors.torch import load_file

from kdcache.cli import run
from kdcache.datasets import SPLITS, fetching
from kdcache.datasets.canvas import Canvas, load_canvas
from kdcache.datasets.labels import label_numbers
from kdcache.datasets.naming import find_source
from kdcache.models.classes import Outputs, imagenet, read_classes
from kdcache.models.creation import create_model, load_weights, require_weights, weights_digest
from kdcache.models.heads import select_rows, zero_head
from kdcache.models.names import kept, resolve
from kdcache.models.zeroshot import zero_shot
from kdcache.replay.check import replay
from kdcache.replay.subject import Subject
from kdcache.students.config import Grid
from kdcache.students.grid import plan_students
from kdcache.system.progress import Silent
from kdcache.training.checkpoint import read_checkpoint, write_checkpoint
from kdcache.training.config import HowTested
from kdcache.training.tested import model_filter, views_of_tests
from kdcache.views import ViewPolicy
from kdcache.workspace import Workspace
from tests import miniatures
from tests.conftest import save_folder
from tests.end_to_end.conftest import Outcome
from tests.following import followed, followed_by_command, says, typed
from tests.hub import WritableHub
from tests.servers import Answer, Fault, FaultyServer
from tests.torch_miniatures import MINIATURES as TORCH
from tests.weights import save_weights


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# ---------------------------------------------------------------- datasets


def read(spec: str, *, fetch: bool = True) -> int:
    images = find_source(spec).open(Path("data"), fetch=fetch)
    assert len(images.class_names()) >= 2
    return sum(len(images.samples(split)) for split in SPLITS)


@pytest.fixture
def textures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    """A server with torchvision's DTD in small, in the place of the real one."""
    TORCH["dtd"](tmp_path / "made")
    (tmp_path / "served").mkdir()
    with tarfile.open(tmp_path / "served/dtd.tar.gz", "w:gz", compresslevel=0) as tar:
        tar.add(tmp_path / "made/dtd/dtd", "dtd")
    with FaultyServer(tmp_path / "served") as server:
        monkeypatch.setattr(torchvision.datasets.DTD, "_URL", f"{server.url}/dtd.tar.gz")
        monkeypatch.setattr(torchvision.datasets.DTD, "_MD5", None)
        yield server


def by_hand(fix: str, made: Path = Path("made")) -> None:
    """Put a set's files where the fix says."""
    shutil.copytree(made, fix.partition("put its files into ")[2].partition(" by hand")[0], dirs_exist_ok=True)


def test_a_set_that_is_not_there_is_fetched_by_the_command_of_the_fix(textures: FaultyServer) -> None:
    def mend(fix: str) -> str:
        assert run(shlex.split(fix)[1:]) == 0
        return "torch/dtd"

    assert followed(lambda spec: read(spec, fetch=False), "torch/dtd", mend) > 3


def test_a_set_whose_server_is_away_is_fetched_later_or_by_hand(textures: FaultyServer) -> None:
    textures.faults["dtd.tar.gz"] = Fault(status=503)

    def later(fix: str) -> str:
        assert fix.startswith("repeat the command when its server can be reached")
        textures.faults.clear()
        return "torch/dtd"

    assert followed(read, "torch/dtd", later) > 3
    Path("data").rename("elsewhere")
    textures.faults["dtd.tar.gz"] = Fault(reset=True)
    assert followed(read, "torch/dtd", lambda fix: by_hand(fix) or "torch/dtd") > 3


def test_a_set_that_has_moved_is_found_by_another_torchvision_or_got_by_hand(
    textures: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = torchvision.datasets.DTD._URL
    monkeypatch.setattr(torchvision.datasets.DTD, "_URL", f"{textures.url}/gone.tar.gz")

    def upgrade() -> None:
        monkeypatch.setattr(torchvision.datasets.DTD, "_URL", address)

    assert followed(read, "torch/dtd", lambda fix: by_hand(fix) or "torch/dtd") > 3
    Path("data").rename("elsewhere")
    assert followed(read, "torch/dtd", says("upgrade torchvision, which may know where it is now", "torch/dtd", upgrade)) > 3


def test_a_set_that_takes_another_package_is_got_with_it_or_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    TORCH["pcam"](Path("made"))
    monkeypatch.setitem(sys.modules, "gdown", None)
    assert followed(read, "torch/pcam", lambda fix: by_hand(fix) or "torch/pcam") > 3


def test_a_set_that_torchvision_lacks_is_there_in_a_newer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    TORCH["mnist"](Path("files"))
    kind = torchvision.datasets.MNIST
    monkeypatch.delattr(torchvision.datasets, "MNIST")

    def upgraded() -> None:
        monkeypatch.setattr(torchvision.datasets, "MNIST", kind, raising=False)

    mend = says("pip install --upgrade torchvision", "torch/mnist,root=files", upgraded)
    assert followed(read, "torch/mnist,root=files", mend) > 3


TORN: dict[str, Callable[[Path], object]] = {  # sets of which a class is missing somewhere
    "country211": lambda place: shutil.rmtree(place / "country211/test/AE"),
    "stl10": lambda place: (place / "stl10_binary/class_names.txt").write_text("airplane\nbird\n"),
}


@pytest.mark.parametrize("name", TORN)
def test_sets_that_lack_a_class_are_set_aside_and_got_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets.STL10, "_check_integrity", lambda self: True)  # they are smaller than the real ones
    TORCH[name](Path("whole"))
    shutil.copytree("whole", f"data/torch/{name}")
    TORN[name](Path(f"data/torch/{name}"))

    def mend(fix: str) -> str:
        typed(fix, "mv")
        shutil.copytree("whole", f"data/torch/{name}", dirs_exist_ok=True)  # they cannot be fetched here
        return f"torch/{name}"

    assert followed(read, f"torch/{name}", mend) > 3


def test_images_that_change_while_they_are_decoded_are_decoded_when_nothing_writes_to_them() -> None:
    for split in SPLITS:
        for name in ("cat", "dog"):
            miniatures.save(Path(f"f/{split}/{name}/0.jpg"))

    class Writing(Silent):
        """Another program, which replaces an image as soon as the first one was decoded."""

        def update(self, *_: Any, **__: Any) -> None:
            miniatures.save(Path("f/train/dog/0.jpg"), (30, 31))

    def build(progress: Silent) -> Canvas:
        return load_canvas(find_source("folder:f"), "train", 8, Path("canvases"), progress)

    assert len(followed(build, Writing(), says("wait until nothing writes to them, and repeat", Silent()))) == 2


def test_what_was_fetched_in_another_layout_is_laid_out_by_hand(tmp_path: Path) -> None:
    (tmp_path / "served").mkdir()
    miniatures.save(Path("pictures/1.jpg"))
    with tarfile.open("served/a.tar", "w") as tar:
        tar.add("pictures")
    with FaultyServer(tmp_path / "served") as server:
        md5 = hashlib.md5(Path("served/a.tar").read_bytes()).hexdigest()
        downloads = [fetching.Download(f"{server.url}/a.tar", md5, 1)]

        def find(_: None) -> Path:
            finder = fetching.first_with("images")
            return fetching.find_or_fetch("ours", "", Path("data"), finder, "images/", downloads, "tars:ROOT", None, True)

        def mend(fix: str) -> None:
            place, layout = re.findall(r"look into (\S+), and lay it out there as (\S+);", fix)[0]
            (Path(place) / "pictures").rename(Path(place) / layout)

        assert (followed(find, None, mend) / "images/1.jpg").is_file()


def test_a_dataset_of_the_hub_is_fetched_when_it_can_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    miniatures.hub(Path("h"))
    usual = datasets.load_dataset

    def unreached(*_: Any, **__: Any) -> Any:
        raise ConnectionError("the Hub is away")

    def reached(_: str, *rest: Any, **options: Any) -> Any:
        return usual("h", *rest, **options)

    monkeypatch.setattr(datasets, "load_dataset", unreached)
    mend = says("when the Hub can be reached", "hf:our/h", lambda: monkeypatch.setattr(datasets, "load_dataset", reached))
    assert followed(read, "hf:our/h", mend) == 11


def test_damaged_files_in_the_form_of_the_hub_are_restored() -> None:
    miniatures.hub(Path("h"))
    file = Path("h/data/test-00000-of-00001.parquet")
    whole = file.read_bytes()
    file.write_bytes(whole[:200] + whole[400:])

    def restore(fix: str) -> str:
        assert fix == "restore its files from a copy, or write them anew"
        file.write_bytes(whole)
        return "hf:h"

    assert followed(read, "hf:h", restore) == 11


def test_a_number_that_is_no_class_is_corrected() -> None:
    assert followed(lambda labels: label_numbers(labels, "abc", "label"), [0, 2**70], says("correct it", [0, 2])) == [0, 2]


# ---------------------------------------------------------------- models

SIDE = {"height": 32, "width": 32}
LABELS = ["hat", "shoe", "trousers", "dress", "sock"]


def edit(folder: str, **settings: Any) -> None:
    file = Path(folder, "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def made(name: str, classes: int = 5, size: int = 32, **options: Any) -> torch.nn.Module:
    """A model by the name that is typed."""
    return create_model(resolve(name), classes, input_size=size, **options)[0]


def timm_model(folder: str | Path, classes: int = 5) -> str:
    """A folder with a small model as timm writes it."""
    model = timm.create_model("test_vit", num_classes=classes, img_size=32)
    Path(folder).mkdir()
    save_weights(model, Path(folder, "model.safetensors"))
    stated = {"num_classes": classes, "input_size": [3, 32, 32], "fixed_input_size": True, "crop_pct": 1.0, "crop_mode": "center"}
    config = {
        "architecture": "test_vit",
        "num_classes": classes,
        "pretrained_cfg": stated | {"interpolation": "bicubic", "classifier": "head"},
    }
    Path(folder, "config.json").write_text(json.dumps(config))
    return f"local-dir:{folder}"


def hf_model(folder: str | Path, model: Any = None, *parts: Any) -> str:
    """A folder with a small model as transformers writes it."""
    from tests.test_hf import saved, vit

    saved(vit() if model is None else model, Path(folder))
    for part in parts:
        part.save_pretrained(folder)
    return f"local-dir:{folder}"


def test_configurations_of_other_weights_are_corrected() -> None:
    again = "correct its config.json"
    timm_model("t")
    edit("t", architecture="test_vit2")

    def pretrained(name: str) -> Any:
        return made(name, pretrained=True)

    assert followed(pretrained, "local-dir:t", says(again, "local-dir:t", lambda: edit("t", architecture="test_vit")))
    edit("t", architecture="test_resnet")
    assert followed(pretrained, "local-dir:t", says(again, "local-dir:t", lambda: edit("t", architecture="test_vit")))
    hf_model("h")
    layers = says(again, "local-dir:h", lambda: edit("h", num_hidden_layers=1))
    edit("h", num_hidden_layers=2)
    assert followed(pretrained, "local-dir:h", layers)
    edit("h", model_type="none such")
    assert followed(pretrained, "local-dir:h", says(again, "local-dir:h", lambda: edit("h", model_type="vit")))


def test_processors_that_mix_colours_are_left_to_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    hf_model("h", None, transformers.ViTImageProcessor(size=SIDE))
    file = Path("h/preprocessor_config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rescale_factor": 1e-12}))
    monkeypatch.syspath_prepend(".")

    def mend(fix: str) -> str:
        assert "or a function that makes this one and does the rest in its forward: package.module:function" in fix
        source = """
            import transformers
            class Own(transformers.ViTForImageClassification):
                def forward(self, x):
                    return super().forward(x.mean(1, keepdim=True).expand(-1, 3, -1, -1)).logits
            def make(num_classes):
                return Own.from_pretrained("h", num_labels=num_classes)
        """
        Path("grey.py").write_text(textwrap.dedent(source))
        return "grey:make"

    assert followed(made, "local-dir:h", mend)
    sys.modules.pop("grey", None)


def test_models_are_made_for_sizes_and_classes_that_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_size(fix: str) -> int:
        return int(re.findall(r"--size (\d+)", fix)[0])

    hf_model("h")
    assert followed(lambda size: made("local-dir:h", size=size), 48, of_size)
    assert followed(lambda size: made("test_vit", size=size), 37, of_size)
    monkeypatch.syspath_prepend(".")
    wrong = {  # what a function makes, and what the fix says that it is to make
        "nn.Sequential(nn.Flatten(), nn.Linear(3072, 7))": "logits [B, num_classes]",
        "nn.Conv2d(3, num_classes, 3)": "logits [B, num_classes]",
        "(nn.Flatten(), num_classes)": "return the module itself",
        "tied(num_classes)": "tensor.clone()",
    }
    begin = """
        from torch import nn
        def tied(num_classes):
            model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 9), nn.Linear(9, 9), nn.Linear(9, 9), nn.Linear(9, num_classes))
            model[2].weight = model[3].weight
            return model
        def make(num_classes):
            return """

    def write(what: str) -> str:
        Path("ours.py").write_text(textwrap.dedent(begin) + what + "\n")
        sys.modules.pop("ours", None)
        importlib.invalidate_caches()
        return "ours:make"

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    good = "nn.Sequential(nn.Flatten(), nn.Linear(3072, num_classes))"
    for what, fix in wrong.items():
        mend = says(fix)
        assert followed(lambda name: made(name, 5), write(what), lambda told, mend=mend: mend(told) or write(good))
    sys.modules.pop("ours", None)


def test_models_without_published_weights_start_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(options: dict[str, Any]) -> Any:
        return made(options.pop("name"), **options)

    published = {"name": "cifar_resnet8", "pretrained": True}
    assert followed(
        start, published, says("--from-scratch or --checkpoint FILE, or use another model", {"name": "cifar_resnet8"})
    )
    Path("own_net.py").write_text(
        "from torch import nn\ndef make(num_classes): return nn.Sequential(nn.Flatten(), nn.Linear(3072, num_classes))\n"
    )
    monkeypatch.syspath_prepend(".")
    assert followed(start, {"name": "own_net:make", "pretrained": True}, says("leave the option out", {"name": "own_net:make"}))
    sys.modules.pop("own_net", None)


def test_weights_are_written_as_the_fix_says() -> None:
    model = timm.create_model("test_vit", num_classes=5, img_size=32)
    whole = {key: value.clone() for key, value in model.state_dict().items()}

    def load(file: str) -> bool:
        fresh = timm.create_model("test_vit", num_classes=5, img_size=32)
        load_weights(fresh, Path(file))
        return weights_digest(fresh) == weights_digest(model)

    def written(fix: str) -> str:
        exec(fix.rpartition(": ")[2].replace("FILE", "'plain.pt'"), {"torch": torch, "model": model})
        return "plain.pt"

    torch.save(whole | {"head.weight": whole["head.weight"].to(torch.complex64)}, "complex.pt")
    assert followed(load, "complex.pt", written)
    torch.save(whole | {"head.weight": torch.full_like(whole["head.weight"], torch.nan)}, "epoch-9.pt")
    torch.save(whole, "epoch-8.pt")
    assert followed(load, "epoch-9.pt", says("such as those of an earlier epoch", "epoch-8.pt"))
    other = timm.create_model("test_vit", num_classes=7, img_size=32)
    torch.save(other.state_dict(), "of_others.pt")
    assert followed(load, "of_others.pt", says("use a teacher of this dataset", "plain.pt"))


def test_weights_of_another_record_are_restored() -> None:
    model = timm.create_model("test_vit", num_classes=5, img_size=32)
    sha = weights_digest(model)
    save_weights(model, Path("copy.safetensors"))
    save_weights(timm.create_model("test_vit", num_classes=5, img_size=32), Path("model.safetensors"))

    def load(file: Path) -> bool:
        fresh = timm.create_model("test_vit", num_classes=5, img_size=32)
        load_weights(fresh, file)
        require_weights(fresh, sha, file)
        return True

    file = Path("model.safetensors")
    assert followed(load, file, says("restore the file", file, lambda: shutil.copy("copy.safetensors", file)))


def test_outputs_are_given_by_number_where_names_do_not_tell_them() -> None:
    def output(content: dict[str, Any], known: Outputs | None = None) -> int:
        Path("classes.json").write_text(json.dumps(content))
        return read_classes(Path("classes.json"), ["cat", "dog"]).resolved(known, 1000, Path("classes.json"))["cat"]

    assert followed(output, {"cat": "tabby"}, lambda fix: {"cat": int(re.findall(r"from 0 to (\d+)", fix)[0])}) == 999
    assert followed(output, {"wolverine": 3}, says("correct the name", {"cat": 3})) == 3
    known = imagenet(1000)

    def number(fix: str) -> dict[str, Any]:
        return {"cat": int(re.findall(r"give its number, such as (\d+)", fix)[0])}

    assert followed(lambda content: output(content, known), {"cat": "crane"}, number) in {134, 517}  # the bird, the machine


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[WritableHub, FaultyServer]]:
    """A Hub with models of timm, of transformers, and CLIP; one for all tests, as clients remember where it is."""
    from tests.test_hf import clip

    content, base = WritableHub("secret"), tmp_path_factory.mktemp("hub")
    made = {"timm/net": timm_model(base / "timm"), "our/net": hf_model(base / "net"), "our/clip": hf_model(base / "clip", clip())}
    tokenizer().save_pretrained(base / "clip")
    for repo, name in made.items():
        files = Path(name.removeprefix("local-dir:")).iterdir()
        content.repos[repo] = {"main": {file.name: file.read_bytes() for file in files}}
    content.repos["our/data"] = {"main": {"README.md": b"no model"}}
    with FaultyServer(content) as server, pytest.MonkeyPatch.context() as patch:
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        patch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        patch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        patch.setattr("huggingface_hub.hf_api.api.endpoint", server.url)
        yield content, server


@pytest.fixture
def hub(
    site: tuple[WritableHub, FaultyServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[WritableHub, FaultyServer]:
    """Of which nothing was fetched before."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "secret")
    return site


def tokenizer() -> Any:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", "a", "photo", "of", "cat", "dog", "."])}
    split = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    split.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=split, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


HUB_NAMES: dict[str, tuple[str, str, str]] = {  # what was typed, the fix's words, and what is typed then
    "no name": ("hf-hub:our/net/", "hf-hub:ORG/NAME[@REVISION]", "hf-hub:our/net"),
    "no such model": ("hf-hub:our/nett", "correct its name", "hf-hub:our/net"),
    "no such revision": ("hf-hub:our/net@v2", "correct what follows @", "hf-hub:our/net@main"),
    "no model": ("hf-hub:our/data", "choose a model of timm's: hf-hub:timm/...", "hf-hub:timm/net"),
}


def test_names_on_the_hub_are_corrected_as_the_fix_says(hub: tuple[WritableHub, FaultyServer]) -> None:
    for wrong, words, right in HUB_NAMES.values():
        assert followed(made, wrong, says(words, right))


def test_an_account_that_may_read_a_model_is_logged_in(
    hub: tuple[WritableHub, FaultyServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "another")

    def mend(fix: str) -> str:
        monkeypatch.setenv(re.findall(r"set (HF_TOKEN)", fix)[0], "secret")
        return "hf-hub:our/net"

    assert followed(made, "hf-hub:our/net", mend)


def test_a_hub_that_is_away_is_asked_again(hub: tuple[WritableHub, FaultyServer]) -> None:
    _, server = hub
    usual = server.content

    def away(only: str) -> None:
        server.content = lambda request: Answer(520) if re.search(only, request.path) else usual(request)

    def back() -> None:
        server.content = usual

    mend = says("when the Hub can be reached", None, back)
    for repo in ("timm/net", "our/net"):
        away(".*")
        assert followed(lambda name: made(name), f"hf-hub:{repo}", lambda fix, repo=repo: mend(fix) or f"hf-hub:{repo}")
    for repo in ("timm/net", "our/net"):
        name = resolve(f"hf-hub:{repo}")
        away("safetensors")
        assert followed(lambda name: made(name, pretrained=True), name, lambda fix, name=name: mend(fix) or name)


def test_zero_shot_teachers_are_made_of_two_towers(hub: tuple[WritableHub, FaultyServer]) -> None:
    def teacher(given: tuple[str, str]) -> Any:
        return zero_shot(given[0], ["cat", "dog"], templates=(given[1],))

    right = ("hf-hub:our/clip", "a photo of a {}.")
    assert followed(teacher, ("our/clip", right[1]), lambda fix: (fix.removeprefix("write "), right[1]))
    assert followed(teacher, (right[0], "a photo"), lambda fix: (right[0], fix.strip("'")))
    assert followed(teacher, ("hf-hub:our/net", right[1]), says("name a CLIP or SigLIP model of transformers", right))


def test_configurations_that_a_folder_lacks_are_restored_or_fetched_by_the_command_of_the_fix(
    hub: tuple[WritableHub, FaultyServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, server = hub
    folder = Path("teacher")
    timm_model(folder)
    config = (folder / "config.json").rename("copy.json")

    def remake(name: str) -> Any:
        return create_model(kept(name, folder), 5, input_size=32)[0]

    def restored() -> None:
        shutil.copy(config, folder / "config.json")

    assert followed(remake, "local-dir:/elsewhere@0123456789ab", says("restore config.json from a copy", "", restored))
    assert remake("hf-hub:our/net@main")
    (folder / "config.json").unlink()

    def fetched(fix: str) -> str:
        found = shlex.split(fix.partition("fetch that of the Hub: ")[2])
        program = Path(sys.executable).with_name(found[0])
        environment = os.environ | {"HF_ENDPOINT": server.url, "HF_HUB_CACHE": str(Path("cache").resolve())}
        subprocess.run([program, *found[1:]], check=True, env=environment, capture_output=True)
        return "hf-hub:our/net@main"

    assert followed(remake, "hf-hub:our/net@main", fetched)


# ---------------------------------------------------------------- what pretrained models say of their tests


def test_views_that_cannot_be_drawn_are_shown_as_the_fix_says() -> None:
    timm_model("net")
    name = "local-dir:net"

    def settings(**changes: Any) -> None:
        stated = json.loads(Path("net/config.json").read_text())["pretrained_cfg"]
        edit("net", pretrained_cfg=stated | changes)

    def tests(options: list[str]) -> Any:
        given = dict(zip((name.removeprefix("--").replace("-", "_") for name in options[::2]), options[1::2], strict=True))
        return views_of_tests(HowTested(**{"test_policy": "model"} | given), name, 32)

    def options(fix: str) -> list[str]:
        return fix.partition("(or distill) ")[2].split()

    settings(interpolation="nearest")
    assert followed(tests, [], options).policy.filter == "bicubic"

    def filters(policy: str) -> Any:
        draft = ViewPolicy.draft(policy, size=32)
        return draft.settled(model_filter(name, 32)) if draft.filter == "auto" else draft

    assert followed(filters, "imagenet", lambda fix: fix.partition("--policy ")[2]).filter == "bicubic"
    settings(interpolation="bicubic", crop_mode="border")
    assert followed(tests, [], options).origin == "eval"


def test_a_checkpoint_that_is_damaged_is_moved_aside_by_the_command_of_the_fix() -> None:
    Path("run").mkdir()
    write_checkpoint(Path("run"), {"epoch": 1}, {}, [])
    file = Path("run/checkpoint.pt")
    whole = file.read_bytes()
    file.write_bytes(whole[:-60] + b"x" + whole[-59:])
    assert followed(read_checkpoint, Path("run"), lambda fix: typed(fix, "mv") or Path("run")) is None


@pytest.fixture
def kdcache(capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run one command line in this process."""

    def call(*command: str) -> Outcome:
        capfd.readouterr()
        status = run(list(command))
        captured = capfd.readouterr()
        return Outcome(status, captured.out, captured.err)

    return call


SQUASHED = """
from torch import nn
def make(num_classes):
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, num_classes), nn.LogSoftmax(1))
    model.pretrained_cfg = {"classifier": "1"}
    return model
"""


def test_classifiers_that_cannot_be_reduced_or_zeroed_start_otherwise(
    image_folder: Path, kdcache: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(".")
    Path("squashed.py").write_text(SQUASHED)
    make = importlib.import_module("squashed").make
    training = ["--teacher", "squashed:make", "--dataset", f"folder:{image_folder}", "--batch-size", "8", "--policy", "pets"]
    training += ["--canvas", "20", "--size", "16", "--home", "."]

    def classes(teacher: Path | None) -> int:
        """Of a model of seven of which three are wanted, or of one that was trained for them."""
        if teacher is not None:
            return len(load_file(teacher / "model.safetensors")["1.bias"])
        model = make(3)
        select_rows(make(7), model, [0, 1, 2], 7, input_size=16)
        return 3

    def finetuned(fix: str) -> Path:
        told = kdcache(*shlex.split(fix.partition("kdcache ")[2]), *training)
        assert told.status == 0, told.err
        return next(Path("teachers").iterdir())

    assert followed(classes, None, finetuned) == 3

    timm_model("net")
    stated = json.loads(Path("net/config.json").read_text())["pretrained_cfg"]

    def begun(head_init: str) -> bool:
        """Whether the classifier has begun as timm begins it."""
        model = made("local-dir:net")
        if head_init == "zero":
            zero_head(model, "local-dir:net")
        return bool(model.get_submodule("head").weight.any())

    assert not begun("zero")
    for layer in ("norm", "nothing", None):  # layers that are no classifier, or not there
        edit("net", pretrained_cfg=stated | {"classifier": layer})
        assert followed(begun, "zero", lambda fix: re.findall(r"--head-init (\w+)", fix)[0])
    sys.modules.pop("squashed")


# ---------------------------------------------------------------- views that are compared with the dump's


@pytest.fixture
def photos_and_dump(make_dump: Any) -> tuple[Callable[..., Canvas], Any]:
    """(what builds the canvas of ./f, an archive of its views)"""
    rng = np.random.default_rng(4)
    save_folder(Path("f"), rng.integers(0, 256, (9, 3, 20, 20), dtype=np.uint8))

    def built(size: int = 20) -> Canvas:
        return load_canvas(find_source("folder:f"), "train", size, Path("canvases"))

    policy = ViewPolicy.load("pets", size=16)
    return built, make_dump(Path("a"), built(), policy=policy, views=1).archive


def test_other_images_than_the_dumps_are_put_right_as_the_fix_says(photos_and_dump: Any) -> None:
    built, archive = photos_and_dump

    def checked(size: int) -> int:
        result = replay(archive, built(size), 9)
        result.raise_if_failed()
        return result.checked

    restored = "restore the dataset as it was"
    first = Path("f/train/class_0/00.png")
    assert followed(checked, 24, lambda fix: int(fix.partition("--canvas ")[2])) == 9
    first.rename("kept.png")
    assert followed(checked, 20, says(restored, 20, lambda: Path("kept.png").rename(first))) == 9
    whole = first.read_bytes()
    miniatures.save(first.with_suffix(".jpg"), (40, 20))
    Image.open(first.with_suffix(".jpg")).save(first)
    first.with_suffix(".jpg").unlink()
    assert followed(checked, 20, says(restored, 20, lambda: first.write_bytes(whole))) == 9


def test_canvases_that_are_not_as_they_were_built_are_built_again(photos_and_dump: Any) -> None:
    built, archive = photos_and_dump

    def checked(_: None) -> int:
        result = replay(archive, built(), 9)
        result.raise_if_failed()
        return result.checked

    def changed(name: str) -> None:
        file = built().path / name
        values = np.load(file)
        values[...] = values[::-1].copy()
        np.save(file, values)

    for name in ("labels.npy", "pixels.npy"):
        changed(name)
        assert followed(checked, None, lambda fix: typed(fix, "mv")) == 9


# ---------------------------------------------------------------- students


def test_grids_are_what_the_fix_says(dump: Any) -> None:
    subject = replace(Subject.of(dump.archive), policy=ViewPolicy.load("pets", size=512))

    def planned(given: dict[str, Any]) -> int:
        options = {"student": ["test_vit"], "student_size": ["32"], "training": {"batch_size": 8}} | given
        return len(plan_students(Grid(**options), subject, Workspace(Path()), dataset="digits"))

    assert followed(planned, {"seed": []}, lambda fix: {re.findall(r"give --(\w+) a value", fix)[0]: [3]}) == 1
    size: Callable[[str], dict[str, Any]] = lambda fix: {"student_size": [re.findall(r"--student-size (\d+)", fix)[0]]}  # noqa: E731
    assert followed(planned, {"student_size": ["8"]}, size) == 1


def test_costs_of_images_that_are_not_here_are_told_by_their_number_or_fetched(
    textures: FaultyServer, kdcache: Callable[..., Outcome]
) -> None:
    command = ["plan", "--teacher", "test_vit", "--dataset", "torch/dtd", "--student", "test_vit", "--views", "2", "--size", "16"]
    command += ["--epochs", "1", "--batch-size", "2", "--canvas", "16", "--home", "."]

    def numbers(command: list[str], told: str) -> list[str]:
        return [*command, *(word for name in re.findall(r"give (--\w+) and (--\w+);", told)[0] for word in (name, "4"))]

    def fetched(command: list[str], told: str) -> list[str]:
        assert run(shlex.split(told.partition("; or kdcache ")[2])) == 0
        return command

    for mend in (numbers, fetched):
        assert followed_by_command(kdcache, command, mend).out


def test_students_are_as_many_as_there_are_files_and_of_the_dumps_classes(
    dump: Any, image_folder: Path, monkeypatch: pytest.MonkeyPatch, kdcache: Callable[..., Outcome]
) -> None:
    shutil.copytree(image_folder, "other")
    for split in SPLITS:
        Path(f"other/{split}/class_0").rename(f"other/{split}/class_00")
    source = f"folder:{image_folder}"
    command = ["distill", "--archive", dump.archive.location, "--student", "test_vit", "--epochs", "1", "--batch-size", "8"]
    command += ["--workers", "0", "--home", "."]

    def dumped(command: list[str], told: str) -> list[str]:
        assert "name the dataset that was dumped with --dataset" in told
        return [*command, "--dataset", source]

    def fewer(command: list[str], told: str) -> list[str]:
        assert "train fewer at once (give --tau, --method, --control or --student fewer values)" in told
        return [*command, "--tau", "2"]

    followed_by_command(kdcache, [*command, "--dataset", "folder:other"], dumped)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (65, 65))  # a lower limit could not be raised again
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    followed_by_command(kdcache, [*command, "--dataset", source, "--tau", "2,3"], fewer)

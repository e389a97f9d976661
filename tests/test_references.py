"""Models that are none of timm's: on the Hub, in folders, made by functions; what is recorded of them, and what is refused."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from kdcache.errors import IncompatibleError, IntegrityError, KdcacheError, NotFoundError, RetryError, UsageError
from kdcache.models.creation import Normalisation, create_model, described, licence, timm_config, weights_digest
from kdcache.models.names import folder_name, public_name, resolve
from kdcache.options import names_in
from kdcache.sharing.publishing import without_places
from kdcache.teachers.forward import Forward
from tests.hub import WritableHub
from tests.servers import Fault, FaultyServer
from tests.weights import save_weights

CARD = b"---\nlicense: other\nlicense_name: my-terms\n---\n# A model\n"

SOURCE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, num_classes)

    def forward(self, x):
        return self.fc(self.conv(x).relu().mean((2, 3)))

def stated(num_classes):
    net = Net(num_classes)
    net.default_cfg = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    return net

def three(num_classes):
    return Net(3)

def tied(num_classes):
    net = Net(num_classes)
    net.other = net.fc
    return net

def wrong(classes):
    return Net(classes)

def nothing(num_classes):
    return None

number = 7
"""


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A trained model of 10 classes, as timm keeps one."""
    return made_folder(tmp_path / "some" / "my-model", seed=0)


def made_folder(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    model, normalise = create_model("test_resnet", 10, input_size=32)
    folder.mkdir(parents=True)
    config = timm_config("test_resnet", model, normalise, {}, input_size=32, class_names=list("0123456789"))
    assert config is not None
    (folder / "config.json").write_bytes(config)
    save_weights(model, folder / "model.safetensors")
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a module of one's own."""
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "own_nets.py").write_text(SOURCE)
    (folder / "broken_nets.py").write_text("import no_such_package")
    (folder / "failing_nets.py").write_text("raise SystemExit('no')")
    monkeypatch.chdir(folder)
    yield folder
    for name in ("own_nets", "broken_nets", "failing_nets"):
        sys.modules.pop(name, None)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model_folder: Path) -> Iterator[tuple[FaultyServer, WritableHub]]:
    """A Hub with the model team/net, and an empty cache."""
    content = WritableHub("secret")
    files = {file.name: file.read_bytes() for file in model_folder.iterdir()}
    content.repos["team/net"] = {"main": {**files, "README.md": CARD}}
    content.repos["team/words"] = {"main": {"config.json": b'{"architecture": "bert"}'}}
    content.repos["team/photos"] = {"main": {"cat.jpg": b"meow"}}
    with FaultyServer(content) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        )
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "secret")
        yield server, content


def logits(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)))


# ---------------------------------------------------------------- local folders


def test_a_folder_is_known_by_what_is_in_it(model_folder: Path, tmp_path: Path) -> None:
    exact = resolve(f"local-dir:{model_folder}")
    assert resolve(exact) == exact
    public = public_name(exact)
    assert public.startswith("local-dir:my-model@")
    assert str(tmp_path) not in public
    assert folder_name(f"local-dir:{model_folder}") == "local-dir-my-model"

    moved = model_folder.parent / "elsewhere" / "my-model"
    moved.parent.mkdir()
    model_folder.rename(moved)
    assert public_name(resolve(f"local-dir:{moved}")) == public
    model, normalise = create_model(resolve(f"local-dir:{moved}"), 10, input_size=32, pretrained=True)
    assert normalise == create_model("test_resnet", 10, input_size=32)[1]

    other = made_folder(tmp_path / "other" / "my-model", seed=1)
    (other / "model.safetensors").replace(moved / "model.safetensors")
    assert public_name(resolve(f"local-dir:{moved}")) != public
    with pytest.raises(IntegrityError, match="is not what it was"):
        resolve(f"local-dir:{moved}@{public.partition('@')[2]}")
    again, _ = create_model(resolve(f"local-dir:{moved}"), 10, input_size=32, pretrained=True)
    assert not torch.equal(logits(model), logits(again))


def test_another_number_of_classes_gets_a_new_classifier_and_that_is_said(model_folder: Path) -> None:
    exact = resolve(f"local-dir:{model_folder}")
    ten, _ = create_model(exact, 10, input_size=32, pretrained=True)
    seven, normalise = create_model(exact, 7, input_size=32, pretrained=True)
    assert logits(seven).shape == (2, 7)
    first, second = ten.state_dict(), seven.state_dict()
    assert [key for key in first if not torch.equal(first[key], second[key])] == ["fc.weight", "fc.bias"]
    said = described(exact, seven, normalise, weights_digest(seven), pretrained=True)
    assert "a new classifier for 7 classes, instead of its 10" in said
    assert "licence unknown" in said


def test_a_licence_is_taken_from_card_or_configuration(model_folder: Path) -> None:
    exact = resolve(f"local-dir:{model_folder}")
    assert licence(exact) is None
    config = json.loads((model_folder / "config.json").read_text())
    config["pretrained_cfg"]["license"] = "mit"
    (model_folder / "config.json").write_text(json.dumps(config))
    assert licence(resolve(f"local-dir:{model_folder}")) == "mit"
    (model_folder / "README.md").write_bytes(CARD)
    assert licence(resolve(f"local-dir:{model_folder}")) == "my-terms"
    (model_folder / "README.md").write_text("---\n{broken\n---\n")
    assert licence(resolve(f"local-dir:{model_folder}")) == "mit"


@pytest.mark.parametrize(
    ("file", "text", "error", "words"),
    [
        ("config.json", None, NotFoundError, "no config.json in it"),
        ("model.safetensors", None, NotFoundError, "no model.safetensors in it"),
        ("config.json", "[]", IntegrityError, "cannot be read"),
        ("config.json", "{", IntegrityError, "cannot be read"),
        ("config.json", '{"architecture": "bert"}', IncompatibleError, "'bert', which timm lacks"),
        ("config.json", "{}", IncompatibleError, "names no architecture"),
        ("config.json", '{"architecture": "test_vit"}', IntegrityError, "cannot be loaded"),
        ("model.safetensors", "nonsense", IntegrityError, "cannot be loaded"),
    ],
)
def test_a_folder_that_is_no_model_is_refused(
    model_folder: Path, file: str, text: str | None, error: type[KdcacheError], words: str
) -> None:
    if text is None:
        (model_folder / file).unlink()
    else:
        (model_folder / file).write_text(text)
    with pytest.raises(error) as caught:
        create_model(resolve(f"local-dir:{model_folder}"), 10, input_size=32, pretrained=True)
    assert words in str(caught.value)
    assert str(caught.value).count("\n") == 2


# ---------------------------------------------------------------- the Hub


def test_a_model_on_the_hub_is_pinned_to_its_commit(hub: tuple[FaultyServer, WritableHub], model_folder: Path) -> None:
    server, content = hub
    exact = resolve("hf-hub:team/net")
    assert exact == resolve("hf-hub:team/net@main") == resolve(exact) == public_name(exact)
    commit = exact.partition("@")[2]
    assert len(commit) == 40
    assert folder_name("hf-hub:team/net@main") == "hf-hub-team-net"
    model, _ = create_model(exact, 10, input_size=32, pretrained=True)
    local, _ = create_model(resolve(f"local-dir:{model_folder}"), 10, input_size=32, pretrained=True)
    assert torch.equal(logits(model), logits(local))
    assert licence(exact) == "my-terms"

    content.repos["team/net"]["main"]["README.md"] = b"# Edited"  # a new commit; the old one stays what it was
    newer = resolve("hf-hub:team/net")
    assert newer != exact
    assert (licence(newer), licence(exact)) == (None, "my-terms")
    server.forget()
    create_model(exact, 10, input_size=32, pretrained=True)
    assert not server.requests  # what is pinned and in the cache is asked of nobody


def test_what_the_hub_does_not_have_is_told_apart(hub: tuple[FaultyServer, WritableHub], monkeypatch: pytest.MonkeyPatch) -> None:
    server, _ = hub
    for name, error, words in (
        ("hf-hub:team/nothing", NotFoundError, "no such model"),
        ("hf-hub:team/net@v9", NotFoundError, "no such revision"),
        ("hf-hub:team/photos", NotFoundError, "has no config.json"),
        ("hf-hub:team/words", IncompatibleError, "'bert', which timm lacks"),
        ("hf-hub:te am/x", UsageError, "is not a model on the Hub"),
    ):
        with pytest.raises(error) as caught:
            resolve(name)
        assert words in str(caught.value)
    exact = resolve("hf-hub:team/net")
    server.faults = {"": Fault(status=503)}
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    with pytest.raises(RetryError, match="could not be fetched"):
        resolve("hf-hub:team/another")
    assert resolve("hf-hub:team/net") == exact  # as it was when it was last seen
    assert licence(exact) is None  # its card was not


# ---------------------------------------------------------------- functions


def test_a_function_makes_the_model_and_states_its_normalisation_or_not(here: Path) -> None:
    model, normalise = create_model(resolve("own_nets:stated"), 4, input_size=16)
    assert (normalise.mean, normalise.std, normalise.assumed) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), False)
    model, normalise = create_model(resolve("own_nets:Net"), 4, input_size=16)
    assert (normalise.mean[0], normalise.assumed) == (0.485, True)
    assert "normalised as ImageNet's" in described("own_nets:Net", model, normalise, "0" * 64, pretrained=False)
    assert timm_config("own_nets:Net", model, normalise, {}, input_size=16, class_names=list("abcd")) is None
    assert str(here) not in sys.path


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("no_such_nets:make", NotFoundError, "there is no module no_such_nets"),
        ("torch.no_such:make", NotFoundError, "there is no module torch.no_such"),
        ("own_nets:state", NotFoundError, "own_nets:stated"),
        ("own_nets:number", UsageError, "number is a int"),
        ("own_nets:three", IncompatibleError, "one vector of 4 logits"),
        ("own_nets:tied", IncompatibleError, "one and the same tensor"),
        ("own_nets:wrong", IncompatibleError, "unexpected keyword argument 'num_classes'"),
        ("own_nets:nothing", IncompatibleError, "it returns a NoneType"),
        ("broken_nets:make", IncompatibleError, "No module named 'no_such_package'"),
        ("failing_nets:make", IncompatibleError, "SystemExit: no"),
        ("own_nets.py:make", NotFoundError, "own_nets.py"),
        ("https://host/x", UsageError, "hf-hub:ORG/NAME[@REVISION], local-dir:PATH or package.module:function"),
        ("team/net", NotFoundError, "hf-hub:team/net or local-dir:team/net"),
    ],
)
def test_what_makes_no_model_is_refused(here: Path, name: str, error: type[KdcacheError], words: str) -> None:
    with pytest.raises(error) as caught:
        create_model(resolve(name), 4, input_size=16)
    assert words in str(caught.value)
    assert str(caught.value).count("\n") == 2


class _Recorder(nn.Module):
    """A classifier without timm's two halves, which remembers the precision that each layer had."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head, self.body = head, nn.Linear(12, 6)  # the head comes first, but runs last
        self.seen: list[torch.dtype] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.body(x[:, :, :2, :2].flatten(1)).relu()
        self.seen.append(features.dtype)
        out = self.head(features)
        self.seen.append(out.dtype)
        return out.flatten(1)


def test_a_plain_models_head_is_computed_in_float32() -> None:
    torch.manual_seed(0)
    views = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    normalise, device = Normalisation((0.5,) * 3, (0.5,) * 3), torch.device("cpu")
    model = _Recorder(nn.Linear(6, 4)).eval()
    half, full = Forward(model, normalise, device, "bf16"), Forward(model, normalise, device, "fp32")
    half(views)
    model.seen.clear()
    found = half(views)
    assert model.seen == [torch.bfloat16, torch.float32]
    model.seen.clear()
    exact = full(views)
    assert model.seen == [torch.float32, torch.float32]
    assert 0 < np.abs(found - exact).max() < 0.02
    with torch.inference_mode():  # the head alone is exact: of rounded features, not rounded itself
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = model.body(normalise(views)[:, :, :2, :2].flatten(1)).relu()
        assert np.array_equal(found, model.head(features.float()).numpy())

    convolution = nn.Sequential(nn.Unflatten(1, (6, 1, 1)), nn.Conv2d(6, 4, 1))
    plain = _Recorder(convolution).eval()
    assert Forward(plain, normalise, device, "bf16")(views).dtype == np.float32
    assert plain.seen[-1] == torch.bfloat16


# ---------------------------------------------------------------- what leaves this machine


def test_places_of_local_models_are_left_out_wherever_they_stand() -> None:
    card = {"alias": "local-dir:/home/ada/nets/mine", "name": "local-dir:../nets/mine@0123456789ab"}
    assert without_places(card) == {"alias": "local-dir:PATH", "name": "local-dir:PATH"}
    for word in ("local-dir:nets/mine", "rn18,local-dir:~/nets/mine", "local-dir:/nets/mine"):
        assert "nets" not in without_places(word)
    for harmless in ("local-dir:mine@0123456789ab", "hf-hub:team/net@main", "pkg.nets:make", "rn18"):
        assert without_places(harmless) == harmless


def test_several_students_are_listed_whatever_their_form() -> None:
    names = ["rn18", "hf-hub:team/net@v2", "local-dir:/runs/tau=4/a b", "pkg.nets:make", "local-dir:../x"]
    assert names_in(",".join(names)) == names


def test_references_load_no_torch_until_they_are_used(run_python: Callable[..., "subprocess.CompletedProcess[str]"]) -> None:
    done = run_python(
        "import sys, kdcache.models.names; print(*[m for m in ('torch', 'timm', 'kdcache.models.cifar') if m in sys.modules])"
    )
    assert done.stdout.split() == []

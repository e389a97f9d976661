"""Models of transformers: classifiers in folders and on the Hub, and zero-shot teachers. Tiny ones, of random weights."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

from kdcache.cli import run
from kdcache.errors import IncompatibleError, IntegrityError, KdcacheError, NotFoundError
from kdcache.models.classes import imagenet
from kdcache.models.creation import create_model, has_new_head, licence, load_weights, published, timm_config, weights_digest
from kdcache.models.names import own_size, resolve
from kdcache.models.zeroshot import zero_shot
from tests.hub import WritableHub
from tests.servers import FaultyServer

SIDE = {"height": 32, "width": 32}
TRANSFORMER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
VISION = {**TRANSFORMER, "image_size": 32, "patch_size": 8}
CENTRE = {"crop_pct": 1.0, "crop_mode": "center", "interpolation": "bilinear"}
LABELS = ["hat", "shoe", "trousers", "dress", "sock"]


def vit(**settings: Any) -> nn.Module:
    labels = {"id2label": dict(enumerate(LABELS))} if "num_labels" not in settings else {}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**VISION, **labels, **settings))


def resnet() -> nn.Module:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", id2label=dict(enumerate(LABELS))
    )
    return transformers.ResNetForImageClassification(config)


def mobilevit() -> nn.Module:
    config = transformers.MobileViTConfig(
        hidden_sizes=[16] * 3, neck_hidden_sizes=[8] * 7, image_size=32, num_attention_heads=2, id2label=dict(enumerate(LABELS))
    )
    return transformers.MobileViTForImageClassification(config)


def deit() -> nn.Module:
    config = transformers.DeiTConfig(**VISION, id2label=dict(enumerate(LABELS)))
    return transformers.DeiTForImageClassificationWithTeacher(config)


def clip() -> nn.Module:
    text = {**TRANSFORMER, "vocab_size": 40, "max_position_embeddings": 16, "eos_token_id": 2, "bos_token_id": 1}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8))


def siglip() -> nn.Module:
    text = {**TRANSFORMER, "vocab_size": 40, "max_position_embeddings": 16}
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=VISION))


def saved(model: nn.Module, folder: Path, processor: Any = None, tokens: Any = None) -> str:
    """Write a model of random weights as transformers does, and return its exact name."""
    generator = torch.Generator().manual_seed(3)
    for key, parameter in model.named_parameters():
        if not key.startswith("logit_"):
            nn.init.normal_(parameter, std=0.3, generator=generator)
    model.save_pretrained(folder)  # type: ignore[operator]
    for part in (processor, tokens):
        if part is not None:
            part.save_pretrained(folder)
    return resolve(f"local-dir:{folder}")


@pytest.fixture
def photo() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def views(photo: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(photo).permute(2, 0, 1)[None]


# ---------------------------------------------------------------- classifiers


@pytest.mark.parametrize(
    ("make", "processor", "stated"),
    [
        (vit, lambda: transformers.ViTImageProcessor(size=SIDE), (1.0, "squash", "bilinear", ("classifier",))),
        (
            resnet,
            lambda: transformers.ConvNextImageProcessor(size={"shortest_edge": 32}, image_mean=[0.1, 0.2, 0.3], resample=3),
            (0.875, "center", "bicubic", ("classifier.1",)),
        ),
        (  # which wants blue first, and no mean
            mobilevit,
            lambda: transformers.MobileViTImageProcessor(size={"shortest_edge": 40}, crop_size=SIDE),
            (0.8, "center", "bicubic", ("classifier",)),
        ),
        (  # which divides by std twice
            deit,
            lambda: transformers.EfficientNetImageProcessor(size=SIDE),
            (1.0, "squash", "bicubic", ("cls_classifier", "distillation_classifier")),
        ),
    ],
)
def test_logits_are_those_of_the_model_called_by_itself(
    make: Callable[[], Any], processor: Callable[[], Any], stated: tuple[Any, ...], photo: NDArray[np.uint8], tmp_path: Path
) -> None:
    original, reads = make(), processor()
    name = saved(original, tmp_path / "net", reads)
    model, normalise = create_model(name, 5, input_size=32, pretrained=True)
    pixels = reads(Image.fromarray(photo), return_tensors="pt", do_resize=False, do_center_crop=False)["pixel_values"]
    with torch.inference_mode():
        expected = original.eval()(pixel_values=pixels).logits
        torch.testing.assert_close(model.eval()(normalise(views(photo))), expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 0.01
    config: Any = model.pretrained_cfg
    assert tuple(config[key] for key in ("crop_pct", "crop_mode", "interpolation", "classifier")) == stated
    assert config["label_names"] == tuple(LABELS)
    known = published(name)
    assert known is not None
    assert (known.num_classes, known.class_names) == (5, tuple(LABELS))

    # As kdcache writes it, from which transformers makes it too.
    written = timm_config(name, model, normalise, CENTRE, input_size=32, class_names=LABELS)
    assert written is not None
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "config.json").write_bytes(written)
    save_file(model.state_dict(), kept / "model.safetensors", metadata={"format": "pt"})
    again, same = create_model(resolve(f"local-dir:{kept}"), 5, input_size=32, pretrained=True)
    assert weights_digest(again) == weights_digest(model)
    with torch.inference_mode():
        same_logits = again.eval()(same(views(photo)))
        torch.testing.assert_close(same_logits, model(normalise(views(photo))), atol=1e-6, rtol=0)
        theirs = transformers.AutoModelForImageClassification.from_pretrained(kept)
        torch.testing.assert_close(theirs.eval()(pixel_values=pixels).logits, expected, atol=1e-6, rtol=0)
        assert theirs.config.id2label == dict(enumerate(LABELS))


def test_another_number_of_classes_gets_a_new_classifier(tmp_path: Path) -> None:
    name = saved(vit(), tmp_path / "net")
    five, normalise = create_model(name, 5, input_size=32, pretrained=True)
    assert normalise.assumed  # it has no image processor
    torch.manual_seed(0)
    three, _ = create_model(name, 3, input_size=32, pretrained=True)
    torch.manual_seed(0)
    assert weights_digest(create_model(name, 3, input_size=32, pretrained=True)[0]) == weights_digest(three)
    first, second = five.state_dict(), three.state_dict()
    differing = [key for key in first if not torch.equal(first[key], second[key])]
    assert differing == ["classifier.weight", "classifier.bias"]
    assert load_weights(three, tmp_path / "net" / "model.safetensors", replace_head=True) == [
        "classifier.bias",
        "classifier.weight",
    ]


def test_all_weights_of_a_file_are_loaded_under_the_names_of_today(tmp_path: Path) -> None:
    """transformers writes names of its older versions, and a model has others."""
    name = saved(vit(), tmp_path / "net")
    expected, _ = create_model(name, 5, input_size=32, pretrained=True)
    torch.manual_seed(9)
    model, _ = create_model(name, 5, input_size=32)
    assert load_weights(model, tmp_path / "net" / "model.safetensors") == []
    assert weights_digest(model) == weights_digest(expected)


def test_a_processor_is_part_of_a_models_name(tmp_path: Path) -> None:
    name = saved(vit(), tmp_path / "net", transformers.ViTImageProcessor(size=SIDE))
    transformers.ViTImageProcessor(size=SIDE, image_mean=[0.1] * 3).save_pretrained(tmp_path / "net")
    assert resolve(f"local-dir:{tmp_path / 'net'}") != name
    with pytest.raises(IntegrityError, match="is not what it was"):
        resolve(name)


def test_labels_in_words_are_imagenets(tmp_path: Path) -> None:
    thousand = imagenet(1000)
    assert thousand is not None
    name = saved(vit(num_labels=1000), tmp_path / "net")
    file = tmp_path / "net" / "config.json"
    config = json.loads(file.read_text())
    known = published(name)
    assert known is not None
    assert known.outputs is None  # LABEL_0 and so on say nothing
    config["id2label"] = {str(i): label for i, label in enumerate(thousand.described)}
    file.write_text(json.dumps(config))
    known = published(resolve(f"local-dir:{tmp_path / 'net'}"))
    assert known is not None
    assert known.outputs == thousand


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (lambda folder: edit(folder, model_type="bert"), IncompatibleError, "is not an image classifier of transformers"),
        (lambda folder: edit(folder, model_type="none such"), IntegrityError, "cannot be loaded"),
        (lambda folder: edit(folder, hidden_size=24), IntegrityError, "cannot be loaded"),
        (lambda folder: edit(folder, num_hidden_layers=2), IntegrityError, "tensors are missing"),
        (lambda folder: edit(folder, image_size=48), IntegrityError, "cannot be loaded"),
        (lambda folder: (folder / "model.safetensors").write_text("nonsense"), IntegrityError, "cannot be loaded"),
        (lambda folder: (folder / "preprocessor_config.json").write_text("{"), IntegrityError, "cannot be loaded"),
    ],
)
def test_what_is_no_such_model_is_refused(
    tmp_path: Path, spoil: Callable[[Path], Any], error: type[KdcacheError], words: str
) -> None:
    saved(vit(), tmp_path / "net")
    spoil(tmp_path / "net")
    with pytest.raises(error) as caught:
        create_model(resolve(f"local-dir:{tmp_path / 'net'}"), 5, input_size=32, pretrained=True)
    assert words in str(caught.value)
    assert str(caught.value).count("\n") == 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"id2label": {"zero": "hat"}}, 'id2label has "zero" for the number of a class'),
        ({"id2label": {"-1": "hat"}}, "id2label has"),
        ({"id2label": {"999999999": "hat"}}, "id2label numbers a class 999999999"),
        ({"id2label": ["hat"]}, "not a mapping"),
        ({"id2label": {}, "num_labels": "x"}, 'num_labels is "x", not a number above 0'),
        ({"id2label": None, "num_labels": 2.5}, "num_labels is 2.5"),
        ({"architectures": 3}, "architectures is 3"),
        ({"image_size": {"side": 32}}, "the size of its images is null"),
        ({"image_size": ["a", "b"]}, 'the size of its images is "b"'),
        ({"pretrained_cfg": {"input_size": "large"}}, 'the size of its images is "large"'),
    ],
)
def test_a_config_that_states_nonsense_is_refused(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    saved(vit(), tmp_path / "net")
    edit(tmp_path / "net", **settings)
    with pytest.raises(IntegrityError) as caught:
        published(resolve(f"local-dir:{tmp_path / 'net'}"))
    assert words in str(caught.value)
    assert str(caught.value).count("\n") == 2


@pytest.mark.parametrize(
    ("settings", "size", "classes"),
    [
        ({"image_size": {"height": 32, "width": 32}}, 32, 5),
        ({"image_size": [32, 32]}, 32, 5),
        ({"image_size": None, "vision_config": {"image_size": "48"}}, 48, 5),
        ({"image_size": None}, 224, 5),
        ({"id2label": {}}, 32, 2),
        ({"id2label": {}, "num_labels": 7}, 32, 7),
    ],
)
def test_a_configs_size_and_classes_are_read_in_one_way(
    tmp_path: Path, settings: dict[str, Any], size: int, classes: int
) -> None:
    saved(vit(), tmp_path / "net")
    edit(tmp_path / "net", **settings)
    name = resolve(f"local-dir:{tmp_path / 'net'}")
    known = published(name)
    assert known is not None
    assert (known.input_size, known.num_classes, own_size(name)) == (size, classes, size)


def test_a_classifier_that_is_missing_is_not_made_up(tmp_path: Path) -> None:
    saved(vit(), tmp_path / "net")
    edit(tmp_path / "net", id2label={})  # transformers then makes none
    name = resolve(f"local-dir:{tmp_path / 'net'}")
    with pytest.raises(IntegrityError, match="2 tensors are missing"):
        create_model(name, 2, input_size=32, pretrained=True)
    create_model(name, 3, input_size=32, pretrained=True)  # it gets a new one


@pytest.mark.parametrize("make", [vit, resnet])
def test_a_new_classifier_starts_at_zero_and_is_probed_as_timms(
    make: Callable[[], Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    name = saved(make(), tmp_path / "net", transformers.ViTImageProcessor(size=SIDE))
    weights = tmp_path / "net" / "model.safetensors"
    assert not has_new_head(name, 5)
    assert not has_new_head(name, 5, weights)
    assert has_new_head(name, 3)
    assert has_new_head(name, 3, weights)
    spec = pictures(tmp_path / "photos", ["car", "cup", "key"])
    train = ["train-teacher", "--teacher", name, "--dataset", spec, "--home", str(tmp_path / "home"), "--canvas", "32"]
    train += ["--size", "32", "--recipe", "lp-ft", "--epochs", "1", "--head-epochs", "2", "--batch-size", "4"]
    assert run(train) == 0
    said = capfd.readouterr().err
    assert "a new head starts at zero and is trained alone first" in said
    assert "first the head alone, on frozen features: 2 epochs" in said
    (folder,) = (tmp_path / "home" / "teachers").iterdir()
    training = json.loads((folder / "teacher.json").read_text())["training"]
    assert (training["head_init"], training["head_epochs"]) == ("zero", 2)
    assert run([*train, "--checkpoint", str(weights), "--epochs", "0"]) == 0
    assert "start at zero" in capfd.readouterr().err


def edit(folder: Path, **settings: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def test_other_sizes_are_refused_where_the_model_does_not_take_them(tmp_path: Path) -> None:
    name = saved(vit(), tmp_path / "net")
    with pytest.raises(IncompatibleError, match="cannot be made for 48 px"):
        create_model(name, 5, input_size=48, pretrained=True)


def test_the_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = saved(vit(), tmp_path / "net")
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(NotFoundError) as caught:
        create_model(name, 5, input_size=32)
    assert caught.value.fix == "pip install 'kdcache[hf]'"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[WritableHub]:
    content = WritableHub("secret")
    with FaultyServer(content) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        )
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "secret")
        yield content


def test_a_classifier_on_the_hub_is_pinned_to_its_commit(hub: WritableHub, tmp_path: Path) -> None:
    local = saved(vit(), tmp_path / "net", transformers.ViTImageProcessor(size=SIDE))
    files = {file.name: file.read_bytes() for file in (tmp_path / "net").iterdir()}
    hub.repos["team/net"] = {"main": {**files, "README.md": b"---\nlicense: mit\n---\n"}}
    exact = resolve("hf-hub:team/net")
    assert len(exact.partition("@")[2]) == 40
    model, normalise = create_model(exact, 5, input_size=32, pretrained=True)
    expected, same = create_model(local, 5, input_size=32, pretrained=True)
    assert weights_digest(model) == weights_digest(expected)
    assert normalise == same
    assert licence(exact) == "mit"


def test_a_classifier_is_a_teacher_as_it_is(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Of three of its classes, in another order, and finetuned; archive, replay and export are as of any teacher."""
    original = vit()
    saved(original, tmp_path / "net", transformers.ViTImageProcessor(size=SIDE))
    spec = pictures(tmp_path / "photos", ["dress", "Hat", "trousers"])
    place = ["--teacher", f"local-dir:{tmp_path / 'net'}", "--dataset", spec, "--home", str(tmp_path / "home")]
    place += ["--canvas", "32", "--size", "32"]
    assert run(["dump-teacher", *place, "--views", "1", "--teacher-epochs", "0"]) == 0
    captured = capfd.readouterr()
    assert "Hat -> output 0 (hat)" in captured.err
    (folder,) = (tmp_path / "home" / "teachers").iterdir()
    record = json.loads((folder / "teacher.json").read_text())
    assert record["classes"]["outputs"] == [0, 3, 2]
    weights = load_file(folder / "model.safetensors")
    assert torch.equal(weights["classifier.weight"], original.classifier.weight[[0, 3, 2]])  # type: ignore[union-attr, index]
    assert json.loads((folder / "config.json").read_text())["id2label"] == {"0": "Hat", "1": "dress", "2": "trousers"}
    (tmp_path / "net").rename(tmp_path / "moved")  # a teacher's folder is enough from now on
    assert run(["verify", captured.out.strip(), "--replay", "1", "--home", str(tmp_path / "home")]) == 0
    assert run(["export", str(folder), "--output", str(tmp_path / "exported"), "--home", str(tmp_path / "home")]) == 0
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "library_name: transformers" in card
    assert "AutoModelForImageClassification" in card


def pictures(place: Path, names: list[str]) -> str:
    rng = np.random.default_rng(7)
    for split in ("train", "test"):
        for name in names:
            (place / split / name).mkdir(parents=True)
            for i in range(4):
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(place / split / name / f"{i}.png")
    return f"folder:{place}"


# ---------------------------------------------------------------- zero-shot teachers


@pytest.fixture(scope="module")
def tokens() -> Any:
    """Words by number, ended as both models want it."""
    words = ["[PAD]", "<s>", "</s>", "[UNK]", "a", "photo", "of", "tench", "goldfish", "great", "white", "shark", "."]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="</s>", bos_token="<s>", unk_token="[UNK]"
    )


@pytest.mark.parametrize("make", [clip, siglip])
def test_zero_shot_logits_are_the_models_own(
    make: Callable[[], Any], tokens: Any, photo: NDArray[np.uint8], tmp_path: Path
) -> None:
    original = make()
    reads = transformers.CLIPImageProcessor(size={"shortest_edge": 40}, crop_size=SIDE)
    name = saved(original, tmp_path / "net", reads, tokens)
    names = ["n01440764", "goldfish", "great_white_shark"]
    model = zero_shot(name, names)
    prompts = ["a photo of a tench.", "a photo of a goldfish.", "a photo of a great white shark."]
    padding = True if make is clip else "max_length"
    inputs = tokens(prompts, padding=padding, truncation=True, max_length=16, return_tensors="pt")
    pixels = reads(Image.fromarray(photo), return_tensors="pt", do_resize=False, do_center_crop=False)["pixel_values"]
    texts = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    with torch.inference_mode():
        expected = original.eval()(pixel_values=pixels, **texts).logits_per_image
        torch.testing.assert_close(model.eval()(pixels), expected, atol=1e-4, rtol=1e-5)
    assert expected.std() > 0.001
    config: Any = model.pretrained_cfg
    assert (config["crop_pct"], config["crop_mode"], config["interpolation"]) == (0.8, "center", "bicubic")
    assert config["mean"][0] == 0.48145466
    assert not [key for key in model.state_dict() if "text" in key]
    assert weights_digest(zero_shot(name, names)) == weights_digest(model)
    assert weights_digest(zero_shot(name, names[::-1])) != weights_digest(model)
    assert weights_digest(zero_shot(name, names, templates=("a {}.",))) != weights_digest(model)


def test_a_zero_shot_teacher_is_dumped(
    tokens: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    saved(clip(), tmp_path / "net", transformers.CLIPImageProcessor(size={"shortest_edge": 40}, crop_size=SIDE), tokens)
    (tmp_path / "my_zero_shot.py").write_text(
        f"""
from kdcache.models.zeroshot import zero_shot

def mine(num_classes, class_names):
    return zero_shot({f"local-dir:{tmp_path / 'net'}"!r}, class_names, templates=("a photo of a {{}}.", "a {{}}."))
"""
    )
    monkeypatch.chdir(tmp_path)
    spec = pictures(tmp_path / "photos", ["goldfish", "great_white_shark", "tench"])
    place = ["--teacher", "my_zero_shot:mine", "--dataset", spec, "--home", str(tmp_path / "home"), "--size", "32"]
    assert run(["dump-teacher", *place, "--canvas", "32", "--views", "1", "--teacher-epochs", "0", "--precision", "bf16"]) == 0
    archive = capfd.readouterr().out.strip()
    (folder,) = (tmp_path / "home" / "teachers").iterdir()
    record = json.loads((folder / "teacher.json").read_text())
    assert record["mean"][0] == 0.48145466
    assert record["top1_clean"] >= 0
    assert run(["verify", archive, "--replay", "1", "--home", str(tmp_path / "home")]) == 0


def test_what_makes_no_zero_shot_teacher_is_refused(tokens: Any, tmp_path: Path) -> None:
    name = saved(vit(), tmp_path / "net", tokens=tokens)
    with pytest.raises(IncompatibleError, match="no towers"):
        zero_shot(name, ["a", "b"])
    with pytest.raises(KdcacheError, match="is not understood"):
        zero_shot("openai/clip-vit-base-patch32", ["a", "b"])
    with pytest.raises(KdcacheError, match="templates"):
        zero_shot(name, ["a", "b"], templates=("a photo",))

"""The files for people: a card that the Hub understands, whoever named things; a figure; a description for catalogues."""

import fnmatch
import json
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import mlcroissant
import numpy as np
import pytest
from huggingface_hub import DatasetCard

from kdcache.archive import Archive, write_archive
from kdcache.archive.format.manifest import Licences, SubsetOf
from kdcache.archive.writing.card import card_files
from kdcache.datasets import SourceCard
from tests.archives import teacher_card

VIEWS, SAMPLES, CLASSES = 2, 60, 5
LINES = "first line\nsecond line"
TEACHER = teacher_card(name="vit_small_patch16_224.augreg_in1k", top1_clean=87.5)
NAMES = tuple(f"class {i}" for i in range(CLASSES))
SOURCE = SourceCard(name="pets", split="train", num_samples=SAMPLES, class_names=NAMES, licence="CC-BY-SA-4.0", digest="d")
HOSTILE = "a|b`c`\n# title\n```python\nimport os\n```\n<script>x</script> [link](javascript:x) ![](x)\x1b[2J---" + "z" * 500


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    logits = np.random.default_rng(1).normal(0, 4, (VIEWS, SAMPLES, CLASSES)).astype(np.float32)
    return write_archive(tmp_path_factory.mktemp("card") / "a", logits, NAMES, labels=np.zeros(SAMPLES, np.int64))


@dataclass(frozen=True)
class Card:
    text: str
    figure: str
    croissant: dict[str, Any]

    @property
    def metadata(self) -> dict[str, Any]:
        """The front matter as the Hub's own library reads it."""
        return dict(DatasetCard(self.text).data.to_dict())


@pytest.fixture(scope="module")
def described(archive: Archive) -> Callable[..., Card]:
    def describe(**changes: Any) -> Card:
        manifest = archive.manifest.model_copy(update={"source": SOURCE, "teacher": TEACHER, **changes})
        files = card_files(manifest, manifest.files, list(archive.shards()), LINES)
        return Card(files["README.md"].decode(), files["entropies.svg"].decode(), json.loads(files["croissant.json"].decode()))

    return describe


def test_an_archive_has_its_card_figure_and_description_on_record(archive: Archive) -> None:
    recorded = {record.path for record in archive.manifest.files}
    assert {"README.md", "entropies.svg", "croissant.json"} <= recorded
    assert archive.verify("full").ok
    again = card_files(
        archive.manifest,
        [
            archive.manifest.shards,
            *(r for r in archive.manifest.files if r.path not in {"README.md", "entropies.svg", "croissant.json"}),
        ],
        archive.shards(),
        re.findall(r"```python\n(.*?)\n```", (archive.path / "README.md").read_text(), flags=re.DOTALL)[0],
    )
    for name, data in again.items():  # from the manifest alone they can be had again, byte for byte
        assert (archive.path / name).read_bytes() == data


def test_the_front_matter_is_what_the_hub_reads(described: Callable[..., Card]) -> None:
    metadata = described(licences=Licences(weights="apache-2.0")).metadata
    assert metadata["pretty_name"] == "Teacher logits: pets seen by vit_small_patch16_224.augreg_in1k"
    assert metadata["license"] == ["cc-by-sa-4.0", "apache-2.0"]
    assert metadata["task_categories"] == ["image-classification"]
    assert metadata["size_categories"] == ["n<1K"]
    assert {"kdcache", "knowledge-distillation", "logits", "teacher", "pets"} <= set(metadata["tags"])
    assert "vit-small-patch16-224.augreg-in1k" in metadata["tags"]
    assert metadata["viewer"] is False


@pytest.mark.parametrize(
    ("data", "weights", "expected"),
    [
        ("MIT", "mit", {"license": "mit"}),
        ("CC0-1.0", "cc-by-nc-4.0", {"license": ["cc0-1.0", "cc-by-nc-4.0"]}),
        ("ImageNet terms", "apache-2.0", {"license": "other", "license_name": "imagenet-terms-and-apache-2.0"}),
        ("cvnets-license", "cvnets-license", {"license": "other", "license_name": "cvnets-license"}),
        ("openrail++", "mit", {"license": ["openrail++", "mit"]}),
        (None, "mit", {"license": "unknown"}),
        ("mit", None, {"license": "unknown"}),
        ("\n: [", "mit", {"license": "other", "license_name": "unnamed-and-mit"}),
    ],
)
def test_licences_are_said_in_the_hubs_words(
    described: Callable[..., Card], data: str | None, weights: str | None, expected: dict[str, Any]
) -> None:
    card = described(source=SOURCE.model_copy(update={"licence": data}), licences=Licences(weights=weights))
    assert {key: value for key, value in card.metadata.items() if key.startswith("license")} == expected
    if data is None:
        assert "| licence of the data | unknown |" in card.text


def test_a_declared_licence_wins_over_what_the_source_and_the_model_say(described: Callable[..., Card]) -> None:
    teacher = TEACHER.model_copy(update={"weights_licence": "cc-by-nc-4.0"})
    assert described(teacher=teacher).metadata["license"] == ["cc-by-sa-4.0", "cc-by-nc-4.0"]
    declared = described(teacher=teacher, licences=Licences(data="odbl"))
    assert declared.metadata["license"] == ["odbl", "cc-by-nc-4.0"]
    assert declared.croissant["license"] == ["cc-by-nc-4.0", "odbl"]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(1, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (10**6 - 1, "100K<n<1M"), (10**9, "1B<n<10B"), (10**12, "n>1T")],
)
def test_sizes_are_said_in_the_hubs_words(described: Callable[..., Card], rows: int, expected: str) -> None:
    assert described(num_views=1, num_samples=rows).metadata["size_categories"] == [expected]


def test_a_subset_says_what_it_is_a_subset_of(described: Callable[..., Card]) -> None:
    card = described(first_view=5, num_views=10, subset_of=SubsetOf(digest="e" * 64, first_view=0, num_views=50))
    assert f"views 5 to 14 of the archive with digest `{'e' * 64}`, which has views 0 to 49." in card.text
    assert "Index 0 of the Zarr arrays is view 5." in card.text
    assert "subset" not in described().text


def test_statistics_alone_are_not_called_logits(described: Callable[..., Card]) -> None:
    card = described(contents="statistics")
    assert card.metadata["pretty_name"].startswith("Statistics of teacher logits: ")
    assert "not the logits themselves" in card.text
    [rows] = [one for one in card.croissant["recordSet"] if one["name"] == "rows"]
    assert {"argmax", "entropy"} <= {field["name"] for field in rows["field"]} - {"logits"}
    assert "logits" not in {field["name"] for field in rows["field"]}


def test_names_of_strangers_stay_names(described: Callable[..., Card]) -> None:
    source = SOURCE.model_copy(update={"name": HOSTILE, "licence": HOSTILE})
    teacher = TEACHER.model_copy(update={"name": HOSTILE, "weights_sha256": HOSTILE})
    plain = described()
    card = described(source=source, teacher=teacher, licences=Licences(weights=HOSTILE), class_names=(HOSTILE,) * CLASSES)
    assert card.metadata["license"] == "other"
    assert re.fullmatch(r"[a-z0-9.+-]+", card.metadata["license_name"])
    assert "\x1b" not in card.text
    body = card.text.partition("\n---\n")[2]
    assert re.findall(r"```python\n(.*?)\n```", body, flags=re.DOTALL) == [LINES]
    outline = [line for line in plain.text.splitlines() if line.startswith("#")][1:]
    assert [line for line in card.text.splitlines() if line.startswith("#")][1:] == outline
    assert not re.search(r"(?<!\\)<script", re.sub(r"`[^`]*`", "", body))
    assert not re.search(r"(?<!\\)\]\(javascript", re.sub(r"`[^`]*`", "", body))
    cells = [len(re.findall(r"(?<!\\)\|", line)) for line in body.splitlines() if line.startswith("|")]
    assert set(cells) == {3, 4}  # two columns and three columns
    assert len(card.text) < 3 * len(plain.text)
    assert len(json.dumps(card.croissant)) < 40_000
    mlcroissant.Dataset(jsonld=card.croissant)


def test_the_figure_is_plain_svg_and_shows_the_means(described: Callable[..., Card], archive: Archive) -> None:
    card = described()
    assert card.figure == described().figure
    root = ElementTree.fromstring(card.figure)
    assert {element.tag.rpartition("}")[2] for element in root.iter()} == {
        "svg",
        "title",
        "rect",
        "path",
        "text",
        "polygon",
        "polyline",
    }
    lines = [element for element in root.iter() if element.tag.endswith("polyline")]
    statistics = archive.manifest.statistics.per_tau
    for line, name in zip(lines, ("entropy_mean", "entropy_rest_mean"), strict=True):
        drawn = np.array([point.split(",") for point in line.attrib["points"].split()], float)
        assert len(drawn) == len(statistics)
        assert (np.diff(drawn[:, 0]) > 0).all()
        means = np.array([getattr(one, name) for one in statistics])
        # The axis runs from 0 at y = 252 to 1 at y = 40, as its labels say.
        np.testing.assert_allclose((252 - drawn[:, 1]) / (252 - 40), means, atol=5e-4)
    ticks = {element.text: float(element.attrib["y"]) - 4 for element in root.iter() if element.get("text-anchor") == "end"}
    assert (ticks["0"], ticks["1"]) == (252, 40)


def test_catalogues_understand_the_description(archive: Archive, described: Callable[..., Card]) -> None:
    dataset = mlcroissant.Dataset(jsonld=str(archive.path / "croissant.json"))
    assert not dataset.metadata.ctx.issues.errors
    classes = [(row["classes/number"], row["classes/name"]) for row in dataset.records("classes")]
    assert classes == list(enumerate(NAMES))
    [rows] = [one for one in dataset.metadata.record_sets if one.name == "rows"]
    fields = {field.name: (field.data_type, field.array_shape_tuple) for field in rows.fields}
    assert fields["logits"] == (np.int16, (CLASSES,))
    assert fields["entropy"] == (np.float32, None)
    assert fields["probe"] == (np.uint8, (16,))
    assert [f"[{VIEWS}, {SAMPLES}, {CLASSES}]" in field.description for field in rows.fields if field.name == "logits"] == [True]


def test_the_description_records_files_and_finds_every_shard(archive: Archive) -> None:
    description = json.loads((archive.path / "croissant.json").read_text())
    assert "croissant/1.0" in description["conformsTo"]
    objects = {one["contentUrl"]: one for one in description["distribution"] if one["@type"] == "cr:FileObject"}
    people = {"README.md", "entropies.svg", "croissant.json"}
    recorded = {record.path: record for record in (archive.manifest.shards, *archive.manifest.files) if record.path not in people}
    assert {name: one["sha256"] for name, one in objects.items()} == {name: record.sha256 for name, record in recorded.items()}
    [shards] = [one for one in description["distribution"] if one["@type"] == "cr:FileSet"]
    for shard in archive.shards():
        assert all(any(fnmatch.fnmatch(file.path, pattern) for pattern in shards["includes"]) for file in shard.files)


def test_the_models_that_the_paper_names_have_known_licences() -> None:
    from kdcache.models.creation import licence
    from kdcache.models.names import ALIASES

    found = {alias: licence(exact) for alias, exact in ALIASES.items() if not exact.startswith("cifar_")}  # those have no weights
    assert found["vit_s"] == "apache-2.0"
    assert found["cn_p"] == "cc-by-nc-4.0"  # finetuned from ConvNeXt V2, which is not for commercial use
    assert None not in found.values()
    assert licence("no_such_model") is None


def test_nothing_heavy_is_imported_to_finish_an_archive(
    tmp_path: Path, run_python: Callable[..., "subprocess.CompletedProcess[str]"]
) -> None:
    done = run_python(
        """
import sys, numpy as np, kdcache
kdcache.write_archive(sys.argv[1], np.zeros((1, 8, 3), np.float32), ["a", "b", "c"])
print(*[name for name in ("torch", "timm", "matplotlib", "huggingface_hub", "mlcroissant", "pandas") if name in sys.modules])
""",
        tmp_path / "a",
    )
    assert done.stdout.split() == []

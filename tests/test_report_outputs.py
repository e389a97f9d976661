"""What runs keep of some test images, and the report's figures of it: differences by class, and features in the plane."""

import io
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from kdcache.errors import IntegrityError
from kdcache.report import collect, summarise, write_report
from kdcache.report.class_figures import differences
from kdcache.report.feature_figures import in_the_plane, silhouette
from kdcache.report.figures import render_figure
from kdcache.report.output_figures import output_drawings
from kdcache.training.outputs import MOST_BYTES, MOST_IMAGES, TEACHER_OUTPUTS, TEST_OUTPUTS, KeptOutputs, chosen_images
from tests.reports import RunFolders

CLASSES = 6


def outputs(seed: int, images: int = 36, apart: float = 3.0, start: int = 0, features: bool = True) -> KeptOutputs:
    """Of images from number `start` on; `apart` tells the distance of classes in units of their spread."""
    rng = np.random.default_rng(seed)
    sample = np.arange(start, start + images, dtype=np.int32)
    label = sample % CLASSES
    centres = np.random.default_rng(99).normal(size=(CLASSES, 16))
    wide = (apart * centres[label] + rng.normal(size=(images, 16))).astype(np.float32)
    logits = (wide @ centres.T + rng.normal(size=(images, CLASSES))).astype(np.float32)
    return KeptOutputs(sample, label.astype(np.int32), logits, wide if features else None, "d" * 64, "w" * 64)


def keep(file: Path, kept: KeptOutputs) -> None:
    file.write_bytes(b"".join(kept.as_file()))


@pytest.fixture
def make_run(tmp_path: Path) -> RunFolders:
    return RunFolders(tmp_path / "runs" / "demo")


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing looks at the figures, and drawing them takes most of a report's time."""
    monkeypatch.setattr("kdcache.report.html.render_figure", lambda drawing, name: (b"<svg></svg>", b""))


def page_of(make_run: RunFolders, tmp_path: Path) -> str:
    return write_report([make_run.base], tmp_path / "out").html.read_text("utf-8")


# ---------------------------------------------------------------- what is kept


@given(
    labels=st.lists(st.integers(0, 30), min_size=1, max_size=300),
    width=st.integers(2, 4000),
)
def test_fewer_images_are_the_first_of_more_and_of_as_many_classes(labels: list[int], width: int) -> None:
    known = np.array(labels, np.int64)
    few, more = chosen_images(known, 50 * width), chosen_images(known, width)
    assert list(more[: len(few)]) == list(few)
    assert len(set(more.tolist())) == len(more) == min(len(known), MOST_IMAGES, max(1, MOST_BYTES // (4 * width)))
    # No class has two images more than another one that has further ones.
    counts, whole = (np.bincount(known[which], minlength=31) for which in (few, np.arange(len(known))))
    assert counts.max() - min(counts[counts < whole], default=counts.max()) <= 1


def test_outputs_are_read_as_they_were_written(tmp_path: Path) -> None:
    for kept in (outputs(0), outputs(1, features=False)):
        keep(tmp_path / "a", kept)
        read = KeptOutputs.read(tmp_path / "a")
        assert (read.images, read.weights) == (kept.images, kept.weights)
        for name in ("sample", "label", "logits", "features"):
            np.testing.assert_array_equal(getattr(read, name), getattr(kept, name))
        assert b"".join(read.as_file()) == (tmp_path / "a").read_bytes()


def test_outputs_of_both_are_of_the_images_that_both_have(tmp_path: Path) -> None:
    one, other = outputs(0, images=20), outputs(1, images=30, start=8)
    both = one.of_both(other)
    assert both is not None
    assert both[0].sample.tolist() == both[1].sample.tolist() == list(range(8, 20))
    np.testing.assert_array_equal(both[0].logits, one.logits[8:])
    np.testing.assert_array_equal(both[1].logits, other.logits[:12])
    assert one.of_both(outputs(1, start=100)) is None


# ---------------------------------------------------------------- figures


def test_differences_by_class_are_those_of_the_published_code() -> None:
    student, teacher = outputs(1), outputs(2)

    def mean_rows(logits: NDArray[np.float32]) -> NDArray[np.float64]:
        return np.array([logits[student.label == c].astype(float).mean(axis=0) for c in range(CLASSES)])

    def scored(logits: NDArray[np.float32]) -> NDArray[np.float32]:
        return (logits - logits.mean(1, keepdims=True)) / logits.std(1, ddof=1, keepdims=True)

    found = differences(student, teacher)
    for table, mine, theirs in (
        (found.tables[0], student.logits, teacher.logits),
        (found.tables[1], scored(student.logits), scored(teacher.logits)),
    ):
        expected = np.abs(mean_rows(mine) - mean_rows(theirs))
        np.fill_diagonal(expected, 0)
        np.testing.assert_allclose(table, expected, rtol=1e-4, atol=1e-6)
    correlations = [np.corrcoef(each.logits.T) for each in (student, teacher)]
    np.testing.assert_allclose(found.tables[2], np.abs(correlations[0] - correlations[1]), atol=1e-6)


def test_a_student_that_only_scales_and_shifts_differs_in_logits_alone() -> None:
    teacher = outputs(2)
    student = KeptOutputs(teacher.sample, teacher.label, 0.1 * teacher.logits + 5, teacher.features, teacher.images)
    means = differences(student, teacher).means
    assert means[0] > 1
    assert max(means[1:]) < 1e-5


@pytest.mark.usefixtures("no_drawing")
def test_students_stand_beside_their_teacher_in_the_report(make_run: RunFolders, tmp_path: Path) -> None:
    for seed, (method, apart) in enumerate((("kd", 0.5), ("zkd", 4.0))):
        worse = make_run(80.0, method_spec=method, tau=1.0)
        keep(worse / TEST_OUTPUTS, outputs(50))
        keep(make_run(90.0, method_spec=method, tau=4.0) / TEST_OUTPUTS, outputs(seed, apart=apart))
    keep(make_run.base / TEACHER_OUTPUTS, outputs(7, apart=4.0))
    text = page_of(make_run, tmp_path)
    classes = re.search(r'aria-label="(Heatmaps of differences[^"]*)"', text)
    assert classes is not None
    for title, seed, apart in (("kd, tau 4", 0, 0.5), ("zkd, tau 4", 1, 4.0)):
        mean = differences(outputs(seed, apart=apart), outputs(7, apart=4.0)).means[0]
        assert f"{title}: distance of mean logits {mean:.3g}" in classes[1]
    features = re.search(r'aria-label="(Maps of features by t-SNE[^"]*)"', text)
    assert features is not None
    scores = [silhouette(each) or 0 for each in (outputs(7, apart=4.0), outputs(0, apart=0.5), outputs(1, apart=4.0))]
    assert scores[1] < scores[2]
    expected = "; ".join(
        f"{title}: silhouette {score:.2f}" for title, score in zip(("teacher", "kd, tau 4", "zkd, tau 4"), scores, strict=True)
    )
    assert expected in features[1]
    assert "36 test images of 6 classes" in text


def test_equal_runs_give_equal_figures(make_run: RunFolders) -> None:
    for seed, method in enumerate(("kd", "zkd")):
        keep(make_run(90.0, method_spec=method) / TEST_OUTPUTS, outputs(seed))
    keep(make_run.base / TEACHER_OUTPUTS, outputs(7))
    table = summarise(collect([make_run.base]))
    made = []
    for _ in range(2):
        found = output_drawings(table, {"pets": table.rows}, {})
        assert [len(found[kind]) for kind in ("classes", "features")] == [1, 1]
        made.append([render_figure(drawing, "x") for kind in ("classes", "features") for drawing in found[kind]])
    assert made[0] == made[1]
    for svg, png in made[0]:
        assert b"<image" in svg
        assert len(svg) < 150_000, "heatmaps and points are pictures in it"
        width, height = Image.open(io.BytesIO(png)).size
        assert min(width, height) > 400


@pytest.mark.usefixtures("no_drawing")
def test_outputs_of_another_teacher_are_not_taken_for_this_ones(make_run: RunFolders) -> None:
    for seed, method in enumerate(("kd", "zkd")):
        keep(make_run(90.0, method_spec=method) / TEST_OUTPUTS, outputs(seed))
    keep(make_run.base / TEACHER_OUTPUTS, outputs(7))
    table = summarise(collect([make_run.base]))
    digest = "d1" * 32  # of the runs' archive
    for weights, classes in (({digest: "w" * 64}, 1), ({digest: "x" * 64}, 0), ({}, 1)):
        found = output_drawings(table, {"pets": table.rows}, weights)
        assert [len(found[kind]) for kind in ("classes", "features")] == [classes, 1]


@pytest.mark.usefixtures("no_drawing")
def test_without_the_teacher_there_are_features_alone(make_run: RunFolders, tmp_path: Path) -> None:
    keep(make_run(90.0) / TEST_OUTPUTS, outputs(0))
    keep(make_run(91.0, method_spec="zkd") / TEST_OUTPUTS, outputs(2))
    keep(make_run(90.0, student="rn50") / TEST_OUTPUTS, outputs(1))  # alone of its kind
    for other in (None, outputs(7, start=1000)):  # not there, or of other images
        if other is not None:
            keep(make_run.base / TEACHER_OUTPUTS, other)
        text = page_of(make_run, tmp_path)
        assert "Heatmaps of differences" not in text
        assert "class by class is not shown" in text
        assert text.count("Maps of features by t-SNE") == 1
        assert re.search("student rn18. kd, tau 1: silhouette [^;]*; zkd, tau 1: silhouette", text)


@pytest.mark.usefixtures("no_drawing")
def test_features_that_say_nothing_are_not_drawn(make_run: RunFolders, tmp_path: Path) -> None:
    same = outputs(0)
    constant = KeptOutputs(same.sample, same.label, same.logits, np.ones_like(same.logits), same.images)
    keep(make_run(90.0) / TEST_OUTPUTS, constant)
    keep(make_run.base / TEACHER_OUTPUTS, outputs(7))
    text = page_of(make_run, tmp_path)
    assert "Maps of features" not in text
    assert "Heatmaps of differences" in text
    for method in ("ttm", "wttm"):
        keep(make_run(91.0, method_spec=method) / TEST_OUTPUTS, outputs(1))
    assert "1 more kept no features, or all the same" in page_of(make_run, tmp_path)


def test_equal_features_are_at_equal_places() -> None:
    first = in_the_plane(outputs(3))
    assert first.shape == (36, 2)
    np.testing.assert_array_equal(first, in_the_plane(outputs(3)))


@pytest.mark.usefixtures("no_drawing")
@pytest.mark.parametrize("name", [TEST_OUTPUTS, TEACHER_OUTPUTS])
@pytest.mark.parametrize("damage", ["a bit", "cut off", "empty", "another file", "labels", "types", "one class"])
def test_damaged_outputs_are_named_and_can_be_set_aside(make_run: RunFolders, tmp_path: Path, name: str, damage: str) -> None:
    run = make_run(90.0)
    keep(run / TEST_OUTPUTS, outputs(0))
    keep(make_run.base / TEACHER_OUTPUTS, outputs(7))
    file = (run if name == TEST_OUTPUTS else make_run.base) / name
    data = bytearray(file.read_bytes())
    whole = outputs(0)
    wrong: dict[str, Any] = {
        "labels": (whole.label + np.int32(CLASSES), whole.logits),
        "types": (whole.label.astype(np.float32), whole.logits),
        "one class": (0 * whole.label, whole.logits[:, :1]),
    }
    if damage in wrong:
        keep(file, KeptOutputs(whole.sample, *wrong[damage], None, whole.images))
    else:
        data[len(data) // 2] ^= 4
        file.write_bytes({"a bit": data, "cut off": data[: len(data) // 2], "empty": b"", "another file": b"{}" * 20}[damage])
    with pytest.raises(IntegrityError) as raised:
        page_of(make_run, tmp_path)
    assert raised.value.what == f"{file} is damaged"
    command = raised.value.fix.partition("do without the figures of it: ")[2]
    assert subprocess.run(command, shell=True, check=False).returncode == 0
    assert "<h2>Results</h2>" in page_of(make_run, tmp_path)


@pytest.mark.usefixtures("no_drawing")
def test_outputs_beside_runs_are_no_runs(make_run: RunFolders, tmp_path: Path) -> None:
    """A shell makes runs/*/* of them too."""
    run = make_run(90.0)
    keep(make_run.base / TEACHER_OUTPUTS, outputs(7))
    assert write_report(sorted(make_run.base.iterdir()), tmp_path / "out").html.is_file()
    assert sorted(make_run.base.iterdir()) == [run, make_run.base / TEACHER_OUTPUTS]

"""Protects `kdcache stats`: what it prints, draws and advises, and what it says a codec would cost."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy import special
from scipy import stats as statistics

import kdcache
from kdcache.archive import Archive, derive, measure_fidelity
from kdcache.archive.reading.fidelity import rank_correlation
from kdcache.cli import run
from kdcache.codecs import CODECS, kl_bound
from kdcache.stats import relative_entropy
from kdcache.system.progress import Silent

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "v1"


@dataclass(frozen=True)
class Outcome:
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def stats(capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    def call(*arguments: object) -> Outcome:
        capfd.readouterr()
        status = run(["stats", *map(str, arguments)])
        captured = capfd.readouterr()
        return Outcome(status, captured.out, captured.err)

    return call


def teacher_logits(views: int, samples: int, classes: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    rng = np.random.default_rng(4)
    labels = rng.integers(0, classes, samples)
    logits = rng.normal(0, 1.5, (views, samples, classes))
    logits[:, np.arange(samples), labels] += rng.uniform(2, 9, samples)
    return logits.astype(np.float32), labels


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    """In float32, so that every codec has something to lose."""
    logits, labels = teacher_logits(2, 150, 37)
    names = [f"class {c}" for c in range(37)]
    return kdcache.write_archive(tmp_path_factory.mktemp("stats") / "made-up", logits, names, labels=labels, codec="f32")


# ---------------------------------------------------------------- statistics and advice


def test_it_prints_the_recorded_figures_and_advises(archive: Archive, stats: Callable[..., Outcome]) -> None:
    done = stats(archive.path)
    assert (done.status, done.err) == (0, "")
    recorded = archive.manifest.statistics
    assert recorded.details is not None
    assert "300, evenly spaced; recorded when it was finished" in done.out
    for figures, detail in zip(recorded.per_tau, recorded.details.per_tau, strict=True):
        assert f"{figures.entropy_mean:.4f}" in done.out
        assert f"{figures.entropy_rest_mean:.4f}" in done.out
        assert f"{detail.smoothing_sorted_mean:.5f}" in done.out
        assert f"{detail.power_sum_mean:.4f}" in done.out
    assert f"{recorded.top1_views:.2f} %" in done.out
    assert f"kdcache distill --archive {archive.path} --tau 10,20,4" in done.out
    assert "section 4.3 and Table 1" in done.out
    assert f"H^(p-bar) = {recorded.per_tau[0].entropy_rest_mean:.3f}" in done.out


def test_other_temperatures_and_fewer_rows_are_read_from_the_logits(archive: Archive, stats: Callable[..., Outcome]) -> None:
    found = stats(archive.path, "--tau", "1,6.5", "--rows", 60, "--json").json
    assert (found["recorded"], found["statistics"]["rows"]) == (False, 60)
    rows = np.concatenate(list(archive.spread_logits(60)))
    for figures, tau in zip(found["statistics"]["per_tau"], (1, 6.5), strict=True):
        assert figures["tau"] == tau
        assert figures["entropy_mean"] == pytest.approx(relative_entropy(rows, tau)[0].mean())
    assert found["statistics"]["top1_views"] == archive.manifest.statistics.top1_views


def test_json_holds_the_recorded_figures_of_the_taus_asked_for_and_the_advice(
    archive: Archive, stats: Callable[..., Outcome]
) -> None:
    found = stats(archive.path, "--tau", "20,4", "--json").json
    assert found["recorded"]
    assert [figures["tau"] for figures in found["statistics"]["per_tau"]] == [20, 4]
    whole = archive.manifest.statistics
    assert whole.details is not None
    assert found["statistics"]["details"]["per_tau"][0] == json.loads(whole.details.per_tau[7].model_dump_json())
    assert found["digest"] == archive.manifest.digest
    assert {"title", "text", "source", "numbers", "applies", "limits", "taus"} == set(found["advice"][0])


def test_archives_from_before_are_measured_when_asked(stats: Callable[..., Outcome]) -> None:
    found = stats(GOLDEN, "--json").json
    assert not found["recorded"]
    assert sum(found["statistics"]["details"]["per_tau"][0]["entropy_histogram"]) == found["statistics"]["rows"] == 22


def test_archives_without_logits_show_what_is_recorded(archive: Archive, tmp_path: Path, stats: Callable[..., Outcome]) -> None:
    part = derive(archive, tmp_path / "part", contents="statistics")
    found = stats(part.path, "--json").json
    assert found["recorded"]
    assert found["statistics"] == archive.manifest.statistics.model_dump(mode="json")
    older = derive(kdcache.open_archive(GOLDEN), tmp_path / "older", contents="statistics")
    done = stats(older.path, "--plot", tmp_path / "figures")
    assert done.status == 0
    assert "H^(p-bar)" in done.out
    assert [path.name for path in sorted((tmp_path / "figures").iterdir())] == ["entropy-over-tau.png", "entropy-over-tau.svg"]
    for option in (("--tau", "6"), ("--rows", "5"), ("--fidelity",)):
        refused = stats(part.path, *option)
        assert (refused.status, "holds no logits" in refused.err) == (5, True)


@pytest.mark.exhaustive
def test_figures_go_into_a_folder_or_onto_one_page(archive: Archive, tmp_path: Path, stats: Callable[..., Outcome]) -> None:
    names = ["entropy-histograms", "entropy-over-tau", "logit-moments", "sorted-softmax"]
    out = stats(archive.path, "--tau", "1,10", "--plot", tmp_path / "figures").out
    written = sorted((tmp_path / "figures").iterdir())
    assert [path.name for path in written] == [f"{name}.{kind}" for name in names for kind in ("png", "svg")]
    assert all(str(path) in out for path in written)
    pages = stats(archive.path, "--tau", 1, "--plot", tmp_path / "page.png", "--json").json["figures"]
    assert pages == [str(tmp_path / "page.png")]
    with Image.open(pages[0]) as page, Image.open(written[0]) as one:
        assert page.height > one.height
    assert stats(archive.path, "--tau", 1, "--plot", tmp_path / "page.svg").status == 0
    assert (tmp_path / "page.svg").read_text("utf-8").count("made-up") == 4  # a title above each


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--tau", "0"), "finite number above 0"),
        (("--tau", "1,x"), "numbers separated by commas"),
        (("--codec", "u8"), "--fidelity --codec u8"),
        (("--fidelity", "--plot", "x"), "leave one of them out"),
        (("--fidelity", "--codec", "i61"), "i16"),
        (("--plot", "nowhere/page.svg"), "there is no folder nowhere"),
        (("--plot", str(Path(__file__))), "is a file"),
    ],
)
def test_mistakes_are_explained(archive: Archive, arguments: tuple[str, ...], said: str, stats: Callable[..., Outcome]) -> None:
    done = stats(archive.path, *arguments)
    assert done.status == 2
    assert said in done.err
    assert done.err.count("\n") == 3


def test_two_classes_and_identical_rows_are_described_too(tmp_path: Path, stats: Callable[..., Outcome]) -> None:
    archive = kdcache.write_archive(tmp_path / "a", np.full((1, 6, 2), 1.5, np.float32), ["a", "b"])
    done = stats(archive.path, "--tau", 1, "--plot", tmp_path / "f.svg")
    assert done.status == 0
    assert "1 by definition" in done.out
    found = stats(archive.path, "--fidelity", "--json")
    assert [one["rank_mean"] for one in found.json["codecs"]] == [None] * len(found.json["codecs"])
    assert stats(archive.path, "--fidelity").status == 0


def test_it_needs_no_torch(archive: Archive, run_python: Callable[..., Any]) -> None:
    code = """
import sys
from kdcache.cli import run
assert run(["stats", sys.argv[1]]) == run(["stats", sys.argv[1], "--fidelity"]) == 0
print("loaded", *{"torch", "torchvision", "timm", "matplotlib", "scipy"} & set(sys.modules))
"""
    assert run_python(code, archive.path).stdout.splitlines()[-1] == "loaded"


# ---------------------------------------------------------------- fidelity


def test_fidelity_agrees_with_its_definitions(archive: Archive, stats: Callable[..., Outcome]) -> None:
    found = {one["codec"]: one for one in stats(archive.path, "--fidelity", "--tau", "1,20", "--json").json["codecs"]}
    assert set(found) == set(CODECS)
    truth = np.concatenate(list(archive.spread_logits()))
    rows = np.arange(len(truth))
    for name, figures in found.items():
        coding = CODECS.build(name)
        stored = coding.encode(truth)
        decoded = coding.decode(stored)
        assert figures["rows"] == 300
        assert figures["bytes_per_logit"] == pytest.approx(sum(part.nbytes for part in stored.values()) / truth.size)
        assert figures["logit_max"] == pytest.approx(np.abs(decoded.astype(float) - truth).max())
        assert figures["argmax_changes"] == (decoded.argmax(axis=1) != truth.argmax(axis=1)).sum()
        others = np.ones(truth.shape, bool)
        others[rows, truth.argmax(axis=1)] = False
        ranks = [statistics.spearmanr(a[keep], b[keep]).statistic for a, b, keep in zip(truth, decoded, others, strict=True)]
        assert figures["rank_mean"] == pytest.approx(np.mean(ranks), abs=1e-12)
        assert figures["rank_min"] == pytest.approx(np.min(ranks), abs=1e-12)
        for at in figures["per_tau"]:
            p, q = (special.softmax(z.astype(np.longdouble) / at["tau"], axis=1) for z in (truth, decoded))
            kl = (p * (np.log(p) - np.log(q))).sum(axis=1)
            assert at["kl_mean"] == pytest.approx(float(kl.mean()), rel=1e-6, abs=1e-17)
            assert at["kl_max"] == pytest.approx(float(kl.max()), rel=1e-6, abs=1e-17)
            assert at["kl_bound"] == pytest.approx(kl_bound(coding.max_error(stored), at["tau"]).max())
            assert at["probability_max"] == pytest.approx(float(np.abs(p - q).max()), rel=1e-6, abs=1e-15)
            for kind, one, other in zip(
                ("entropy", "entropy_rest"), relative_entropy(truth, at["tau"]), relative_entropy(decoded, at["tau"]), strict=True
            ):
                change = np.abs(one - other)
                assert (at[f"{kind}_mean"], at[f"{kind}_max"]) == (pytest.approx(change.mean()), pytest.approx(change.max()))


@pytest.mark.grid
@pytest.mark.parametrize("name", list(CODECS))
@pytest.mark.parametrize("classes", [2, 5, 1000])
def test_nothing_measured_exceeds_a_codecs_bound(name: str, classes: int) -> None:
    rng = np.random.default_rng(classes)
    rows = rng.normal(0, rng.uniform(0.01, 12, (200, 1)), (200, classes)).clip(-60, 60).astype(np.float32)
    [found] = measure_fidelity([rows], 200, [name], [0.5, 1, 4, 40], Silent())
    assert not found.refused
    assert found.logit_max <= found.logit_bound
    for at in found.per_tau:
        assert 0 <= at.kl_mean <= at.kl_max <= at.kl_bound
        assert at.bound_share <= 1
    assert (found.logit_max > 0) == (name != "f32")


def test_what_a_codec_cannot_hold_is_said_and_the_others_are_measured(tmp_path: Path, stats: Callable[..., Outcome]) -> None:
    logits = np.random.default_rng(0).normal(0, 40, (1, 50, 5)).astype(np.float32)
    archive = kdcache.write_archive(tmp_path / "a", logits, list("abcde"), codec="f32")
    done = stats(archive.path, "--fidelity", "--codec", "i16,u8")
    assert done.status == 0
    assert "i16 cannot hold these rows: codec i16 stores logits within" in done.out
    found = {one["codec"]: one for one in stats(archive.path, "--fidelity", "--codec", "i16,u8", "--json").json["codecs"]}
    assert list(found) == ["f32", "i16", "u8"]  # the archive's own comes first
    assert found["i16"]["per_tau"] == []
    assert found["u8"]["per_tau"]


def test_the_archives_own_codec_loses_nothing_twice_and_states_its_bound(tmp_path: Path, stats: Callable[..., Outcome]) -> None:
    logits, _ = teacher_logits(1, 40, 10)
    archive = kdcache.write_archive(tmp_path / "a", logits, [str(c) for c in range(10)])
    done = stats(archive.path, "--fidelity", "--codec", "i16")
    assert "no logit moved by more than 0.000977" in done.out
    [own] = stats(archive.path, "--fidelity", "--codec", "i16", "--json").json["codecs"]
    assert (own["logit_max"], own["logit_bound"]) == (0, 2**-10)
    assert all(at["kl_max"] == 0 for at in own["per_tau"])


def test_compressed_sizes_are_those_of_the_layouts(tmp_path: Path, stats: Callable[..., Outcome]) -> None:
    logits, _ = teacher_logits(1, 512, 64)
    archive = kdcache.write_archive(tmp_path / "a", logits, [str(c) for c in range(64)])
    found = stats(archive.path, "--fidelity", "--codec", "i16", "--json").json["codecs"][0]["compressed"]
    assert {"bitshuffle", "pcodec"} == set(found)
    for kind, measured in found.items():
        packed = derive(archive, tmp_path / kind, layout=f"zarr:{kind}")
        [record] = [file for shard in packed.shards() for file in shard.files if file.path.startswith("logits/")]
        assert measured == pytest.approx(record.bytes / logits.size, rel=0.01)
        shutil.rmtree(packed.path)


def test_ranks_share_ties_and_need_something_to_rank() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.integers(0, 6, (50, 20)), rng.integers(0, 6, (50, 20))
    expected = [statistics.spearmanr(a, b).statistic for a, b in zip(one, other, strict=True)]
    np.testing.assert_allclose(rank_correlation(one, other), expected, atol=1e-12)
    flat, row = np.zeros((1, 4)), np.arange(4.0)[None]
    assert np.isnan(rank_correlation(flat, row))[0]
    assert rank_correlation(row, flat)[0] == 0
    assert rank_correlation(row, -row)[0] == pytest.approx(-1)

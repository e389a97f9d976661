"""Protects what `kdcache diff` says of two archives, and which archives may be averaged."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import rel_entr
from scipy.stats import entropy as shannon

from kdcache.archive import Archive, Ensemble, compare, derive, write_archive
from kdcache.archive.format.manifest import Manifest
from kdcache.archive.reading.comparison import Comparison
from kdcache.cli import run
from kdcache.errors import IncompatibleError, UsageError
from kdcache.stats import softmax
from tests.archives import teacher_card
from tests.conftest import Dump, made_up, redump

TEACHER = teacher_card(alias="vit_s", name="vit_small", weights_sha256="a" * 64, batch_size=64)


@pytest.fixture(scope="module")
def make(dump: Dump, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Archive]:
    """An archive of the views of `dump`; the same arguments give the same logits."""

    def archive(seed: int = 1, **changes: Any) -> Archive:
        return redump(tmp_path_factory.mktemp("made") / f"seed{seed}", dump, made_up(seed, dump), **changes)

    return archive


def differing(found: Comparison) -> dict[str, tuple[str, str]]:
    return {fact.name: (fact.a, fact.b) for fact in found.facts if not fact.same}


def in_another_order(manifest: Manifest) -> dict[str, Any]:
    names = manifest.class_names[::-1]
    return {"class_names": names, "source": manifest.source.model_copy(update={"class_names": names, "digest": "b" * 64})}


# ---------------------------------------------------------------- the same contents


def test_an_archive_is_equal_to_itself(dump: Dump) -> None:
    found = compare(dump.archive, dump.archive, taus=(1, 20))
    assert differing(found) == {}
    assert (found.views, found.rows, found.agreement, found.max_logit) == (range(3), 69, 100.0, 0.0)
    for distance in found.distances:
        assert (distance.kl_ab_max, distance.kl_ba_max, distance.max_probability, distance.entropy_difference) == (0, 0, 0, 0)
        assert distance.entropy_correlation == pytest.approx(1)
        assert distance.entropy_a == distance.entropy_b > 0


def test_shards_and_codecs_are_another_form_of_the_same_contents(make: Callable[..., Archive]) -> None:
    found = compare(make(codec="f32", shard_rows=4), make(codec="i16", shard_rows=16))
    assert set(differing(found)) == {"digest", "codec", "layout", "shard rows"}
    assert found.differences == []
    assert found.max_logit is not None
    assert 0 < found.max_logit <= 2.0**-10
    assert all(0 < distance.kl_ab_max < 4.8e-7 / distance.tau**2 for distance in found.distances)


@pytest.mark.parametrize(
    "form", [{"layout": "hdf5"}, {"layout": "webdataset"}, *({"codec": name} for name in ("u8", "f16", "i16"))]
)
def test_converting_an_archive_leaves_its_contents_as_they_are(make: Callable[..., Archive], tmp_path: Path, form: Any) -> None:
    original = make(1, codec="f32")
    found = compare(original, derive(original, tmp_path / "other", **form))
    assert found.differences == []
    assert (found.rows, found.max_logit == 0) == (69, "layout" in form)
    assert [fact.name for fact in compare(make(2, codec="u8"), derive(original, tmp_path / "u8", codec="u8")).differences] == [
        "logits"
    ]


def test_an_archive_of_statistics_is_compared_by_its_views_alone(make: Callable[..., Archive], tmp_path: Path, capfd) -> None:
    a = make(1)
    b = derive(a, tmp_path / "b", contents="statistics")
    found = compare(a, b)
    assert [fact.name for fact in found.differences] == ["contents"]
    assert (found.comparable, found.rows) == (True, 0)
    assert run(["diff", a.location, b.location]) == 0
    assert "No logits are compared: one has none." in capfd.readouterr().out


def test_a_logit_that_moved_by_more_than_its_codec_rounds_is_other_contents(dump: Dump, tmp_path: Path) -> None:
    logits = made_up(1, dump)
    a = redump(tmp_path / "a", dump, logits, codec="f32")
    logits[1, 5, 2] += 0.002
    b = redump(tmp_path / "b", dump, logits, codec="i16")
    assert [fact.name for fact in compare(a, b).differences] == ["logits"]
    assert [fact.name for fact in compare(b, a).differences] == ["logits"]


def test_rows_are_matched_by_sample_where_positions_differ(dump: Dump, tmp_path: Path) -> None:
    logits = made_up(1, dump)
    a = redump(tmp_path / "a", dump, logits)
    turned = {name: np.stack([dump.archive.column(name, v)[::-1] for v in range(3)]) for name in ("sample", "digest")}
    b = redump(tmp_path / "b", dump, logits[:, ::-1], **turned)
    found = compare(a, b)
    assert set(differing(found)) == {"digest", "order"}
    assert (found.agreement, found.max_logit) == (100.0, 0.0)


def test_archives_that_record_no_views_are_compared_with_a_note(tmp_path: Path) -> None:
    logits = np.random.default_rng(0).normal(size=(1, 9, 3)).astype(np.float32)
    a, b = (write_archive(tmp_path / name, logits, list("xyz"), codec="f32") for name in "ab")
    found = compare(a, b)
    [fact] = [fact for fact in found.facts if fact.name == "fingerprints"]
    assert (fact.a, fact.same, fact.note) == ("unknown", True, "that these are the same views is not recorded")
    assert (found.rows, found.max_logit, found.differences) == (9, 0.0, [])


# ---------------------------------------------------------------- how far apart


def test_distances_are_those_of_the_formulas(make: Callable[..., Archive]) -> None:
    a, b = make(1, codec="f32"), make(2, codec="f32")
    found = compare(a, b, taus=(1, 7))
    x, y = (np.concatenate([archive.read(view, 0, 23).logits for view in range(3)]) for archive in (a, b))
    assert found.rows == 69
    assert found.agreement == pytest.approx(100 * (x.argmax(1) == y.argmax(1)).mean())
    assert found.max_logit == pytest.approx(np.abs(x - y).max())
    for distance in found.distances:
        p, q = softmax(x, distance.tau), softmax(y, distance.tau)
        forth, back = rel_entr(p, q).sum(axis=1), rel_entr(q, p).sum(axis=1)
        h, g = (shannon(probs, axis=1) / np.log(3) for probs in (p, q))
        expected = [forth.mean(), forth.max(), back.mean(), back.max(), np.abs(p - q).max(), h.mean(), g.mean()]
        expected += [np.abs(h - g).mean(), np.corrcoef(h, g)[0, 1]]
        assert list(vars(distance).values())[1:] == pytest.approx(expected, rel=1e-9)


def test_at_most_so_many_rows_are_read_and_they_are_spread_over_all_views(make: Callable[..., Archive], monkeypatch) -> None:
    read: list[tuple[int, int]] = []
    take = Archive.take

    def recorded(self: Archive, view: int, positions: np.ndarray) -> Any:
        read.extend((view, int(position)) for position in positions)
        return take(self, view, positions)

    a, b = make(1), make(2)
    monkeypatch.setattr(Archive, "take", recorded)
    monkeypatch.setattr("kdcache.archive.reading.comparison.BLOCK_VALUES", 9)  # blocks of three rows
    found = compare(a, b, rows=10)
    assert found.rows == 10
    assert len(read) == 20
    assert {view for view, _ in read} == {0, 1, 2}
    assert len(set(read)) == 10


# ---------------------------------------------------------------- what differs

OTHERS: dict[str, tuple[Callable[[Manifest], dict[str, Any]], set[str], tuple[str, ...]]] = {
    "another policy": (
        lambda manifest: {"policy": manifest.policy.model_copy(update={"hflip": 0.25, "mix": None})},
        {"policy", "policy.hflip", "policy.mix.cutmix", "policy.mix.probability"},
        ("policy.hflip: ", "0.25", "0.5", "policy.mix.cutmix: ", "none"),
    ),
    "another seed of views": (
        lambda manifest: {"policy": manifest.policy.model_copy(update={"seed": 4})},
        {"policy", "policy.seed"},
        ("policy.seed: ", "4", " against "),
    ),
    "no policy": (lambda manifest: {"policy": None}, {"policy"}, ("policy: ", "unknown")),
    "other images": (
        lambda manifest: {"source": manifest.source.model_copy(update={"digest": "c" * 64})},
        {"data"},
        ("data: ", "cccccccccccc...", "(other files, labels or classes)"),
    ),
    "images decoded otherwise": (
        lambda manifest: {"canvas": manifest.canvas.model_copy(update={"digest": "d" * 64})},
        {"canvas"},
        ("canvas: ", "dddddddddddd..."),
    ),
    "another canvas size": (
        lambda manifest: {"canvas": manifest.canvas.model_copy(update={"size": 24})},
        {"canvas size"},
        ("canvas size: ", "20", "24"),
    ),
    "classes in another order": (
        in_another_order,
        {"classes", "data"},
        ("number 0 is class_0", "number 0 is class_2", "(the same names in another order)"),
    ),
    "other classes": (
        lambda manifest: {"class_names": (*manifest.class_names[:2], "moth")},
        {"classes"},
        ("number 2 is class_2", "number 2 is moth", "(other names)"),
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_archives_of_other_views_or_classes_are_told_apart_and_never_averaged(
    name: str, dump: Dump, make: Callable[..., Archive]
) -> None:
    changes, names, words = OTHERS[name]
    a, b = make(1), make(2, **changes(dump.archive.manifest))
    found = compare(a, b)
    assert set(differing(found)) - {"digest"} == names
    assert not found.comparable
    assert (found.rows, found.distances) == (0, ())
    with pytest.raises(IncompatibleError, match="differ in") as caught:
        Ensemble([a, b])
    assert names <= set(caught.value.what.partition("differ in ")[2].split(", "))
    assert a.location in caught.value.what
    assert b.location in caught.value.what
    assert all(word in caught.value.why for word in words)


def test_fewer_samples_are_told_apart_and_never_averaged(dump: Dump, make: Callable[..., Archive], tmp_path: Path) -> None:
    keep = {"num_samples": 22, "labels": None, "keys": None, "source": None}
    fewer = {name: np.tile(np.arange(22), (3, 1)) for name in ("sample", "digest")}
    small = redump(tmp_path / "small", dump, made_up(2, dump)[:, :22], **keep, **fewer)
    found = compare(make(1), small)
    assert differing(found)["samples"] == ("23", "22")
    with pytest.raises(IncompatibleError, match="samples"):
        Ensemble([make(1), small])


def test_views_that_only_claim_to_be_the_same_are_noticed(dump: Dump, tmp_path: Path, make: Callable[..., Archive]) -> None:
    digest = np.stack([dump.archive.column("digest", view) for view in range(3)])
    digest[2, 7] ^= 1
    b = redump(tmp_path / "b", dump, made_up(2, dump), digest=digest)
    found = compare(make(1), b)
    sample = int(dump.archive.column("sample", 2)[7])
    [fact] = [fact for fact in found.facts if fact.name == "fingerprints"]
    assert (fact.same, fact.b) == (False, "68 of them the same")
    assert f"view 2 of sample {sample}" in fact.note
    assert found.rows == 0
    ensemble = Ensemble([make(1), b])
    ensemble.take(2, np.arange(7))
    with pytest.raises(IncompatibleError, match=r"view 2 of archive .* at positions 7 \(1 in all\)"):
        ensemble.take(2, np.arange(5, 12))


def test_samples_at_other_positions_are_never_averaged(dump: Dump, tmp_path: Path, make: Callable[..., Archive]) -> None:
    sample = np.stack([dump.archive.column("sample", view) for view in range(3)])
    sample[1, [2, 3]] = sample[1, [3, 2]]
    ensemble = Ensemble([make(1), redump(tmp_path / "b", dump, made_up(2, dump), sample=sample)])
    with pytest.raises(IncompatibleError, match=r"view 1 .* at positions 3, 2 \(2 in all\)"):
        ensemble.take(1, np.array([3, 9, 2]))


def test_a_subset_of_views_is_compared_where_both_have_them(make: Callable[..., Archive]) -> None:
    found = compare(make(1), make(1, views=range(1, 3)))
    assert differing(found)["views"] == ("0 to 2", "1 to 2")
    assert [fact.name for fact in found.differences] == ["views"]
    assert (found.views, found.rows, found.max_logit) == (range(1, 3), 46, 0.0)


def test_archives_without_a_view_in_common_are_neither_compared_nor_averaged(make: Callable[..., Archive], capfd) -> None:
    a, b = make(1, views=range(1)), make(2, views=range(1, 3))
    assert compare(a, b).rows == 0
    assert run(["diff", a.location, b.location]) == 0
    assert "no view in common" in capfd.readouterr().out
    with pytest.raises(IncompatibleError, match="no view is in all") as caught:
        Ensemble([a, b])
    assert "views 0, 1 to 2" in caught.value.why


def test_another_teacher_is_named_by_what_differs(make: Callable[..., Archive]) -> None:
    other = TEACHER.model_copy(update={"weights_sha256": "e" * 64, "precision": "bf16", "batch_size": 32, "alias": "mine"})
    found = compare(make(1, teacher=TEACHER), make(2, teacher=other))
    assert {fact.name for fact in found.differences} == {"weights", "precision", "batch size", "logits"}
    assert differing(found)["teacher"] == ("vit_s = vit_small", "mine = vit_small")
    assert len(found.distances) == 9


# ---------------------------------------------------------------- the command


def test_diff_prints_tables_or_json_and_strict_decides_the_status(make: Callable[..., Archive], capfd) -> None:
    a, same, other = make(1), make(1, shard_rows=8, codec="f32"), make(2, teacher=TEACHER)
    assert run(["diff", a.location, other.location, "--tau", "1,20"]) == 0
    out = capfd.readouterr().out
    assert "weights" in out
    assert "unknown" in out
    assert "aaaaaaaaaaaa..." in out
    assert "69 rows, the same top class in" in out
    assert run(["diff", a.location, same.location, "--strict"]) == 0
    assert run(["diff", a.location, other.location, "--strict", "--json", "--rows", "5"]) == 5
    captured = capfd.readouterr()
    assert [line.split(":")[0] for line in captured.err.splitlines()[-3:]] == ["error", "why", "fix"]
    assert "differ in weights, precision, batch size, logits" in captured.err
    found = json.loads(captured.out[captured.out.index("{\n") :])
    assert (found["rows"], found["views"], len(found["distances"])) == (5, [0, 3], 3)
    assert {"name": "weights", "a": "unknown", "b": "a" * 64, "same": False, "meaning": "other contents", "note": ""} in found[
        "facts"
    ]


def test_diff_says_why_it_compares_no_rows(dump: Dump, make: Callable[..., Archive], capfd) -> None:
    a, b = make(1), make(1, **in_another_order(dump.archive.manifest))
    assert run(["diff", a.location, b.location]) == 0
    out = capfd.readouterr().out
    assert "the same names in another order" in out
    assert "No logits are compared: views or classes differ." in out


@pytest.mark.parametrize("arguments", [["--tau", "0"], ["--tau", ""], ["--rows", "0"]])
def test_diff_refuses_what_makes_no_sense(dump: Dump, arguments: list[str], capfd) -> None:
    assert run(["diff", dump.archive.location, dump.archive.location, *arguments]) == 2
    assert capfd.readouterr().err.splitlines()[-3].startswith("error: ")


# ---------------------------------------------------------------- ensembles


def test_averaged_logits_are_the_mean_and_members_may_differ_in_form(make: Callable[..., Archive]) -> None:
    archives = [make(1, codec="f32", shard_rows=4), make(2), make(3, shard_rows=16)]
    positions = np.array([22, 0, 7, 8, 9])
    parts = np.stack([archive.take(1, positions).logits for archive in archives])
    rows = Ensemble(archives).take(1, positions)
    assert rows.logits.dtype == np.float32
    np.testing.assert_allclose(rows.logits, parts.astype(np.float64).mean(axis=0), rtol=6e-8)
    np.testing.assert_array_equal(rows.sample, archives[0].take(1, positions).sample)
    kept = Ensemble(archives, "probabilities").take(1, positions).logits
    assert kept.shape == (5, 3, 3)
    np.testing.assert_array_equal(np.sort(kept, axis=1), np.sort(parts.transpose(1, 0, 2), axis=1))


def test_an_ensemble_of_one_is_that_archive(dump: Dump) -> None:
    one = Ensemble([dump.archive], "probabilities")
    assert (one.digest, one.name, one.location) == (dump.archive.manifest.digest, dump.archive.name, dump.archive.location)
    assert one.views == dump.archive.views
    np.testing.assert_array_equal(one.take(1, np.arange(23)).logits, dump.logits[1])
    blocks = zip(one.spread_logits(), dump.archive.spread_logits(), strict=True)
    assert all(np.array_equal(x, y) for x, y in blocks)


def test_an_ensembles_identity_is_its_members_in_any_order_and_the_average(make: Callable[..., Archive]) -> None:
    a, b, c = make(1), make(2), make(3)
    assert Ensemble([a, b]).digest == Ensemble([b, a]).digest
    digests = {Ensemble(members, how).digest for members in ([a, b], [a, c], [a, b, c]) for how in ("logits", "probabilities")}
    assert len(digests) == 6
    assert Ensemble([b, a]).name == "seed1+seed2"
    x = [Ensemble(members).take(0, np.arange(23)).logits for members in ([a, b, c], [c, a, b])]
    np.testing.assert_array_equal(*x)


def test_long_names_are_cut(dump: Dump, tmp_path: Path) -> None:
    archives = [redump(tmp_path / (str(seed) * 90), dump, made_up(seed, dump)) for seed in (1, 2)]
    name = Ensemble(archives).name
    assert len(name) < 128
    assert name.startswith("1" * 90 + "+2")


def test_an_ensemble_crosses_into_another_process(make: Callable[..., Archive]) -> None:
    ensemble = Ensemble([make(1), make(2)], "probabilities")
    again = pickle.loads(pickle.dumps(ensemble))
    assert (again.digest, again.average, again.views) == (ensemble.digest, "probabilities", range(3))
    np.testing.assert_array_equal(again.take(2, np.arange(5)).logits, ensemble.take(2, np.arange(5)).logits)


def test_students_see_the_views_that_all_archives_have(make: Callable[..., Archive]) -> None:
    members = [make(1), make(2, views=range(1, 3))]
    ensemble = Ensemble(members)
    assert (ensemble.views, ensemble.num_views) == (range(1, 3), 2)
    assert sum(len(block) for block in ensemble.spread_logits()) == 46
    mean = np.mean([archive.take(2, np.arange(5)).logits for archive in members], axis=0, dtype=np.float64)
    np.testing.assert_array_equal(ensemble.take(2, np.arange(5)).logits, mean.astype(np.float32))


def test_the_same_archive_twice_is_refused(make: Callable[..., Archive]) -> None:
    with pytest.raises(UsageError, match="hold the same logits"):
        Ensemble([make(1), make(1, shard_rows=None)])


def test_an_unknown_average_is_refused(dump: Dump) -> None:
    with pytest.raises(UsageError, match="close to it: logits"):
        Ensemble([dump.archive], "logit")  # type: ignore[arg-type]

"""The README's first command: it works, ends in a table and a report, and a second run reuses everything."""

from dataclasses import replace

import pytest

from kdcache.datasets.digits import Digits


@pytest.mark.slow
def test_quickstart_ends_in_a_table_and_a_report(tmp_path, kdcache, monkeypatch):
    # One epoch of four, one seed of two, a teacher that learns little, and an eighth of the digits: all of it takes minutes.
    monkeypatch.setattr("kdcache.quickstart.EPOCHS", 1)
    monkeypatch.setattr("kdcache.quickstart.SEEDS", (0,))
    monkeypatch.setattr(Digits, "recipe", replace(Digits.recipe, teacher_epochs=1))
    samples = Digits.samples
    monkeypatch.setattr(Digits, "samples", lambda self, split: samples(self, split)[: {"train": 160, "test": 40}[split]])
    first = kdcache("quickstart", "--home", tmp_path)
    assert first.status == 0, first.err
    assert all(name in first.out for name in ("none", "ls-global", "ls-instance", "bottom:3", "tau 1", "tau 4", "tau 20"))
    report = tmp_path / "reports/quickstart/index.html"
    assert first.out.splitlines()[-1] == str(report)
    assert report.stat().st_size > 50_000
    summaries = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/*/summary.json")}
    assert len(summaries) == 12

    second = kdcache("quickstart", "--home", tmp_path)
    assert second.status == 0
    assert second.out == first.out
    assert "nothing to do" in second.err
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/*/summary.json")} == summaries

    literal = kdcache("distill", "--tau", "20", "--dry-run", "--home", tmp_path)
    assert literal.status == 0
    assert "test_resnet kd tau 20 none seed 0" in literal.out

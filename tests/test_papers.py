"""`pipelines/PAPERS.md`: every study has its place in a paper, and every place names a study and a section that exist."""

import re
from pathlib import Path

import pytest

from kdcache.study.schema import load_study, shipped

HERE = Path(__file__).parents[1]
NONE = "\N{EN DASH}"  # in the place of a study or section
OWN = {"quickstart"}  # a study of kdcache's own
HEADINGS = set(re.findall(r"<h2[^>]*>([^<]+)</h2>", (HERE / "kdcache/report/template.html.j2").read_text()))


def rows() -> list[tuple[str, str, str, str, str]]:
    """(paper, item, study or "", where, expected)."""
    found, paper = [], ""
    for line in (HERE / "pipelines/PAPERS.md").read_text().splitlines():
        if line.startswith("## "):
            paper = line[3:]
        elif line.startswith("| ") and not line.startswith("| item |"):
            item, study, where, expected = (cell.strip() for cell in line.strip("|").split("|"))
            found.append((paper, item, study.strip("`") if study != NONE else "", where, expected))
    return found


def test_every_study_has_a_row_and_every_row_a_study_or_a_reason() -> None:
    named = {study for _, _, study, _, _ in rows() if study}
    assert named == set(shipped()) - OWN


@pytest.mark.parametrize(("paper", "item", "study", "where", "expected"), rows(), ids=lambda text: re.sub(r"\W+", "_", text)[:24])
def test_a_row_says_where_its_report_shows_it(paper: str, item: str, study: str, where: str, expected: str) -> None:
    assert paper
    assert len(expected) > 8, "a number of the paper's, or the reason why not"
    if not study:
        assert where == NONE
        return
    place, _, heading = where.partition(": ")
    assert (place, heading) == ("stats", "") or (place == "report" and heading in HEADINGS)
    if place == "stats":
        assert load_study(HERE / f"pipelines/studies/{study}.yaml").stats is not None


def test_papers_numbers_are_of_students_that_their_study_trains() -> None:
    """A number of a paper that no run of its study can stand beside would never be shown."""
    for name in shipped():
        study = load_study(HERE / f"pipelines/studies/{name}.yaml")
        students = {student for block in study.students for student in block.student}
        teachers = {teacher for archive in study.archives.values() for teacher in archive.teacher}
        for table in study.published:
            for line in [dict(zip(table.by, row, strict=False)) | dict(table.of) for row in table.rows]:
                columns = set(table.across.get("student", ())) | {line.get("student")} - {None}
                assert columns <= students, (name, table.table, line)
                assert line.get("teacher") in {*teachers, None}, (name, table.table, line)

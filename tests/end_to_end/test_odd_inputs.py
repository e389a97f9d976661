"""Odd input to the command line: an exit status that says whose fault it is, three lines, and nothing lost or left behind."""

import pytest

from tests.end_to_end.conftest import DUMP, start
from tests.end_to_end.forks import Started

TEACHER = ["train-teacher", "--dataset", "digits", "--epochs", "1"]


def three_lines(result, words=""):
    assert "Traceback" not in result.err
    lines = result.err.splitlines()[-3:]
    assert [line.split(":")[0] for line in lines] == ["error", "why", "fix"], result.err
    assert words in " ".join(lines)


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--teacher", "test_vit", "--size", "30"], 5, "30 px"),
        (["--teacher", "inception_v3"], 5, "32 px"),
        (["--teacher", "resnet18.bogus"], 3, "resnet18.tv_in1k"),
        (["--teacher", "test_vit", "--device", "meta"], 2, "'meta'"),
        (["--teacher", "test_vit", "--device", "toaster"], 2, "'toaster'"),
        (["--teacher", "test_vit", "--device", "cuda:77"], 2, "'cuda:77'"),
        (["--teacher", "test_vit", "--seed", str(1 << 64)], 2, "--seed"),
        (["--teacher", "test_vit", "--seed", "-1"], 2, "--seed"),
        (["--teacher", "test_vit", "--lr", "0"], 2, "--lr '0'"),
        (
            ["--teacher", "test_resnet", "--batch-size", "1"],
            2,
            "'--batch-size' / '-b': Input should be greater than or equal to 2",
        ),
    ],
)
def test_a_teacher_that_cannot_be_trained_leaves_nothing_behind(trained, tmp_path, kdcache, arguments, status, words):
    home = tmp_path / "home"
    result = kdcache(*TEACHER, *arguments, "--home", home, "--data-dir", trained / "data")
    assert result.status == status
    three_lines(result, words)
    assert not (home / "teachers").exists()


@pytest.mark.parametrize("seed", [str(1 << 64), "0-99999999999", "3-1", "-1", "1,,2"])
def test_seeds_are_numbers_of_64_bits_in_ascending_ranges(trained, kdcache, seed):
    result = kdcache("distill", f"--seed={seed}", "--dry-run", "--home", trained)
    assert result.status == 2
    three_lines(result, f"--seed '{seed}'")
    assert "seed 18446744073709551615" in kdcache("distill", "--seed", (1 << 64) - 1, "--dry-run", "--home", trained).out


@pytest.mark.parametrize("command", [[*DUMP, "--views", "9"], ["distill"]])
def test_a_device_that_computes_nothing_is_refused(trained, kdcache, command):
    result = kdcache(*command, "--device", "meta", "--home", trained)
    assert result.status == 2
    three_lines(result, "'meta'")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00tau", "caf\xe9: 1".encode("latin-1"), b"[" * 5000, b"tau: [1", b"\x00\x01"])
def test_a_configuration_that_is_no_text_is_a_usage_error(trained, tmp_path, kdcache, content):
    config = tmp_path / "study.yaml"
    config.write_bytes(content)
    for file in (config, tmp_path):
        result = kdcache("distill", "--config", file, "--dry-run", "--home", trained)
        assert result.status == 2
        three_lines(result, str(file))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--out", "."],
        ["--out", "no/such/folder.png"],
        ["--sample", "5-2"],
        ["--sample", "1438"],
        ["--views", "-1:3"],
        ["--views", "2:1"],
    ],
)
def test_a_sheet_that_cannot_be_drawn_is_a_usage_error(trained, tmp_path, kdcache, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    result = kdcache("view", next((trained / "archives").iterdir()), *arguments, "--home", trained)
    assert result.status == 2
    three_lines(result, arguments[1])
    assert not list(tmp_path.iterdir())


def test_without_a_command_the_help_is_shown(kdcache):
    result = kdcache()
    assert result.status == 2
    assert "dump-teacher" in result.out
    assert result.err == ""


@pytest.mark.parametrize(
    "command",
    [
        ["info"],
        *(pytest.param(other, marks=pytest.mark.exhaustive) for other in (["models", "*"], ["info", "--json"], ["--help"])),
    ],
)
def test_a_reader_that_has_seen_enough_is_no_error(trained, command):
    if command[0] == "info":
        command = [*command, str(next((trained / "archives").iterdir()))]
    process = start(*command)
    assert process.stdout is not None
    process.stdout.close()  # before the first line, as the shortest `| head` there is
    assert process.wait(timeout=120) == 0
    assert process.stderr is not None
    assert process.stderr.read() == ""


def test_work_goes_on_when_nobody_reads_its_notes(home, tmp_path):
    process = Started("verify", next((home / "archives").iterdir()), "--replay", 3, "--home", home)
    process.stderr.close()
    assert "replay 3: ok" in process.stdout.read()
    assert process.wait(timeout=120) == 0

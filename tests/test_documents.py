"""Protects all commands from documents that are small and mean much: each is refused in three lines, quickly, with its line."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from kdcache.cli import run
from kdcache.datasets.tars import in_tar, members
from kdcache.errors import KdcacheError
from kdcache.models.classes import read_classes
from kdcache.models.names import resolve
from kdcache.system.documents import DocumentError, parse_json, parse_yaml, read_json, read_yaml
from kdcache.views.policy import ViewPolicy
from kdcache.workspace import read_record

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 10)}]\n" for n in range(9)
)
MERGED = "a0: &a0 {x: 1}\n" + "".join(
    f"a{n + 1}: &a{n + 1} {{{', '.join(f'k{i}: *a{n}' for i in range(10))}}}\n" for n in range(9)
)
HOSTILE_YAML = {
    "bomb": (BOMB, "stands for more than"),
    "mappings": (MERGED, "stands for more than"),
    "itself": ("a: &a [1, *a]", "a part of"),
    "deep": ("a: " + "[" * 5000 + "]" * 5000, "nested"),
    "deep blocks": ("- " * 3000 + "x", "nested"),
    "digits": ("seed: " + "9" * 5000, "5,000 digits"),
    "hexadecimal": ("seed: 0x" + "f" * 5000, "digits"),
    "sixties": ("seed: 1" + ":59" * 2000, "digits"),
    "nul": ('name: "a\\0b"', "U+0000"),
    "raw nul": ("name: a\0b", ""),
    "surrogate": ('name: "\\ud800"', ""),
    "twice": ("seed: 1\nsize: 3\nseed: 2", "line 3: 'seed' is there twice"),
    "latin-1": (b"a: 1\nname: \xe4\n", "line 2"),
    "utf-16": ("seed: 1".encode("utf-16"), "UTF-8"),
    "tag": ("!!python/object/apply:os.system ['true']", "line 1"),
    "date": ("when: 2024-13-45", ""),
    "unclosed": ("a: [1, 2\nb: 3", "line "),
    "two": ("a: 1\n---\nb: 2", "line "),
    "unhashable": ("{[1]: 2, {a: 1}: 3}", ""),
}
HOSTILE_JSON = {
    "deep": ("[" * 200_000, "nested"),
    "deeper than its limit": ("[" * 200 + "]" * 200, "nested"),
    "digits": ('{"a": ' + "9" * 5000 + "}", "5,000 digits"),
    "nul": ('{"a": "x\\u0000"}', "U+0000"),
    "surrogate": ('{"a": "\\ud83d"}', "U+D83D"),
    "surrogate in a name": ('{"\\udc00": 1}', "U+DC00"),
    "twice": ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' is there twice"),
    "latin-1": (b'{"a":\n "\xe4"}', "line 2"),
    "cut off": ('{"a": [1,\n', "line 2"),
    "nothing": ("", "line 1"),
}


@pytest.mark.parametrize("kind", HOSTILE_YAML)
def test_yaml_beyond_the_limits_is_refused_with_its_line(kind: str, tmp_path: Path) -> None:
    text, why = HOSTILE_YAML[kind]
    (tmp_path / "a.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DocumentError) as caught:
        read_yaml(tmp_path / "a.yaml")
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("kind", HOSTILE_JSON)
def test_json_beyond_the_limits_is_refused(kind: str, tmp_path: Path) -> None:
    text, why = HOSTILE_JSON[kind]
    (tmp_path / "a.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DocumentError) as caught:
        read_json(tmp_path / "a.json")
    assert why in str(caught.value)
    assert len(str(caught.value)) < 300


def test_what_people_write_is_read_as_it_is() -> None:
    text = (
        "base: &b {lr: 0.1, tau: [1, 4]}\nother: {<<: *b, lr: 0.2}\nwhen: 2024-01-02\nname: Müller 😀\nbig: 18446744073709551615"
    )
    value = parse_yaml("\ufeff".encode() + text.encode())
    assert value["other"] == {"lr": 0.2, "tau": [1, 4]}
    assert (value["name"], value["big"]) == ("Müller 😀", 2**64 - 1)
    nested: dict[str, object] = {"a": ["\U0001f600", {"b": None}], "c": 1e300}
    assert parse_json(json.dumps(nested)) == nested
    assert parse_json("NaN") != 0
    with pytest.raises(DocumentError, match="NaN"):
        parse_json("NaN", finite=True)
    assert parse_yaml("") is None
    assert len(parse_json(json.dumps([{}] * 1000))) == 1000


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.yaml")
    with pytest.raises(DocumentError, match="not a regular file"):
        read_yaml(tmp_path / "a.yaml")
    with pytest.raises(DocumentError, match="folder"):
        read_json(tmp_path)
    with (tmp_path / "large").open("wb") as large:
        large.truncate(1 << 40)
    with pytest.raises(DocumentError, match="more than 67,108,864 bytes"):
        read_json(tmp_path / "large")


@pytest.mark.parametrize("kind", HOSTILE_YAML)
def test_configurations_policies_and_studies_refuse_them(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, _ = HOSTILE_YAML[kind]
    file = tmp_path / "a.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    for command in (
        ["distill", "--config", str(file), "--home", str(tmp_path)],
        ["policy", str(file)],
        ["study", "plan", str(file), "--home", str(tmp_path)],
    ):
        assert run(command) == 2, command
        said = capsys.readouterr().err
        assert str(file) in said
        assert "bug in kdcache" not in said
        assert "Traceback" not in said
    run_folder = tmp_path / "runs" / "one"
    run_folder.mkdir(parents=True)
    (run_folder / "args.yaml").write_bytes(file.read_bytes())
    (run_folder / "summary.json").write_text("{}")
    assert run(["report", str(tmp_path / "runs"), "--home", str(tmp_path)]) in {2, 3, 4}
    assert "args.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("kind", HOSTILE_JSON)
def test_records_models_and_classes_refuse_them(kind: str, tmp_path: Path) -> None:
    text, _ = HOSTILE_JSON[kind]
    data = text if isinstance(text, bytes) else text.encode()
    for name in ("config.json", "record.json", "model.safetensors", "classes.json"):
        (tmp_path / name).write_bytes(data)
    reads = [lambda: resolve(f"local-dir:{tmp_path}"), lambda: read_record(tmp_path / "record.json")]
    if data.strip():
        reads.append(lambda: read_classes(tmp_path / "classes.json", ("a", "b")))
    for read in reads:
        with pytest.raises(KdcacheError) as caught:
            read()
        assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize("value", [BOMB.replace("\n", " "), "9" * 5000, "[" * 3000, '"\\0"'])
def test_values_on_the_command_line_are_read_within_limits(value: str) -> None:
    with pytest.raises(KdcacheError):
        ViewPolicy.draft(f"pets:hflip={value}")


# ---------------------------------------------------------------- names and outputs that are no text


def command(*arguments: str | bytes | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "kdcache", *arguments], cwd=cwd, env=os.environ | environment, capture_output=True, check=False
    )


def test_an_output_in_ascii_has_escapes_for_other_characters(tmp_path: Path) -> None:
    name = "schön-😀"
    for environment in ({"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}):
        home = tmp_path / name
        made = command("quickstart", "--dry-run", "--home", home, cwd=tmp_path, **environment)
        listed = command("policy", "pets:nothing=ü", cwd=tmp_path, **environment)
        for result in (made, listed):
            assert result.returncode in {0, 2}, result.stderr
            assert b"Traceback" not in result.stderr
            assert b"bug in kdcache" not in result.stderr


def test_a_workspace_whose_path_is_no_text_is_refused_in_one_error_and_a_link_to_it_works(tmp_path: Path) -> None:
    place = os.fsencode(tmp_path) + b"/w\xff"
    Path(os.fsdecode(place)).mkdir()
    for result in (
        command("ls", "--home", place, cwd=tmp_path),
        command("ls", cwd=Path(os.fsdecode(place))),
        command("ls", cwd=tmp_path, KDCACHE_HOME=os.fsdecode(place)),
        command("info", place + b"/archive", cwd=tmp_path),
        command("report", place, "--home", tmp_path, cwd=tmp_path),
    ):
        assert result.returncode == 2
        assert len(result.stderr.splitlines()) == 3
        assert b"is not UTF-8 text" in result.stderr
        assert b"ln -s" in result.stderr
    (tmp_path / "link").symlink_to(Path(os.fsdecode(place)))
    assert command("ls", "--home", tmp_path / "link", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize("kind", ["sparse", "beyond the end", "long name", "pax"])
def test_a_tar_member_that_claims_to_be_huge_is_refused_before_memory_is_taken(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "a.tar"
    info = tarfile.TarInfo("huge.png")
    info.size = 8 << 30
    info.type = {"long name": tarfile.GNUTYPE_LONGNAME, "pax": tarfile.XHDTYPE}.get(kind, tarfile.REGTYPE)
    file.write_bytes(info.tobuf(tarfile.GNU_FORMAT))
    with file.open("r+b") as opened:
        opened.truncate(4096 if kind == "beyond the end" else (8 << 30) + 2048)
    with pytest.raises(KdcacheError) as caught:
        list(map(in_tar, members(file)))
    assert str(file) in caught.value.what
    assert "8,589,934,592" in str(caught.value)
    assert ("huge.png" in str(caught.value)) == (kind in {"sparse", "beyond the end"})

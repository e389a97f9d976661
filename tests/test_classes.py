"""Which output is which class: by name, WordNet id, synonym, or as a file says; and what is refused, by name."""

import json
import random
import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from timm.data import ImageNetInfo

from kdcache.errors import KdcacheError
from kdcache.models.classes import WNID, ClassMap, Outputs, imagenet, labelled, match, read_classes
from kdcache.teachers.as_is import take
from kdcache.teachers.config import TeacherAndData

THOUSAND = imagenet(1000)
assert THOUSAND is not None


def found(names: list[str], outputs: Outputs) -> list[int]:
    result = match(names, outputs)
    assert result.certain, result
    return [result.outputs[name] for name in names]


@pytest.mark.parametrize(
    ("count", "first", "tench"), [(1000, "n01440764", 0), (1001, "background", 1), (21841, "n00004475", None)]
)
def test_imagenets_classes_are_known_by_their_number(count: int, first: str, tench: int | None) -> None:
    known = imagenet(count)
    assert known is not None
    assert (len(known), known.names[0]) == (count, first)
    expected = known.names.index("n01440764") if tench is None else tench
    for name in ("n01440764", "tench", "Tinca_tinca", "TENCH", "tench, Tinca tinca", "n01440764-tench"):
        assert found([name], known) == [expected]


def test_numbers_of_classes_that_say_nothing() -> None:
    assert imagenet(10) is None
    assert imagenet(512) is None


@given(st.integers(2, 200), st.randoms(use_true_random=False))
def test_any_part_of_imagenet_is_found_by_ids_in_any_order(count: int, rng: random.Random) -> None:
    outputs = rng.sample(range(1000), count)
    names = [THOUSAND.names[output] for output in outputs]
    assert found(names, THOUSAND) == outputs
    assert found(names, imagenet(1001)) == [output + 1 for output in outputs]  # type: ignore[arg-type]


@given(st.sampled_from([str.upper, str.title, lambda s: s.replace(" ", "_"), lambda s: s.replace("-", " "), lambda s: f" {s} "]))
def test_synonyms_are_found_however_they_are_written(written: object) -> None:
    assert callable(written)
    info = ImageNetInfo()
    words: dict[str, set[int]] = {}
    for output, described in enumerate(info.label_descriptions()):
        for word in described.split(", "):
            words.setdefault("".join(c for c in word.casefold() if c.isalnum()), set()).add(output)
    for output in (0, 1, 2, 701, 999):
        for word in info.index_to_description(output).split(", "):
            result = match([written(word)], THOUSAND)
            fitting = words["".join(c for c in word.casefold() if c.isalnum())]
            assert result.certain == (len(fitting) == 1)
            if result.certain:
                assert result.outputs == {written(word): output}


def test_imagenette_by_plain_names() -> None:
    names = ["tench", "English springer", "cassette_player", "chain-saw", "church", "French horn", "garbage truck", "gas pump"]
    names += ["golf ball", "parachute"]
    assert found(names, THOUSAND) == [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]


def test_words_of_several_classes_are_ambiguous_unless_the_others_are_taken() -> None:
    assert match(["crane", "tench"], THOUSAND).ambiguous == {"crane": (134, 517)}
    assert match(["maillot"], THOUSAND).ambiguous == {"maillot": (638, 639)}
    assert found(["maillot", "maillot, tank suit"], THOUSAND) == [638, 639]
    assert match(["tench", "Tinca tinca"], THOUSAND).doubled == (("tench", "Tinca tinca"),)
    assert match(["dress", "tench"], THOUSAND).missing == ("dress",)
    assert not match(["", "___"], THOUSAND).certain


def test_labels_that_are_imagenets_in_words_are_known_by_ids() -> None:
    described = THOUSAND.described
    assert labelled(described).names == THOUSAND.names
    assert labelled([text.partition(",")[0] for text in described]).names == THOUSAND.names
    assert labelled(["background", *described]).names[:2] == ("background", "n01440764")
    assert labelled([f"{name} {text}" for name, text in zip(THOUSAND.names, described, strict=True)]) == THOUSAND
    other = list(described)
    other[3], other[4] = other[4], other[3]
    assert labelled(other).names == tuple(other)
    assert labelled(["Paris, France", "Paris, Texas"]).names == ("Paris, France", "Paris, Texas")
    assert match(["France"], labelled(["Paris, France", "Paris, Texas"])).missing == ("France",)


def test_a_mapping_is_shown_and_survives_its_record() -> None:
    names = ("mouse", "n01440764", "goldfish", "garbage truck", "ear")
    mapping = ClassMap.of(names, match(names, THOUSAND), THOUSAND, 1000)
    assert ClassMap.recorded(names, json.loads(json.dumps(mapping.record()))) == mapping
    assert mapping.lines() == [
        "classes: 5 of 1000 outputs, 4 by name, 1 by WordNet id; 995 outputs are not used",
        "  mouse -> output 673 (n03793489 mouse)",
        "  n01440764 tench -> output 0",
        "  goldfish -> output 1 (n01443537 goldfish)",
        "  ...",
        "  ear -> output 998 (n13133613 ear)",
        "  1 taken by a name that has other meanings too: mouse -> output 673 (n03793489 mouse)",
    ]
    assert not mapping.whole
    assert ClassMap.in_order(names).whole
    assert ClassMap(names, (1, 0, 2, 3, 4), 5).digest != ClassMap(names, (0, 1, 2, 3, 4), 5).digest


# ---------------------------------------------------------------- --classes


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a\nb c\nd\n", ("a", "b c", "d")),
        ("\ufeffa\r\nb c\r\nd", ("a", "b c", "d")),
        ('["a", "b c", "d"]', ("a", "b c", "d")),
        ('{"1": "b c", "0": "a", "2": "d"}', ("a", "b c", "d")),
        ('{"0": ["n01440764", "tench"], "1": ["n01443537", "goldfish"]}', ("n01440764", "n01443537")),
        ("n01440764 tench, Tinca tinca\nn01443537\n", ("n01440764", "n01443537")),
    ],
)
def test_a_file_names_all_outputs(tmp_path: Path, text: str, names: tuple[str, ...]) -> None:
    (tmp_path / "classes").write_text(text, "utf-8")
    stated = read_classes(tmp_path / "classes", ("x", "y"))
    assert stated.outputs is not None
    assert stated.outputs.names == names
    if WNID.fullmatch(names[0]):
        assert found(["goldfish", "tench"], stated.outputs) == [1, 0]


def test_a_file_says_which_output_a_class_is(tmp_path: Path) -> None:
    file = tmp_path / "classes.json"
    file.write_text('{"crane": 517, "bird": "n02012849", "fish": "Tinca tinca"}')
    stated = read_classes(file, ("crane", "bird", "fish", "goldfish"))
    chosen = stated.resolved(THOUSAND, 1000, file)
    assert chosen == {"crane": 517, "bird": 134, "fish": 0}
    assert match(["goldfish", "crane", "bird", "fish"], THOUSAND, chosen).outputs["goldfish"] == 1
    file.write_text('{"0": 7, "1": 3}')  # of digits, whose names are numbers
    assert read_classes(file, ("0", "1", "2")).chosen == {"0": 7, "1": 3}


def test_lists_are_known_by_name() -> None:
    stated = read_classes(Path("imagenet-1k"), ("x",))
    assert stated.outputs == THOUSAND
    assert read_classes(Path("dataset"), ("x",)).in_order


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "does not exist"),
        (b"caf\xe9\n", "is not UTF-8 text"),
        (b"", "is empty"),
        (b"a\n\nb\n", "no name in line 2 of 3"),
        (b'{"a": 1', "is not JSON"),
        (b'{"a": 1, "a": 2}', "has 'a' twice"),
        (b'{"c": 1}', "has the class 'c'"),
        (b'{"a": 1.5}', "has 1.5 for 'a'"),
        (b'{"a": true}', "has true for 'a'"),
        (b'{"0": "x", "2": "y"}', "not those from 0 to 1"),
        (b"[1, 2]", "has 1 for an output's name"),
        (b'{"a": 1000}', "'a' is output 1000"),
        (b'{"a": -1}', "'a' is output -1"),
        (b'{"a": "tencch"}', "'tench'"),
        (b'{"a": "crane"}', "2 outputs are called so: 134 (n02012849 crane), 517 (n03126707 crane)"),
        (b"[" * 100_000, "is not JSON"),
    ],
)
def test_files_that_make_no_sense_are_refused(tmp_path: Path, text: bytes | None, words: str) -> None:
    file = tmp_path / "classes"
    if text is not None:
        file.write_bytes(text)
    with pytest.raises(KdcacheError) as caught:
        read_classes(file, ("a", "b")).resolved(THOUSAND, 1000, file)
    assert words in str(caught.value)
    assert str(caught.value).count("\n") == 2


def test_a_folder_is_no_file_of_classes(tmp_path: Path) -> None:
    with pytest.raises(KdcacheError, match="is a folder"):
        read_classes(tmp_path, ("a",))


def test_the_advice_to_finetune_can_be_pasted_whatever_the_dataset_is_called() -> None:
    subject = TeacherAndData(teacher="resnet18", dataset="folder:/my images/of $it")
    with pytest.raises(KdcacheError) as caught:
        take("resnet18.a1_in1k", ("this", "that"), subject, "timm", checkpoint=None, classes=None, input_size=224)
    words = shlex.split(caught.value.fix.partition("finetune them: ")[2].partition(";")[0])
    assert words[:6] == ["kdcache", "train-teacher", "--teacher", subject.teacher, "--dataset", subject.dataset]

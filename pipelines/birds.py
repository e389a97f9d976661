"""Build the two sets of birds of the study `granularity`, which were never published, from ImageNet and a set of birds of yours.

    python pipelines/birds.py --imagenet imagenet --birds folder:CUB/images --dry-run

imagenet-birds: 52 of ImageNet-1K's 59 classes below WordNet's bird.n.01, by WordNet id; 30 training and 20 test images each, out
of the 50 of the validation split, which ImageNet's weights have not been trained on.
finer-grained-birds: 52 classes of your sets that are a finer kind of one of those, such as "king vulture", and none of them
themselves: their names end with one of its names. Classes whose kind has several come first, as with the study's magpies and
vultures.

Which 52 classes and which images the paper took is not known: these are chosen by the rules above, and the images by a hash of
their keys. Sources are datasets as kdcache names them; of yours, the images of both splits are taken together.
"""

import argparse
import hashlib
import io
import json
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from kdcache.datasets import Sample, Split
from kdcache.errors import KdcacheError, NotFoundError, UsageError
from kdcache.models.classes import imagenet, spoken
from kdcache.system.files import translated_os_errors
from kdcache.workspace import Workspace, parse_dataset

CLASSES, TRAIN, TEST = 52, 30, 20
SPLITS = {"train": TRAIN, "test": TEST}
COARSE, FINE = "imagenet-birds", "finer-grained-birds"
# All synsets of ImageNet-1K below bird.n.01 (n01503061) in WordNet 3.0.
# fmt: off
BIRDS = (
    "n01514668", "n01514859", "n01518878", "n01530575", "n01531178", "n01532829", "n01534433", "n01537544", "n01558993",
    "n01560419", "n01580077", "n01582220", "n01592084", "n01601694", "n01608432", "n01614925", "n01616318", "n01622779",
    "n01795545", "n01796340", "n01797886", "n01798484", "n01806143", "n01806567", "n01807496", "n01817953", "n01818515",
    "n01819313", "n01820546", "n01824575", "n01828970", "n01829413", "n01833805", "n01843065", "n01843383", "n01847000",
    "n01855032", "n01855672", "n01860187", "n02002556", "n02002724", "n02006656", "n02007558", "n02009229", "n02009912",
    "n02011460", "n02012849", "n02013706", "n02017213", "n02018207", "n02018795", "n02025239", "n02027492", "n02028035",
    "n02033041", "n02037110", "n02051845", "n02056570", "n02058221",
)
# fmt: on
SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp"}  # whose files are kept as they are


@dataclass(frozen=True)
class Found:
    """An image of one of the sources, by its number; keys are those of a split."""

    source: int
    split: str
    sample: Sample

    @property
    def key(self) -> str:
        return f"{self.source}/{self.split}/{self.sample.key}"


@dataclass(frozen=True)
class Class:
    """A class to be built: the name of its folder, what it is finer than, if anything, and all images that there are of it."""

    name: str
    samples: tuple[Found, ...]
    kind: str = ""

    def chosen(self, seed: int) -> dict[str, list[Found]]:
        """The images of each split."""

        def drawn(found: Found) -> str:
            return hashlib.sha256(f"{seed} {found.key}".encode()).hexdigest()

        ordered = sorted(self.samples, key=drawn)
        return {"train": ordered[:TRAIN], "test": ordered[TRAIN : TRAIN + TEST]}


@dataclass(frozen=True)
class Plan:
    """The classes of one set, and lines about what there is too little of."""

    name: str
    sources: tuple[str, ...]
    classes: tuple[Class, ...]
    notes: tuple[str, ...]

    @property
    def missing(self) -> int:
        return CLASSES - len(self.classes)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], epilog=(__doc__ or "").partition("\n\n")[2])
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--imagenet", default="imagenet", help="ImageNet-1K, as kdcache names a dataset [imagenet]")
    parser.add_argument(
        "--birds", action="append", default=[], help="a set of birds of yours, such as folder:ROOT; several times: all"
    )
    parser.add_argument("--out", type=Path, default=Path(), help=f"folder in which {COARSE}/ and {FINE}/ are made [.]")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of images [0]")
    parser.add_argument("--dry-run", action="store_true", help="say what would be made and what is missing; make nothing")
    parser.add_argument("--home", type=Path, default=Path(), help="workspace of kdcache, where datasets are looked for [.]")
    parser.add_argument("--data-dir", type=Path, default=None, help="folder of datasets [HOME/data]")
    given = parser.parse_args(arguments)
    try:
        return build(given)
    except KdcacheError as error:
        print(error, file=sys.stderr)
        return error.exit_code


def build(given: argparse.Namespace) -> int:
    """Plan both sets, say what they are, and make them."""
    if not given.birds:
        raise UsageError(
            "no set of birds is named",
            why=f"{FINE} is made of a finer set than ImageNet's, such as CUB-200-2011",
            fix="name one, such as folder:ROOT, where ROOT/train holds a folder for each kind of bird",
        )
    data = Workspace(given.home, given.data_dir).data
    plans = [coarse(given.imagenet, data), fine(given.birds, data)]
    for plan in plans:
        print(f"{plan.name}: {len(plan.classes)} of {CLASSES} classes of {TRAIN} + {TEST} images")
        for each in plan.classes:
            print(
                f"  {each.name}"
                + (f" (a kind of {each.kind})" if each.kind else "")
                + f": {len(each.samples)} images to choose from"
            )
        for note in plan.notes:
            print(f"  missing: {note}")
    short = [plan for plan in plans if plan.missing > 0]
    if short:
        raise NotFoundError(
            "; ".join(f"{plan.name} lacks {plan.missing} of {CLASSES} classes" for plan in short),
            why="see the lines `missing:` above; a class needs 50 images",
            fix="name a whole ImageNet, or further sets of birds beside this one",
        )
    if given.dry_run:
        print("a dry run: nothing was made")
        return 0
    for plan in plans:
        make(plan, given.out / plan.name, given.seed)
    return 0


# ---------------------------------------------------------------- what there is


def coarse(spec: str, data: Path) -> Plan:
    """ImageNet's own birds, of its validation split."""
    by_name = _samples(spec, 0, data, ("test",))
    found = {wnid: name for name in by_name if (wnid := name[:9]) in BIRDS}
    if not found:
        raise UsageError(
            f"{spec} has none of ImageNet's birds",
            why="its classes are to be called by their WordNet ids, such as n01582220",
            fix="name imagenet, or folder:ROOT with ROOT/train/n01582220/ and ROOT/val/n01582220/",
        )
    enough, notes = [], []
    for wnid in BIRDS:
        samples = by_name.get(found.get(wnid, ""), ())
        if len(samples) >= TRAIN + TEST:
            enough.append(Class(f"{wnid}-{_folder(spoken(wnid))}", tuple(samples)))
        else:
            notes.append(
                f"{wnid} {spoken(wnid)}: {len(samples)} images in the validation split of {spec}, {TRAIN + TEST} are needed"
            )
    return Plan(COARSE, (spec,), tuple(enough[:CLASSES]), tuple(notes))


def fine(specs: Sequence[str], data: Path) -> Plan:
    """Finer kinds of ImageNet's birds, of all sets together."""
    pooled: dict[str, list[Found]] = defaultdict(list)
    sources = tuple(dict.fromkeys(specs))
    for number, spec in enumerate(sources):
        for name, samples in _samples(spec, number, data, ("train", "test")).items():
            pooled[_plain(name)] += samples
    kinds = {name: kind for name in pooled if (kind := kind_of(name))}
    enough = [name for name in kinds if len(pooled[name]) >= TRAIN + TEST]
    of_kind = {kind: [name for name in enough if kinds[name] == kind] for kind in kinds.values()}
    ordered = sorted(enough, key=lambda name: (len(of_kind[kinds[name]]) < 2, kinds[name], name))[:CLASSES]
    notes = [
        f"{name} (a kind of {kinds[name]}): {len(pooled[name])} images in all, {TRAIN + TEST} are needed"
        for name in sorted(kinds)
        if name not in enough
    ]
    if without := sorted({spoken(wnid) for wnid in BIRDS} - set(kinds.values())):
        notes.append(f"finer kinds of {', '.join(without)}")
    if others := len(pooled) - len(kinds):
        notes.append(f"{others} classes of yours are no finer kind of any of ImageNet's birds, or are one of them")
    return Plan(FINE, sources, tuple(Class(_folder(name), tuple(pooled[name]), kinds[name]) for name in ordered), tuple(notes))


def kind_of(name: str) -> str:
    """The bird of ImageNet's that a class in plain words is a finer kind of; empty if there is none, or if it is one itself."""
    words = _words()
    fitting = [word for word in words if name.endswith(f" {word}")]
    return "" if name in words or not fitting else words[max(fitting, key=len)]


def _words() -> dict[str, str]:
    """Every name of ImageNet's birds in plain words, and the first name of its synset."""
    known = imagenet("imagenet-1k")
    assert known is not None
    by_id = dict(zip(known.names, known.described, strict=True))
    return {_plain(word): spoken(wnid) for wnid in BIRDS for word in by_id[wnid].split(", ")}


def _samples(spec: str, number: int, data: Path, splits: Iterable[Split]) -> Mapping[str, Sequence[Found]]:
    """The images of each class."""
    images = parse_dataset(spec).open(data, fetch=False)
    names = list(images.class_names())
    by_name: dict[str, list[Found]] = {name: [] for name in names}
    for split in splits:
        for sample in images.samples(split):
            by_name[names[sample.label]].append(Found(number, split, sample))
    return by_name


def _plain(name: str) -> str:
    """A class in small letters, without numbers before it: `black footed albatross` of `001.Black_footed_Albatross`."""
    words = re.sub(r"^\d+[\s_.-]+", "", name)
    return " ".join(re.sub(r"[\s_-]+", " ", words).split()).lower()


def _folder(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name).strip("._")


# ---------------------------------------------------------------- making it


def make(plan: Plan, place: Path, seed: int) -> None:
    """Write one set, under another name until it is whole."""
    record = {
        "made_by": "kdcache pipelines/birds.py",
        "seed": seed,
        "sources": plan.sources,
        "classes": {
            each.name: {
                "kind": each.kind,
                **{split: [image.key for image in images] for split, images in each.chosen(seed).items()},
            }
            for each in plan.classes
        },
    }
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    stored = place / "birds.json"
    if place.exists():
        if stored.is_file() and stored.read_text("utf-8") == text:
            print(f"{place}: is there already")
            return
        raise UsageError(
            f"{place} is there already",
            why="it was made of other images or classes, or by somebody else",
            fix="name another folder to make them in",
        )
    partial = place.with_name(f".{place.name}.partial")  # of a killed process: nobody else has that name
    with translated_os_errors(place):
        shutil.rmtree(partial, ignore_errors=True)
        for each in plan.classes:
            for split, images in each.chosen(seed).items():
                folder = partial / split / each.name
                folder.mkdir(parents=True)
                for number, image in enumerate(images):
                    data, suffix = _file(image.sample.load, image.key)
                    (folder / f"{number:02d}{suffix}").write_bytes(data)
        (partial / "birds.json").write_text(text, "utf-8")
        partial.rename(place)
    print(f"{place}: {len(plan.classes)} classes")


def _file(load: Callable[[], Image.Image], key: str) -> tuple[bytes, str]:
    """An image's file as it is, or as PNG where its format is a rare one or it is no file; with its suffix."""
    try:
        image = load()
        image.load()  # a damaged one is noticed here, and not while a canvas is made of it
        again = load()
        if image.format in SUFFIXES and (file := getattr(again, "fp", None)) is not None:
            file.seek(0)
            return file.read(), SUFFIXES[image.format]
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "PNG")
        return buffer.getvalue(), ".png"
    except (OSError, ValueError, SyntaxError) as error:
        raise UsageError(
            f"image {key} cannot be read", why=" ".join(str(error).split())[:200], fix="take it away, or name another set"
        ) from None


if __name__ == "__main__":
    sys.exit(main())

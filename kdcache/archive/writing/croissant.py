"""`croissant.json`: the archive in the vocabulary of ML Commons' Croissant 1.0, for catalogues and other machines.

Croissant describes files and their records. It cannot read arrays in Zarr, HDF5 or tar files, so the record set gives
only the dtype and shape of each field. The card explains how to read the rows.
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from kdcache.archive.format.manifest import FileRecord, Manifest, ShardRecord
from kdcache.archive.layouts import row_fields
from kdcache.errors import printable

__all__ = ["croissant"]

LONGEST = 1000  # characters of a stranger's text
# fmt: off
TERMS = (
    "arrayShape", "citeAs", "column", "equivalentProperty", "extract", "field", "fileObject", "fileProperty", "fileSet", "format",
    "includes", "isArray", "isLiveDataset", "jsonPath", "key", "md5", "parentField", "path", "recordSet", "references", "regex",
    "repeated", "replace", "samplingRate", "separator", "source", "subField", "transform",
)
# fmt: on
CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "dct": "http://purl.org/dc/terms/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "sc": "https://schema.org/",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    **{word: f"cr:{word}" for word in TERMS},
}
MEDIA = {
    ".h5": "application/x-hdf5",
    ".json": "application/json",
    ".jsonl": "application/jsonlines",
    ".tar": "application/x-tar",
}
MEANING = {
    "logits": "raw logits of the teacher, one per class",
    "argmax": "class of the largest logit, before the logits were stored",
    "sample": "number of the sample that sits at this position of the view",
    "entropy": "H(p) / log C at temperature 1",
    "entropy_rest": "the same without the top class, over log(C - 1)",
    "digest": "32 bits of a fingerprint of the view's pixels",
    "probe": "means of the view in a grid of 4 x 4 cells, in grey levels",
}


def croissant(manifest: Manifest, title: str, described: Sequence[FileRecord], shards: Iterable[ShardRecord]) -> str:
    """The Croissant description as JSON-LD. `described`: the files that belong to no shard."""
    rows = sorted({_pattern(file.path) for shard in shards for file in shard.files})
    licences = {_text(name) for name in (manifest.known_licences.data, manifest.known_licences.weights) if name}
    description = {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": _text(title),
        "description": (
            f"What a teacher network says of {manifest.num_samples} images in {manifest.num_views} augmented views each, over "
            f"{manifest.num_classes} classes. A kdcache archive with digest {manifest.digest}; kdcache.json describes it in "
            "full, with the sha256 of every file, and README.md says how it is read."
        ),
        "version": f"{manifest.format_version}.0.0",
        "keywords": ["knowledge distillation", "logits", "teacher", "image classification"],
        **({"license": sorted(licences)} if licences else {}),
        "distribution": [*(_file_object(manifest, file) for file in described), _row_files(manifest, rows)],
        "recordSet": [_classes(manifest), _rows(manifest)],
    }
    return json.dumps(description, indent=1, ensure_ascii=False) + "\n"


def _text(text: str) -> str:
    return printable(text)[:LONGEST]


def _pattern(path: str) -> str:
    """A glob that matches this shard file and its counterparts in other views and blocks."""
    return re.sub("[0-9]+", "*", path)


def _media(manifest: Manifest, path: str) -> str:
    other = "application/vnd.zarr" if manifest.layout["name"] == "zarr" else "application/octet-stream"
    return MEDIA.get(PurePosixPath(path).suffix, other)


def _file_object(manifest: Manifest, file: FileRecord) -> dict[str, Any]:
    return {
        "@type": "cr:FileObject",
        "@id": _text(file.path),
        "name": _text(file.path),
        "contentUrl": _text(file.path),
        "contentSize": f"{file.bytes} B",
        "encodingFormat": _media(manifest, file.path),
        "sha256": file.sha256,
    }


def _row_files(manifest: Manifest, patterns: Sequence[str]) -> dict[str, Any]:
    return {
        "@type": "cr:FileSet",
        "@id": "shards",
        "name": "shards",
        "description": f"The rows, in shards of {manifest.shard_rows} positions of one view.",
        "encodingFormat": _media(manifest, patterns[0]),
        "includes": list(patterns),
    }


def _classes(manifest: Manifest) -> dict[str, Any]:
    return {
        "@type": "cr:RecordSet",
        "@id": "classes",
        "name": "classes",
        "description": "Names of the classes, in the order of the logits.",
        "key": {"@id": "classes/number"},
        "field": [
            {"@type": "cr:Field", "@id": f"classes/{name}", "name": name, "dataType": kind}
            for name, kind in (("number", "cr:Int64"), ("name", "sc:Text"))
        ],
        "data": [{"classes/number": number, "classes/name": _text(name)} for number, name in enumerate(manifest.class_names)],
    }


def _rows(manifest: Manifest) -> dict[str, Any]:
    views, samples = manifest.num_views, manifest.num_samples
    return {
        "@type": "cr:RecordSet",
        "@id": "rows",
        "name": "rows",
        "description": f"A row per view and position: {views} x {samples} of them, all positions of a view after each other.",
        "field": [_field(name, dtype, shape, (views, samples)) for name, (dtype, shape) in row_fields(manifest).items()],
    }


def _field(name: str, dtype: np.dtype, shape: tuple[int, ...], rows: tuple[int, int]) -> dict[str, Any]:
    whole = ", ".join(map(str, (*rows, *shape)))
    return {
        "@type": "cr:Field",
        "@id": f"rows/{name}",
        "name": name,
        "description": f"{MEANING.get(name, 'parameter of the codec')}; stored as {dtype.name}, in all [{whole}]",
        "dataType": _data_type(dtype),
        **({"isArray": True, "arrayShape": ",".join(map(str, shape))} if shape else {}),
        "source": {"fileSet": {"@id": "shards"}, "extract": {"fileProperty": "content"}},
    }


def _data_type(dtype: np.dtype) -> str:
    """Croissant's name of a dtype, such as `cr:Int16`, `cr:UInt8` or `cr:Float32`."""
    kind = {"i": "Int", "u": "UInt", "f": "Float"}[dtype.kind]
    return f"cr:{kind}{8 * dtype.itemsize}"

"""`kdcache.json`, format version 1: the manifest of an archive, which records every file with its sha256."""

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from kdcache.codecs import CODECS
from kdcache.datasets import SourceCard
from kdcache.errors import IncompatibleError, IntegrityError, KdcacheError
from kdcache.views.policy import ViewPolicy
from kdcache.views.tested import WHOLE, TestViews

if TYPE_CHECKING:
    from kdcache.datasets.canvas import Canvas

__all__ = [
    "FORMAT_VERSION",
    "ArchivePlan",
    "CanvasCard",
    "FileRecord",
    "Licences",
    "LogitMoments",
    "Manifest",
    "MemoryFormat",
    "Noise",
    "ShardRecord",
    "Statistics",
    "StatisticsDetails",
    "SubsetOf",
    "TauDetail",
    "TauStatistics",
    "TeacherCard",
    "archive_digest",
    "first_error",
    "load_manifest",
    "not_known",
    "seal_of",
    "sealed",
]

FORMAT_VERSION = 1
MANIFEST_NAME = "kdcache.json"
SEAL = "manifest_sha256"
CARD_NAME = "README.md"
WORK = ".dump"  # the writers' folder; a finished archive has none
PULL = ".pull"  # the transfers' folder; a finished archive has none
CLOSING = f"{WORK}/closing.jsonl"  # records of the files that an append replaces before the manifest
FIGURE_NAME = "entropies.svg"
CROISSANT_NAME = "croissant.json"
FOR_PEOPLE = frozenset({CARD_NAME, FIGURE_NAME, CROISSANT_NAME})  # people may edit these; kdcache reads nothing from them
INT32 = 2**31 - 1
INT64 = 2**63 - 1
MANIFEST_LIMIT = 64 << 20  # bytes
TABLE_LIMIT = 1 << 30  # bytes of the table of shards
SHORTEST_RECORD = 100  # bytes; every shard's record in the table is longer, by its field names and a digest alone
MANY_ERRORS = 100
READABLE_BY = "0.1.0"  # the first kdcache that reads FORMAT_VERSION


def _left_out(default: Any) -> Callable[[Any], bool]:
    """Leave a field out of the JSON while it has its default, so that manifests older than the field keep their bytes."""
    return lambda value: bool(value == default)


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


MemoryFormat = Literal["contiguous", "channels_last"]


class FileRecord(_Record):
    path: str
    bytes: int = Field(ge=0, le=INT64)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class ShardRecord(_Record):
    """The files of one shard (a view's block of positions), and the digest of its rows, which is the same in every layout.

    `checksums` tell whose rows a file holds, by field: a digest of the checksums of its units (see `reading.binding`).
    """

    view: int = Field(ge=0, le=INT64)
    block: int = Field(ge=0, le=INT32)
    rows: int = Field(ge=1, le=INT32)
    rows_digest: str = Field(pattern="^[0-9a-f]{64}$", validation_alias=AliasChoices("rows_digest", "rows_sha256"))
    files: tuple[FileRecord, ...] = Field(fail_fast=True)
    checksums: dict[str, Annotated[str, Field(pattern="^[0-9a-f]{32}$")]] | None = Field(None, exclude_if=_left_out(None))


class CanvasCard(_Record):
    size: int = Field(ge=1)  # side in pixels
    digest: str
    sizes_digest: str | None = Field(None, exclude_if=_left_out(None))  # of the photographs' sizes, where views depend on them

    @classmethod
    def of(cls, canvas: "Canvas", policy: ViewPolicy) -> "CanvasCard":
        """The card of the canvas that views of this policy are cut from."""
        return cls(size=canvas.size, digest=canvas.digest, sizes_digest=canvas.sizes_digest if policy.needs_sizes else None)


class Noise(_Record):
    """Distance of the stored logits from those that the teacher gives in a better precision, over `views` views at tau 1."""

    views: int
    kl_mean: float  # nats
    kl_max: float
    max_logit_difference: float
    # What half precision and float32 were compared with. Older records do not say: theirs of float32 is 0, and means nothing.
    reference: Literal["float32", "float64"] | None = Field(None, exclude_if=_left_out(None))


class TeacherCard(_Record):
    alias: str
    name: str  # exact: timm's, hf-hub:ORG/NAME@COMMIT, local-dir:FOLDER@DIGEST (without its place) or package.module:function
    weights_sha256: str
    input_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    precision: Literal["fp32", "fp16", "bf16"]
    batch_size: int = Field(ge=1)
    memory_format: MemoryFormat = Field("contiguous", exclude_if=_left_out("contiguous"))  # of a batch's pixels
    training: dict[str, Any] | None = None  # the settings that train-teacher recorded
    top1_clean: float | None = None  # percent, on the clean test images
    top5_clean: float | None = Field(None, exclude_if=_left_out(None))
    noise: Noise | None = None
    weights_licence: str | None = Field(None, exclude_if=_left_out(None))
    test_views: TestViews | None = Field(None, exclude_if=_left_out(None))  # None: the whole images, made square
    # What was found wrong with the teacher before its dump, and accepted: by the option, in words.
    accepted: dict[str, str] | None = Field(None, exclude_if=_left_out(None))

    @property
    def known_noise(self) -> Noise | None:
        """The noise, if it was measured: dumps in float32 used to record 0, which was not."""
        return self.noise if self.noise and (self.noise.reference or self.precision != "fp32") else None

    @property
    def test_title(self) -> str:
        """How its test images were shown, in words."""
        return (self.test_views or WHOLE).title


# Types of the numbers that figures are drawn from. They bound size and value by what kdcache itself computes.
Count = Annotated[int, Field(ge=0, le=INT64)]
Share = Annotated[float, Field(ge=-0.001, le=1.001)]  # a fraction, give or take rounding
Logit = Annotated[float, Field(ge=-4e38, le=4e38)]
Quantiles = Annotated[tuple[Share, ...], Field(min_length=5, max_length=5)]
Histogram = Annotated[tuple[Count, ...], Field(min_length=32, max_length=32)]
MomentRow = Annotated[tuple[Count, ...], Field(min_length=24, max_length=24)]


class TauStatistics(_Record):
    """Relative entropies of the teacher at one temperature: means and quantiles (5, 25, 50, 75, 95 %) over the rows."""

    tau: float = Field(gt=0, le=1e6)
    entropy_mean: Share
    entropy_quantiles: Quantiles
    entropy_rest_mean: Share
    entropy_rest_quantiles: Quantiles
    sorted_mean_entropy: Share  # relative entropy of the mean sorted softmax


class LogitMoments(_Record):
    """Rows by the mean and the (population) standard deviation of their logits (logit standardization, Fig. 5)."""

    mean: Logit  # over the rows
    std: Logit
    mean_range: tuple[Logit, Logit]
    std_range: tuple[Logit, Logit]
    # counts[i][j]: rows in bin i of the means and bin j of the deviations, each 24 equal bins of its range.
    counts: tuple[MomentRow, ...] = Field(min_length=24, max_length=24)


class EntropyHistogram(_Record):
    """Rows by the relative entropy of their softmax at tau 1, over `classes` classes (TTM, arXiv 2402.11148, Fig. 3)."""

    classes: Count
    mean: Share
    counts: Histogram  # 32 equal bins, from 0 to 1


class TauDetail(_Record):
    """Distributions of the teacher at one temperature, for figures."""

    entropy_histogram: Histogram  # rows in 32 equal bins of relative entropy, from 0 to 1
    entropy_rest_histogram: Histogram
    sorted_mean: tuple[Share, ...]  # mean of the sorted softmax, at the ranks of `StatisticsDetails.ranks`
    smoothing_sorted_mean: Share  # alpha of the label smoothing with entropy sorted_mean_entropy: control ls-global
    smoothing_mean_entropy: Share  # alpha of the label smoothing with entropy entropy_mean
    # Mean of U = sum_c p_c^(1/tau), the weights of wttm. Older archives have none.
    power_sum_mean: float | None = Field(None, gt=0, le=1e9, exclude_if=_left_out(None))


class StatisticsDetails(_Record):
    ranks: tuple[Count, ...]  # 1 is the largest class; every rank up to 64 classes, a sparser selection beyond
    per_tau: tuple[TauDetail, ...]  # in the order of `Statistics.per_tau`
    moments: LogitMoments


class Statistics(_Record):
    rows: Count  # rows, evenly spaced over the archive, from which the figures per temperature are computed
    per_tau: tuple[TauStatistics, ...] = Field(min_length=1)
    top1_views: float | None  # percent of all views whose argmax is the label (of mixed views: the dominant one)
    details: StatisticsDetails | None = Field(None, exclude_if=lambda details: details is None)  # older archives have none

    @model_validator(mode="after")
    def _consistent(self) -> "Statistics":
        if details := self.details:
            low_to_high = (details.ranks, details.moments.mean_range, details.moments.std_range)
            if any(below >= above for values in low_to_high for below, above in itertools.pairwise(values)):
                raise ValueError("ranks or ranges that do not ascend")
            lengths = {len(details.ranks), *(len(detail.sorted_mean) for detail in details.per_tau)}
            if len(details.per_tau) != len(self.per_tau) or len(lengths) > 1:
                raise ValueError("details of other temperatures or ranks")
        return self

    def at(self, taus: Iterable[float]) -> "Statistics":
        """These statistics at `taus` only, in that order. KeyError for a temperature that was not computed."""
        place = {figures.tau: number for number, figures in enumerate(self.per_tau)}
        chosen = [place[tau] for tau in taus]
        details = self.details and self.details.model_copy(update={"per_tau": tuple(self.details.per_tau[n] for n in chosen)})
        return self.model_copy(update={"per_tau": tuple(self.per_tau[n] for n in chosen), "details": details})


class SubsetOf(_Record):
    """The whole archive that this archive is a part of."""

    digest: str = Field(pattern="^[0-9a-f]{64}$")
    first_view: int = Field(ge=0)
    num_views: int = Field(ge=1)


class Licences(_Record):
    """Licences of data and weights: SPDX names, or names that the Hugging Face Hub knows. None is unknown."""

    data: str | None = None
    weights: str | None = None

    def otherwise(self, earlier: "Licences | None") -> "Licences":
        """These licences; where one is not known, that of `earlier`."""
        earlier = earlier or Licences()
        return Licences(data=self.data or earlier.data, weights=self.weights or earlier.weights)


class ArchivePlan(_Record):
    """An archive's contents and form, fixed before its first shard is written.

    A resumed dump must bring an equal plan; only `provenance` may differ.
    """

    # Views keep the policy's numbers, also in an archive that holds only some of them.
    first_view: int = Field(0, ge=0, le=INT32, exclude_if=_left_out(0))
    num_views: int = Field(ge=1, le=INT32)
    num_samples: int = Field(ge=1, le=INT32)  # sample numbers are stored as int32
    class_names: tuple[str, ...] = Field(min_length=2, fail_fast=True)
    codec: dict[str, Any]
    layout: dict[str, Any]
    shard_rows: int = Field(ge=1, le=INT32)
    source: SourceCard | None = None
    canvas: CanvasCard | None = None
    policy: ViewPolicy | None = None
    probe_version: Literal[1, 2] = Field(1, exclude_if=_left_out(1))  # version of the views' digests
    contents: Literal["all", "statistics"] = Field("all", exclude_if=_left_out("all"))  # "statistics": without logits
    rows_hash: Literal["sha256", "blake3"] = Field("sha256", exclude_if=_left_out("sha256"))  # hash of the shards' rows
    subset_of: SubsetOf | None = Field(None, exclude_if=_left_out(None))
    licences: Licences | None = Field(None, exclude_if=_left_out(None))
    teacher: TeacherCard | None = None
    provenance: dict[str, Any] = {}

    @property
    def known_licences(self) -> Licences:
        """The declared licences; where none is declared, those recorded with the data and the weights."""
        declared = self.licences or Licences()
        return Licences(
            data=declared.data or (self.source.licence if self.source else None),
            weights=declared.weights or (self.teacher.weights_licence if self.teacher else None),
        )

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def views(self) -> range:
        """Numbers of the views."""
        return range(self.first_view, self.first_view + self.num_views)

    @property
    def num_blocks(self) -> int:
        """Number of shards per view."""
        return -(-self.num_samples // self.shard_rows)

    def block_rows(self, block: int) -> int:
        return min(self.shard_rows, self.num_samples - block * self.shard_rows)

    @property
    def identity(self) -> dict[str, Any]:
        """The fields that must be equal for two dumps to be one. The number of views may grow, so it is not among them."""
        return self.model_dump(
            mode="json",
            exclude={
                "num_views": True,
                "probe_version": True,
                "rows_hash": True,
                "licences": True,
                "provenance": True,
                "source": {"unused"},
                "teacher": {"noise", "weights_licence", "top1_clean", "top5_clean", "test_views", "training"},
            },
        )


class Manifest(ArchivePlan):
    format: Literal["kdcache"] = "kdcache"
    format_version: Literal[1] = 1
    readable_by: str = READABLE_BY
    digest: str = Field(pattern="^[0-9a-f]{64}$")
    policy_digest: str | None
    files: tuple[FileRecord, ...] = Field(fail_fast=True)  # the files that belong to no shard
    shards: FileRecord  # the table of shards, one ShardRecord a line
    statistics: Statistics
    optional: dict[str, Any] = {}  # readers may ignore it
    # The digest of all other fields (see `sealed`). Older manifests have none; one whose shards have `checksums` must have it.
    manifest_sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$", exclude_if=_left_out(None))

    @model_validator(mode="after")
    def _consistent(self) -> "Manifest":
        if self.policy_digest != (self.policy.digest if self.policy else None):
            raise ValueError("policy_digest is not the digest of the policy")
        if self.source and self.source.num_samples != self.num_samples:
            raise ValueError("the source card has another number of samples")
        if (details := self.statistics.details) and (details.ranks[:1], details.ranks[-1:]) != ((1,), (self.num_classes,)):
            raise ValueError("the statistics are of another number of classes")
        if self.shard_rows > 4 * self.num_samples:  # padding to whole units never makes more
            raise ValueError(f"shards of {self.shard_rows:,} rows, of {self.num_samples:,} samples")
        # A manifest must not claim more shards than its table has bytes for: readers loop over them.
        if self.num_views * self.num_blocks * SHORTEST_RECORD > min(self.shards.bytes, TABLE_LIMIT):
            raise ValueError(f"{self.num_views * self.num_blocks:,} shards in a table of {self.shards.bytes:,} bytes")
        if len({record.path for record in self.files}) < len(self.files):
            raise ValueError("a file is recorded twice")
        CODECS.from_dict(self.codec)
        return self


def sealed(manifest: Manifest) -> bytes:
    """The bytes of `kdcache.json`: the manifest with its own digest. Whatever writes a manifest writes these."""
    bare = manifest.model_copy(update={"manifest_sha256": None})
    seal = seal_of(from_json(bare.model_dump_json()))
    return manifest.model_copy(update={"manifest_sha256": seal}).model_dump_json(indent=1).encode()


def seal_of(fields: Mapping[str, Any]) -> str:
    """sha256 of a manifest's parsed JSON, whatever its layout, without the digest itself."""
    others = {name: value for name, value in fields.items() if name != SEAL}
    return hashlib.sha256(json.dumps(others, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def archive_digest(plan: ArchivePlan, shards: Iterable[ShardRecord]) -> str:
    """The sha256 that identifies an archive's contents. Equal dumps have equal digests in every layout."""
    identity = plan.identity
    kept = {key: identity[key] for key in ("num_samples", "class_names", "codec", "source", "canvas", "policy")}
    kept["num_views"] = plan.num_views
    kept |= {key: identity[key] for key in ("first_view", "contents") if key in identity}  # absent at their default
    kept["teacher"] = plan.teacher.weights_sha256 if plan.teacher else None
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True, separators=(",", ":")).encode())
    for shard in sorted(shards, key=lambda s: (s.view, s.block)):
        digest.update(f"{shard.view} {shard.block} {shard.rows} {shard.rows_digest}\n".encode())
    return digest.hexdigest()


def first_error(error: ValidationError) -> tuple[str, str, str]:
    """The first wrong field of a record, its value (shortened), and the reason."""
    if error.error_count() > MANY_ERRORS:  # describing each of a million takes minutes
        return "", "", f"{error.error_count():,} of its fields are wrong"
    first = error.errors(include_url=False)[0]
    wrong = first["input"]
    shown = str(wrong) if isinstance(wrong, str | int | float | None) else f"a {type(wrong).__name__}"
    return ".".join(map(str, first["loc"]))[:200], shown[:80], first["msg"][:1000]


def load_manifest(text: bytes, where: str, *, fix: str) -> Manifest:
    """Parse and check `kdcache.json`. Errors name the archive as `where`; for a damaged manifest they advise `fix`.

    Raises IntegrityError for a damaged manifest, IncompatibleError for a newer format or an unknown codec.
    """
    broken = {"why": "it is damaged, or was not written by kdcache", "fix": fix}
    try:
        fields = from_json(text, allow_inf_nan=False)  # rejects lone surrogates and deep nesting
    except ValueError:
        raise IntegrityError(f"{where}: kdcache.json is not JSON", **broken) from None
    if not isinstance(fields, dict) or fields.get("format") != "kdcache":
        raise IntegrityError(f"{where}: kdcache.json is not a kdcache manifest", **broken)
    version = fields.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        reader = str(fields.get("readable_by"))
        known = re.fullmatch(r"\d[\w.]{0,30}", reader, re.ASCII)  # the text becomes part of a shell command
        raise IncompatibleError(
            f"{where}: the archive has format version {version}",
            why=f"this kdcache reads versions up to {FORMAT_VERSION}; "
            f"this archive needs {f'kdcache {reader} or newer' if known else 'a newer kdcache'}",
            fix=f"pip install --upgrade 'kdcache{f'>={reader}' if known else ''}'",
        )
    try:
        manifest = Manifest.model_validate(fields)
        if manifest.manifest_sha256 in {None, found := seal_of(fields)}:
            return manifest
        raise IntegrityError(
            f"{where}: kdcache.json has sha256 {found[:12]}... where it says {manifest.manifest_sha256[:12]}...",
            why="it was changed after it was written: statistics, names, settings or records are not those of the dump",
            fix=fix,
        )
    except ValidationError as error:
        field, wrong, why = first_error(error)
        raise IntegrityError(
            f"{where}: kdcache.json has a wrong field {field or 'manifest'}" + (f" = {wrong!r}" if field else ""),
            why=why,
            fix=fix,
        ) from None
    except IntegrityError:
        raise
    except KdcacheError as error:
        raise not_known(where, error) from None


def not_known(where: str, error: KdcacheError) -> IncompatibleError:
    """The error of a manifest whose codec or layout, or an option of it, is not what this installation has."""
    return IncompatibleError(
        f"{where}: {error.what}",
        why="this installation does not know it",
        fix="upgrade kdcache, or install the plugin; if that does not help, restore kdcache.json from a copy of the archive",
    )

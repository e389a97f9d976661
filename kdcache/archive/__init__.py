"""Archives of teacher logits. Everything that other modules may use of this package is here; nothing needs torch."""

from typing import Any

from kdcache.archive.card import code_span, escaped, licence_fields
from kdcache.archive.comparison import Comparison, Distance, Fact, compare
from kdcache.archive.cost import COST, TEACHER_COST, DumpCost
from kdcache.archive.derive import derive, derived_plan, stored_bytes
from kdcache.archive.ensemble import AnyArchive, Average, Ensemble
from kdcache.archive.fidelity import CodecFidelity, TauFidelity, measure_fidelity
from kdcache.archive.layouts import layout
from kdcache.archive.manifest import (
    CanvasCard,
    Licences,
    LogitMoments,
    Manifest,
    Noise,
    Plan,
    Statistics,
    StatisticsDetails,
    SubsetOf,
    TauDetail,
    TauStatistics,
    TeacherCard,
)
from kdcache.archive.planning import new_plan, recorded_plan
from kdcache.archive.publishing import require_licences
from kdcache.archive.reader import Archive, open_archive
from kdcache.archive.rows import Rows
from kdcache.archive.sharing import OF_THE_HUB, Shipment, part_label, pull, push, quiet_hub, shipment, told_by_the_hub
from kdcache.archive.signing import sign_archive, verify_signature
from kdcache.archive.statistics import MAX_ROWS, PAPER_TAUS, measure_logits, moment_histogram
from kdcache.archive.store import sha256, translated_os_errors
from kdcache.archive.verification import Failure, Verification
from kdcache.archive.writer import ArchiveWriter, sweep, write_archive
from kdcache.remote import is_url

__all__ = [
    "COST",
    "MAX_ROWS",
    "OF_THE_HUB",
    "PAPER_TAUS",
    "TEACHER_COST",
    "AnyArchive",
    "Archive",
    "ArchiveWriter",
    "Average",
    "CanvasCard",
    "CodecFidelity",
    "Comparison",
    "Distance",
    "DumpCost",
    "Ensemble",
    "Fact",
    "Failure",
    "Licences",
    "LogitMoments",
    "Manifest",
    "Noise",
    "Plan",
    "Rows",
    "Shipment",
    "Statistics",
    "StatisticsDetails",
    "SubsetOf",
    "TauDetail",
    "TauFidelity",
    "TauStatistics",
    "TeacherCard",
    "Verification",
    "code_span",
    "compare",
    "derive",
    "derived_plan",
    "escaped",
    "is_url",
    "layout",
    "licence_fields",
    "manifest_schema",
    "measure_fidelity",
    "measure_logits",
    "moment_histogram",
    "new_plan",
    "open_archive",
    "part_label",
    "pull",
    "push",
    "quiet_hub",
    "recorded_plan",
    "require_licences",
    "sha256",
    "shipment",
    "sign_archive",
    "stored_bytes",
    "sweep",
    "told_by_the_hub",
    "translated_os_errors",
    "verify_signature",
    "write_archive",
]


def manifest_schema() -> dict[str, Any]:
    """JSON Schema of `kdcache.json`."""
    return Manifest.model_json_schema()

"""Archives of teacher logits. Everything that other modules may use of this package is here; nothing needs torch."""

from kdcache.archive.format.cost import COST, TEACHER_COST, DumpCost
from kdcache.archive.format.manifest import (
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
from kdcache.archive.format.rows import Rows
from kdcache.archive.format.store import sha256, translated_os_errors
from kdcache.archive.layouts import LAYOUTS, Layout
from kdcache.archive.reading.comparison import Comparison, Distance, Fact, compare
from kdcache.archive.reading.ensemble import AnyArchive, Average, Ensemble
from kdcache.archive.reading.fidelity import CodecFidelity, TauFidelity, measure_fidelity
from kdcache.archive.reading.reader import Archive, open_archive
from kdcache.archive.reading.statistics import MAX_ROWS, PAPER_TAUS, measure_logits, moment_histogram
from kdcache.archive.reading.verification import Failure, Verification
from kdcache.archive.writing.card import code_span, escaped, licence_fields
from kdcache.archive.writing.derive import derive, derived_plan, stored_bytes
from kdcache.archive.writing.planning import new_plan, recorded_plan
from kdcache.archive.writing.writer import ArchiveWriter, sweep, write_archive
from kdcache.system.remote import is_url

__all__ = [
    "COST",
    "LAYOUTS",
    "MAX_ROWS",
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
    "Layout",
    "Licences",
    "LogitMoments",
    "Manifest",
    "Noise",
    "Plan",
    "Rows",
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
    "licence_fields",
    "measure_fidelity",
    "measure_logits",
    "moment_histogram",
    "new_plan",
    "open_archive",
    "recorded_plan",
    "sha256",
    "stored_bytes",
    "sweep",
    "translated_os_errors",
    "write_archive",
]

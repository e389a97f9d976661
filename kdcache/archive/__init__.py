"""Archives of teacher logits: the names that other packages import. Nothing here needs torch."""

from kdcache.archive.format.cost import COST, TEACHER_COST, TEACHER_ENTROPIES, DumpCost
from kdcache.archive.format.devices import DEVICE, shards_by_device
from kdcache.archive.format.manifest import (
    ArchivePlan,
    CanvasCard,
    EntropyHistogram,
    Licences,
    LogitMoments,
    MemoryFormat,
    Noise,
    Statistics,
    TauDetail,
    TauStatistics,
    TeacherCard,
)
from kdcache.archive.format.rows import Rows
from kdcache.archive.layouts import LAYOUTS, Layout
from kdcache.archive.reading.comparison import compare
from kdcache.archive.reading.ensemble import AnyArchive, Average, Ensemble
from kdcache.archive.reading.fidelity import CodecFidelity, measure_fidelity
from kdcache.archive.reading.reader import Archive, open_archive
from kdcache.archive.reading.statistics import MAX_ROWS, PAPER_TAUS, entropy_histogram, measure_logits, moment_histogram
from kdcache.archive.reading.verification import Failure, Verification
from kdcache.archive.writing.card import code_span, licence_fields, markdown_escaped
from kdcache.archive.writing.derive import derive, derived_plan, stored_bytes
from kdcache.archive.writing.planning import new_plan, recorded_plan
from kdcache.archive.writing.sweeping import sweep
from kdcache.archive.writing.whole import write_archive
from kdcache.archive.writing.writer import ArchiveWriter

__all__ = [
    "COST",
    "DEVICE",
    "LAYOUTS",
    "MAX_ROWS",
    "PAPER_TAUS",
    "TEACHER_COST",
    "TEACHER_ENTROPIES",
    "AnyArchive",
    "Archive",
    "ArchivePlan",
    "ArchiveWriter",
    "Average",
    "CanvasCard",
    "CodecFidelity",
    "DumpCost",
    "Ensemble",
    "EntropyHistogram",
    "Failure",
    "Layout",
    "Licences",
    "LogitMoments",
    "MemoryFormat",
    "Noise",
    "Rows",
    "Statistics",
    "TauDetail",
    "TauStatistics",
    "TeacherCard",
    "Verification",
    "code_span",
    "compare",
    "derive",
    "derived_plan",
    "entropy_histogram",
    "licence_fields",
    "markdown_escaped",
    "measure_fidelity",
    "measure_logits",
    "moment_histogram",
    "new_plan",
    "open_archive",
    "recorded_plan",
    "shards_by_device",
    "stored_bytes",
    "sweep",
    "write_archive",
]

"""Reports: runs as a table, figures and one offline page. Nothing here needs torch."""

import importlib
from typing import TYPE_CHECKING, Any

__all__ = [
    "ArchivePage",
    "Cell",
    "Experiment",
    "PairedDifference",
    "Published",
    "Report",
    "Row",
    "RunRecord",
    "Table",
    "are_archives",
    "collect",
    "paired",
    "summarise",
    "write_archive_page",
    "write_report",
]

_PUBLIC = {
    "RunRecord": "records",
    "collect": "records",
    "Cell": "table",
    "PairedDifference": "table",
    "Row": "table",
    "Table": "table",
    "paired": "table",
    "summarise": "table",
    "Experiment": "experiment",
    "Published": "experiment",
    "Report": "html",
    "write_report": "html",
    "ArchivePage": "archive_page",
    "are_archives": "archive_page",
    "write_archive_page": "archive_page",
}

if TYPE_CHECKING:
    from kdcache.report.archive_page import ArchivePage, are_archives, write_archive_page
    from kdcache.report.experiment import Experiment, Published
    from kdcache.report.html import Report, write_report
    from kdcache.report.records import RunRecord, collect
    from kdcache.report.table import Cell, PairedDifference, Row, Table, paired, summarise


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"kdcache.report.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'kdcache.report' has no attribute {name!r}")

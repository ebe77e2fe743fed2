"""Run records, the papers' published numbers, and how sure a difference is."""

from .comparison import compare
from .published import published, sources
from .records import (
    RunRecord,
    departures,
    full_settings,
    load_records,
    read_record,
    seeds_table,
    table,
    versions,
)
from .statistics import Interval, mean_std, paired_bootstrap, wilcoxon

__all__ = [
    "Interval",
    "RunRecord",
    "compare",
    "departures",
    "full_settings",
    "load_records",
    "mean_std",
    "paired_bootstrap",
    "published",
    "read_record",
    "seeds_table",
    "sources",
    "table",
    "versions",
    "wilcoxon",
]

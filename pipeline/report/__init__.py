"""One self-contained HTML page: what came in, what became of it, and what was learnt from it."""

from pipeline.report.config import ReportConfig
from pipeline.report.job import check, run

__all__ = ["ReportConfig", "check", "run"]

"""`vimi-data report`: one self-contained HTML page of what was made; `validate` and `plan` beside it."""

from pipeline.report.page import check, run
from pipeline.report.read import ReportConfig

__all__ = ["ReportConfig", "check", "run"]

"""Proof that a set of prompt shards is whole and honest. Import names from here."""

from pipeline.report.validate.findings import Report, ValidateConfig
from pipeline.report.validate.job import validate

__all__ = ["Report", "ValidateConfig", "validate"]

"""Proof that a set of prompt shards is whole and honest. Import names from here."""

from pipeline.validate.findings import Report, ValidateConfig
from pipeline.validate.job import validate

__all__ = ["Report", "ValidateConfig", "validate"]

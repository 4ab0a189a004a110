"""Duplicates in the memory: found, reported, dropped."""

from pipeline.memory.dedup.config import DedupConfig, Duplicates
from pipeline.memory.dedup.groups import drop, find_duplicates

__all__ = ["DedupConfig", "Duplicates", "drop", "find_duplicates"]

"""`vimi-data build-index`: clips tables -> the retrieval memory."""

from pipeline.memory.build_index.job import run
from pipeline.memory.build_index.preflight import BuildIndexConfig, check

__all__ = ["BuildIndexConfig", "check", "run"]

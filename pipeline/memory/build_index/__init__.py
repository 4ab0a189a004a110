"""`vimi-data build-index`: clips tables -> the retrieval memory."""

from pipeline.memory.build_index.config import BuildIndexConfig
from pipeline.memory.build_index.door import check
from pipeline.memory.build_index.run import run

__all__ = ["BuildIndexConfig", "check", "run"]

"""`vimi-data search`: look into a memory, for one question or a batch of them."""

from pipeline.memory.search.engine import Filters, Hit, Query, Searcher
from pipeline.memory.search.run import SearchConfig, check, load_memory_clip, run

__all__ = ["Filters", "Hit", "Query", "SearchConfig", "Searcher", "check", "load_memory_clip", "run"]

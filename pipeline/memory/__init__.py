"""The memory: documents in LanceDB, in shards. Import names from here, not from the files."""

from pipeline.memory.store import TABLE, Memory, Shard, connect, open_memory, open_table, require_model

__all__ = ["TABLE", "Memory", "Shard", "connect", "open_memory", "open_table", "require_model"]

"""The memory: documents in LanceDB. Import names from here, not from the files."""

from pipeline.memory.store import (
    TABLE,
    Memory,
    connect,
    model_column,
    open_memory,
    open_table,
    require_model,
    upsert,
    version_tag,
)

__all__ = [
    "TABLE",
    "Memory",
    "connect",
    "model_column",
    "open_memory",
    "open_table",
    "require_model",
    "upsert",
    "version_tag",
]

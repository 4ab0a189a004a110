"""Another CLIP's vectors beside the first: a new column, and not one old byte written again.

LanceDB's `merge_insert` with a source that holds only some columns rewrites whole rows, pictures and all
(measured: 2,540 kB for 16 kB of new vectors), unless the join column has a scalar index: then it writes a
file of the new column alone (20 kB). So the index comes first.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from infra.errors import DataError
from pipeline.memory.index import build_id_index
from pipeline.memory.store import first_line, vectors_arrow


def add_column(table: Any, name: str, dim: int) -> None:
    """Add an empty embedding column; nothing to do if it is there.

    Raises:
        DataError: there is a column of this name with another size.
    """
    if not any(index.columns == ["doc_id"] for index in table.list_indices()):
        build_id_index(table)
    kind = pa.list_(pa.float16(), dim)
    if name not in table.schema.names:
        table.add_columns(pa.field(name, kind))
    elif table.schema.field(name).type != kind:
        raise DataError(f"column {name} holds {table.schema.field(name).type}, not {kind}")


def fill_column(table: Any, name: str, doc_ids: Sequence[str], vectors: np.ndarray) -> int:
    """Write the vectors (`n d`) of these documents; one atomic commit. Returns how many were found."""
    schema = pa.schema([table.schema.field("doc_id"), table.schema.field(name)])
    return fill_columns(
        table, pa.Table.from_arrays([pa.array(doc_ids, pa.string()), vectors_arrow(vectors)], schema=schema)
    )


def fill_columns(table: Any, rows: pa.Table) -> int:
    """Write columns of rows that are there: doc_id and what is new; one atomic commit."""
    schema = pa.schema([table.schema.field(name) for name in rows.schema.names])
    try:
        result = table.merge_insert("doc_id").when_matched_update_all().execute(rows.cast(schema))
    except (OSError, RuntimeError, ValueError) as error:
        names = ", ".join(rows.schema.names[1:])
        raise DataError(f"can't write column {names}: {first_line(error)}") from error
    return int(result.num_updated_rows)

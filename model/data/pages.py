"""Where the values of a binary column lie in a local Parquet file, so that they are mapped and not copied.

Arrow copies a value twice before it is in a batch: out of the file, then out of its page. Frames are stored as
they are (no compression, no dictionary), so a mapped file holds them whole, and one copy does.

    a column chunk   page, page, ...
    a page           header (Thrift, compact protocol); definition levels; length, bytes, length, bytes, ...

After the Parquet format's README, Encodings.md and parquet.thrift. Whatever isn't laid out so (compressed, in a
dictionary, with nulls, another version of pages) is left to Arrow: `find_values` then says None.
"""

import struct
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

DATA_PAGE, PLAIN, RLE = 0, 0, 3
"""Of parquet.thrift: PageType.DATA_PAGE, Encoding.PLAIN, Encoding.RLE."""


def map_values(
    mapped: pa.MemoryMappedFile, file: pq.ParquetFile, group: int, column: int
) -> list[np.ndarray] | None:
    """uint8 views of the mapped file, one for each value of a binary column; None = let Arrow read it.

    Args:
        mapped: the file of `file`.
        file: its footer is asked where the column lies.
        group: number of the row group.
        column: number of the column among Parquet's leaves.
    """
    kind, chunk = file.schema.column(column), file.metadata.row_group(group).column(column)
    if kind.max_repetition_level or chunk.compression != "UNCOMPRESSED" or chunk.has_dictionary_page:
        return None
    mapped.seek(chunk.data_page_offset)
    data = mapped.read_buffer(chunk.total_compressed_size)
    try:
        spans = find_values(data, chunk.num_values, kind.max_definition_level)
    except (IndexError, struct.error):  # a header that is none
        return None
    if spans is None:
        return None
    whole = np.frombuffer(data, np.uint8)
    return [whole[start : start + length] for start, length in spans]


def find_values(data: pa.Buffer, count: int, max_level: int) -> list[tuple[int, int]] | None:
    """(start, length) of each of `count` values in a column chunk, bytes; None if they aren't plainly there.

    Raises:
        IndexError, struct.error: the bytes end too early.
    """
    view, place = memoryview(data).cast("B"), 0
    spans: list[tuple[int, int]] = []
    while len(spans) < count:
        header, place = read_struct(view, place)
        page = header.get(5)
        if header.get(1) != DATA_PAGE or not isinstance(page, dict):
            return None
        if page.get(2) != PLAIN or page.get(3) != RLE or header.get(2) != header.get(3):
            return None
        end, number = place + header[3], page[1]
        if max_level:
            (length,) = struct.unpack_from("<I", view, place)
            if not all_present(view[place + 4 : place + 4 + length], number, max_level):
                return None
            place += 4 + length
        for _ in range(number):
            (length,) = struct.unpack_from("<I", view, place)
            spans.append((place + 4, length))
            place += 4 + length
        if place != end:
            return None
    return spans if len(spans) == count and place <= len(view) else None


def all_present(levels: memoryview, count: int, max_level: int) -> bool:
    """Whether the run lengths say that all values are there; bit-packed levels mean that some are not."""
    place = 0
    while count > 0:
        header, place = read_varint(levels, place)
        if header & 1 or levels[place] != max_level:  # levels below 256 take one byte
            return False
        count, place = count - (header >> 1), place + 1
    return True


def read_struct(data: memoryview, place: int) -> tuple[dict[int, Any], int]:
    """A struct of Thrift's compact protocol as {field: integer or struct}, other types skipped; and its end.

    Raises:
        IndexError: a type that page headers don't have, or the bytes end too early.
    """
    fields: dict[int, Any] = {}
    number = 0
    while True:
        byte = data[place]
        place += 1
        if byte == 0:
            return fields, place
        kind, step = byte & 15, byte >> 4
        if step:
            number += step
        else:
            number, place = read_zigzag(data, place)
        if kind in (1, 2):  # true, false
            continue
        if kind in (4, 5, 6):  # integers
            fields[number], place = read_zigzag(data, place)
        elif kind == 8:  # bytes
            length, place = read_varint(data, place)
            place += length
        elif kind == 12:
            fields[number], place = read_struct(data, place)
        else:
            raise IndexError(f"type {kind} in a page's header")


def read_zigzag(data: memoryview, place: int) -> tuple[int, int]:
    value, place = read_varint(data, place)
    return (value >> 1) ^ -(value & 1), place


def read_varint(data: memoryview, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, place

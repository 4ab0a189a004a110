"""samples.json says what it said when it was written, or nothing."""

from pathlib import Path

import pytest

from infra.errors import DataError
from infra.samples import SAMPLES, read_samples, write_samples

ENTRIES = [{"prompt": "a white dog runs", "video": "sample-000.mp4", "seed": 0, "fps": 8.5}]


def test_no_flipped_bit_is_read(tmp_path: Path) -> None:
    write_samples(str(tmp_path), ENTRIES, run="runs/a", ema="power-0.05")
    data, refused = (tmp_path / SAMPLES).read_bytes(), 0
    assert read_samples(str(tmp_path)) == ENTRIES
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / SAMPLES).write_bytes(flipped)
        try:
            assert read_samples(str(tmp_path)) == ENTRIES
        except DataError:
            refused += 1
    assert refused > 0.95 * 8 * len(data)  # the rest is space between values


def test_one_without_its_seal_is_refused(tmp_path: Path) -> None:
    (tmp_path / SAMPLES).write_text('{"samples": [{"prompt": "a dog"}]}')
    with pytest.raises(DataError, match="damaged, edited or made by an earlier version"):
        read_samples(str(tmp_path))

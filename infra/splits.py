"""Which clips are kept from training: one rule for the trainer and for whoever examines what it has learned."""

import hashlib

HELD_OUT = ("val", "validation", "test")
"""Splits of a corpus that training never sees."""


def is_held_out(parent: str, split: str | None, frac: float) -> bool:
    """Whether clips of this parent video are kept from training: the same answer in both stages.

    `parent` is the sha256 of its bytes, or its URI; `frac` is kept back beside the videos of a split.
    """
    if split in HELD_OUT:
        return True
    if frac <= 0:
        return False
    digest = hashlib.sha256(parent.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < frac * 2**64

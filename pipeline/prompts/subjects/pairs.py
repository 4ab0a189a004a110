"""Cross-pairs: the picture that stands for a word is cut out of another place than the target itself.

A reference that is cut out of its own target teaches copying. A living thing is taken from another clip of the
same source video, whose span is disjoint, for elsewhere it would be another one. Other things may also come
from the documents that were retrieved for the clip, which the guard has cleared of its own video. The CLIP
vectors of the two lie between two bounds (Phantom-Data; it prints neither): below, it is likely another thing;
above, the two are all but one picture, and copying is what they would teach.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from infra.splits import HELD_OUT
from pipeline.schema import Status

Row = dict[str, Any]
Pairs = Literal["in_pair", "cross_clip", "mixed"]
BINS = 20
"""Of the histogram of similarities, from 0 to 1."""
NUM_LOOKED_AT = 2
"""Comparisons of a target that are kept of each fate but `used`, evenly by rank: a film of 2,000 clips makes
12 million. Ours."""


@dataclass(frozen=True)
class Compared:
    """A cut-out of the target and one of another place."""

    target: Row
    reference: Row
    similarity: float
    fate: str
    """used, spare, near_duplicate or too_unlike."""

    def row(self) -> Row:
        """As a row of `schema.PAIRS`."""
        return {
            "clip_id": self.target["clip_id"],
            "phrase": self.target["phrase"],
            "nature": self.target["nature"],
            "target_crop": self.target["crop_id"],
            "reference_crop": self.reference["crop_id"],
            "similarity": self.similarity,
            "fate": self.fate,
        }


def cross_references(
    target: Row, bank: Sequence[Row], similarity: tuple[float, float], *, at_most: int
) -> list[Compared]:
    """Everything that `target` was compared with, most similar first; `at_most` of them are used.

    `bank` holds the crops of the same source video and of the target's own documents; `similarity` are the
    bounds of a pair.
    """
    low, high = similarity
    candidates = [crop for crop in bank if is_candidate(target, crop)]
    if not candidates:
        return []
    vectors = np.stack([np.asarray(crop["vector"], np.float64) for crop in candidates])
    similarities = (vectors * np.asarray(target["vector"], np.float64)).sum(1).tolist()
    compared = []
    for crop, cosine in zip(candidates, similarities, strict=True):
        fate = "near_duplicate" if cosine > high else "too_unlike" if cosine < low else "spare"
        compared.append(Compared(target, crop, cosine, fate))
    compared.sort(key=lambda pair: (-pair.similarity, pair.reference["crop_id"]))
    # One of each clip and document: several frames of a still one are one picture.
    chosen: dict[tuple[str, str | None], int] = {}
    for place, pair in enumerate(compared):
        if pair.fate == "spare":
            chosen.setdefault((pair.reference["clip_id"], pair.reference["doc_id"]), place)
    for place in list(chosen.values())[:at_most]:
        compared[place] = replace(compared[place], fate="used")
    return compared


@dataclass
class Tally:
    """All comparisons as counts; of each target's a few, to be looked at."""

    fates: Counter[str] = field(default_factory=Counter)
    similarities: list[int] = field(default_factory=lambda: [0] * BINS)
    """The histogram."""
    kept: list[Compared] = field(default_factory=list)
    """What was used, and `NUM_LOOKED_AT` of each other fate."""

    def add(self, compared: Sequence[Compared]) -> None:
        """Count what one target was compared with, most similar first."""
        more = histogram([pair.similarity for pair in compared])
        self.similarities = [a + b for a, b in zip(self.similarities, more, strict=True)]
        by_fate: dict[str, list[Compared]] = {}
        for pair in compared:
            by_fate.setdefault(pair.fate, []).append(pair)
        for fate, pairs in by_fate.items():
            self.fates[fate] += len(pairs)
            step = 1 if fate == "used" else -(-len(pairs) // NUM_LOOKED_AT)
            self.kept += pairs[::step]

    def receipt(self) -> dict[str, Any]:
        """As JSON values."""
        pairs = [pair.row() for pair in self.kept]
        return {"pairs": pairs, "fates": dict(self.fates), "similarities": self.similarities}


def is_candidate(target: Row, crop: Row) -> bool:
    """May `crop` show the same thing, and from elsewhere? What is kept from training is nobody's reference."""
    if crop["status"] != Status.OK or crop["vector"] is None or target["vector"] is None:
        return False
    if crop["head"] != target["head"] or crop["nature"] == "place":
        return False
    if crop["doc_id"] is not None:
        return crop["clip_id"] == target["clip_id"] and target["nature"] != "living"
    if crop["split"] in HELD_OUT and target["split"] not in HELD_OUT:
        return False
    same = crop["clip_source"] == target["clip_source"] and crop["clip_id"] != target["clip_id"]
    return same and disjoint(target, crop)


def disjoint(one: Row, other: Row) -> bool:
    """Do the spans of two clips of one source share no moment? Pictures have no span: they are one picture."""
    first, second = sorted((row["start_s"] or 0.0, row["end_s"] or 0.0) for row in (one, other))
    return first[0] < first[1] <= second[0] < second[1]


def histogram(similarities: Sequence[float]) -> list[int]:
    """Counts in `BINS` equal bins of [0, 1]; below 0 counts as 0."""
    counts, _ = np.histogram(np.clip(similarities, 0, 1), bins=BINS, range=(0, 1))
    return [int(count) for count in counts]


def draw_histogram(counts: Sequence[int]) -> str:
    """One character a bin: for the terminal."""
    blocks = " ▁▂▃▄▅▆▇█"
    top = max(max(counts, default=0), 1)
    return "".join(blocks[-(-count * (len(blocks) - 1) // top)] for count in counts)

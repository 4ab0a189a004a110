"""From which similarity on two pictures are the same: measured on the memory, for every CLIP has its own.

A cosine of 0.9 means "nearly the same picture" to the CLIP of RA-CM3 (section 3.2: what is more similar
than 0.9 is skipped), "half of all the pictures of a kitchen" to a weaker encoder, and is hardly ever
reached by a copy with a watermark in a third. What does carry over is how rare it is: copies are more
alike than all but a few of the pairs of strangers that the memory itself is full of.
"""

import numpy as np

from pipeline.prompts.guard.rules import RA_CM3, GuardConfig, GuardedDocuments

NUM_PAIRS = 200_000
STRANGERS_FRAC = 1e-4
"""Share of the random pairs that may lie above the bound. Ours, from `tests/bench/bench_guard.py`."""
MIN_DOCUMENTS = 150
"""With fewer there are not 1 / STRANGERS_FRAC different pairs to learn from: RA-CM3's bound is taken."""
LOWEST, HIGHEST = 0.85, 0.98
"""Whatever the memory says. On real clips and a small CLIP, strangers begin to be refused below the one
(`tests/bench/bench_guard.py`: precision 0.977 at 0.8, 0.991 at 0.85); copies encoded again stay above the
other."""


def similarity_bound(config: GuardConfig, documents: GuardedDocuments) -> float:
    """The cosine above which a document is refused as a copy.

    Args:
        config: its `max_similarity`, if given, is the answer.
        documents: of the memory; pairs from one source, or from one file, don't count as strangers.

    Returns:
        A pure function of its arguments, in (0, 1].
    """
    if config.max_similarity is not None:
        return config.max_similarity
    count = len(documents.sources)
    if count < MIN_DOCUMENTS:
        return RA_CM3
    one, other = np.random.default_rng(0).integers(0, count, (2, NUM_PAIRS))
    strange = one != other
    for names in (documents.sources, documents.shas):  # 0 = unknown
        strange &= (names[one] != names[other]) | (names[one] == 0)
    one, other = one[strange], other[strange]
    if len(one) < 1 / STRANGERS_FRAC:
        return RA_CM3
    found = np.concatenate([_cosines(documents.vectors, one[i : i + 8192], other[i : i + 8192])
                            for i in range(0, len(one), 8192)])  # fmt: skip
    bound = float(np.quantile(found, 1 - STRANGERS_FRAC, method="higher"))
    return round(min(max(bound, LOWEST), HIGHEST), 4)


def _cosines(vectors: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    left, right = (np.asarray(vectors[rows], np.float32) for rows in (one, other))
    return (left * right).sum(axis=1)

"""What the retrieved documents say of their targets, beside random ones: can retrieval help at all?

Words need no tagger: they are what the retriever's analysis leaves of a text, without its stop words, stemmed.
Workers count shard by shard; the sums of all shards make the job's closing words.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.memory.retrieve.analysis import Analysis, analyser
from pipeline.memory.retrieve.documents import Documents
from pipeline.memory.vectors import cosines
from pipeline.prompts.augment.match import Match
from pipeline.schema import content_id

Sums = dict[str, float]
ERRORS = 2
"""A lead of fewer standard errors than this is none."""


def measure(
    rows: Sequence[dict[str, Any]],
    matches: Sequence[Match],
    own: Sequence[int] | np.ndarray,
    pictures: Sequence[np.ndarray | None],
    documents: Documents,
    analysis: Analysis,
) -> Sums:
    """Sums over the clips that got a document; each also meets a random document, fixed by its id.

    Args:
        rows: of a clips table.
        matches: their documents.
        own: number of the document that was made from each clip, -1 where there is none.
        pictures: float [d] unit image vector of each clip, where there is one.
        documents: the memory's.
        analysis: that of the retriever.

    Returns:
        words: content words of the captions, each once a caption; words_best, words_random: how many of them
        the best document, and a random one, has too; pictures: clips that were compared by picture;
        best, random, lead, lead_squared: sums over these of the best document's cosine with the clip, a random
        one's, their difference and its square.
    """
    names = ("words", "words_best", "words_random", "pictures", "best", "random", "lead", "lead_squared")
    sums: Sums = dict.fromkeys(names, 0)
    terms_of, texts = analyser(analysis), documents.table["text"]
    for row, match, itself, picture in zip(rows, matches, own, pictures, strict=True):
        if not match.docs:
            continue
        pair = [match.docs[0], random_document(row["clip_id"], len(documents), int(itself))]
        wanted = set(terms_of(row["caption"] or ""))
        best, other = (len(wanted & set(terms_of(texts[n].as_py() or ""))) for n in pair)
        found: Sums = {"words": len(wanted), "words_best": best, "words_random": other}
        vectors = documents.image[pair]
        if picture is not None and picture.any() and vectors.any(axis=1).all():
            near, far = cosines(vectors, picture).tolist()
            lead = near - far
            found |= {"pictures": 1, "best": near, "random": far, "lead": lead, "lead_squared": lead**2}
        for name, value in found.items():
            sums[name] += value
    return sums


def random_document(clip: str, num_documents: int, own: int) -> int:
    """A document's number, drawn by the clip's id among all but its own."""
    number = int(content_id("random document", clip)[:12], 16) % (num_documents - (own >= 0))
    return number + (0 <= own <= number)


def total(shards: Sequence[Sums]) -> Sums:
    """The sums over all shards, in their order."""
    names = shards[0] if shards else {}
    return {name: sum(shard[name] for shard in shards) for name in names}


def sentences(sums: Sums) -> list[str]:
    """What the sums say, a line on words and one on pictures; [] when no clip got a document."""
    if not sums.get("words"):
        return []
    best, random = (100 * sums[name] / sums["words"] for name in ("words_best", "words_random"))
    return [
        f"words: the best document has {best:.0f} % of its caption's, a random one {random:.0f} %",
        f"pictures: {_picture_sentence(sums)}",
    ]


def _picture_sentence(sums: Sums) -> str:
    count = int(sums["pictures"])
    if count < 2:
        return "not compared with the targets, whose vectors are neither in the memory nor were computed"
    best, random, lead = (sums[name] / count for name in ("best", "random", "lead"))
    variance = max(sums["lead_squared"] / count - lead**2, 0) * count / (count - 1)
    error = math.sqrt(variance / count)
    helps = "retrieval can help" if lead > ERRORS * error else "retrieval can hardly help"
    return (
        f"the best document's cosine with the target is {best:.3f}, a random one's {random:.3f} "
        f"({lead:+.3f} ± {error:.3f}, {count:,} clips): {helps}"
    )

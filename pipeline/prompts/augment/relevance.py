"""What the retrieved documents say of their targets, beside random ones: are they nearer at all?

Words need no tagger: they are what the retriever's analysis leaves of a text, without its stop words, stemmed.
Workers count shard by shard; the sums of all shards make the job's closing words.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.memory import Memory
from pipeline.memory.embed.worker import row_doc_id
from pipeline.memory.retrieve.analysis import analyser
from pipeline.memory.vectors import cosines, vectors_numpy
from pipeline.prompts.augment.match import Match
from pipeline.schema import content_id

Sums = dict[str, float]
ERRORS = 2
"""A lead of fewer standard errors than this is none."""


def measure(
    rows: Sequence[dict[str, Any]],
    matches: Sequence[Match],
    pictures: Sequence[np.ndarray | None],
    memory: Memory,
) -> Sums:
    """Sums over the clips that got a document; each also meets a random document, fixed by its id.

    Args:
        rows: of a clips table.
        matches: their documents.
        pictures: float [d] unit image vector of each clip, where there is one.
        memory: of the documents.

    Returns:
        words: content words of the captions, each once a caption; words_best, words_random: how many of them
        the best document, and a random one, has too; pictures: clips that were compared by picture;
        best, random, lead, lead_squared: sums over these of the best document's cosine with the clip, a random
        one's, their difference and its square.
    """
    names = ("words", "words_best", "words_random", "pictures", "best", "random", "lead", "lead_squared")
    sums: Sums = dict.fromkeys(names, 0)
    terms_of, total = analyser(memory.analysis), memory.num_documents
    with_one = [i for i, match in enumerate(matches) if match.docs]
    numbers = [(matches[i].docs[0], *random_documents(rows[i]["clip_id"], total)) for i in with_one]
    unique = sorted({number for some in numbers for number in some})
    table = memory.take(unique, ["doc_id", "text", "image_embedding"])
    ids, texts = table["doc_id"].to_pylist(), table["text"].to_pylist()
    vectors, place = (
        vectors_numpy(table["image_embedding"].combine_chunks()),
        {n: i for i, n in enumerate(unique)},
    )
    for i, some in zip(with_one, numbers, strict=True):
        row, picture = rows[i], pictures[i]
        best, first, second = (place[number] for number in some)
        pair = [best, second if ids[first] == row_doc_id(row) else first]
        wanted = set(terms_of(row["caption"] or ""))
        with_best, with_random = (len(wanted & set(terms_of(texts[n] or ""))) for n in pair)
        found: Sums = {"words": len(wanted), "words_best": with_best, "words_random": with_random}
        if picture is not None and picture.any() and vectors[pair].any(axis=1).all():
            near, far = cosines(vectors[pair], picture).tolist()
            lead = near - far
            found |= {"pictures": 1, "best": near, "random": far, "lead": lead, "lead_squared": lead**2}
        for name, value in found.items():
            sums[name] += value
    return sums


def random_documents(clip: str, num_documents: int) -> tuple[int, int]:
    """Two documents' numbers, drawn by the clip's id: one, and the next where the first is the clip's own."""
    number = int(content_id("random document", clip)[:12], 16) % num_documents
    return number, (number + 1) % num_documents


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
    says = "nearer than a random one" if lead > ERRORS * error else "no nearer: retrieval can hardly help"
    return (
        f"the best document's cosine with the target is {best:.3f}, a random one's {random:.3f} "
        f"({lead:+.3f} ± {error:.3f}, {count:,} clips): {says}"
    )

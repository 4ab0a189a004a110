r"""Text -> words, for every script, by one rule; what BM25 counts.

Letters, marks and digits make words; everything else separates them, so characters that a query
language reserves (`" + - ( ) : * ^ ~ \`) are harmless by construction. Text is NFKC-normalised and
case-folded. Scripts written without spaces (Chinese, Japanese, Thai, ...) give overlapping pairs of
characters, as Lucene's CJKAnalyzer does.
"""

import hashlib
import re
import unicodedata
from functools import lru_cache

import numpy as np
import regex

from pipeline.schema import content_id

_ASCII = re.compile(r"[a-z0-9]+")
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}ー"
_ANY = regex.compile(rf"(?P<run>[{_UNSPACED}]+)|(?P<word>[[\p{{L}}\p{{M}}\p{{N}}]--[{_UNSPACED}]]+)", regex.V1)


def words(text: str) -> list[str]:
    """The words of `text` in order; [] when it has none."""
    if text.isascii():
        return _ASCII.findall(text.lower())
    found: list[str] = []
    for match in _ANY.finditer(unicodedata.normalize("NFKC", text).casefold()):
        run = match["run"]
        if run is None:
            found.append(match["word"])
        elif len(run) == 1:
            found.append(run)
        else:
            found += [run[i : i + 2] for i in range(len(run) - 1)]
    return found


@lru_cache(maxsize=1 << 16)
def word_hash(word: str) -> int:
    """64 bits that stand for a word, so that an index is made of arrays alone.

    Among a million words the chance of any collision is 3e-8.
    """
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def drop_words(text: str, *, dropped_frac: float, seed: int, row_id: str) -> str:
    """Drop each word of a query with a probability; at least one stays (RA-CM3, section 3.2).

    The draw is a function of (seed, row_id): the same for any number of workers.
    """
    pieces = text.split()
    if not dropped_frac or len(pieces) < 2:
        return text
    random = np.random.default_rng(int(content_id("query dropout", seed, row_id), 16))
    draws = random.random(len(pieces))
    kept = [piece for piece, draw in zip(pieces, draws, strict=True) if draw >= dropped_frac]
    return " ".join(kept or [pieces[int(draws.argmax())]])

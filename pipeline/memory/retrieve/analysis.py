r"""From a text to the terms that BM25 compares: Lucene's English analysis, stems of other languages, or words.

    english    possessive 's and 33 stop words go, the rest is stemmed (Snowball english, "Porter2")
    french …   stemmed by that language's Snowball algorithm
    none       words as they stand

Words are found by one rule for every script: letters, marks and digits make words; everything else separates
them, so characters that a query language reserves (`" + - ( ) : * ^ ~ \`) are harmless by construction. Text is
NFKC-normalised and case-folded. Scripts written without spaces (Chinese, Japanese, Thai, ...) give overlapping
pairs of characters, as Lucene's CJKAnalyzer does.
"""

import re
import unicodedata
from collections.abc import Callable
from typing import Literal

import regex

Analysis = Literal[
    "english",
    "arabic",
    "danish",
    "dutch",
    "finnish",
    "french",
    "german",
    "greek",
    "hungarian",
    "italian",
    "norwegian",
    "portuguese",
    "romanian",
    "russian",
    "spanish",
    "swedish",
    "tamil",
    "turkish",
    "none",
]
"""Languages that Snowball stems."""
_STOP = """
a an and are as at be but by for if in into is it no not of on or such that the their then there these they this
to was will with s
"""
STOP_WORDS = frozenset(_STOP.split())
"""Lucene's `EnglishAnalyzer.ENGLISH_STOP_WORDS_SET`; and the s that its possessive filter takes off "dog's"."""
_ASCII = re.compile(r"[a-z0-9]+")
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}ー"
_ANY = regex.compile(rf"(?P<run>[{_UNSPACED}]+)|(?P<word>[[\p{{L}}\p{{M}}\p{{N}}]--[{_UNSPACED}]]+)", regex.V1)


def analyser(analysis: Analysis) -> Callable[[str], list[str]]:
    """Text -> its terms in order; for one thread (Snowball's stemmers keep state)."""
    if analysis == "none":
        return words
    import Stemmer

    stem = Stemmer.Stemmer(analysis).stemWords
    if analysis == "english":
        return lambda text: stem([w for w in words(text) if w not in STOP_WORDS])
    return lambda text: stem(words(text))


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

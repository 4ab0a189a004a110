"""Finds the noun phrases of a caption that name things that could be seen: rules, no download.

VIMI's figure replaces the subject's words and the background's words by pictures and leaves the article
(`A [dog] is playing in [grass]`). Which tool finds the words is not published. Where others ask a parser
(VideoBooth: spaCy noun chunks) or a language model (Video Alchemist), captions need less: nearly all
their noun phrases open with a determiner and end at a function word or a verb. The rules of Video
Alchemist (2501.06187) hold: the entity's words are a substring of the caption, no plurals, at least one
subject.
"""

import itertools
import re
from dataclasses import dataclass
from typing import Literal

from pipeline.prompts.subjects import lexicon

Kind = Literal["subject", "background"]
Nature = Literal["living", "product", "place", "other"]
TOKEN = re.compile(r"[A-Za-z]+(?:[-'’][A-Za-z]+)*|[0-9]+[A-Za-z]*|[^\sA-Za-z0-9]")
MAX_WORDS = 4
"""Words of an entity: longer runs are mostly lists of names without commas."""


@dataclass(frozen=True)
class Entity:
    """A noun phrase without its determiner: `caption[start:end] == text`."""

    text: str
    head: str
    start: int
    end: int
    kind: Kind
    singular: bool

    @property
    def is_person(self) -> bool:
        """By its head: every cut-out of it shows a face, or nobody can tell who it is."""
        return self.head in lexicon.PERSONS

    @property
    def nature(self) -> Nature:
        """Which pictures may stand for it: a living thing is only itself, a product has its like."""
        if self.kind == "background":
            return "place"
        if self.is_person or self.head in lexicon.ANIMALS:
            return "living"
        return "product" if self.head in lexicon.PRODUCTS else "other"


@dataclass(frozen=True)
class _Token:
    text: str
    word: str
    start: int
    end: int


def find_entities(caption: str) -> list[Entity]:
    """Noun phrases of `caption` in order, each a subject or a background; plurals are marked.

    >>> [(e.text, e.kind) for e in find_entities("A white dog is playing in the tall grass.")]
    [('white dog', 'subject'), ('tall grass', 'background')]
    """
    tokens = [_Token(m[0], m[0].lower(), m.start(), m.end()) for m in TOKEN.finditer(caption)]
    found: list[Entity] = []
    place = 0
    while place < len(tokens):
        opener = tokens[place].word
        begin = _begin(tokens, place)
        if begin is None:
            place += 1
            continue
        end = _end(tokens, begin, opener)
        if end > begin:
            entity = _entity(caption, tokens, begin, end, opener)
            if entity is not None:
                found.append(entity)
        place = max(end, place + 1)
    return found


def subjects(entities: list[Entity]) -> list[Entity]:
    """The entities that a cut-out may replace: one thing each, first named first."""
    chosen, heads = [], set()
    for entity in entities:
        if entity.kind == "subject" and entity.singular and entity.head not in heads:
            chosen.append(entity)
            heads.add(entity.head)
    return chosen


def named_together(caption: str, entities: list[Entity]) -> bool:
    """Does `and` join the first subject to another? One mask then shows both ("a woman and a child")."""
    named = [entity for entity in entities if entity.kind == "subject"]
    if not named:
        return False
    first, between = named[0], []
    if len(named) > 1:
        between = caption[first.end : named[1].start].lower().split()
    behind = [m[0].lower() for m in TOKEN.finditer(caption[first.end :])][:3]
    is_bare = behind[:1] == ["and"] and not lexicon.THINGS.isdisjoint(behind[1:])  # "a bride and groom"
    return is_bare or ("and" in between and len(between) <= 2)


def somebody_acts(caption: str, until: int) -> bool:
    """Does somebody without a name act before the first thing is named ("someone is driving the truck")?"""
    words = [m[0].lower() for m in TOKEN.finditer(caption[:until])]
    return not lexicon.NOBODY.isdisjoint(words) or ("some", "one") in itertools.pairwise(words)


def is_request(caption: str) -> bool:
    """Does the caption ask for something to be done ("Put the pen in the bowl")? Who does it is not named."""
    words = [m[0].lower() for m in TOKEN.finditer(caption)][:2]
    return (
        len(words) == 2
        and words[0] in lexicon.VERBS_BASE | lexicon.REQUESTS
        and words[1] in lexicon.AFTER_REQUESTS
    )


def background(entities: list[Entity]) -> Entity | None:
    """The first place that the caption names, or None."""
    return next((entity for entity in entities if entity.kind == "background"), None)


def _begin(tokens: list[_Token], place: int) -> int | None:
    """Index of the first word of the phrase that opens at `place`; None if none opens there."""
    word = tokens[place].word
    if word in lexicon.DETERMINERS:
        return place + 1
    if word in lexicon.COUNTED:
        return place  # "people": several at once
    if word in lexicon.PLURAL_COUNTS or word.isdigit():
        return place + 1  # "two butterflies", "3 women"
    there_are = place > 1 and (tokens[place - 2].word, tokens[place - 1].word) == ("there", "are")
    if (place == 0 or there_are) and _plural(word):
        return place  # "There are workers in white coats"
    starts = place == 0 or tokens[place - 1].word in {".", ",", "and", *lexicon.PLACE_PREPOSITIONS}
    after_preposition = place > 0 and tokens[place - 1].word in lexicon.PLACE_PREPOSITIONS
    if after_preposition and (word in lexicon.PLACES or word in lexicon.ADJECTIVES):
        return place  # "in grass", "on snowy ground": places often go without an article
    if starts and (word in lexicon.BARE_NOUNS or word in lexicon.ADJECTIVES):
        return place  # "Dog running on the beach"
    return None


def _end(tokens: list[_Token], begin: int, opener: str) -> int:
    """Index after the phrase's last word: it stops before a function word, a verb or punctuation."""
    end = begin
    while end < len(tokens) and end - begin < MAX_WORDS and _belongs(tokens, begin, end, opener):
        end += 1
    # "a brown and white dog": colours joined by `and` are one phrase
    joined = end + 1 < len(tokens) and tokens[end].word == "and"
    if joined and all(t.word in lexicon.ADJECTIVES for t in (*tokens[begin:end], tokens[end + 1])):
        end += 1
        while end < len(tokens) and end - begin < MAX_WORDS + 2 and _belongs(tokens, begin, end, opener):
            end += 1
    return end


def _belongs(tokens: list[_Token], begin: int, place: int, opener: str) -> bool:
    word = tokens[place].word
    if not word[0].isalnum() or word in lexicon.STOPS or word in lexicon.PLURAL_COUNTS - lexicon.COUNTED:
        return False
    before = [t.word for t in tokens[begin:place] if t.word != "and"]
    if all(_modifies(w) for w in before):
        return True  # no noun yet
    if _participle(word):
        return _is_compound(tokens, place)
    if word in lexicon.VERBS_S or word in lexicon.VERBS_BASE or before[-1] in lexicon.PEOPLE:
        return False  # "the man | rides", "a man | explain"
    if word.endswith("ly") and word not in lexicon.NOUNS_LY:
        return False  # "a cup | slightly"
    is_verb = _plural(word) and word not in lexicon.NOUNS_S | lexicon.COUNTED
    if opener in lexicon.SINGULAR_DETERMINERS and is_verb:
        return False  # after "a" the noun is singular, so this is a verb: "a boxer | punches"
    return word not in lexicon.ADJECTIVES or word in lexicon.PLACES


def _is_compound(tokens: list[_Token], place: int) -> bool:
    """Does the participle at `place` join two nouns to one name, or say what the first one does?

    "a computer | generated | monster truck" and "a chocolate | covered | cake" name the last noun; "a man |
    riding", "a woman | fried | shrimp" and "a pot | placed | on" the first.
    """
    previous, following = tokens[place - 1].word, tokens[place + 1].word if place + 1 < len(tokens) else ""
    if not tokens[place].word.endswith("ed") or previous in lexicon.BARE_NOUNS:
        return False
    ends = not following[:1].isalpha() or following in lexicon.STOPS | lexicon.PLURAL_COUNTS
    return not ends and not following.endswith("ly")


def _participle(word: str) -> bool:
    return word.endswith(("ing", "ed")) and len(word) > 4


def _modifies(word: str) -> bool:
    """Is this word an adjective or participle: something that a noun must still follow?"""
    return (word in lexicon.ADJECTIVES and word not in lexicon.PLACES) or _participle(word)


def _entity(caption: str, tokens: list[_Token], begin: int, end: int, opener: str) -> Entity | None:
    """The phrase as an entity; None when its head names the shot, an action or a measure."""
    words = [t.word for t in tokens[begin:end]]
    head = words[-1]
    if words[0] in {"close", "closeup", "close-up"} or head.endswith(("'s", "’s")):
        return None
    if head in lexicon.SHOT_NOUNS or head in lexicon.WORN or len(head) < 2 or head[0].isdigit():
        return None
    if head.endswith("ing") and head not in lexicon.PLACES and len(words) == 1:
        return None  # "the singing": an action
    if _modifies(head) and head not in lexicon.BARE_NOUNS:
        return None  # "the red": no noun after all
    followed_by = tokens[end].word if end < len(tokens) else ""
    if followed_by == "of" and head in lexicon.PLACES:
        return None  # "the floor of ...", "a body of water": the place comes after `of`
    if followed_by == "s":
        return None  # "a lady s face": the possessor, as transcribed captions spell it
    if _does_something_to(tokens, end) and head not in lexicon.BARE_NOUNS:
        return None  # "a cnc milling machine": is it the machine that is named, or what a cnc does?
    kind: Kind = "background" if head in lexicon.PLACES else "subject"
    start, stop = tokens[begin].start, tokens[end - 1].end
    is_filled = followed_by == "of" and head in lexicon.CONTAINERS  # "a pot of soup": which of both is seen?
    several = {"some", "any"} | lexicon.PLURAL_COUNTS
    one = opener in lexicon.SINGULAR_DETERMINERS and head in lexicon.NOUNS_S
    is_plural = _plural(head) and not one  # after "a" too: "a cartoon involving animals"
    singular = not (is_filled or is_plural or opener in several or opener.isdigit())
    return Entity(caption[start:stop], head, start, stop, kind, singular)


def _does_something_to(tokens: list[_Token], end: int) -> bool:
    """Does an -ing form with a bare noun behind it follow the phrase?"""
    if end + 1 >= len(tokens) or not tokens[end].word.endswith("ing"):
        return False
    word = tokens[end + 1].word
    return word.isalpha() and word not in lexicon.STOPS | lexicon.PLURAL_COUNTS and not word.endswith("ly")


def _plural(head: str) -> bool:
    """Does the noun look plural? When in doubt yes: a plural is left in words, which is never wrong."""
    if head in lexicon.PLURAL_COUNTS or head in {"feet", "mice", "geese", "teeth", "police"}:
        return True
    return head.endswith("s") and not head.endswith(("ss", "us", "is"))

"""Selects what of a prompt is encoded: number of documents, condition dropout, the limit on tokens.

All three cut the *prompt*, before it is encoded: the later states of a language model have seen the
earlier segments, so hiding their tokens afterwards would not hide what they said.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

from model.condition import KINDS, Prompt, Segment
from model.data.batch import ROLES, Role

PUNCTUATION = ".,;:!?)]}'"


def select(prompt: Prompt, num_documents: int | None = None, dropped: frozenset[str] = frozenset()) -> Prompt:
    """The first `num_documents` retrieved documents of a prompt, without the dropped kinds.

    A dropped subject or background leaves its word in the caption (`Segment.text`), if it has one: "A
    [dog] is playing." becomes "A dog is playing."; without the word the picture just goes.

    `num_documents` stay, best first; None = all. `dropped` are kinds of `model.condition.KINDS`.

    Raises:
        ValueError: an unknown kind or a negative number.
    """
    if unknown := dropped - set(KINDS):
        raise ValueError(f"kinds {sorted(unknown)}; legal: {', '.join(KINDS)}")
    if num_documents is not None and num_documents < 0:
        raise ValueError(f"num_documents = {num_documents}; legal: None, 0, 1, 2, ...")
    kept = keep_documents(prompt, num_documents)
    if "text" not in dropped and "subject" in dropped:
        kept = restore_words(kept)
    return tuple(segment for segment in kept if ROLES[segment.role].kind not in dropped)


def documents(prompt: Prompt) -> list[list[int]]:
    """Positions of the segments of each retrieved document, best first.

    A document is a text, a picture, or a text followed by its picture: a retrieved text begins a new
    one, and so does a picture when the document before it has its picture already.
    """
    found: list[list[int]] = []
    complete = True
    for place, segment in enumerate(prompt):
        if segment.role != Role.RETRIEVED:
            continue
        if complete or segment.type == "text":
            found.append([])
        found[-1].append(place)
        complete = segment.type == "image"
    return found


def keep_documents(prompt: Prompt, number: int | None) -> Prompt:
    if number is None:
        return prompt
    gone = {place for document in documents(prompt)[number:] for place in document}
    return tuple(segment for place, segment in enumerate(prompt) if place not in gone)


def retrieved(prompt: Prompt) -> Prompt:
    """The segments of its documents, best first."""
    return tuple(segment for segment in prompt if segment.role == Role.RETRIEVED)


def with_retrieved(prompt: Prompt, found: Prompt) -> Prompt:
    """The prompt with these documents in place of its own; where it has none, behind its instruction."""
    instructions = sum(segment.role == Role.INSTRUCTION for segment in prompt)
    place = next((n for n, segment in enumerate(prompt) if segment.role == Role.RETRIEVED), instructions)
    own = [segment for segment in prompt if segment.role != Role.RETRIEVED]
    return (*own[:place], *found, *own[place:])


def restore_words(prompt: Prompt) -> Prompt:
    """Put the words of subject and background pictures back in their place, one caption again."""
    words = [
        Segment("text", Role.CAPTION, text=segment.text)
        if segment.type == "image" and segment.text and ROLES[segment.role].kind == "subject"
        else segment
        for segment in prompt
    ]
    if words == list(prompt):
        return prompt
    joined: list[Segment] = []
    for segment in words:
        last = joined[-1] if joined else None
        if last and last.type == segment.type == "text" and last.role == segment.role == Role.CAPTION:
            joined[-1] = replace(last, text=join_words(last.text or "", segment.text or ""))
        else:
            joined.append(segment)
    return tuple(joined)


def join_words(left: str, right: str) -> str:
    left, right = left.rstrip(), right.lstrip()
    tight = not left or not right or right[0] in PUNCTUATION
    return f"{left}{right}" if tight else f"{left} {right}"


def drop_empty(prompt: Prompt) -> list[tuple[int, Segment]]:
    """Segments that say something, with their positions: no blank text, no picture without bytes."""
    return [
        (place, segment)
        for place, segment in enumerate(prompt)
        if (segment.image if segment.type == "image" else (segment.text or "").strip())
    ]


def fit(prompt: Prompt, max_tokens: int, count: Callable[[Prompt], int]) -> Prompt:
    """The prompt cut to `max_tokens`: what matters least goes first, and pictures are never cut.

    In this order: whole retrieved documents, the worst first; pictures, the last first (subjects leave
    their word); the other texts but the caption; then the caption from its end, at a space if there is one.
    Segments keep their positions: what goes is blanked, so that `segment` ids don't move.

    `count` gives the tokens of a prompt, as the encoder counts them.
    """
    if count(prompt) <= max_tokens:
        return prompt
    for shorter in _shorter(prompt):
        prompt = shorter
        if count(prompt) <= max_tokens:
            return prompt
    for place in reversed(range(len(prompt))):
        text = prompt[place].text or ""
        if prompt[place].type == "text" and text.strip():
            prompt = _cut_text(prompt, place, max_tokens, count)
            if (prompt[place].text or "").strip():
                return prompt
    return prompt


def _shorter(prompt: Prompt) -> Iterator[Prompt]:
    for document in reversed(documents(prompt)):
        prompt = _blank(prompt, document)
        yield prompt
    for place in reversed(range(len(prompt))):
        if prompt[place].type == "image" and prompt[place].image:
            word = prompt[place].text if ROLES[prompt[place].role].kind == "subject" else None
            swap = Segment("text", Role.CAPTION, text=word) if word else None
            prompt = _blank(prompt, [place], swap)
            yield prompt
    others = [n for n, s in enumerate(prompt) if s.type == "text" and s.role != Role.CAPTION]
    if others:
        yield _blank(prompt, others)


def _blank(prompt: Prompt, places: list[int], swap: Segment | None = None) -> Prompt:
    blank = swap or Segment("text", Role.CAPTION, text="")
    return tuple(blank if place in places else segment for place, segment in enumerate(prompt))


def _cut_text(prompt: Prompt, place: int, max_tokens: int, count: Callable[[Prompt], int]) -> Prompt:
    """The longest prefix of one text with which the prompt fits; empty if none does."""
    text = (prompt[place].text or "").rstrip()

    def with_prefix(length: int) -> Prompt:
        short = replace(prompt[place], text=text[:length])
        return (*prompt[:place], short, *prompt[place + 1 :])

    low, high = 0, len(text)  # the prefix of `low` characters fits, or nothing does
    while high - low > 1:
        middle = (low + high) // 2
        if count(with_prefix(middle)) <= max_tokens:
            low = middle
        else:
            high = middle
    if low and not text[low].isspace():
        low = text.rfind(" ", 0, low) if " " in text[:low] else low
    return with_prefix(low)

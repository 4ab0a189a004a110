"""Which part of a prompt is encoded: documents, dropout, the limit."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.condition import KINDS, Prompt, Segment
from model.data.batch import ROLES
from model.prompt.select import documents, fit, retrieved, select, with_retrieved

ANY_SEGMENT = st.builds(
    Segment,
    type=st.sampled_from(["text", "image"]),
    role=st.sampled_from(list(ROLES)),
    text=st.none() | st.text(max_size=12),
    image=st.just(b"picture"),
).map(lambda s: s if s.type == "image" else Segment("text", s.role, text=s.text or ""))
ANY_PROMPT = st.lists(ANY_SEGMENT, max_size=9).map(tuple)
ANY_KINDS = st.frozensets(st.sampled_from(sorted(KINDS)))


def text(role: str, words: str) -> Segment:
    return Segment("text", role, text=words)


def image(role: str, word: str | None = None, data: bytes = b"picture") -> Segment:
    return Segment("image", role, text=word, image=data)


RETRIEVED = (
    text("retrieved", "first"),
    image("retrieved"),
    text("retrieved", "second"),
    text("retrieved", "third"),
    image("retrieved"),
    image("retrieved"),
)
SUBJECTS = (
    text("instruction", "Generate a video with the text and image"),
    text("caption", "A"),
    image("subject", "dog"),
    text("caption", " is playing in "),
    image("background", "grass"),
    text("caption", "."),
)


def test_documents_are_texts_with_their_pictures_in_rank_order() -> None:
    assert documents((*RETRIEVED, text("caption", "x"))) == [[0, 1], [2], [3, 4], [5]]


@pytest.mark.parametrize(("number", "kept"), [(0, 0), (1, 2), (2, 3), (3, 5), (4, 6), (9, 6), (None, 6)])
def test_the_best_documents_stay(number: int | None, kept: int) -> None:
    assert select((*RETRIEVED, *SUBJECTS), number) == (*RETRIEVED[:kept], *SUBJECTS)


@given(prompt=ANY_PROMPT, other=ANY_PROMPT)
def test_swapped_documents_are_the_others_and_all_else_is_ones_own(prompt: Prompt, other: Prompt) -> None:
    swapped = with_retrieved(prompt, retrieved(other))
    assert retrieved(swapped) == retrieved(other)
    assert select(swapped, dropped=frozenset({"retrieved"})) == select(prompt, dropped=frozenset({"retrieved"}))


def test_swapped_documents_stand_where_ones_own_stood() -> None:
    instruction, caption = text("instruction", "Generate"), text("caption", "A dog")
    found = RETRIEVED[2:5]
    assert with_retrieved((*RETRIEVED[:2], instruction, caption), found) == (*found, instruction, caption)
    assert with_retrieved((instruction, *RETRIEVED[:2], caption), found) == (instruction, *found, caption)
    assert with_retrieved((instruction, caption), found) == (instruction, *found, caption)


def test_a_dropped_subject_leaves_its_word() -> None:
    found = select(SUBJECTS, dropped=frozenset({"subject"}))
    assert [s.text for s in found] == [SUBJECTS[0].text, "A dog is playing in grass."]


def test_without_text_and_subjects_nothing_is_left_of_a_subject_prompt() -> None:
    assert select(SUBJECTS, dropped=frozenset({"subject", "text"})) == ()
    assert [s.type for s in select(SUBJECTS, dropped=frozenset({"text"}))] == ["image", "image"]


@given(prompt=ANY_PROMPT)
def test_selecting_everything_changes_nothing(prompt: Prompt) -> None:
    assert select(prompt) == prompt


@given(prompt=ANY_PROMPT, dropped=ANY_KINDS, number=st.none() | st.integers(0, 4))
def test_dropped_kinds_are_gone_and_the_others_unmoved(
    prompt: Prompt, dropped: frozenset[str], number: int | None
) -> None:
    found = select(prompt, number, dropped)
    gone = {role for role, facts in ROLES.items() if facts.kind in dropped}
    assert not any(segment.role in gone for segment in found)
    others = [s for s in found if s.role not in ("caption", "retrieved")]
    assert others == [s for s in prompt if s.role not in gone | {"caption", "retrieved"}]
    assert select(found, number, dropped) == found
    if number is not None and "retrieved" not in dropped:
        assert len(documents(found)) == min(number, len(documents(prompt)))


@pytest.mark.parametrize(("number", "dropped"), [(-1, frozenset()), (1, frozenset({"pictures"}))])
def test_what_can_not_be_selected_is_refused(number: int, dropped: frozenset[str]) -> None:
    with pytest.raises(ValueError, match="legal"):
        select(SUBJECTS, number, dropped)


def count(prompt: Prompt) -> int:
    """Ten tokens a picture, one a character."""
    texts = sum(len(s.text or "") for s in prompt if s.type == "text" and (s.text or "").strip())
    return texts + 10 * sum(s.type == "image" and bool(s.image) for s in prompt)


@settings(max_examples=300, deadline=None)
@given(prompt=ANY_PROMPT, limit=st.integers(1, 60))
def test_a_cut_prompt_fits_and_keeps_its_pictures_whole(prompt: Prompt, limit: int) -> None:
    short = fit(prompt, limit, count)
    assert count(short) <= limit and len(short) == len(prompt)
    assert fit(short, limit, count) == short
    if count(prompt) <= limit:
        assert short == prompt
    for before, after in zip(prompt, short, strict=True):
        assert after.image in (before.image, None)
        if before.type == after.type == "text":
            assert (before.text or "").startswith(after.text or "")


def test_the_caption_is_cut_last_and_at_a_space() -> None:
    prompt = (*RETRIEVED[:2], image("subject", "dog"), text("instruction", "do"), text("caption", "one two"))
    cuts = [fit(prompt, limit, count) for limit in (34, 33, 20, 10, 9, 5)]
    said = [[s.text or "picture" for s in cut if s.image or (s.text or "").strip()] for cut in cuts]
    assert said == [
        ["first", "picture", "dog", "do", "one two"],
        ["dog", "do", "one two"],
        ["dog", "do", "one two"],
        ["dog", "one two"],
        ["dog", "one"],
        ["dog", "on"],
    ]

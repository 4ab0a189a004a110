"""Renders a prompt by a model's chat template and maps its tokens back to the prompt's segments.

The template is rendered with a marker in the place of each text, and the texts are put in afterwards:
so their characters are known exactly, whatever the template does, and a caption can't write template
code or control tokens.
"""

import re
from dataclasses import dataclass
from typing import Any

from infra.errors import ConfigError
from model.condition import Prompt, Segment
from model.data.batch import Role
from model.prompt.select import drop_empty

OPEN, CLOSE = "\ue000", "\ue001"
"""Private-use characters around a marker's number; no tokenizer gives them a meaning."""
MARKER = re.compile(f"{OPEN}(\\d+){CLOSE}")


@dataclass(frozen=True)
class Span:
    """Characters [start, end) of a string that belong to a segment."""

    place: int
    role: str
    start: int
    end: int


@dataclass(frozen=True)
class Layout:
    """A rendered prompt, pictures still one placeholder each."""

    text: str
    spans: list[Span]
    """In the order of the characters; what is outside is template."""
    pictures: list[bytes]
    """Encoded pictures in the order of their placeholders."""


class Template:
    """The chat and image template of a processor.

    A template that keeps the order of the content is used as it is. One that moves pictures to the front
    (LLaVA-1.5's) would undo the interleaving: then the pictures go inline, as placeholders in the text,
    which is how these models take several pictures. A processor without a template gets the bare
    interleaved text.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.image_token: str = getattr(processor, "image_token", None) or ""
        if not self.image_token:
            raise ConfigError(
                f"{type(processor).__name__} names no image token",
                legal="a processor of an image-text-to-text model",
            )
        self._control = _control_tokens(processor, self.image_token)
        self._has_template = bool(getattr(processor, "chat_template", None))
        self._is_inline = not (self._has_template and self._keeps_order())
        self._before, self._after = ("", "") if self._is_inline else self._wrap()

    def render(self, prompt: Prompt) -> Layout:
        """Lay the prompt out; blank segments are left out."""
        segments = drop_empty(prompt)
        texts = [self._text_of(segments, n) for n in range(len(segments))]
        rendered = self._render_markers([segment.type for _, segment in segments])
        return self._fill(rendered, segments, texts)

    def _fill(self, rendered: str, segments: list[tuple[int, Segment]], texts: list[str]) -> Layout:
        """Put texts where their markers are, and note whose characters are where."""
        pictures = [(place, segment) for place, segment in segments if segment.type == "image"]
        pattern = re.compile(f"{MARKER.pattern}|({re.escape(self.image_token)})")
        out, spans, last, length, seen = [], [], 0, 0, 0

        def write(piece: str) -> None:
            nonlocal length
            out.append(piece)
            length += len(piece)

        for match in pattern.finditer(rendered):
            write(rendered[last : match.start()])
            start, last = length, match.end()
            if match.group(1) is not None:
                place, segment = segments[int(match.group(1))]
                write(texts[int(match.group(1))])
                spans.append(Span(place, segment.role, start, length))
                continue
            if seen == len(pictures):
                raise ConfigError(f"{type(self.processor).__name__}'s template adds pictures of its own")
            place, segment = pictures[seen]
            seen += 1
            write(self.image_token)
            before = len(self._before) if rendered[: match.start()].endswith(self._before) else 0
            after = len(self._after) if rendered[last:].startswith(self._after) else 0
            spans.append(Span(place, segment.role, start - before, length + after))
        write(rendered[last:])
        if seen != len(pictures) or len(spans) != len(segments):
            raise ConfigError(f"{type(self.processor).__name__}'s template leaves out parts of a prompt")
        return Layout("".join(out), spans, [segment.image or b"" for _, segment in pictures])

    def _text_of(self, segments: list[tuple[int, Segment]], n: int) -> str:
        """A segment's text, cleaned, with what parts it from a text that follows at once."""
        segment = segments[n][1]
        if segment.type == "image":
            return ""
        text = self._control.sub(" ", segment.text or "")
        following = segments[n + 1][1] if n + 1 < len(segments) else None
        if following is None or following.type == "image":
            return text
        return text + (" " if segment.role == following.role == Role.CAPTION else "\n")

    def _render_markers(self, kinds: list[str]) -> str:
        """The template with a marker for each text and a placeholder for each picture."""
        marks = [f"{OPEN}{n}{CLOSE}" for n in range(len(kinds))]
        if self._is_inline:
            inline = "".join(
                self.image_token if kind == "image" else mark for kind, mark in zip(kinds, marks, strict=True)
            )
            return self._chat([{"type": "text", "text": inline}]) if self._has_template else inline
        return self._chat(
            [
                {"type": "image"} if kind == "image" else {"type": "text", "text": mark}
                for kind, mark in zip(kinds, marks, strict=True)
            ]
        )

    def _chat(self, content: list[dict[str, str]]) -> str:
        return self.processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)

    def _keeps_order(self) -> bool:
        """Whether text, picture, text, picture come out in this order."""
        self._is_inline = False
        rendered = self._render_markers(["text", "image", "text", "image"])
        pattern = re.compile(f"{OPEN}(\\d+){CLOSE}|{re.escape(self.image_token)}")
        return [match.group(1) for match in pattern.finditer(rendered)] == ["0", None, "2", None]

    def _wrap(self) -> tuple[str, str]:
        """What the template writes around a picture, such as `<|vision_start|>` and `<|vision_end|>`."""
        rendered = self._render_markers(["text", "image", "text"])
        inside = rendered[rendered.index(CLOSE) + 1 : rendered.rindex(OPEN)]
        before, _, after = inside.partition(self.image_token)
        return before, after


def _control_tokens(processor: Any, image_token: str) -> re.Pattern[str]:
    """Matches what a text must not contain: control tokens, placeholders and our own marker characters."""
    tokenizer = processor.tokenizer
    known = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    tags = {token for token in tokenizer.get_added_vocab() if re.fullmatch(r"<.+>|\[.+\]", token)}
    more = {getattr(processor, name, None) for name in ("video_token", "audio_token", "fake_image_token")}
    names = {*known, *tags, *tokenizer.all_special_tokens, *more, image_token, OPEN, CLOSE} - {None, ""}
    return re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)))


def owners(
    offsets: list[tuple[int, int]], layout: Layout, replacements: list[dict[str, Any]]
) -> list[int | None]:
    """Index in `layout.spans` of the segment that each token belongs to; None = template.

    A token belongs to the segment that has most of its characters.

    Args:
        offsets: characters [start, end) of each token in the expanded text.
        layout: of the text before pictures were expanded.
        replacements: the processor's `text_replacement_offsets` of this text.
    """
    spans = [_expanded(span, replacements) for span in layout.spans]
    found: list[int | None] = []
    first = 0
    for start, end in offsets:
        while first < len(spans) and spans[first][1] <= start:
            first += 1
        best, most = None, 0
        for n in range(first, len(spans)):
            if spans[n][0] >= end:
                break
            overlap = min(end, spans[n][1]) - max(start, spans[n][0])
            if overlap > most:
                best, most = n, overlap
        found.append(best)
    return found


def _expanded(span: Span, replacements: list[dict[str, Any]]) -> tuple[int, int]:
    """The characters of a span after each placeholder has become many."""

    def gained(position: int) -> int:
        grown = [r for r in replacements if r["span"][1] <= position]
        return sum((r["new_span"][1] - r["new_span"][0]) - (r["span"][1] - r["span"][0]) for r in grown)

    return span.start + gained(span.start), span.end + gained(span.end)

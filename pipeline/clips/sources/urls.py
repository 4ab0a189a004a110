"""A list of addresses: one a line, with its caption after a tab if there is one."""

from collections.abc import Iterator

from infra.storage import absolute, sha256_file
from pipeline.clips.sources.base import Cut, Item, is_url, make_cut, media_of
from pipeline.clips.sources.manifest import text_lines
from pipeline.schema import Status


class UrlReader:
    """LAION/CC-style lists without a header; empty lines and those that start with # are skipped."""

    def __init__(self, path: str) -> None:
        self.path = absolute(path)

    def items(self) -> Iterator[Item]:
        for number, line in enumerate(text_lines(self.path)):
            url, _, caption = line.strip().partition("\t")
            if not url or url.startswith("#"):
                continue
            cuts = (make_cut(caption or None),)
            if is_url(url) and url.isprintable():
                yield Item(url, media_of(url), cuts)
            else:
                place = f"{self.path}#line={number}"
                yield Item(place, "auto", (Cut(),), status=Status.BAD_ROW.value, error="not an address")

    def fingerprint(self) -> str:
        return sha256_file(self.path)[:16]

"""Finds videos and pictures in web pages, with the words beside them.

`<video>`, `<source>`, `og:video`; pictures with their alt texts or figure captions; links of the same
site, to a given depth. What was found is written down once, so that a stopped crawl continues with it.
"""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from html.parser import HTMLParser
from urllib.parse import urldefrag, urljoin, urlsplit

from infra.storage import exists, join, read_bytes, write_bytes
from pipeline.clips.sources.base import (
    Cut,
    Item,
    Reader,
    SourceConfig,
    Web,
    is_url,
    media_of,
    suffix_of,
)
from pipeline.clips.sources.captions import clean_caption
from pipeline.schema import RowError, content_id

PAGE_SUFFIXES = frozenset({"", ".html", ".htm", ".php", ".asp", ".aspx", ".xhtml"})
MAX_TITLE_CHARS = 10_000
"""What of a page's title serves as a caption: it is cleaned once for each film. Ours."""


class PageReader(Reader):
    """Items of a site, once `prepare` has looked through it."""

    needs_web = True

    def __init__(self, config: SourceConfig) -> None:
        self.url, self.depth, self.max_pages = config.path, config.depth, config.max_pages
        self.found: list[Item] = []

    @classmethod
    def recognise(cls, path: str) -> SourceConfig | None:
        return SourceConfig(kind="page", path=path) if is_url(path) else None

    def prepare(self, web: Web, folder: str) -> None:
        """Look through the site, or take what an earlier run of this job found."""
        place = join(folder, f"{self.fingerprint()}.jsonl")
        if not exists(place):
            items = list(self._look_through(web))
            lines = [json.dumps(item.to_json(), ensure_ascii=False) for item in items]
            write_bytes(place, "\n".join(lines).encode())
        lines = read_bytes(place).decode().split("\n")
        self.found = [Item.from_json(json.loads(line)) for line in lines if line]

    def items(self) -> Iterator[Item]:
        return iter(self.found)

    def fingerprint(self) -> str:
        return content_id("page", self.url, self.depth, self.max_pages)[:16]

    def _look_through(self, web: Web) -> Iterator[Item]:
        """Breadth first, each page once; a page that can't be had is a row."""
        site = urlsplit(self.url).netloc
        seen, media, level = {self.url}, set(), [self.url]
        for depth in range(self.depth + 1):
            following: list[str] = []
            for url in level:
                try:
                    final, body = web.page(url)
                except RowError as error:
                    yield Item(url, "auto", (Cut(),), status=error.status.value, error=f"page: {error}")
                    continue
                page = parse_page(final, body)
                for item in page.items:
                    if item.uri not in media:
                        media.add(item.uri)
                        yield item
                for link in page.links:
                    inside = urlsplit(link).netloc == site and suffix_of(link) in PAGE_SUFFIXES
                    if depth < self.depth and inside and link not in seen and len(seen) < self.max_pages:
                        seen.add(link)
                        following.append(link)
            level = following


def parse_page(url: str, body: bytes) -> "Page":
    """The media and links of a page; HTML that Python's parser gives up on is read up to there."""
    page = Page(url)
    with suppress(AssertionError):  # html.parser's answer to `<![<![`
        page.feed(body.decode("utf-8", "replace"))
        page.close()
    page.finish()
    return page


class Page(HTMLParser):
    """Collects media with their captions, and links."""

    def __init__(self, url: str) -> None:
        super().__init__(convert_charrefs=True)
        self.base = url
        self.items: list[Item] = []
        self.links: list[str] = []
        self.title = ""
        self.meta: dict[str, str] = {}
        self.stack: list[str] = []
        self.inside: Counter[str] = Counter()  # the same, counted: a page may never close its tags
        self.pending: list[tuple[str, str, str | None]] = []  # url, media, caption; of one figure
        self.figcaption = ""
        self.video_title: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attrs}
        if tag in ("figure", "figcaption", "title", "video", "picture"):
            self.stack.append(tag)
            self.inside[tag] += 1
        if tag == "figure":
            self._flush()
        if tag == "base" and values.get("href"):
            self.base = self._absolute(values["href"]) or self.base
        elif tag == "a" and values.get("href"):
            link = self._absolute(values["href"])
            self.links += [urldefrag(link)[0]] if link else []
        elif tag == "meta":
            self.meta.setdefault(values.get("property") or values.get("name", ""), values.get("content", ""))
        elif tag == "video":
            self.video_title = values.get("title") or values.get("aria-label")
            self._add(values.get("src"), "video", self.video_title)
        elif tag == "source" and self.inside["video"]:
            self._add(values.get("src"), "video", self.video_title)
        elif tag == "img":
            self._add(values.get("src"), "image", values.get("alt") or values.get("title"))

    def handle_endtag(self, tag: str) -> None:
        while self.inside[tag]:
            closed = self.stack.pop()
            self.inside[closed] -= 1
            if closed == tag:
                break
        if tag == "figure":
            self._flush()

    def handle_data(self, data: str) -> None:
        if self.inside["figcaption"]:
            self.figcaption += data
        elif self.inside["title"]:
            self.title += data

    def finish(self) -> None:
        self._flush()
        caption = self.meta.get("og:title") or self.meta.get("og:description") or self.title
        for name in ("og:video:secure_url", "og:video:url", "og:video"):
            if self.meta.get(name):
                self._add(self.meta[name], "video", caption)
                break
        self._flush()

    def _add(self, address: str | None, media: str, caption: str | None) -> None:
        url = None if not address or address.startswith("data:") else self._absolute(address.strip())
        if url:
            self.pending.append((url, media, caption))
        if not self.inside["figure"]:
            self._flush()

    def _absolute(self, address: str) -> str | None:
        """The address below the page's base; None for one that is none, such as `http://[x`."""
        try:
            url = urljoin(self.base, address)
            urlsplit(url)
        except ValueError:
            return None
        return url

    def _flush(self) -> None:
        """A figure's caption describes what it shows; without one the alt text or title does."""
        shared, _ = clean_caption(self.figcaption)
        for url, media, own in self.pending:
            caption = shared or clean_caption(own)[0] or (self._title() if media == "video" else None)
            if is_url(url):
                kind = media if media_of(url) == "auto" else media_of(url)
                self.items.append(Item(url, kind, (Cut(caption),)))
        self.pending, self.figcaption = [], ""

    def _title(self) -> str | None:
        return clean_caption((self.meta.get("og:title") or self.title)[:MAX_TITLE_CHARS])[0]

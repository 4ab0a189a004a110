"""Web pages: the videos and pictures that they show, with the words that stand beside them.

`<video>`, `<source>`, `og:video`; pictures with their alt texts or figure captions; links of the same
site, to a given depth. What was found is written down once, so that a stopped crawl continues with it.
"""

import json
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Protocol
from urllib.parse import urldefrag, urljoin, urlsplit

from infra.storage import exists, join, read_bytes, write_bytes
from pipeline.clips.sources.base import Cut, Item, clean_caption, is_url, media_of, suffix_of
from pipeline.schema import RowError, content_id


class PageFetcher(Protocol):
    def page(self, url: str) -> tuple[str, bytes]: ...


class PageReader:
    """Items of a site, once `prepare` has looked through it."""

    def __init__(self, url: str, depth: int, max_pages: int) -> None:
        self.url, self.depth, self.max_pages = url, depth, max_pages
        self.found: list[Item] = []

    def prepare(self, fetcher: PageFetcher, folder: str) -> None:
        """Look through the site, or take what an earlier run of this job found."""
        place = join(folder, f"{self.fingerprint()}.jsonl")
        if not exists(place):
            items = list(self._crawl(fetcher))
            lines = [json.dumps(item.to_json(), ensure_ascii=False) for item in items]
            write_bytes(place, "\n".join(lines).encode())
        lines = read_bytes(place).decode().splitlines()
        self.found = [Item.from_json(json.loads(line)) for line in lines if line]

    def items(self) -> Iterator[Item]:
        return iter(self.found)

    def fingerprint(self) -> str:
        return content_id("page", self.url, self.depth, self.max_pages)[:16]

    def _crawl(self, fetcher: PageFetcher) -> Iterator[Item]:
        """Breadth first, each page once; a page that can't be had is a row."""
        site = urlsplit(self.url).netloc
        seen, media, level = {self.url}, set(), [self.url]
        for depth in range(self.depth + 1):
            following: list[str] = []
            for url in level:
                try:
                    final, body = fetcher.page(url)
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


PAGE_SUFFIXES = frozenset({"", ".html", ".htm", ".php", ".asp", ".aspx", ".xhtml"})


def parse_page(url: str, body: bytes) -> "Page":
    page = Page(url)
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
        self.inside: list[str] = []
        self.pending: list[tuple[str, str, str | None]] = []  # url, media, caption; of one figure
        self.figcaption = ""
        self.video_title: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attrs}
        if tag in ("figure", "figcaption", "title", "video", "picture"):
            self.inside.append(tag)
        if tag == "figure":
            self._flush()
        if tag == "base" and values.get("href"):
            self.base = urljoin(self.base, values["href"])
        elif tag == "a" and values.get("href"):
            self.links.append(urldefrag(urljoin(self.base, values["href"]))[0])
        elif tag == "meta":
            self.meta.setdefault(values.get("property") or values.get("name", ""), values.get("content", ""))
        elif tag == "video":
            self.video_title = values.get("title") or values.get("aria-label")
            self._add(values.get("src"), "video", self.video_title)
        elif tag == "source" and "video" in self.inside:
            self._add(values.get("src"), "video", self.video_title)
        elif tag == "img":
            self._add(values.get("src"), "image", values.get("alt") or values.get("title"))

    def handle_endtag(self, tag: str) -> None:
        if tag in self.inside:
            while self.inside.pop() != tag:
                pass
        if tag == "figure":
            self._flush()

    def handle_data(self, data: str) -> None:
        if "figcaption" in self.inside:
            self.figcaption += data
        elif "title" in self.inside:
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
        if address and not address.startswith("data:"):
            self.pending.append((urljoin(self.base, address.strip()), media, caption))
        if "figure" not in self.inside:
            self._flush()

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
        return clean_caption(self.meta.get("og:title") or self.title)[0]

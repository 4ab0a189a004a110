"""Finds videos and pictures in web pages, with the words beside them.

`<video>`, `<source>`, `og:video`; pictures with their alt texts or figure captions; links of the same
site, to a given depth. What was found is written down once, so that a stopped crawl continues with it.

Pages are cut into tags here, not by `html.parser`: that one takes quadratic time for tags and comments that
never end. Each regular expression below consumes what it looks at, or looks through the rest once.
"""

import html
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from urllib.parse import urldefrag, urljoin, urlsplit

from infra.storage import exists, join, read_bytes, write_bytes
from pipeline.clips.sources.base import (
    CREDENTIALS,
    Cut,
    Item,
    Reader,
    SourceConfig,
    Web,
    is_url,
    media_of,
    suffix_of,
    without_credentials,
)
from pipeline.clips.sources.captions import clean_caption
from pipeline.schema import MAX_CAPTION_CHARS, RowError, Status, content_id

PAGE_SUFFIXES = frozenset({"", ".html", ".htm", ".php", ".asp", ".aspx", ".xhtml"})
MAX_FOUND = 10_000
"""Links, and videos and pictures, that one page may have; more are counted in a row of its own. Ours."""
MAX_ADDRESS_CHARS = 4096
"""Longer addresses are none: servers refuse them. Ours."""
TAG = re.compile(r"<(/?)([a-zA-Z][^\s/>]*+)")
ATTRIBUTE = re.compile(
    r"""[\s/]*+(?:(?P<end>>)|(?P<name>[^\s/>][^\s/>=]*+)"""
    r"""(?:\s*+=\s*+(?:"(?P<a>[^"]*+)"|'(?P<b>[^']*+)'|(?P<c>[^\s>]*+)))?)"""
)
RAW = {name: re.compile(f"</{name}", re.IGNORECASE) for name in ("script", "style", "textarea", "title")}
"""Elements whose content is text, whatever it looks like."""


class PageReader(Reader):
    """Items of a site, once `prepare` has looked through it."""

    needs_web = True

    def __init__(self, config: SourceConfig) -> None:
        self.url, self.depth, self.max_pages = without_credentials(config.path), config.depth, config.max_pages
        login = CREDENTIALS.search(config.path)
        self.login = login[0] if login else ""
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
        items = [Item.from_json(json.loads(line)) for line in lines if line]
        self.found = [replace(item, uri=self._with_login(item.uri)) for item in items]

    def items(self) -> Iterator[Item]:
        return iter(self.found)

    def fingerprint(self) -> str:
        return content_id("page", self.url, self.depth, self.max_pages)[:16]

    def _with_login(self, url: str) -> str:
        """The address as it is asked for: what the user's own names for the site, and nobody else's."""
        same = self.login and urlsplit(url).netloc == urlsplit(self.url).netloc
        return url.replace("://", f"://{self.login}", 1) if same else url

    def _look_through(self, web: Web) -> Iterator[Item]:
        """Breadth first, each page once; a page that can't be had, or has too much on it, is a row."""
        site = urlsplit(self.url).netloc
        seen, media, level = {self.url}, set(), [self.url]
        for depth in range(self.depth + 1):
            following: list[str] = []
            for url in level:
                try:
                    final, body = web.page(self._with_login(url))
                except RowError as error:
                    yield Item(url, "auto", (Cut(),), status=error.status.value, error=f"page: {error}")
                    continue
                page = parse_page(without_credentials(final), body)
                if page.num_left_out:
                    reason = f"page: {page.num_left_out:,} links, videos and pictures beyond {MAX_FOUND:,}"
                    yield Item(url, "auto", (Cut(),), status=Status.TOO_LARGE.value, error=reason)
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
    """The media and links of a page."""
    page = Page(url)
    for mark, name, values in tokens(body.decode("utf-8", "replace")):
        if mark == "<":
            page.open(name, values)
        elif mark == "</":
            page.close(name)
        else:
            page.read(name)
    page.finish()
    return page


def tokens(text: str) -> Iterator[tuple[str, str, dict[str, str]]]:
    """("<", tag, attributes), ("</", tag, {}) and ("", text, {}) of HTML, in time linear in its length."""
    place = 0
    while place < len(text):
        start = text.find("<", place)
        if start != place:
            yield "", text[place:start] if start > 0 else text[place:], {}
        if start < 0:
            return
        tag = TAG.match(text, start)
        if tag is None:
            if text[start + 1 : start + 2] in ("!", "?", "/"):  # a comment or declaration
                mark = "-->" if text.startswith("<!--", start) else ">"
                end = text.find(mark, start + 2)
                if end < 0:
                    return
                place = end + len(mark)
            else:
                place = start + 1
            continue
        name, values, place = tag[2].lower(), {}, tag.end()
        while attribute := ATTRIBUTE.match(text, place):
            place = attribute.end()
            if attribute["end"]:
                break
            value = attribute["a"] or attribute["b"] or attribute["c"] or ""
            values.setdefault(attribute["name"].lower(), value)
        else:
            return  # a tag that does not end
        yield "<" + tag[1], name, values
        if not tag[1] and name in RAW:
            closing = RAW[name].search(text, place)
            end = closing.start() if closing else len(text)
            yield "", text[place:end], {}
            place = end


class Page:
    """Collects media with their captions, and links."""

    def __init__(self, url: str) -> None:
        self.base = url
        self.links: list[str] = []
        self.items: list[Item] = []
        self.num_left_out = 0
        self.num_links = 0
        self.title = ""
        self.meta: dict[str, str] = {}
        self.stack: list[str] = []
        self.inside: Counter[str] = Counter()  # the same, counted: a page may never close its tags
        self.found: list[tuple[str, str, str | None]] = []  # url, media, caption
        self.figure_at = 0
        self.figcaption: list[str] = []
        self.video_title: str | None = None

    def open(self, tag: str, values: dict[str, str]) -> None:
        if tag == "figure":
            self._end_figure()
        if tag in ("figure", "figcaption", "title", "video", "picture"):
            self.stack.append(tag)
            self.inside[tag] += 1
        if tag == "base" and values.get("href"):
            self.base = self._absolute(values["href"]) or self.base
        elif tag == "a" and values.get("href"):
            self._link(values["href"])
        elif tag == "meta":
            name = values.get("property") or values.get("name", "")
            self.meta.setdefault(name, _unescape(values.get("content", "")))
        elif tag == "video":
            self.video_title = _caption(values.get("title") or values.get("aria-label"))
            self._add(values.get("src"), "video", self.video_title)
        elif tag == "source" and self.inside["video"]:
            self._add(values.get("src"), "video", self.video_title)
        elif tag == "img":
            self._add(values.get("src"), "image", _caption(values.get("alt") or values.get("title")))

    def close(self, tag: str) -> None:
        if tag == "figure":
            self._end_figure()
        while self.inside[tag]:
            closed = self.stack.pop()
            self.inside[closed] -= 1
            if closed == tag:
                break

    def read(self, text: str) -> None:
        if self.inside["figcaption"]:
            self.figcaption.append(text)
        elif self.inside["title"] and not self.title:
            self.title = _unescape(text)

    def finish(self) -> None:
        self._end_figure()
        for name in ("og:video:secure_url", "og:video:url", "og:video"):
            if self.meta.get(name):
                caption = self.meta.get("og:title") or self.meta.get("og:description")
                self._add(self.meta[name], "video", _caption(caption))
                break
        title = clean_caption((self.meta.get("og:title") or self.title)[:MAX_CAPTION_CHARS])[0]
        for url, media, caption in self.found:
            kind = media if media_of(url) == "auto" else media_of(url)
            self.items.append(Item(url, kind, (Cut(caption or (title if media == "video" else None)),)))

    def _add(self, address: str | None, media: str, caption: str | None) -> None:
        if not address or address.startswith("data:"):
            return
        if len(self.found) >= MAX_FOUND:
            self.num_left_out += 1
            return
        url = self._absolute(address)
        if url and is_url(url):
            self.found.append((url, media, caption))

    def _link(self, address: str) -> None:
        self.num_links += 1
        if self.num_links > MAX_FOUND:
            self.num_left_out += 1
            return
        link = self._absolute(address)
        self.links += [urldefrag(link)[0]] if link else []

    def _absolute(self, address: str) -> str | None:
        """The address below the page's base; None for one that is none, such as `http://[x`."""
        if len(address) > MAX_ADDRESS_CHARS:
            return None
        try:
            url = urljoin(self.base, _unescape(address).strip())
            urlsplit(url)
        except ValueError:
            return None
        return without_credentials(url)

    def _end_figure(self) -> None:
        """A figure's caption describes what it shows; without one the alt text or title does."""
        shared = _caption("".join(self.figcaption)) if self.figcaption else None
        if shared and self.inside["figure"]:
            self.found[self.figure_at :] = [
                (url, media, shared) for url, media, _ in self.found[self.figure_at :]
            ]
        self.figcaption, self.figure_at = [], len(self.found)


def _caption(text: str | None) -> str | None:
    return clean_caption(_unescape(text or ""))[0]


def _unescape(text: str) -> str:
    try:
        return html.unescape(text)
    except ValueError:  # a character whose number has thousands of digits
        return text

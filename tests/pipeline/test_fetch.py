"""Fetching from a real server that is slow, lies, truncates, redirects in circles and resets."""

import hashlib
import ipaddress
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.fetch.answers import FetchError
from pipeline.fetch.config import FetchConfig
from pipeline.fetch.fetcher import Fetcher
from pipeline.fetch.guarded import is_public
from pipeline.fetch.robots import opted_out, parse_robots
from pipeline.sources.page import PageReader, parse_page

BODY = bytes(range(256)) * 400  # 102,400 bytes that are no text
ETAG = '"v1"'


class Site(ThreadingHTTPServer):
    """What was asked for, and how often."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.hits: Counter[str] = Counter()
        self.sent_bytes = 0
        self.ranges: list[str | None] = []
        self.active = self.most_active = 0
        self.times: list[float] = []
        self.robots = "User-agent: *\nDisallow: /private\n"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Site  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        site, path = self.server, self.path.split("?")[0]
        site.hits[path] += 1
        site.times.append(time.monotonic())
        site.active += 1
        site.most_active = max(site.most_active, site.active)
        try:
            getattr(self, "on_" + path.strip("/").split("/")[0].replace(".", "_"), self.on_missing)()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            site.active -= 1

    def reply(self, code: int = 200, body: bytes = BODY, length: int | None = None, **headers: str) -> None:
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)
        self.server.sent_bytes += len(body)

    def on_robots_txt(self) -> None:
        self.reply(body=self.server.robots.encode())

    def on_missing(self) -> None:
        self.reply(404, b"")

    def on_good(self) -> None:
        self.reply()

    on_private = on_good

    def on_tagged(self) -> None:
        if self.headers["If-None-Match"] == ETAG:
            self.reply(304, b"", ETag=ETAG)
        else:
            self.reply(ETag=ETAG, Last_Modified="Mon, 05 Jan 2026 10:00:00 GMT")

    def on_slow(self) -> None:
        time.sleep(2)
        self.reply()

    def on_drip(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        for _ in range(200):
            self.wfile.write(b"\0" * 10)
            self.wfile.flush()
            time.sleep(0.1)

    def on_cut(self) -> None:
        """The first answer breaks off half-way; a range request gets the rest."""
        asked = self.headers["Range"]
        self.server.ranges.append(asked)
        if asked and self.headers["If-Range"] == ETAG:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            self.reply(206, BODY[start:], ETag=ETAG, Content_Range=f"bytes {start}-{len(BODY) - 1}/{len(BODY)}")
        else:
            self.reply(body=BODY[:50000], length=len(BODY), ETag=ETAG)
            self.close_connection = True

    def on_cutalways(self) -> None:
        self.reply(body=BODY[:50000], length=len(BODY))
        self.close_connection = True

    def on_circle(self) -> None:
        self.reply(302, b"", Location="/circle")

    def on_hop(self) -> None:
        self.reply(302, b"", Location="/good")

    def on_inward(self) -> None:
        self.reply(302, b"", Location=f"http://localhost:{self.server.server_port}/good")

    def on_file(self) -> None:
        self.reply(302, b"", Location="file:///etc/passwd")

    def on_announced(self) -> None:
        self.reply(body=b"", length=10_000_000_000)

    def on_endless(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        while True:
            self.wfile.write(b"10000\r\n" + b"\0" * 65536 + b"\r\n")

    def on_reset(self) -> None:
        linger = b"\1\0\0\0\0\0\0\0"
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.connection.close()
        self.close_connection = True

    def on_flaky(self) -> None:
        self.reply(503, b"") if self.server.hits["/flaky"] < 3 else self.reply()

    def on_busy(self) -> None:
        self.reply(429, b"", Retry_After="1") if self.server.hits["/busy"] < 2 else self.reply()

    def on_always429(self) -> None:
        self.reply(429, b"", Retry_After="0")

    def on_html(self) -> None:
        self.reply(body=b"<!DOCTYPE html><html>not a film</html>" + b" " * 600, Content_Type="video/mp4")

    def on_empty(self) -> None:
        self.reply(body=b"")

    def on_noai(self) -> None:
        self.reply(X_Robots_Tag="noindex, noai")

    def on_forbidden(self) -> None:
        self.reply(403, b"")

    def on_pages(self) -> None:
        links = "".join(f'<a href="/pages/{self.path}/{n}">x</a>' for n in range(2))
        body = f"<title>T {self.path}</title><video src='/good/{self.path}.mp4'></video>{links}"
        self.reply(body=body.encode(), Content_Type="text/html")


@pytest.fixture
def site() -> Iterator[Site]:
    server = Site()
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def fetch(site, tmp_path):
    """Fetches paths of the site; settings override the quick ones of the tests."""
    made: list[Fetcher] = []

    def run(*paths: str, media: str = "media", **settings: Any) -> list[dict[str, Any]]:
        config = {
            "allow_hosts": ("127.0.0.1",),
            "backoff_s": 0.01,
            "per_host_per_s": 1000.0,
            "max_bytes": 1_000_000,
            "read_timeout_s": 1.0,
            "max_tries": 3,
            **settings,
        }
        fetcher = Fetcher(FetchConfig.model_validate(config), str(tmp_path / media))
        made.append(fetcher)
        return fetcher.fetch_all([site.url + path for path in paths])

    yield run
    for fetcher in made:
        fetcher.close()


def test_bytes_arrive_whole_and_are_named_by_their_content(fetch):
    found = fetch("/good", "/good", "/hop", "/flaky")
    for one in found:
        path = Path(one["local_uri"])
        assert path.read_bytes() == BODY
        assert path.name.startswith(hashlib.sha256(BODY).hexdigest())


@pytest.mark.parametrize(
    ("path", "status", "reason"),
    [
        ("/absent", "not_found", "HTTP 404"),
        ("/slow", "timeout", "ReadTimeout"),
        ("/cutalways", "unreachable", "RemoteProtocolError"),
        ("/circle", "not_found", "redirects"),
        ("/file", "refused", "not an http address"),
        ("/announced", "too_large", "10,000,000,000 bytes"),
        ("/endless", "too_large", "more than 1,000,000"),
        ("/reset", "unreachable", "ReadError"),
        ("/always429", "rate_limited", "HTTP 429"),
        ("/html", "wrong_type", "text, not media"),
        ("/empty", "empty", "0 bytes"),
        ("/noai", "opted_out", "noai"),
        ("/private/x", "opted_out", "robots.txt"),
        ("/forbidden", "refused", "HTTP 403"),
        ("/inward", "refused", "localhost is 127.0.0.1, not a public address"),
    ],
)
def test_every_fault_of_a_server_is_a_status_with_its_reason(fetch, path, status, reason):
    found, good = fetch(path, "/good", max_tries=2)
    assert found["status"] == status
    assert reason in found["error"]
    assert Path(good["local_uri"]).read_bytes() == BODY


def test_a_body_that_drips_is_cut_off_by_the_total_time(fetch):
    started = time.monotonic()
    (found,) = fetch("/drip", total_timeout_s=0.6)
    assert (found["status"], time.monotonic() - started < 3) == ("timeout", True)


def test_a_download_that_breaks_off_is_resumed_where_it_stopped(fetch, site):
    (found,) = fetch("/cut")
    assert Path(found["local_uri"]).read_bytes() == BODY
    assert site.ranges == [None, "bytes=50000-"]
    assert site.sent_bytes - len(site.robots) == len(BODY)


def test_a_second_crawl_transfers_only_what_changed(fetch, site):
    first = fetch("/tagged")
    sent = site.sent_bytes
    assert fetch("/tagged") == first
    assert site.sent_bytes - sent == len(site.robots)
    assert first[0]["etag"] == ETAG


def test_retry_after_is_waited_for(fetch):
    started = time.monotonic()
    (found,) = fetch("/busy", max_tries=3)
    assert "local_uri" in found
    assert time.monotonic() - started >= 1


def test_a_host_is_not_asked_faster_or_wider_than_agreed(fetch, site):
    fetch(*[f"/good/{n}" for n in range(12)], per_host_per_s=40.0, per_host_concurrency=2)
    assert site.most_active <= 2
    assert site.times[-1] - site.times[0] >= 11 / 40 * 0.9


def test_robots_and_opt_outs_are_ignored_only_when_told_so(fetch):
    found = fetch("/private/x", "/noai", honour_robots=False, honour_opt_out=False)
    assert all("local_uri" in one for one in found)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "[::1]", "0.0.0.0", "[::ffff:127.0.0.1]", "2130706433"]
)
def test_private_addresses_are_refused_by_default_however_they_are_spelt(fetch, site, tmp_path, host):
    fetcher = Fetcher(FetchConfig(max_tries=1), str(tmp_path / "m"))
    (found,) = fetcher.fetch_all([f"http://{host}:{site.server_port}/good"])
    fetcher.close()
    assert found["status"] == "refused"
    assert site.hits["/good"] == 0


def test_a_name_that_resolves_differently_the_second_time_is_connected_to_where_it_was_checked(site, tmp_path):
    """DNS rebinding: the transport resolves once and connects to that address, not to the name."""
    fetcher = Fetcher(FetchConfig(max_tries=1, allow_hosts=("127.0.0.1",)), str(tmp_path / "m"))
    transport: Any = fetcher.web.client._transport
    asked: list[str] = []

    async def rebinding(host: str, port: int, request: Any = None) -> str:
        asked.append(host)
        return "127.0.0.1"  # what was checked; the name itself resolves nowhere

    transport.resolve = rebinding
    (found,) = fetcher.fetch_all([f"http://rebinding.invalid:{site.server_port}/good"])
    fetcher.close()
    assert "local_uri" in found
    assert set(asked) == {"rebinding.invalid"}


@given(st.ip_addresses())
def test_only_global_unicast_is_public(address):
    if is_public(address):
        assert address.is_global
        assert not (address.is_private or address.is_loopback or address.is_link_local or address.is_multicast)


@given(st.ip_addresses(v=4))
def test_wrapping_an_address_in_ipv6_changes_nothing(address):
    for prefix in ("::ffff:0:0", "64:ff9b::"):
        wrapped = ipaddress.IPv6Address(int(ipaddress.IPv6Address(prefix)) + int(address))
        assert is_public(wrapped) == is_public(address)


def test_robots_rules_follow_rfc_9309():
    lines = ["User-agent: a", "User-agent: vimi-crawler", "Disallow: /x", "Allow: /x/y", "Disallow: /*.gif$"]
    text = "\n".join([*lines, "Crawl-delay: 2", "", "User-agent: *", "Disallow: /"])
    ours = parse_robots(text, "vimi-crawler/0.1")
    assert [ours.allows(p) for p in ("/", "/x", "/x/y/z", "/a.gif", "/a.gif?b")] == [
        True,
        False,
        True,
        False,
        True,
    ]
    assert ours.crawl_delay_s == 2
    assert not parse_robots(text, "other").allows("/")
    assert parse_robots("", "other").allows("/")


@given(st.text(), st.text())
def test_no_robots_file_can_crash_the_crawler(text, path):
    assert parse_robots(text, "x").allows(path) in (True, False)


def test_opt_out_headers_name_everyone_or_us():
    assert opted_out(["noindex, NoAI"], "vimi-crawler/0.1") == "noai"
    assert opted_out(["vimi-crawler: noimageai"], "vimi-crawler/0.1") == "noimageai"
    assert opted_out(["otherbot: noai"], "vimi-crawler/0.1") is None
    assert opted_out(["noindex"], "vimi-crawler/0.1") is None


def test_pages_give_their_media_with_the_words_beside_them():
    html = b"""<html><head><title>Title</title><meta property="og:video" content="/og.mp4">
    <meta property="og:title" content="The film"></head><body>
    <video title="a clip"><source src="v.webm"><source src="v.mp4"></video>
    <figure><img src="/f.jpg" alt="alt"><figcaption>The <b>figure</b>'s words</figcaption></figure>
    <img src="http://other.org/i.png" alt=" an  icon "><img src="data:image/png;base64,x">
    <a href="sub/page.html#part">link</a></body></html>"""
    page = parse_page("http://site.org/a/index.html", html)
    assert [(item.uri, item.media, item.cuts[0].caption) for item in page.items] == [
        ("http://site.org/a/v.webm", "video", "a clip"),
        ("http://site.org/a/v.mp4", "video", "a clip"),
        ("http://site.org/f.jpg", "image", "The figure's words"),
        ("http://other.org/i.png", "image", "an icon"),
        ("http://site.org/og.mp4", "video", "The film"),
    ]
    assert page.links == ["http://site.org/a/sub/page.html"]


@given(st.binary(max_size=300))
def test_no_page_can_crash_the_crawler(body):
    parse_page("http://site.org/", b"<figure><video src=a>" + body)


def test_a_site_is_looked_through_to_the_given_depth_once(site, tmp_path):
    fetcher = Fetcher(
        FetchConfig(allow_hosts=("127.0.0.1",), per_host_per_s=1000, max_tries=1), str(tmp_path / "m")
    )
    for depth, pages in ((0, 1), (1, 3), (2, 7)):
        reader = PageReader(f"{site.url}/pages", depth, 100)
        reader.prepare(fetcher, str(tmp_path / "pages"))
        assert len(list(reader.items())) == pages
        hits = site.hits.total()
        reader.prepare(fetcher, str(tmp_path / "pages"))
        assert site.hits.total() == hits
    fetcher.close()


def test_a_page_that_cannot_be_had_is_an_error_with_a_status(site, tmp_path):
    fetcher = Fetcher(FetchConfig(allow_hosts=("127.0.0.1",), max_tries=1), str(tmp_path / "m"))
    with pytest.raises(FetchError, match="404"):
        fetcher.page(f"{site.url}/absent")
    fetcher.close()

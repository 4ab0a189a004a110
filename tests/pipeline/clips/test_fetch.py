"""Fetching from a real server that is slow, lies, truncates, redirects in circles and resets."""

import hashlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.clips.fetch import fetcher as fetching
from pipeline.clips.fetch import web
from pipeline.clips.fetch.fetcher import Fetcher
from pipeline.clips.fetch.store import MediaStore
from pipeline.clips.fetch.web import FetchConfig
from pipeline.clips.sources import SourceConfig, open_source
from pipeline.schema import RowError
from tests.pipeline.clips.hostile_site import BODY, ETAG, Site


@pytest.fixture
def site() -> Iterator[Site]:
    server = Site()
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def fetch(site, tmp_path, monkeypatch):
    """Fetches paths of the site; settings override the quick ones of the tests."""
    made: list[Fetcher] = []
    monkeypatch.setattr(fetching, "BACKOFF_S", 0.01)
    monkeypatch.setattr(web, "READ_TIMEOUT_S", 1.0)

    def run(*paths: str, media: str = "media", **settings: Any) -> list[dict[str, Any]]:
        config = {
            "allow_hosts": ("127.0.0.1",),
            "per_host_per_s": 1000.0,
            "max_bytes": 1_000_000,
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
        ("/badredirect", "refused", "not a usable address"),
        ("/superscript", "rate_limited", "HTTP 429"),
        ("/badrange", "unreachable", "another range"),
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


def test_a_link_that_waits_where_a_download_would_grow_is_not_followed(site, fetch, tmp_path):
    """The name of that place is a hash of the address, which anybody can work out."""
    with MediaStore(str(tmp_path / "media")).partial(site.url + "/good") as part:
        pass
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    part.symlink_to(victim)
    (found,) = fetch("/good")
    assert Path(found["local_uri"]).read_bytes() == BODY
    assert victim.read_bytes() == b"mine" and part.is_symlink()


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


def test_a_host_is_not_asked_faster_or_wider_than_agreed(fetch, site, monkeypatch):
    monkeypatch.setattr(web, "PER_HOST_CONCURRENCY", 2)
    fetch(*[f"/good/{n}" for n in range(12)], per_host_per_s=40.0)
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


def test_a_site_is_looked_through_to_the_given_depth_once(site, tmp_path):
    fetcher = Fetcher(
        FetchConfig(allow_hosts=("127.0.0.1",), per_host_per_s=1000, max_tries=1), str(tmp_path / "m")
    )
    for depth, pages in ((0, 1), (1, 3), (2, 7)):
        reader = open_source(SourceConfig(kind="page", path=f"{site.url}/pages", depth=depth))
        reader.prepare(fetcher, str(tmp_path / "pages"))
        assert len(list(reader.items())) == pages
        hits = site.hits.total()
        reader.prepare(fetcher, str(tmp_path / "pages"))
        assert site.hits.total() == hits
    fetcher.close()


def test_a_page_that_cannot_be_had_is_an_error_with_a_status(site, tmp_path):
    fetcher = Fetcher(FetchConfig(allow_hosts=("127.0.0.1",), max_tries=1), str(tmp_path / "m"))
    with pytest.raises(RowError, match="404"):
        fetcher.page(f"{site.url}/absent")
    fetcher.close()


@pytest.mark.parametrize(
    "url",
    ["http://[::1", "http://ex\u2100mple.com", "http://host:99999/", "http://xn--/a.jpg", "http://h\x00/"],
)
def test_what_is_no_usable_address_costs_its_row_alone(tmp_path, url):
    fetcher = Fetcher(FetchConfig(max_tries=1), str(tmp_path / "m"))
    (found,) = fetcher.fetch_all([url])
    fetcher.close()
    assert found["status"] in ("refused", "unreachable")


def test_a_full_disk_is_not_a_row(tmp_path, monkeypatch):
    fetcher = Fetcher(FetchConfig(max_tries=1), str(tmp_path / "m"))
    monkeypatch.setattr(fetcher.store, "partial", lambda url: (_ for _ in ()).throw(OSError(28, "No space")))
    with pytest.raises(OSError, match="No space"):
        fetcher.fetch_all(["http://a.invalid/"])
    fetcher.close()

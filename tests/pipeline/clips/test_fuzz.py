"""Whatever strangers send, a row comes out: mutated media, pages, answers, tables, within time and memory.

Short forms of a fixed seed in `make test`; ten minutes each in `make test-all`, or as `VIMI_FUZZ_S` has it.
"""

import os
import random
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import httpx
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import ConfigError
from pipeline.clips.crawl import CrawlConfig, Worker
from pipeline.clips.fetch import answers
from pipeline.clips.fetch.fetcher import Fetcher
from pipeline.clips.fetch.web import FetchConfig, split_address
from pipeline.clips.parent import inspect_parent, look_at_image
from pipeline.clips.sources import SourceConfig, open_source, read_items
from pipeline.clips.sources.base import CREDENTIALS
from pipeline.clips.sources.page import parse_page
from pipeline.media import isolate
from pipeline.media.isolate import GRACE_S
from pipeline.schema import CLIPS, RowError, Status

FORMS = [
    pytest.param(0.8, id="short"),
    pytest.param(
        float(os.environ.get("VIMI_FUZZ_S", "600")),
        id="long",
        marks=[pytest.mark.slow, pytest.mark.timeout(1200)],
    ),
]
LIMIT_S = 10.0
MEMORY_BYTES = 2 << 30
WORDS = [
    *(
        b"\0",
        b"\xff" * 8,
        b"\xc2\xb2",
        b"\xb2",
        b"-",
        b"'",
        b'"',
        b"<",
        b"<!",
        b"<![",
        b"&#99999999;",
        b"[",
        b"http://[",
    ),
    *(
        b"99999999999999999999",
        b"-1",
        b"\r\n",
        b"\x80",
        b"ffconcat version 1.0\n",
        b"moov",
        b"mdat",
        b"\x7f\xff\xff\xff",
    ),
]
ANSWER = (
    b"HTTP/1.1 206 Partial\r\nContent-Type: video/mp4\r\nContent-Length: 12\r\nContent-Range: bytes 2-5/10\r\n"
    b'ETag: "v1"\r\nLast-Modified: Mon, 05 Jan 2026 10:00:00 GMT\r\nRetry-After: 1\r\nX-Robots-Tag: a: noai\r\n'
    b"Location: http://127.0.0.1/\r\n\r\n\0\1\2 a body \xff"
)
PAGE = (
    b"<html><head><base href='/a/'><title>T &amp; t</title><meta property='og:video' content='v.mp4'></head>"
    b"<figure><img src=a.jpg alt='x'><figcaption>words</figcaption></figure><video title=y><source src=v.webm>"
    b"</video><a href='http://[::1]/b'>l</a><!-- c --><script>if (a<b) 1</script>"
)
ROBOTS = b"User-agent: *\nDisallow: /*a*b$\nAllow: /x\nCrawl-delay: 2\n# c\nSitemap: http://a/\n"


def mutations(seeds: list[bytes], seconds: float) -> Iterator[bytes]:
    """Seeds flipped, cut, repeated, spliced and salted, by a fixed sequence, for so long."""
    rng = random.Random(0)
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.choice((1, 2, 8))):
            place = rng.randrange(len(data) + 1)
            kind = rng.randrange(5)
            if kind == 0 and place < len(data):
                data[place] ^= 1 << rng.randrange(8)
            elif kind == 1:
                data[place:place] = rng.choice(WORDS)
            elif kind == 2:
                del data[place : place + rng.choice((1, 4, 100, 10_000))]
            elif kind == 3:
                data[place:place] = data[place : place + rng.choice((1, 8, 300))] * rng.choice((1, 3, 50))
            else:
                other = rng.choice(seeds)
                data[place : place + rng.choice((4, 64))] = other[: rng.choice((4, 64))]
        yield bytes(data)


def run_all(target: Callable[[bytes], object], seeds: list[bytes], seconds: float, limit_s: float) -> None:
    """Call the target with every mutation: no exception, no call above the limit, no growth above the cap."""
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for data in mutations(seeds, seconds):
        started_s = time.thread_time()
        target(data)
        assert time.thread_time() - started_s < limit_s, data[:200]
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb) << 10 < MEMORY_BYTES


@pytest.fixture(scope="module")
def media(tmp_path_factory, write_video, write_picture) -> dict[str, list[bytes]]:
    root = tmp_path_factory.mktemp("seeds")
    small = {"num_frames": 8, "size_px": (64, 64)}
    films = [write_video(root / f"a{suffix}", **small).read_bytes() for suffix in (".mp4", ".mkv", ".ts")]
    films.append(write_video(root / "a.avi", codec="mpeg4", **small).read_bytes())
    texts = [
        b"ffconcat version 1.0\n# \xe9\nfile '/etc/hosts'\nduration 1\n",
        b"#EXTM3U\n#EXTINF:3,\xe9\n/etc/hosts\n",
    ]
    pictures = [
        write_picture(root / f"a{suffix}").read_bytes()
        for suffix in (".jpg", ".png", ".gif", ".webp", ".bmp", ".tiff")
    ]
    return {"probe": films, "ffconcat": texts, "pictures": pictures}


@pytest.mark.parametrize("seconds", FORMS)
@pytest.mark.parametrize("kind", ["probe", "ffconcat", "pictures"])
def test_no_file_costs_more_than_its_row(tmp_path, media, kind, seconds, monkeypatch):
    monkeypatch.setattr(isolate, "MEMORY_BYTES", MEMORY_BYTES)
    worker = Worker(CrawlConfig(sources=(), out=str(tmp_path / "out"), timeout_s=LIMIT_S))
    path = tmp_path / "a.mp4"

    def look(data: bytes) -> None:
        path.write_bytes(data)
        started_s = time.monotonic()
        items = list(read_items(source, open_source(source)))
        rows = [row for i in items for row in worker.inspect(i.to_json(), {"local_uri": i.uri})]
        assert time.monotonic() - started_s < LIMIT_S + GRACE_S + 20
        assert [Status(row["status"]) for row in rows]

    source = SourceConfig(kind="folder", path=str(tmp_path))
    try:
        look(media[kind][0])
        run_all(look, media[kind], seconds, LIMIT_S)
    finally:
        worker.close()


def read_picture(data: bytes) -> None:
    with suppress(RowError):
        look_at_image(data)


def read_page(data: bytes) -> None:
    for item in parse_page("http://site.org/", data).items:
        item.uri.encode()


def read_robots(data: bytes) -> None:
    robots = answers.Robots(data.decode("utf-8", "replace"), "vimi-crawler/0.1")
    robots.allows("/" + "a" * 200)
    assert robots.crawl_delay_s is None or robots.crawl_delay_s <= 60


def read_headers(data: bytes) -> None:
    lines = [line.partition(b":") for line in data.split(b"\r\n")]
    headers = [(key or b"x", value.strip()) for key, _, value in lines]
    for code in (200, 206, 429, 503, 404):
        response = httpx.Response(code, headers=headers)
        with suppress(RowError):
            answers.check_code(response)
            answers.check_opt_out(response, "vimi-crawler/0.1")
        assert answers.announced_bytes(response) >= 0
        assert (answers.starts_at(response) or 0) >= 0
        (answers.validator(response) or "").encode("ascii")


@pytest.mark.parametrize("seconds", FORMS)
@pytest.mark.parametrize(
    ("target", "seed"),
    [(read_page, PAGE), (read_robots, ROBOTS), (read_headers, ANSWER)],
    ids=["page", "robots", "headers"],
)
def test_no_text_of_a_site_raises_or_takes_long(target, seed, seconds):
    run_all(target, [seed, seed * 20], seconds, 3)


@pytest.mark.parametrize("seconds", FORMS)
def test_no_header_of_a_picture_raises_or_takes_long(media, seconds):
    run_all(read_picture, media["pictures"], seconds, LIMIT_S)


@pytest.mark.parametrize("seconds", FORMS)
@pytest.mark.parametrize("name", ["t.jsonl", "t.csv", "t.txt", "t.tar", "a.json", "a.vtt"])
def test_no_table_or_sidecar_ends_a_crawl(tmp_path, name, seconds):
    (tmp_path / "a.mp4").write_bytes(b"x")
    is_folder = name.startswith("a.")
    seeds = {
        "t.jsonl": b'{"video": "a.mp4", "caption": "x", "start": 1, "end": 2.5, "split": "train"}\n' * 3,
        "t.csv": b"video,start,end,caption\na.mp4,0,1,one\na.mp4,0:01,2,\"['a', 'b']\"\n",
        "t.txt": b"http://a.org/x.mp4\ta film\n# c\nhttps://u:p@b.org:80/y?z#w\n",
        "t.tar": b"a.jpg".ljust(100, b"\0")
        + b"0000644\0"
        + b"0000000\0" * 2
        + b"00000000002\0" * 2
        + b" " * 376
        + b"xx",
        "a.json": b'{"clips": [{"start_s": 1, "end_s": 2, "caption": "one"}], "timestamps": [[1, 2]]}',
        "a.vtt": b"WEBVTT\n\n00:01.500 --> 00:02.500\n<i>hello</i>\n\n",
    }

    def read(data: bytes) -> None:
        (tmp_path / name).write_bytes(data)
        kind = (
            {"l": "manifest", "v": "manifest", "t": "urls", "r": "tar"}[name[-1]] if not is_folder else "folder"
        )
        source = SourceConfig(kind=kind, path=str(tmp_path if is_folder else tmp_path / name))
        with suppress(ConfigError):
            items = list(read_items(source, open_source(source)))
            found = {"status": "refused", "error": "as if"}
            rows = [row for item in items for row in inspect_parent(item.to_json(), found, "whole", FILTERS)]
            pa.Table.from_pylist(rows, schema=CLIPS)

    run_all(read, [seeds[name]], seconds, 3)


FILTERS = CrawlConfig(sources=(), out="out").filters


@pytest.mark.parametrize("seconds", FORMS)
def test_no_answer_on_the_wire_ends_a_crawl(tmp_path, seconds):
    fetcher = Fetcher(
        FetchConfig(allow_hosts=("127.0.0.1",), max_tries=1, honour_robots=False, total_timeout_s=5),
        str(tmp_path),
    )
    answer = b""

    def serve(server: socket.socket) -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with suppress(OSError), connection:
                connection.recv(65536)
                connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, args=(server,), daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"

        def ask(data: bytes) -> None:
            nonlocal answer
            answer = data
            (found,) = fetcher.fetch_all([url])
            assert found.keys() & {"local_uri", "status"}

        run_all(ask, [ANSWER, ANSWER.replace(b"206", b"200"), ANSWER.replace(b"206", b"302")], seconds, 5)
        server.shutdown(socket.SHUT_RDWR)
    fetcher.close()


ADDRESSES = st.one_of(
    st.text(),
    st.from_regex(r"https?://[^/]{0,20}(/.*)?", fullmatch=True),
    st.builds("http://{}:{}@{}:{}/{}".format, *[st.text(max_size=8)] * 5),
    st.builds("http://[{}]/".format, st.text("0123456789abcdef:.%v[]", max_size=20)),
)


@given(ADDRESSES)
def test_every_address_is_one_or_is_refused(address):
    try:
        parts = split_address(address)
    except RowError as error:
        assert error.status is Status.REFUSED
    else:
        assert parts.hostname


@settings(max_examples=30)
@given(st.lists(ADDRESSES, min_size=1, max_size=20))
def test_no_address_ends_a_crawl(tmp_path_factory, addresses):
    fetcher = Fetcher(FetchConfig(max_tries=1, honour_robots=False), str(tmp_path_factory.mktemp("m")))

    async def nowhere(host: str, port: int, request: httpx.Request | None = None) -> str:
        raise httpx.ConnectError("no network here", request=request)

    fetcher.web.client._transport.resolve = nowhere  # pyright: ignore[reportAttributeAccessIssue]
    found = fetcher.fetch_all(addresses)
    fetcher.close()
    assert all(Status(one["status"]).is_dead and not CREDENTIALS.search(one["error"]) for one in found)

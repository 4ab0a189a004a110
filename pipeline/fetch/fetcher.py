"""Fetch addresses politely and safely: bytes on disk with their provenance, or a status that says why not.

Partial downloads are resumed where the server allows ranges; what was fetched before is asked for again
with its validators (ETag, Last-Modified), so that a second crawl transfers only what changed.
"""

import asyncio
import hashlib
import time
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpx
from pydantic import Field

from infra.config import Config
from pipeline.fetch.guarded import GuardedTransport, RefusedAddressError
from pipeline.fetch.robots import MAX_BYTES, Robots, opted_out, parse_robots
from pipeline.fetch.store import MediaStore, Record, note_validator, read_validator
from pipeline.media import looks_like_text
from pipeline.schema import Status

TRANSIENT = (
    httpx.TimeoutException,
    httpx.ConnectError,
    httpx.ReadError,
    httpx.WriteError,
    httpx.CloseError,
    httpx.RemoteProtocolError,
)
"""Faults that a retry may cure: time-outs, refused and reset connections, bodies cut short."""
TRANSIENT_CODES = frozenset({408, 425, 429, 500, 502, 503, 504})
GONE_CODES = frozenset({404, 410})
Found = dict[str, Any]


class FetchConfig(Config):
    """Manners and bounds of the crawler. All numbers are ours."""

    user_agent: str = "vimi-crawler/0.1"
    """Named in every request; robots.txt rules are looked up for the part before the slash."""
    per_host_per_s: float = Field(default=20.0, gt=0)
    """Requests a second to one host, over all workers (each gets its share)."""
    per_host_concurrency: int = Field(default=8, ge=1)
    """Connections to one host, over all workers; at least one a worker."""
    concurrency: int = Field(default=64, ge=1)
    """Downloads at once in one worker."""
    connect_timeout_s: float = Field(default=10.0, gt=0)
    read_timeout_s: float = Field(default=30.0, gt=0)
    """Longest silence of a server."""
    total_timeout_s: float = Field(default=900.0, gt=0)
    """Longest download, retries included."""
    max_bytes: int = Field(default=4 << 30, ge=1)
    """Largest download."""
    max_redirects: int = Field(default=5, ge=0)
    max_tries: int = Field(default=4, ge=1)
    """Tries for transient faults: 429, 5xx, time-outs, resets, bodies cut short."""
    backoff_s: float = Field(default=0.5, ge=0)
    """First wait before a retry; doubles each time."""
    max_wait_s: float = Field(default=60.0, ge=0)
    """Longest wait before a retry, Retry-After included."""
    honour_robots: bool = True
    """Obey robots.txt and its Crawl-delay."""
    honour_opt_out: bool = True
    """Leave out what X-Robots-Tag marks noai or noimageai."""
    allow_hosts: tuple[str, ...] = ()
    """Hosts (or host:port) that may be fetched from though their addresses are private."""


class FetchError(Exception):
    """This address gives nothing; `status` says which fate its rows get."""

    def __init__(self, status: Status, reason: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.status, self.retry_after_s = status, retry_after_s


class Gate:
    """One host's turnstile: so many at once, so many a second."""

    def __init__(self, concurrency: int, per_s: float) -> None:
        self.slots, self.interval_s, self.next_s = asyncio.Semaphore(concurrency), 1 / per_s, 0.0

    async def __aenter__(self) -> None:
        await self.slots.acquire()
        now_s = time.monotonic()
        start_s = max(now_s, self.next_s)
        self.next_s = start_s + self.interval_s
        await asyncio.sleep(start_s - now_s)

    async def __aexit__(self, *_: object) -> None:
        self.slots.release()


class Fetcher:
    """Fetches lots of addresses; lives in one worker and keeps its connections and robots.txt files."""

    def __init__(self, config: FetchConfig, media: str, *, workers: int = 1) -> None:
        self.config, self.store = config, MediaStore(media)
        self.share = max(1, config.per_host_concurrency // workers), config.per_host_per_s / workers
        self.gates: dict[str, Gate] = {}
        self.robots: dict[str, asyncio.Task[Robots]] = {}
        self.runner = asyncio.Runner()
        self.client = httpx.AsyncClient(
            transport=GuardedTransport(config.allow_hosts),
            timeout=httpx.Timeout(
                config.read_timeout_s, connect=config.connect_timeout_s, pool=config.total_timeout_s
            ),
            headers={"User-Agent": config.user_agent, "Accept-Encoding": "identity"},
            follow_redirects=False,
            trust_env=False,
        )

    def fetch_all(self, urls: list[str]) -> list[Found]:
        """What became of each address: local_uri and validators, or status and error."""
        return self.runner.run(self._fetch_all(urls))

    def page(self, url: str, max_bytes: int = 5 << 20) -> tuple[str, bytes]:
        """(final address, body) of a web page.

        Raises:
            FetchError: it can't or must not be had.
        """
        return self.runner.run(self._page(url, max_bytes))

    def close(self) -> None:
        self.runner.run(self.client.aclose())
        self.runner.close()

    async def _fetch_all(self, urls: list[str]) -> list[Found]:
        limit = asyncio.Semaphore(self.config.concurrency)

        async def one(url: str) -> Found:
            async with limit:
                return await self._fetch(url)

        distinct = list(dict.fromkeys(urls))
        found = dict(zip(distinct, await asyncio.gather(*map(one, distinct)), strict=True))
        return [found[url] for url in urls]

    async def _fetch(self, url: str) -> Found:
        try:
            async with asyncio.timeout(self.config.total_timeout_s):
                return await self._with_retries(url)
        except FetchError as error:
            return {"status": error.status.value, "error": str(error)}
        except TimeoutError:
            error = f"not done after {self.config.total_timeout_s:g} s"
            return {"status": Status.TIMEOUT.value, "error": error}

    async def _with_retries(self, url: str) -> Found:
        for attempt in range(1, self.config.max_tries + 1):
            try:
                return await self._download(url)
            except FetchError as error:
                failure = error
            except TRANSIENT as error:
                status = Status.TIMEOUT if isinstance(error, httpx.TimeoutException) else Status.UNREACHABLE
                failure = FetchError(status, f"{type(error).__name__}: {error}")
            if not failure.status.is_retriable or attempt == self.config.max_tries:
                raise failure
            await asyncio.sleep(self._wait_s(url, attempt, failure.retry_after_s))
        raise AssertionError("unreachable")

    def _wait_s(self, url: str, attempt: int, retry_after_s: float | None) -> float:
        """Exponential, with a jitter that is a function of the address; Retry-After wins."""
        jitter = hashlib.sha256(f"{url}{attempt}".encode()).digest()[0] / 255
        wait_s = self.config.backoff_s * 2 ** (attempt - 1) * (1 + jitter / 2)
        return min(self.config.max_wait_s, max(wait_s, retry_after_s or 0.0))

    async def _download(self, url: str) -> Found:
        """One try: conditional if known, a continuation if partly there."""
        with self.store.partial(url) as part:
            return await self._download_to(url, part)

    async def _download_to(self, url: str, part: Path) -> Found:
        known = self.store.known(url)
        headers = _conditions(known, part, read_validator(part))
        async with self._get(url, headers) as response:
            self._check_opt_out(response)
            if response.status_code == 304 and known:
                return known.found()
            if response.status_code == 416:
                part.unlink(missing_ok=True)
                raise FetchError(Status.UNREACHABLE, "the part on disk is not a part of it any more")
            self._check_code(response)
            resumed = response.status_code == 206 and _starts_at(response) == _size(part)
            if response.status_code == 206 and not resumed:
                part.unlink(missing_ok=True)
                raise FetchError(Status.UNREACHABLE, "the server sent another range than asked for")
            note_validator(part, _validator(response))
            await self._save(response, part, append=resumed)
            etag, changed = response.headers.get("etag"), response.headers.get("last-modified")
        return self.store.commit(url, part, etag=etag, last_modified=changed).found()

    async def _save(self, response: httpx.Response, part: Path, *, append: bool) -> None:
        size, limit = (_size(part) if append else 0), self.config.max_bytes
        announced = response.headers.get("content-length", "")
        if announced.isdigit() and size + int(announced) > limit:
            raise FetchError(Status.TOO_LARGE, f"{size + int(announced):,} bytes, more than {limit:,}")
        with part.open("ab" if append else "wb") as file:
            async for chunk in response.aiter_raw():
                if size < 512 and looks_like_text(chunk[:512] if size == 0 else b""):
                    raise FetchError(Status.WRONG_TYPE, f"text, not media: {chunk[:40]!r}")
                size += len(chunk)
                if size > limit:
                    part.unlink()
                    raise FetchError(Status.TOO_LARGE, f"more than {limit:,} bytes")
                file.write(chunk)
        if size == 0:
            raise FetchError(Status.EMPTY, "0 bytes")

    async def _page(self, url: str, max_bytes: int) -> tuple[str, bytes]:
        for attempt in range(1, self.config.max_tries + 1):
            try:
                async with asyncio.timeout(self.config.total_timeout_s):
                    async with self._get(url, {}) as response:
                        self._check_code(response)
                        self._check_opt_out(response)
                        body = b""
                        async for chunk in response.aiter_raw():
                            body += chunk
                            if len(body) > max_bytes:
                                break
                        return str(response.extensions["url"]), body[:max_bytes]
            except (*TRANSIENT, TimeoutError) as error:
                if attempt == self.config.max_tries:
                    raise FetchError(Status.UNREACHABLE, f"{type(error).__name__}: {error}") from None
                await asyncio.sleep(self._wait_s(url, attempt, None))
        raise AssertionError("unreachable")

    def _get(self, url: str, headers: dict[str, str], *, robots: bool = True) -> "_Following":
        return _Following(self, url, headers, robots=robots)

    def gate(self, host: str, delay_s: float | None = None) -> Gate:
        concurrency, per_s = self.share
        if host not in self.gates:
            self.gates[host] = Gate(concurrency, min(per_s, 1 / delay_s) if delay_s else per_s)
        return self.gates[host]

    async def rules(self, origin: str) -> Robots:
        """robots.txt of a site, read once by whoever comes first.

        Raises:
            FetchError: it can't be read, so nothing there may be (RFC 9309 section 2.3.1.4).
        """
        if origin not in self.robots:
            self.robots[origin] = asyncio.ensure_future(self._read_robots(origin))
        try:
            return await asyncio.shield(self.robots[origin])
        except FetchError:
            self.robots.pop(origin, None)  # the next try asks again
            raise

    async def _read_robots(self, origin: str) -> Robots:
        try:
            async with self._get(f"{origin}/robots.txt", {}, robots=False) as response:
                if 400 <= response.status_code < 500 and response.status_code != 429:
                    return Robots()  # none there: all may be read
                self._check_code(response)
                body = b""
                async for chunk in response.aiter_raw():
                    body += chunk
                    if len(body) > MAX_BYTES:
                        break
                return parse_robots(body.decode("utf-8", "replace"), self.config.user_agent)
        except FetchError as error:
            if error.status is Status.REFUSED:
                return Robots()  # the page itself will be refused, and say why
            raise FetchError(error.status, f"robots.txt: {error}", retry_after_s=error.retry_after_s) from None
        except TRANSIENT as error:
            raise FetchError(Status.UNREACHABLE, f"robots.txt: {type(error).__name__}: {error}") from None

    def _check_opt_out(self, response: httpx.Response) -> None:
        if not self.config.honour_opt_out:
            return
        directive = opted_out(response.headers.get_list("x-robots-tag"), self.config.user_agent)
        if directive:
            raise FetchError(Status.OPTED_OUT, f"X-Robots-Tag: {directive}")

    def _check_code(self, response: httpx.Response) -> None:
        code = response.status_code
        if code in (200, 206):
            return
        reason = f"HTTP {code} {response.reason_phrase}".strip()
        if code in GONE_CODES:
            raise FetchError(Status.NOT_FOUND, reason)
        if code in TRANSIENT_CODES:
            status = Status.RATE_LIMITED if code == 429 else Status.UNREACHABLE
            raise FetchError(status, reason, retry_after_s=_retry_after_s(response))
        raise FetchError(Status.REFUSED if 400 <= code < 500 else Status.UNREACHABLE, reason)


class _Following:
    """`async with` over the response at the end of the redirects; every hop is checked like the first."""

    def __init__(self, fetcher: Fetcher, url: str, headers: dict[str, str], *, robots: bool) -> None:
        self.fetcher, self.url, self.headers, self.robots = fetcher, url, headers, robots

    async def __aenter__(self) -> httpx.Response:
        fetcher = self.fetcher
        for _ in range(fetcher.config.max_redirects + 1):
            parts = urlsplit(self.url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise FetchError(Status.REFUSED, f"not an http address: {self.url[:200]}")
            delay_s = await self._check_robots(f"{parts.scheme}://{parts.netloc}")
            self.gate = fetcher.gate(parts.netloc, delay_s)
            await self.gate.__aenter__()
            try:
                self.response = await self._send()
            except BaseException:
                await self.gate.__aexit__()
                raise
            target = self.response.headers.get("location")
            if not (self.response.status_code in (301, 302, 303, 307, 308) and target):
                self.response.extensions["url"] = self.url
                return self.response
            await self.__aexit__()
            self.url = urljoin(self.url, target)
        raise FetchError(Status.NOT_FOUND, f"more than {fetcher.config.max_redirects} redirects")

    async def __aexit__(self, *_: object) -> None:
        await self.response.aclose()
        await self.gate.__aexit__()

    async def _send(self) -> httpx.Response:
        client = self.fetcher.client
        try:
            return await client.send(client.build_request("GET", self.url, headers=self.headers), stream=True)
        except RefusedAddressError as error:
            raise FetchError(Status.REFUSED, str(error)) from None
        except (httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.LocalProtocolError) as error:
            raise FetchError(Status.REFUSED, f"not a usable address: {error}") from None

    async def _check_robots(self, origin: str) -> float | None:
        if not (self.robots and self.fetcher.config.honour_robots):
            return None
        rules = await self.fetcher.rules(origin)
        parts = urlsplit(self.url)
        if not rules.allows(parts.path + (f"?{parts.query}" if parts.query else "")):
            raise FetchError(Status.OPTED_OUT, "robots.txt disallows it")
        return rules.crawl_delay_s


def _conditions(known: Record | None, part: Path, validator: str | None) -> dict[str, str]:
    if known is not None:
        pairs = {"If-None-Match": known.etag, "If-Modified-Since": known.last_modified}
        return {key: value for key, value in pairs.items() if value}
    if validator and _size(part):
        return {"Range": f"bytes={_size(part)}-", "If-Range": validator}
    return {}


def _validator(response: httpx.Response) -> str | None:
    """What If-Range may carry: a strong ETag, else the date."""
    etag = response.headers.get("etag")
    if etag and not etag.startswith("W/"):
        return etag
    return response.headers.get("last-modified")


def _starts_at(response: httpx.Response) -> int | None:
    start = response.headers.get("content-range", "").removeprefix("bytes ").partition("-")[0]
    return int(start) if start.isdigit() else None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _retry_after_s(response: httpx.Response) -> float | None:
    """Retry-After in seconds, given as such or as a date."""
    value = response.headers.get("retry-after", "").strip()
    if value.isdigit():
        return float(value)
    from email.utils import parsedate_to_datetime

    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None

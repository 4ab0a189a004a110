"""Polite HTTP fetching: rate limits by host, robots.txt read once a site, every redirect checked.

Reached are public addresses only (pipeline/clips/fetch/guarded.py).
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import SplitResult, urljoin, urlsplit

import httpx
from pydantic import Field

from infra.config import Config, Incidental
from pipeline.clips.fetch.answers import TRANSIENT, Robots, check_code
from pipeline.clips.fetch.guarded import GuardedTransport, RefusedAddressError
from pipeline.schema import RowError, Status

CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 10.0, 30.0
"""Longest wait for a connection, and longest silence of a server. Ours."""
MAX_REDIRECTS = 5
PER_HOST_CONCURRENCY = 8
"""Connections to one host, over all workers; at least one a worker. Ours."""
MAX_ROBOTS_BYTES = 500 << 10
"""RFC 9309 section 2.5: a crawler reads at least this much."""


class FetchConfig(Config):
    """Manners and bounds of the crawler. All numbers are ours."""

    user_agent: str = "vimi-crawler/0.1"
    """Named in every request; robots.txt rules are looked up for the part before the slash."""
    per_host_per_s: Incidental[float] = Field(default=20.0, gt=0, le=100_000)
    """Requests a second to one host, over all workers (each gets its share)."""
    total_timeout_s: Incidental[float] = Field(default=900.0, gt=0, le=604_800)
    """Longest download, retries included."""
    max_tries: Incidental[int] = Field(default=4, ge=1, le=100)
    """Tries for transient faults: 429, 5xx, time-outs, resets, bodies cut short."""
    max_bytes: int = Field(default=4 << 30, ge=1)
    """Largest download."""
    honour_robots: bool = True
    """Obey robots.txt and its Crawl-delay."""
    honour_opt_out: bool = True
    """Leave out what X-Robots-Tag marks noai or noimageai."""
    allow_hosts: tuple[str, ...] = ()
    """Hosts (or host:port) that may be fetched from though their addresses are private."""


class RateLimit:
    """Requests to one host: so many at once, so many a second; `async with` waits for its turn."""

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


class Web:
    """Connections, rate limits and robots.txt files of one worker, which gets its share of a host's rate."""

    def __init__(self, config: FetchConfig, *, workers: int = 1) -> None:
        self.config = config
        self.share = max(1, PER_HOST_CONCURRENCY // workers), config.per_host_per_s / workers
        self.limits: dict[str, RateLimit] = {}
        self.robots: dict[str, asyncio.Task[Robots]] = {}
        timeout = httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S, pool=config.total_timeout_s)
        self.client = httpx.AsyncClient(
            transport=GuardedTransport(config.allow_hosts),
            timeout=timeout,
            headers={"User-Agent": config.user_agent, "Accept-Encoding": "identity"},
            follow_redirects=False,
            trust_env=False,
        )

    @asynccontextmanager
    async def get(
        self, url: str, headers: dict[str, str], *, robots: bool = True
    ) -> AsyncIterator[httpx.Response]:
        """The response at the end of the redirects, its body unread; its address is `extensions["url"]`.

        Raises:
            RowError: robots.txt forbids it, the address is not public, or it is none at all.
        """
        for _ in range(MAX_REDIRECTS + 1):
            parts = split_address(url)
            delay_s = await self._ask_robots(parts) if robots and self.config.honour_robots else None
            async with self._limit(parts.netloc.rpartition("@")[2].lower(), delay_s):
                response = await self._send(url, headers)
                try:
                    target = response.headers.get("location")
                    if not (response.status_code in (301, 302, 303, 307, 308) and target):
                        response.extensions["url"] = url
                        yield response
                        return
                finally:
                    await response.aclose()
            url = _joined(url, target)
        raise RowError(Status.NOT_FOUND, f"more than {MAX_REDIRECTS} redirects")

    async def _send(self, url: str, headers: dict[str, str]) -> httpx.Response:
        try:
            return await self.client.send(self.client.build_request("GET", url, headers=headers), stream=True)
        except RefusedAddressError as error:
            raise RowError(Status.REFUSED, str(error)) from None
        except (httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.LocalProtocolError) as error:
            raise RowError(Status.REFUSED, f"not a usable address: {error}") from None

    def _limit(self, host: str, delay_s: float | None) -> RateLimit:
        concurrency, per_s = self.share
        if host not in self.limits:
            self.limits[host] = RateLimit(concurrency, min(per_s, 1 / delay_s) if delay_s else per_s)
        return self.limits[host]

    async def _ask_robots(self, parts: SplitResult) -> float | None:
        """The site's crawl delay; matching runs in a thread, so that no rules can stop the event loop."""
        rules = await self._rules(f"{parts.scheme}://{parts.netloc}")
        path = parts.path + (f"?{parts.query}" if parts.query else "")
        if not await asyncio.to_thread(rules.allows, path):
            raise RowError(Status.OPTED_OUT, "robots.txt disallows it")
        return rules.crawl_delay_s

    async def _rules(self, origin: str) -> Robots:
        """robots.txt of a site, read once by whoever comes first.

        Raises:
            RowError: it can't be read, so nothing there may be (RFC 9309 section 2.3.1.4).
        """
        if origin not in self.robots:
            self.robots[origin] = asyncio.ensure_future(self._read_robots(origin))
        try:
            return await asyncio.shield(self.robots[origin])
        except Exception:  # whatever it is, it is raised again
            self.robots.pop(origin, None)  # the next try asks again
            raise

    async def _read_robots(self, origin: str) -> Robots:
        agent = self.config.user_agent
        try:
            async with self.get(f"{origin}/robots.txt", {}, robots=False) as response:
                if 400 <= response.status_code < 500 and response.status_code != 429:
                    return Robots("", agent)  # none there: all may be read
                check_code(response)
                body = await read_at_most(response, MAX_ROBOTS_BYTES)
                return await asyncio.to_thread(Robots, body.decode("utf-8", "replace"), agent)
        except RowError as error:
            if error.status is Status.REFUSED:
                return Robots("", agent)  # the page itself will be refused, and say why
            raise RowError(error.status, f"robots.txt: {error}", retry_after_s=error.retry_after_s) from None
        except TRANSIENT as error:
            raise RowError(Status.UNREACHABLE, f"robots.txt: {type(error).__name__}: {error}") from None


def split_address(url: str) -> SplitResult:
    """The parts of an http address.

    Raises:
        RowError: it is none, or names a host or port that can't exist.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise RowError(Status.REFUSED, f"not a usable address: {url[:200]}: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise RowError(Status.REFUSED, f"not an http address: {url[:200]}")
    return parts


def _joined(url: str, target: str) -> str:
    try:
        return urljoin(url, target)
    except ValueError as error:
        raise RowError(Status.REFUSED, f"redirected to {target[:200]}: {error}") from None


async def read_at_most(response: httpx.Response, max_bytes: int) -> bytes:
    """The first bytes of a body."""
    body = b""
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) >= max_bytes:
            break
    return body[:max_bytes]

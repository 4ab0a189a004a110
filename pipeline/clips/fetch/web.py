"""The web, politely: one turnstile a host, robots.txt read once a site, every hop of a redirect checked."""

import asyncio
import time
from urllib.parse import urljoin, urlsplit

import httpx

from pipeline.clips.fetch.answers import TRANSIENT, check_code
from pipeline.clips.fetch.config import FetchConfig
from pipeline.clips.fetch.guarded import GuardedTransport, RefusedAddressError
from pipeline.clips.fetch.robots import MAX_BYTES, Robots, parse_robots
from pipeline.schema import RowError, Status


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


class Web:
    """Connections, turnstiles and robots.txt files of one worker, which gets its share of a host's rate."""

    def __init__(self, config: FetchConfig, *, workers: int = 1) -> None:
        self.config = config
        self.share = max(1, config.per_host_concurrency // workers), config.per_host_per_s / workers
        self.gates: dict[str, Gate] = {}
        self.robots: dict[str, asyncio.Task[Robots]] = {}
        self.client = httpx.AsyncClient(
            transport=GuardedTransport(config.allow_hosts),
            timeout=httpx.Timeout(
                config.read_timeout_s, connect=config.connect_timeout_s, pool=config.total_timeout_s
            ),
            headers={"User-Agent": config.user_agent, "Accept-Encoding": "identity"},
            follow_redirects=False,
            trust_env=False,
        )

    def get(self, url: str, headers: dict[str, str], *, robots: bool = True) -> "Following":
        """`async with` gives the response, its body unread."""
        return Following(self, url, headers, robots=robots)

    def gate(self, host: str, delay_s: float | None = None) -> Gate:
        concurrency, per_s = self.share
        if host not in self.gates:
            self.gates[host] = Gate(concurrency, min(per_s, 1 / delay_s) if delay_s else per_s)
        return self.gates[host]

    async def rules(self, origin: str) -> Robots:
        """robots.txt of a site, read once by whoever comes first.

        Raises:
            RowError: it can't be read, so nothing there may be (RFC 9309 section 2.3.1.4).
        """
        if origin not in self.robots:
            self.robots[origin] = asyncio.ensure_future(self._read_robots(origin))
        try:
            return await asyncio.shield(self.robots[origin])
        except RowError:
            self.robots.pop(origin, None)  # the next try asks again
            raise

    async def _read_robots(self, origin: str) -> Robots:
        try:
            async with self.get(f"{origin}/robots.txt", {}, robots=False) as response:
                if 400 <= response.status_code < 500 and response.status_code != 429:
                    return Robots()  # none there: all may be read
                check_code(response)
                body = b""
                async for chunk in response.aiter_raw():
                    body += chunk
                    if len(body) > MAX_BYTES:
                        break
                return parse_robots(body.decode("utf-8", "replace"), self.config.user_agent)
        except RowError as error:
            if error.status is Status.REFUSED:
                return Robots()  # the page itself will be refused, and say why
            raise RowError(error.status, f"robots.txt: {error}", retry_after_s=error.retry_after_s) from None
        except TRANSIENT as error:
            raise RowError(Status.UNREACHABLE, f"robots.txt: {type(error).__name__}: {error}") from None


class Following:
    """`async with` over the response at the end of the redirects; every hop is checked like the first."""

    def __init__(self, web: "Web", url: str, headers: dict[str, str], *, robots: bool) -> None:
        self.web, self.url, self.headers, self.robots = web, url, headers, robots

    async def __aenter__(self) -> httpx.Response:
        web = self.web
        for _ in range(web.config.max_redirects + 1):
            parts = urlsplit(self.url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise RowError(Status.REFUSED, f"not an http address: {self.url[:200]}")
            delay_s = await self._check_robots(f"{parts.scheme}://{parts.netloc}")
            self.gate = web.gate(parts.netloc, delay_s)
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
        raise RowError(Status.NOT_FOUND, f"more than {web.config.max_redirects} redirects")

    async def __aexit__(self, *_: object) -> None:
        await self.response.aclose()
        await self.gate.__aexit__()

    async def _send(self) -> httpx.Response:
        client = self.web.client
        try:
            return await client.send(client.build_request("GET", self.url, headers=self.headers), stream=True)
        except RefusedAddressError as error:
            raise RowError(Status.REFUSED, str(error)) from None
        except (httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.LocalProtocolError) as error:
            raise RowError(Status.REFUSED, f"not a usable address: {error}") from None

    async def _check_robots(self, origin: str) -> float | None:
        if not (self.robots and self.web.config.honour_robots):
            return None
        rules = await self.web.rules(origin)
        parts = urlsplit(self.url)
        if not rules.allows(parts.path + (f"?{parts.query}" if parts.query else "")):
            raise RowError(Status.OPTED_OUT, "robots.txt disallows it")
        return rules.crawl_delay_s

"""Fetch addresses politely and safely: bytes on disk with their provenance, or a status that says why not.

Partial downloads are resumed where the server allows ranges; what was fetched before is asked for again
with its validators (ETag, Last-Modified), so that a second crawl transfers only what changed.
"""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import httpx

from infra.storage import size_bytes
from pipeline.clips.fetch.answers import (
    TRANSIENT,
    announced_bytes,
    check_code,
    check_opt_out,
    conditions,
    starts_at,
    told,
    validator,
)
from pipeline.clips.fetch.store import MediaStore, note_validator, open_own, read_validator
from pipeline.clips.fetch.web import FetchConfig, Web, read_at_most
from pipeline.clips.sources.base import without_credentials
from pipeline.media.store import looks_like_text
from pipeline.schema import RowError, Status

BACKOFF_S, MAX_WAIT_S = 0.5, 60.0
"""First wait before a retry, doubled each time; longest one, Retry-After included. Ours."""
MAX_PAGE_BYTES = 5 << 20
Found = dict[str, Any]
T = TypeVar("T")


class Fetcher:
    """Fetches lots of addresses; lives in one worker and keeps its connections and robots.txt files."""

    def __init__(self, config: FetchConfig, media: str, *, workers: int = 1) -> None:
        self.config, self.store = config, MediaStore(media)
        self.web = Web(config, workers=workers)
        self.runner = asyncio.Runner()

    def fetch_all(self, urls: list[str]) -> list[Found]:
        """What became of each address, all fetched at once: local_uri and validators, or status and error."""
        return self.runner.run(self._fetch_all(urls))

    def page(self, url: str) -> tuple[str, bytes]:
        """(final address, body) of a web page.

        Raises:
            RowError: it can't or must not be had.
        """
        return self.runner.run(self._with_retries(url, self._page))

    def close(self) -> None:
        self.runner.run(self.web.client.aclose())
        self.runner.close()
        self.store.close()

    async def _fetch_all(self, urls: list[str]) -> list[Found]:
        async def one(url: str) -> Found:
            try:
                return await self._with_retries(url, self._download)
            except RowError as error:
                return {"status": error.status.value, "error": without_credentials(str(error))}

        distinct = list(dict.fromkeys(urls))
        found = dict(zip(distinct, await asyncio.gather(*map(one, distinct)), strict=True))
        return [found[url] for url in urls]

    async def _with_retries(self, url: str, get: Callable[[str], Awaitable[T]]) -> T:
        """What `get(url)` gives, tried again after faults that may pass; the boundary of one address.

        Raises:
            RowError: whatever went wrong: one odd address or server costs one row.
        """
        try:
            async with asyncio.timeout(self.config.total_timeout_s):
                for attempt in range(1, self.config.max_tries + 1):
                    try:
                        return await get(url)
                    except RowError as error:
                        failure = error
                    except TRANSIENT as error:
                        late = isinstance(error, httpx.TimeoutException)
                        status = Status.TIMEOUT if late else Status.UNREACHABLE
                        failure = RowError(status, f"{type(error).__name__}: {error}")
                    if not failure.status.is_retriable or attempt == self.config.max_tries:
                        raise failure
                    await asyncio.sleep(_wait_s(url, attempt, failure.retry_after_s))
        except TimeoutError:
            reason = f"not done after {self.config.total_timeout_s:g} s"
            raise RowError(Status.TIMEOUT, reason) from None
        except (RowError, OSError, MemoryError):  # a full disk is not the address's fault
            raise
        except Exception as error:  # the row boundary: on hostile answers parsers and codecs raise anything
            raise RowError(Status.REFUSED, f"{type(error).__name__}: {error}") from error
        raise AssertionError("unreachable")

    async def _download(self, url: str) -> Found:
        """One try: conditional if known, a continuation if partly there."""
        with self.store.partial(url) as part:
            return await self._download_to(url, part)

    async def _download_to(self, url: str, part: Path) -> Found:
        known = self.store.known(url)
        headers = conditions(known, part, read_validator(part))
        async with self.web.get(url, headers) as response:
            if self.config.honour_opt_out:
                check_opt_out(response, self.config.user_agent)
            if response.status_code == 304 and known:
                return known.found()
            if response.status_code == 416:
                part.unlink(missing_ok=True)
                raise RowError(Status.UNREACHABLE, "the part on disk is not a part of it any more")
            check_code(response)
            resumed = response.status_code == 206 and starts_at(response) == size_bytes(part)
            if response.status_code == 206 and not resumed:
                part.unlink(missing_ok=True)
                raise RowError(Status.UNREACHABLE, "the server sent another range than asked for")
            note_validator(part, validator(response))
            await self._save(response, part, append=resumed)
            etag, changed = told(response, "etag"), told(response, "last-modified")
        return self.store.commit(url, part, etag=etag, last_modified=changed).found()

    async def _save(self, response: httpx.Response, part: Path, *, append: bool) -> None:
        size, limit = (size_bytes(part) if append else 0), self.config.max_bytes
        announced = size + announced_bytes(response)
        if announced > limit:
            raise RowError(Status.TOO_LARGE, f"{announced:,} bytes, more than {limit:,}")
        with open_own(part, "ab" if append else "wb") as file:
            async for chunk in response.aiter_raw():
                if size < 512 and looks_like_text(chunk[:512] if size == 0 else b""):
                    raise RowError(Status.WRONG_TYPE, f"text, not media: {chunk[:40]!r}")
                size += len(chunk)
                if size > limit:
                    part.unlink()
                    raise RowError(Status.TOO_LARGE, f"more than {limit:,} bytes")
                file.write(chunk)
        if size == 0:
            raise RowError(Status.EMPTY, "0 bytes")

    async def _page(self, url: str) -> tuple[str, bytes]:
        async with self.web.get(url, {}) as response:
            check_code(response)
            if self.config.honour_opt_out:
                check_opt_out(response, self.config.user_agent)
            return str(response.extensions["url"]), await read_at_most(response, MAX_PAGE_BYTES)


def _wait_s(url: str, attempt: int, retry_after_s: float | None) -> float:
    """Exponential, with a jitter that is a function of the address; Retry-After wins."""
    jitter = hashlib.sha256(f"{url}{attempt}".encode("utf-8", "surrogatepass")).digest()[0] / 255
    wait_s = BACKOFF_S * 2 ** (attempt - 1) * (1 + jitter / 2)
    return min(MAX_WAIT_S, max(wait_s, retry_after_s or 0.0))

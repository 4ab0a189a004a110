"""What a server's answer means: the fate of the address, and what to ask for next time."""

import time
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx

from pipeline.clips.fetch.config import FetchConfig
from pipeline.clips.fetch.robots import opted_out
from pipeline.clips.fetch.store import Record
from pipeline.schema import RowError, Status

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


def check_opt_out(response: httpx.Response, config: FetchConfig) -> None:
    """Raise RowError where the site asks not to be learned from and the config honours that."""
    if not config.honour_opt_out:
        return
    directive = opted_out(response.headers.get_list("x-robots-tag"), config.user_agent)
    if directive:
        raise RowError(Status.OPTED_OUT, f"X-Robots-Tag: {directive}")


def check_code(response: httpx.Response) -> None:
    """Raise RowError, with the fate that it means, for every status but 200 and 206."""
    code = response.status_code
    if code in (200, 206):
        return
    reason = f"HTTP {code} {response.reason_phrase}".strip()
    if code in GONE_CODES:
        raise RowError(Status.NOT_FOUND, reason)
    if code in TRANSIENT_CODES:
        status = Status.RATE_LIMITED if code == 429 else Status.UNREACHABLE
        raise RowError(status, reason, retry_after_s=retry_after_s(response))
    raise RowError(Status.REFUSED if 400 <= code < 500 else Status.UNREACHABLE, reason)


def conditions(known: Record | None, part: Path, validator: str | None) -> dict[str, str]:
    """Headers that ask for what has changed, or for the rest of what is partly there."""
    if known is not None:
        pairs = {"If-None-Match": known.etag, "If-Modified-Since": known.last_modified}
        return {key: value for key, value in pairs.items() if value}
    if validator and size_bytes(part):
        return {"Range": f"bytes={size_bytes(part)}-", "If-Range": validator}
    return {}


def validator(response: httpx.Response) -> str | None:
    """What If-Range may carry: a strong ETag, else the date."""
    etag = response.headers.get("etag")
    if etag and not etag.startswith("W/"):
        return etag
    return response.headers.get("last-modified")


def starts_at(response: httpx.Response) -> int | None:
    """First byte of a partial answer."""
    start = response.headers.get("content-range", "").removeprefix("bytes ").partition("-")[0]
    return int(start) if start.isdigit() else None


def size_bytes(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def retry_after_s(response: httpx.Response) -> float | None:
    """Retry-After in seconds, given as such or as a date."""
    value = response.headers.get("retry-after", "").strip()
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None

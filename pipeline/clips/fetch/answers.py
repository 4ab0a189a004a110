"""Interprets HTTP answers: status codes, validators, ranges, robots.txt (RFC 9309), opt-outs from training."""

import re
import ssl
import time
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx
from protego import Protego

from infra.storage import size_bytes
from pipeline.clips.fetch.store import Record
from pipeline.schema import RowError, Status

TRANSIENT = (
    httpx.TimeoutException,
    httpx.ConnectError,
    httpx.ReadError,
    httpx.WriteError,
    httpx.CloseError,
    httpx.RemoteProtocolError,
    ssl.SSLError,  # a record that is damaged on the way comes as it is
)
"""Faults that a retry may cure: time-outs, refused and reset connections, bodies cut short."""
TRANSIENT_CODES = frozenset({408, 425, 429, 500, 502, 503, 504})
GONE_CODES = frozenset({404, 410})
OPT_OUTS = frozenset({"noai", "noimageai"})
"""Directives of X-Robots-Tag by which a site declines machine learning; img2dataset honours them too."""
MAX_CRAWL_DELAY_S = 60.0
MAX_HEADER_CHARS = 1000
"""Longer validators are not kept. Ours."""
AGENT_LINE = re.compile(r"\s*user[- ]?agent[\s:]+([^#]*)", re.IGNORECASE)


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


def check_opt_out(response: httpx.Response, agent: str) -> None:
    """Raise RowError where X-Robots-Tag asks crawlers not to learn from what it stands before."""
    directive = opted_out(response.headers.get_list("x-robots-tag"), agent)
    if directive:
        raise RowError(Status.OPTED_OUT, f"X-Robots-Tag: {directive}")


def opted_out(headers: list[str], agent: str) -> str | None:
    """The directive by which X-Robots-Tag headers decline, for everyone or for us by name; else None."""
    for header in headers:
        name, sep, rest = header.partition(":")
        if sep and name.strip().lower() not in (product_token(agent), "*", "unavailable_after"):
            continue  # meant for another crawler
        for directive in (rest if sep else header).lower().split(","):
            if directive.strip() in OPT_OUTS:
                return directive.strip()
    return None


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
    etag = told(response, "etag")
    return etag if etag and not etag.startswith("W/") else told(response, "last-modified")


def told(response: httpx.Response, header: str) -> str | None:
    """A header that may be stored and sent back as it is; None if it isn't there, or is odd."""
    value = response.headers.get(header, "")
    return value if value.isascii() and value.isprintable() and 0 < len(value) <= MAX_HEADER_CHARS else None


def starts_at(response: httpx.Response) -> int | None:
    """First byte of a partial answer."""
    return _whole(response.headers.get("content-range", "").removeprefix("bytes ").partition("-")[0])


def announced_bytes(response: httpx.Response) -> int:
    """Content-Length; 0 when the server doesn't say."""
    return _whole(response.headers.get("content-length", "")) or 0


def retry_after_s(response: httpx.Response) -> float | None:
    """Retry-After in seconds, given as such or as a date."""
    value = response.headers.get("retry-after", "").strip()
    seconds = _whole(value)
    if seconds is not None:
        return float(seconds)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def _whole(text: str) -> int | None:
    """A whole number in ASCII digits of sane length (`int` alone takes other scripts, `isdigit` even "²")."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


class Robots:
    """robots.txt of one site, read for one crawler; matching takes linear time whatever the patterns are.

    Args:
        text: the file; "" allows everything.
        agent: our User-Agent header, whose product token selects the group.
    """

    def __init__(self, text: str, agent: str) -> None:
        self.token = product_token(agent)
        self.rules = Protego.parse(_without_other_agents(text, self.token))

    def allows(self, path: str) -> bool:
        """May this path (with its query) be fetched?"""
        return self.rules.can_fetch("http://site/" + path.removeprefix("/"), self.token)

    @property
    def crawl_delay_s(self) -> float | None:
        delay_s = self.rules.crawl_delay(self.token)
        return None if delay_s is None else min(delay_s, MAX_CRAWL_DELAY_S)


def _without_other_agents(text: str, token: str) -> str:
    """Give all other crawlers one name: thousands of names would each get a copy of each rule."""
    lines = []
    for line in text.splitlines():
        agent = AGENT_LINE.match(line)
        other = agent is not None and agent[1].strip().lower() not in (token, "*")
        lines.append("User-agent: somebody-else" if other else line)
    return "\n".join(lines)


def product_token(agent: str) -> str:
    """`vimi-crawler` of `vimi-crawler/0.1`: what robots.txt and X-Robots-Tag call us by."""
    return agent.split("/")[0].strip().lower()

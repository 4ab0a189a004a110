"""Manners and bounds of the crawler."""

from pydantic import Field

from infra.config import Config


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

"""robots.txt (RFC 9309) and the opt-out headers that sites send to those who collect training data."""

import re
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from urllib.parse import unquote

OPT_OUTS = frozenset({"noai", "noimageai"})
"""Directives of X-Robots-Tag by which a site declines machine learning; img2dataset honours them too."""
MAX_BYTES = 500 << 10
"""RFC 9309 section 2.5: a crawler reads at least this much."""


@dataclass
class Robots:
    """The rules of one site that apply to one crawler."""

    rules: list[tuple[str, bool]] = field(default_factory=list)
    """(path pattern, allowed)"""
    crawl_delay_s: float | None = None

    def allows(self, path: str) -> bool:
        """The longest matching pattern decides; allow wins a tie (RFC 9309 section 2.2.2)."""
        path = unquote(path) or "/"
        found = [(len(pattern), allowed) for pattern, allowed in self.rules if _matches(pattern, path)]
        return max(found, default=(0, True))[1]


def parse_robots(text: str, agent: str) -> Robots:
    """The group for `agent` (its product token, as in `vimi-crawler/0.1`), else the group for `*`."""
    token = agent.split("/")[0].strip().lower()
    groups: dict[str, Robots] = {}
    names: list[str] = []
    in_rules = False
    for line in text.splitlines():
        key, sep, value = line.partition("#")[0].partition(":")
        key, value = key.strip().lower(), value.strip()
        if not sep:
            continue
        if key == "user-agent":
            names = [] if in_rules else names
            names.append(value.lower())
            in_rules = False
            groups.setdefault(value.lower(), Robots())
            continue
        in_rules = True
        for name in names:
            _add_rule(groups[name], key, value)
    return groups.get(token) or groups.get("*") or Robots()


def _add_rule(robots: Robots, key: str, value: str) -> None:
    if key in ("allow", "disallow") and value:
        robots.rules.append((unquote(value), key == "allow"))
    elif key == "crawl-delay":
        with suppress(ValueError):
            robots.crawl_delay_s = min(max(float(value), 0.0), 60.0)


def _matches(pattern: str, path: str) -> bool:
    return _pattern(pattern).match(path) is not None


@lru_cache(maxsize=4096)
def _pattern(pattern: str) -> re.Pattern[str]:
    anchored = pattern.endswith("$")
    pieces = [re.escape(piece) for piece in pattern.removesuffix("$").split("*")]
    return re.compile(".*?".join(pieces) + ("$" if anchored else ""), re.DOTALL)


def opted_out(headers: list[str], agent: str) -> str | None:
    """The directive by which X-Robots-Tag headers decline, for everyone or for us by name; else None."""
    token = agent.split("/")[0].strip().lower()
    for header in headers:
        name, sep, rest = header.partition(":")
        if sep and name.strip().lower() not in (token, "*", "unavailable_after"):
            continue  # meant for another crawler
        for directive in (rest if sep else header).lower().split(","):
            if directive.strip() in OPT_OUTS:
                return directive.strip()
    return None

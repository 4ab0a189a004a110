"""Prints progress: done / total, rate, ETA, failures."""

import sys
import time
from collections import Counter


class ProgressPrinter:
    """Prints one line that renews itself on a terminal, and a line every `every_s` elsewhere."""

    def __init__(self, what: str, total: int | None, *, unit: str = "rows", every_s: float = 5.0):
        self.what, self.total, self.unit = what, total, unit
        self.every_s = every_s if not sys.stderr.isatty() else 0.25
        self.done = self.skipped = self.printed_done = 0
        self.notes: Counter[str] = Counter()
        self.started_s = self.printed_s = time.monotonic()

    def add(self, count: int = 1, notes: dict[str, int] | None = None) -> None:
        self.done += count
        self.notes.update(notes or {})
        ending = self.done == self.total  # close() prints that line
        if not ending and time.monotonic() - self.printed_s >= self.every_s:
            self.print()

    def skip(self, count: int) -> None:
        """Count what an earlier run has done: part of the total, not of the rate."""
        self.done += count
        self.skipped += count

    def print(self, *, last: bool = False) -> None:
        self.printed_s, self.printed_done = time.monotonic(), self.done
        end = "\n" if last or not sys.stderr.isatty() else ""
        start = "\r\x1b[2K" if sys.stderr.isatty() else ""
        print(start + self.line(), end=end, file=sys.stderr, flush=True)

    def line(self) -> str:
        elapsed_s = max(time.monotonic() - self.started_s, 1e-9)
        rate = (self.done - self.skipped) / elapsed_s
        parts = [f"  {self.what}: {self.done:,}"]
        if self.total is not None:
            parts[0] += f" / {self.total:,} {self.unit}"
            if rate > 0 and self.done < self.total:
                parts.append(f"ETA {span((self.total - self.done) / rate)}")
        else:
            parts[0] += f" {self.unit}"
        if rate > 0:
            slow = rate < 1
            parts.insert(1, f"{rate * (60 if slow else 1):,.1f} {self.unit}/{'min' if slow else 's'}")
        if self.skipped:
            parts.insert(1, f"{self.skipped:,} from an earlier run")
        bad = ", ".join(f"{name} {count}" for name, count in sorted(self.notes.items()))
        if bad:
            parts.append(bad)
        return " · ".join(parts)

    def close(self) -> None:
        """The last line, unless it stands there already."""
        if sys.stderr.isatty() or not self.done or self.printed_done != self.done:
            self.print(last=True)


def span(seconds: float) -> str:
    """12 s, 3 min 20 s, 5 h 10 min, 2.1 days."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    if seconds < 48 * 3600:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"
    return f"{seconds / 86400:.1f} days"


def bytes_in_words(num_bytes: float) -> str:
    """812 bytes, 12.3 kB, 1.5 TB."""
    if num_bytes < 1000:
        return f"{num_bytes:.0f} bytes"
    for unit in ("kB", "MB", "GB", "TB"):
        num_bytes /= 1000
        if num_bytes < 1000:
            return f"{num_bytes:.1f} {unit}"
    return f"{num_bytes / 1000:,.1f} PB"


def say(text: str) -> None:
    """Print a line for the person at the terminal, now."""
    print(text, file=sys.stderr, flush=True)

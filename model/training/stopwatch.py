"""Where a step's time goes."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

WAITS = {"data", "checkpoint"}
"""Parts of a step that the processor waits for; the others are a GPU's, where there is one."""


class Stopwatch:
    """Seconds of a step by part: data, encode, forward, backward, optimizer, checkpoint (what it held up).

    A GPU notes when it came to a part's beginning and end, and is asked when the means are taken: to wait for
    it after each part would leave it without work.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.marks: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self.num_steps = 0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        on_gpu = self.device.type == "cuda" and name not in WAITS
        start, mark = time.perf_counter(), gpu_mark() if on_gpu else None
        try:
            yield
        finally:
            if mark is not None:
                self.marks.append((name, mark, gpu_mark()))
            else:
                self.seconds[name] += time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """Mean seconds a step by part since the last call, `<part>_s`."""
        for name, begun, ended in self.marks:
            ended.synchronize()
            self.seconds[name] += begun.elapsed_time(ended) / 1e3
        self.marks.clear()
        steps = max(self.num_steps, 1)
        means = {f"{name}_s": total / steps for name, total in self.seconds.items()}
        self.seconds.clear()
        self.num_steps = 0
        return means


def gpu_mark() -> torch.cuda.Event:
    """The moment at which the current stream gets here."""
    mark = torch.cuda.Event(enable_timing=True)
    mark.record()
    return mark

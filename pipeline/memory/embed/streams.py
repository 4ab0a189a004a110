"""Overlaps decoding and CLIP forwards within one embedding worker.

On CPUs a batch is not split over the cores; each core takes a batch of its own. Decoding goes to the same
threads, so no core waits for another and none is asked to do two things at once. On a GPU the model has
one thread, and all others decode for it.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from infra.allocator import keep_freed_memory

T = TypeVar("T")
R = TypeVar("R")

GPU_BATCH = 512
"""Rows of a forward on a GPU. Ours."""
CPU_BATCH = 16
"""Most pictures of one forward on a core: a convolution's intermediates for more leave the caches and
ask for more memory, and gain nothing (offline CLIP, 2 cores: 3.3 ms a picture at 16, 3.4 at 32)."""


@dataclass(frozen=True)
class Streams:
    """The threads of one worker."""

    decoders: ThreadPoolExecutor
    models: ThreadPoolExecutor
    """The same pool on CPUs, one thread on a GPU."""
    num_decoders: int
    num_models: int

    @classmethod
    def make(cls, device: str, threads: int) -> "Streams":
        decoders = ThreadPoolExecutor(threads)
        if device == "cpu":
            return cls(decoders, decoders, threads, threads)
        return cls(decoders, ThreadPoolExecutor(1), threads, 1)


def settle_process(device: str) -> None:
    """Prepare the worker's own process: one core for each thread, and freed memory is kept.

    Numpy's BLAS would start threads of its own in each of ours, for products of a few kB (perceptual
    hashes): on 2 cores that doubled the CPU time of the whole worker.
    """
    from threadpoolctl import threadpool_limits

    threadpool_limits(1, user_api="blas")
    if device != "cpu":
        return
    import torch

    torch.set_num_threads(1)
    keep_freed_memory()


def ahead(
    pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], *, depth: int
) -> Iterator[R]:
    """`map` in order on a pool, at most `depth` results ahead of the reader: memory stays bounded."""
    waiting: deque[Any] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    batch: list[T] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch

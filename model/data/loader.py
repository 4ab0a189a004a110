"""Row groups -> batches, from any position, on any number of ranks; read and decoded ahead in threads.

The position is the number of samples that all ranks consumed together; nothing else is saved.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from pydantic import Field

from infra.config import Config
from infra.errors import DataError
from model.condition import Prompt
from model.data.batch import Batch, Sample, collate, read_prompt, read_sample
from model.data.groups import RowGroups
from model.data.plan import Plan


class LoaderConfig(Config):
    """How fast shards are read; none of it changes what is read."""

    num_threads: int = Field(default=2, ge=1)
    """Threads a rank that read and decode; PyAV and pyarrow release the GIL."""
    prefetch_batches: int = Field(default=4, ge=1)
    """Micro-batches read ahead of the step."""
    cache_bytes: int = Field(default=2 << 30, ge=1 << 20)
    """Row groups kept in memory a rank, bytes: room for those that the order walks side by side, lanes /
    ranks x (shuffle_rows / rows of a group + 1), or they are read more than once. Targets that lie uncompressed
    in local shards don't count: they stay in the file."""


@dataclass
class Loader:
    """This rank's micro-batches from `position` on, without end; read and decoded ahead in threads.

    Attributes:
        select: (prompt with all stored documents, global position) -> the prompt to train on.
        num_bad: targets so far that could not be read; another row of their group took their place.
    """

    plan: Plan
    row_groups: RowGroups
    select: Callable[[Prompt, int], Prompt]
    rank: int = 0
    world_size: int = 1
    position: int = 0
    num_threads: int = 2
    prefetch_batches: int = 4
    pin_memory: bool = False
    num_bad: int = 0
    pool: ThreadPoolExecutor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.position % self.plan.micro_batch or self.plan.micro_batch < self.world_size:
            raise ValueError(f"position {self.position} or ranks {self.world_size} split a micro-batch")
        self.pool = ThreadPoolExecutor(self.num_threads, thread_name_prefix="loader")

    def __iter__(self) -> Iterator[Batch]:
        ahead: deque[Future[Batch]] = deque()
        position = self.position
        try:
            while True:
                while len(ahead) < self.prefetch_batches:
                    ahead.append(self._submit(position))
                    position += self.plan.micro_batch
                yield ahead.popleft().result()
        finally:
            self.close()

    def _submit(self, position: int) -> Future[Batch]:
        """Make a batch in one job, since each hand-over costs as much as a row, or in parts where threads would
        idle; the job that joins parts queues behind them, so never blocks all.
        """
        mine = range(position + self.rank, position + self.plan.micro_batch, self.world_size)
        count = -(-self.num_threads // self.prefetch_batches)
        if count == 1:
            return self.pool.submit(lambda: self._join([self._read_part(mine)]))
        size = -(-len(mine) // count)
        parts = [mine[first : first + size] for first in range(0, len(mine), size)]
        waiting = [self.pool.submit(self._read_part, part) for part in parts]
        return self.pool.submit(lambda: self._join([part.result() for part in waiting]))

    def _read_part(self, positions: range) -> list[Sample]:
        return [self.read(position) for position in positions]

    def _join(self, parts: list[list[Sample]]) -> Batch:
        batch = collate([sample for part in parts for sample in part])
        return batch.pin() if self.pin_memory else batch

    def read(self, position: int) -> Sample:
        """The sample at a global position.

        Raises:
            DataError: its target and those of its spares can't be read.
        """
        source = self.plan.source(position)
        bucket = self.row_groups.buckets[source.bucket]
        reason = ""
        for which in range(source.num_tries):
            row = self.row_groups.row(source, which)
            try:
                prompt = self.select(read_prompt(row), position)
                return read_sample(
                    row, bucket, position=position, prompt=prompt, pixels=not self.row_groups.has_latents
                )
            except DataError as error:
                self.num_bad += 1
                reason = str(error)
        raise DataError(f"{source.num_tries} targets in a row can't be read; the last: {reason}")

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)

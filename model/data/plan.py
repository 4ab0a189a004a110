"""Maps a sample's position to its row: the mixture of buckets and tasks, and the order within each.

    position -> micro-batch -> bucket (Mixture) -> task (Mixture) -> row group and row (Order)

Every micro-batch holds one bucket, the same on all ranks, so that ranks have equal work at each step.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from infra.errors import ConfigError
from model.data.buckets import VALIDATION
from model.data.order import Mixture, Order, make_key
from model.data.shards import Stream

SPARES = 16
"""Rows that are tried in place of one whose target can't be read, before the run stops."""
LANES = 48
"""Places of an epoch that are walked side by side. Ranks that divide it share no row group: 1, 2, 3, 4, 6, 8,
12, 16, 24 and 48 do. Ours."""
WINDOW_ROWS = 64
"""Rows of a lane that are shuffled together (row groups themselves are shuffled over the epoch, and lanes lie
far apart). More mixes better and keeps more row groups in memory. Ours."""


@dataclass(frozen=True)
class Source:
    """What a position means: a row of the shards, to be decoded into a bucket."""

    bucket: int
    group: int
    row: int
    """Number of the row among the group's rows of its stream."""
    stream: Stream
    num_rows: int = 1
    """Of the stream in the group."""

    @property
    def num_tries(self) -> int:
        """The row itself, and spares for it."""
        return min(self.num_rows, SPARES)

    def try_row(self, which: int) -> int:
        """The row itself, or its `which`-th spare."""
        return (self.row + which) % self.num_rows if which else self.row


class Plan:
    """position -> Source, the same for any number of ranks.

    Args:
        index: from `index_shards`.
        num_groups: row groups of the shards.
        micro_batch: samples of a micro-batch over all ranks; each one holds a single bucket.
        bucket_weights: share of micro-batches of each bucket; None = in proportion to their rows.
        task_weights: share of samples of each task; None = in proportion to their rows.
        cycle: draws in which shares of any size are exact; simple ones are in fewer.
        lanes: as in `Order`, and `window_rows`.

    Raises:
        ConfigError: a weight for a task that the shards don't hold, or no rows at all.
    """

    def __init__(
        self,
        index: pa.Table,
        num_groups: int,
        *,
        seed: int,
        micro_batch: int,
        bucket_weights: dict[int, float] | None = None,
        task_weights: dict[str, float] | None = None,
        cycle: int = 1000,
        lanes: int = LANES,
        window_rows: int = WINDOW_ROWS,
    ) -> None:
        streams = count_streams(index, num_groups)
        counts = {s: rows for s, rows in streams.items() if not s[1].startswith(VALIDATION)}
        if task_weights is not None:
            counts = _keep_tasks(counts, task_weights)
        if not counts:
            raise ConfigError("no rows of the shards fit the buckets", legal="buckets of the rows' media")
        self.micro_batch = micro_batch
        self.counts = counts
        self.orders = {
            stream: Order(
                rows,
                seed=make_key(seed, 1, *stream[1].encode(), stream[0]),
                lanes=lanes,
                window_rows=window_rows,
            )
            for stream, rows in counts.items()
        }
        sizes = {stream: order.num_rows for stream, order in self.orders.items()}
        buckets = {b: sum(n for s, n in sizes.items() if s[0] == b) for b in sorted({s[0] for s in sizes})}
        given = buckets if bucket_weights is None else bucket_weights
        shares = {str(b): float(given.get(b, 0.0)) for b in buckets}
        self.buckets = Mixture(_positive(shares, "bucket"), cycle=cycle)
        self.tasks: dict[int, Mixture] = {}
        for bucket in buckets:
            tasks = {s[1]: float(n) for s, n in sizes.items() if s[0] == bucket}
            weights = tasks if task_weights is None else {t: task_weights[t] for t in tasks}
            self.tasks[bucket] = Mixture(_positive(weights, "task"), cycle=cycle)

    def source(self, position: int) -> Source:
        """The row at a global position."""
        number, offset = divmod(position, self.micro_batch)
        bucket_name, nth = self.buckets.draw(number)
        bucket = int(bucket_name)
        task, k = self.tasks[bucket].draw(nth * self.micro_batch + offset)
        group, row = self.orders[bucket, task].locate(k)
        return Source(bucket, group, row, (bucket, task), int(self.counts[bucket, task][group]))

    def count_tasks(self, position: int) -> dict[str, int]:
        """Samples of each task among the first `position`, whole micro-batches."""
        counts: Counter[str] = Counter()
        for bucket, number in self.buckets.count(position // self.micro_batch).items():
            counts.update(self.tasks[int(bucket)].count(number * self.micro_batch))
        return dict(counts)


def count_streams(index: pa.Table, num_groups: int) -> dict[Stream, np.ndarray]:
    """int64 [groups] rows of each stream, from `index_shards`."""
    group, rows = index["group"].to_numpy(), index["rows"].to_numpy()
    lines: defaultdict[Stream, list[int]] = defaultdict(list)
    for line, stream in enumerate(zip(index["bucket"].to_pylist(), index["task"].to_pylist(), strict=True)):
        lines[stream].append(line)
    counts = {stream: np.zeros(num_groups, np.int64) for stream in sorted(lines)}
    for stream, ours in lines.items():
        counts[stream][group[ours]] = rows[ours]
    return counts


def _keep_tasks(counts: dict[Stream, np.ndarray], weights: dict[str, float]) -> dict[Stream, np.ndarray]:
    there = {task for _, task in counts}
    missing = sorted(task for task, weight in weights.items() if weight > 0 and task not in there)
    if missing:
        raise ConfigError(
            f"the mixture wants {', '.join(missing)}, which the shards don't hold",
            legal=", ".join(sorted(there)),
            cure="set its weight to 0, or make it with vimi-data instruct",
        )
    return {s: rows for s, rows in counts.items() if weights.get(s[1], 0) > 0}


def _positive(weights: dict[str, float], what: str) -> dict[str, float]:
    found = {name: weight for name, weight in weights.items() if weight > 0}
    if not found:
        raise ConfigError(
            f"no {what} that the shards hold has a weight above 0", cure="give one of them a weight"
        )
    return found

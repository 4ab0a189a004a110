"""Deterministic shuffling and mixing of training samples: a pure function of (seed, position).

    permute(i, n, key)      a keyed permutation of range(n), computed for one index (Feistel network
                            with cycle walking: Black and Rogaway 2002), so a seek costs the same anywhere
    Order(counts).locate(k) the k-th row of an endless, reshuffled walk over row groups
    Mixture(weights).draw(k) which stream the k-th sample comes from, and its place in that stream; the shares
                            are exact over any window

An epoch visits every row once. It is cut into *lanes*, walked side by side: position i belongs to lane
i mod lanes. With W ranks and i mod W == rank, each rank stays in its own lanes, so it reads 1/W of the
row groups and yet the global order does not know W.
"""

import math
from collections import OrderedDict
from fractions import Fraction
from typing import TypeVar

import numpy as np

KEPT_ROWS = 4096
"""Rows of the largest window whose shuffle is kept, not computed anew for each row."""
_MASK = (1 << 64) - 1
_ROUNDS = 6
_Bits = TypeVar("_Bits", int, np.ndarray)


def mix(x: _Bits) -> _Bits:
    """splitmix64's finaliser: a bijection of 64 bits that looks random (Steele et al. 2014)."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)


def make_key(*parts: int) -> int:
    """64 bits out of any integers; the order of the parts matters."""
    key = 0x9E3779B97F4A7C15
    for part in parts:
        key = mix((key + (part & _MASK) * 0xD1342543DE82EF95 + 1) & _MASK)
    return key


def uniform(*parts: int) -> float:
    """A number in [0, 1) that is a function of its arguments."""
    return (make_key(*parts) >> 11) * 2.0**-53


def permute(index: int, count: int, key: int) -> int:
    """Where the permutation `key` of range(count) sends `index`; O(1), expected < 4 rounds of walking."""
    half = _half_bits(count)
    while True:
        index = _feistel(index, half, key)
        if index < count:
            return index


def permute_all(count: int, key: int) -> np.ndarray:
    """`permute` of every index at once: int64 [count]."""
    half = _half_bits(count)
    out = _feistel(np.arange(count, dtype=np.uint64), half, key)
    while (walking := out >= count).any():
        out[walking] = _feistel(out[walking], half, key)
    return out.astype(np.int64)


def _half_bits(count: int) -> int:
    return max(1, ((count - 1).bit_length() + 1) // 2)


def _feistel(x: _Bits, half: int, key: int) -> _Bits:
    low = (1 << half) - 1
    left, right = x >> half, x & low
    for number in range(_ROUNDS):
        round_key = make_key(key, number)
        left, right = right, left ^ (mix(right ^ round_key) & low)
    return (left << half) | right


class Order:
    """An endless walk over the rows of row groups; each epoch is another permutation.

    Args:
        counts: int64 [groups], rows of each row group that belong to this stream.
        seed: of the shuffle.
        lanes: how many places of the epoch are walked side by side; any number of ranks that divides
            it reads each row group on one rank only (but for the groups that a lane's border cuts).
        window_rows: within a lane, rows are shuffled in windows of this many, so that the row groups
            in memory are few.
    """

    def __init__(self, counts: np.ndarray, *, seed: int, lanes: int, window_rows: int) -> None:
        self.counts = np.asarray(counts, dtype=np.int64)
        self.num_rows = int(self.counts.sum())
        if not self.num_rows:
            raise ValueError("an order over no rows")
        self.seed, self.lanes, self.window_rows = seed, lanes, window_rows
        self._epochs: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._windows: dict[tuple[int, ...], list[int]] = {}

    def locate(self, index: int) -> tuple[int, int]:
        """Row group of the row at `index` of the walk, and its number among that group's rows of the stream."""
        epoch, i = divmod(index, self.num_rows)
        offset, lane = divmod(i, self.lanes)
        size, longer = divmod(self.num_rows, self.lanes)
        start = lane * size + min(lane, longer)
        length = size + (lane < longer)
        window, within = divmod(offset, self.window_rows)
        first = window * self.window_rows
        within = self._within(within, min(self.window_rows, length - first), epoch, lane, window)
        return self._row(epoch, start + first + within)

    def _within(self, row: int, count: int, *place: int) -> int:
        """Where a window's shuffle sends its `row`: computed at once for all, since they are asked for next."""
        if count > KEPT_ROWS:
            return permute(row, count, make_key(self.seed, *place))
        found = self._windows.get(place)
        if found is None:
            if len(self._windows) > 4 * self.lanes:
                self._windows.clear()
            found = permute_all(count, make_key(self.seed, *place)).tolist()
            self._windows[place] = found
        return found[row]

    def _row(self, epoch: int, place: int) -> tuple[int, int]:
        """The row at `place` of the epoch's row groups laid end to end in their shuffled order."""
        groups, ends = self._groups(epoch)
        which = int(np.searchsorted(ends, place, side="right"))
        group = int(groups[which])
        return group, place - int(ends[which] - self.counts[group])

    def _groups(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order of row groups, and where each one ends: O(groups) once an epoch."""
        found = self._epochs.get(epoch)
        if found is None:
            groups = permute_all(len(self.counts), make_key(self.seed, epoch))
            found = self._epochs[epoch] = (groups, np.cumsum(self.counts[groups]))
            while len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return found


class Mixture:
    """Which of several streams the k-th draw comes from: in any window of draws, fewer than 2 off its share.

    One arrangement of `cycle` draws (fewer, where the weights have a smaller common measure) goes round. Each
    stream advances without gaps, so that its own epochs stay exact.
    """

    def __init__(self, weights: dict[str, float], *, cycle: int) -> None:
        self.names = list(weights)
        self.shares = _whole_shares(list(weights.values()), cycle)
        self.cycle = sum(self.shares)
        self.order = spread_evenly(self.shares)
        chosen = np.asarray(self.order)[:, None] == np.arange(len(self.names))
        self.before: list[list[int]] = np.pad(np.cumsum(chosen, axis=0), ((1, 0), (0, 0))).tolist()

    def draw(self, index: int) -> tuple[str, int]:
        """Name of the stream and the draw's position in it."""
        cycle, slot = divmod(index, self.cycle)
        which = self.order[slot]
        return self.names[which], cycle * self.shares[which] + self.before[slot][which]

    def count(self, draws: int) -> dict[str, int]:
        """How many of the first `draws` come from each stream."""
        cycle, slot = divmod(draws, self.cycle)
        shares = zip(self.names, self.shares, self.before[slot], strict=True)
        return {name: cycle * share + before for name, share, before in shares}


def spread_evenly(shares: list[int]) -> list[int]:
    """A stream for each of `sum(shares)` draws, so that none is ever a whole draw off its share.

    The chairman assignment of Tijdeman (1980): of the streams that are due, the one whose time runs out first.
    Any number of draws from the start is off by at most 1 - 1 / (2n - 2), n streams.
    """
    total, due = sum(shares), 2 * max(len(shares) - 1, 1)
    found, counts = [], [0] * len(shares)
    for k in range(1, total + 1):
        # Whole numbers, `total * due` times the shares, so that nothing is rounded.
        lacks = [due * (share * k - total * count) for share, count in zip(shares, counts, strict=True)]
        waiting = [n for n, lack in enumerate(lacks) if lack >= total and shares[n]]
        which = min(waiting, key=lambda n: (total * (due - 1) - lacks[n]) / shares[n])
        counts[which] += 1
        found.append(which)
    return found


def _whole_shares(weights: list[float], most: int) -> list[int]:
    """Whole shares in proportion to `weights`: exact where `most` draws or fewer allow it, else of `most`."""
    exact = [Fraction(weight).limit_denominator(most**2) for weight in weights]
    parts = [weight / sum(exact) for weight in exact] if all(exact) else []
    total = math.lcm(*(part.denominator for part in parts))
    if parts and total <= most:
        return [int(part * total) for part in parts]
    return _largest_remainder(weights, most)


def _largest_remainder(weights: list[float], total: int) -> list[int]:
    """Whole shares of `total` in proportion to `weights`; every positive weight gets at least one."""
    scale = sum(weights)
    exact = [w / scale * total for w in weights]
    shares = [max(int(e), int(w > 0)) for e, w in zip(exact, weights, strict=True)]
    if sum(1 for w in weights if w > 0) > total:
        raise ValueError(f"{len(weights)} streams need a cycle of at least as many draws, got {total}")
    by_need = sorted(range(len(weights)), key=lambda n: shares[n] - exact[n])
    for n in by_need[: max(0, total - sum(shares))]:
        shares[n] += 1
    while sum(shares) > total:
        largest = max(range(len(shares)), key=shares.__getitem__)
        shares[largest] -= 1
    return shares

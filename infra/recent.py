"""What was used last, within so many bytes: spares making again what a small corpus asks for in every epoch."""

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Recent(Generic[K, V]):
    """Values by their keys, the least recently used out first; threads may share it."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.num_bytes = max_bytes, 0
        self.values: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self.lock = threading.Lock()

    def find(self, key: K) -> V | None:
        with self.lock:
            if key not in self.values:
                return None
            self.values.move_to_end(key)
            return self.values[key][0]

    def keep(self, key: K, value: V, num_bytes: int) -> None:
        with self.lock:
            _, before = self.values.pop(key, (None, 0))
            self.values[key] = value, num_bytes
            self.num_bytes += num_bytes - before
            while self.num_bytes > self.max_bytes:
                self.num_bytes -= self.values.popitem(last=False)[1][1]

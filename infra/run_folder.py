"""Paths of a training run's folder, and the names of the metrics in its records.

config.yaml job.json certificate.json   as every job writes them
index.parquet  index.json               where the shards' rows are, and the hash of that
metrics.jsonl  tensorboard/  curves.png
checkpoints/samples-000000001600/       whole when it holds committed.json
samples/samples-000000001600/           sampled while training: sample-000.mp4 .png ... samples.json (last)
restarts/<milliseconds since 1970>.json why workers died
stop  failure.json  final.json          asked to leave; ended by an error; what the certificate quotes
progress.json                           how far a validation or a preview is
"""

import json
import zlib
from dataclasses import dataclass
from typing import Any

from infra.certificate import read_sealed
from infra.storage import exists, join, list_files, read_bytes

COMMITTED = "committed.json"
_CHECKSUM = "crc32"
LOSS = "loss"
SEEN = "seen/"
"""Before the number of samples of each task so far."""
VALIDATION = "val/"
"""Before every number of a validation (`infra.validation_cells`)."""
HELD_OUT = "val/held_out"
"""1 if its rows were kept from training, 0 if there were none such."""
VIDEOS = "videos"
"""How many videos were sampled."""


SCORE = "score/"
"""Before every number of a metric of sampled videos."""


def is_scored(record: dict[str, Any]) -> bool:
    return any(name.startswith(SCORE) for name in record)


def is_validation(record: dict[str, Any]) -> bool:
    return any(name.startswith(VALIDATION) for name in record)


@dataclass(frozen=True)
class RunFolder:
    """A run at `uri`, a local folder or on an object store."""

    uri: str

    @property
    def name(self) -> str:
        return self.uri.rpartition("/")[2]

    @property
    def config(self) -> str:
        return join(self.uri, "config.yaml")

    @property
    def index(self) -> str:
        return join(self.uri, "index.parquet")

    @property
    def index_hash(self) -> str:
        return join(self.uri, "index.json")

    @property
    def kept(self) -> str:
        """In stage 2: which rows of stage 1 are watched."""
        return join(self.uri, "kept.json")

    @property
    def kept_start(self) -> str:
        """Their losses before the first step."""
        return join(self.uri, "kept-start.json")

    @property
    def progress(self) -> str:
        return join(self.uri, "progress.json")

    @property
    def metrics(self) -> str:
        return join(self.uri, "metrics.jsonl")

    @property
    def tensorboard(self) -> str:
        return join(self.uri, "tensorboard")

    @property
    def curves(self) -> str:
        return join(self.uri, "curves.png")

    @property
    def stop(self) -> str:
        """Whoever writes this file asks the run to save and leave."""
        return join(self.uri, "stop")

    @property
    def failure(self) -> str:
        return join(self.uri, "failure.json")

    @property
    def final(self) -> str:
        return join(self.uri, "final.json")

    @property
    def ray_snapshot(self) -> str:
        """What Ray Train remembers of an earlier driver."""
        return join(self.uri, "checkpoints", "checkpoint_manager_snapshot.json")

    @property
    def checkpoints(self) -> str:
        return join(self.uri, "checkpoints")

    def checkpoint(self, position: int) -> str:
        return join(self.checkpoints, _folder(position))

    def positions(self) -> list[int]:
        """Samples seen at the whole checkpoints, ascending."""
        return _positions(list_files(self.checkpoints, suffix="/" + COMMITTED))

    def half_written(self) -> list[int]:
        """Samples seen at checkpoints that hold files but no `COMMITTED`, ascending."""
        return sorted({*_positions(list_files(self.checkpoints))} - {*self.positions()})

    def latest_checkpoint(self) -> str | None:
        positions = self.positions()
        return self.checkpoint(positions[-1]) if positions else None

    def samples(self, position: int) -> str:
        """Folder of the videos sampled at a position."""
        return join(self.uri, "samples", _folder(position))

    def sampled_positions(self) -> list[int]:
        """Positions whose videos are all there, ascending."""
        return _positions(list_files(join(self.uri, "samples"), suffix="/samples.json"))

    def restart(self, time_ms: int) -> str:
        return join(self.uri, "restarts", f"{time_ms}.json")

    def restarts(self) -> list[str]:
        """Files that say why workers died, oldest first."""
        return list_files(join(self.uri, "restarts"), suffix=".json")

    def failed(self) -> dict[str, str] | None:
        """The error that ended the run, which every further try would meet again: its `kind` and `error`."""
        return read_sealed(self.failure) if exists(self.failure) else None

    def records(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl, in order; a torn or damaged line is left out."""
        if not exists(self.metrics):
            return []
        found = map(_record, read_bytes(self.metrics).decode("utf-8", "replace").splitlines())
        return [record for record in found if record is not None]


def split_checkpoint(uri: str) -> tuple[RunFolder, int] | None:
    """The run and the position of a checkpoint's folder; None where it was moved out of its run."""
    run, found, position = uri.rpartition("/checkpoints/samples-")
    return (RunFolder(run), int(position)) if found else None


def _folder(position: int) -> str:
    return f"samples-{position:012d}"


def _positions(files: list[str]) -> list[int]:
    """Of files that lie in folders of a position."""
    folders = [file.split("/")[-2] for file in files]
    return sorted(int(name.removeprefix("samples-")) for name in folders if name.startswith("samples-"))


def record_line(record: dict[str, Any]) -> str:
    """A line of metrics.jsonl: the record and its checksum."""
    return json.dumps({**record, _CHECKSUM: _crc32(record)}) + "\n"


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or record.pop(_CHECKSUM, None) != _crc32(record):
        return None
    return record


def _crc32(record: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(record).encode())

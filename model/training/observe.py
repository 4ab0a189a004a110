"""Validation and previews of a run: in the loop, or of its committed checkpoints by a process beside it.

    run/observed/samples-<position>.json    what was found at a checkpoint, by a process beside the loop

A checkpoint that is due and has no such file is awaited: the same question, asked of the folder alone, tells
the driver what to start, a new driver what an old one left undone, and the writer what may not be deleted yet.
"""

from collections.abc import Collection
from typing import Any

import pyarrow as pa
import torch

from infra.storage import exists, join, list_files, read_json, write_json
from model.data.loader import RowGroups
from model.data.shards import open_shards
from model.encodings.store import open_encoder, open_encodings
from model.sampling.restore import WEIGHTS, restore_generator
from model.training.checkpoint import checkpoint_uri, committed_positions
from model.training.door import read_index
from model.training.due import is_due, is_observed
from model.training.loop import Training
from model.training.parallel import DTYPES
from model.training.preview import Preview
from model.training.stages import StageConfig
from model.training.targets import Targets
from model.training.validate import Observed, Validation


class Observer:
    """Validation and previews in the loop: training waits for them; all ranks call `look` alike."""

    def __init__(self, training: Training, index: pa.Table) -> None:
        self.training, self.config = training, training.config
        self.validation = Validation(training.observed, index)
        self.preview = Preview(training.observed, index)

    def look(self) -> dict[str, Any]:
        """What is due at this position; the validation's record, {} without one."""
        position, ema = self.training.position, self.config.preview.ema
        record = self.validation.run() if is_due(self.config, "validation", position) else {}
        if is_due(self.config, "preview", position):
            average = None if ema == WEIGHTS else self.training.emas[ema]
            if average is not None:
                self.training.writer.settle()
                average.swap(self.training.model)
            self.preview.make(position)
            if average is not None:
                average.swap(self.training.model)
        return record


def result_uri(run: str, position: int) -> str:
    return join(run, "observed", f"samples-{position:012d}.json")


def awaited(config: StageConfig) -> list[int]:
    """Positions of committed checkpoints that are due and not yet looked at, oldest first."""
    found = [p for p in committed_positions(config.out) if is_observed(config, p)]
    return [p for p in found if not exists(result_uri(config.out, p))]


def observe_checkpoint(config: StageConfig, position: int, device: torch.device) -> None:
    """Validate a committed checkpoint and sample from it, alone; the result is a file in the run's folder."""
    uri, index = checkpoint_uri(config.out, position), read_index(config.out)
    record: dict[str, Any] = {}
    if is_due(config, "validation", position):
        record = Validation(open_observed(config, uri, WEIGHTS, device), index).run()
    if is_due(config, "preview", position):
        Preview(open_observed(config, uri, config.preview.ema, device), index).make(position)
    write_json(result_uri(config.out, position), {"samples": position, "record": record, "error": None})


def give_up(config: StageConfig, position: int, error: str) -> None:
    """Note that this checkpoint can't be looked at, so that nobody waits for it."""
    write_json(result_uri(config.out, position), {"samples": position, "record": {}, "error": error})


def open_observed(config: StageConfig, uri: str, ema: str, device: torch.device) -> Observed:
    """A checkpoint's generator with its way to rows and prompts."""
    restored = restore_generator(uri, ema=ema, device=device)
    held_out, encodings = config.validation.held_out_frac, open_encodings(config.encodings)
    return Observed(
        config,
        restored.model,
        open_encoder(config.encoder, encodings, device),
        Targets(config, device, encodings),
        RowGroups(open_shards(config.prompts), config.shapes, held_out_frac=held_out, encodings=encodings),
        None if config.parallel.dtype == "float32" else DTYPES[config.parallel.dtype],
        device,
    )


def read_results(run: str, known: Collection[int]) -> list[tuple[int, dict[str, Any]]]:
    """(position, record) of what was found beside the loop, without the known ones."""
    places = {p: result_uri(run, p) for p in _positions(list_files(join(run, "observed"), suffix=".json"))}
    found = [read_json(place) for position, place in places.items() if position not in known]
    return [(r["samples"], r["record"]) for r in found if r["record"]]


def _positions(places: list[str]) -> list[int]:
    return [int(place.rpartition("/samples-")[2].removesuffix(".json")) for place in places]

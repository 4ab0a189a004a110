"""Watches what stage 2 keeps of stage 1: its text-to-video loss on the rows that validation read there.

    find_kept(config)   the driver, at each start: which rows of stage 1's prompts, or why none can be read
    Kept                the ranks, before the first step and with each checkpoint

They are stage 1's held-out rows (rows of its training, where a corpus keeps none back), each with as many
documents as it read at most. Noise is keyed by the prompt, so a loss and that before the first step are paired.
"""

import math
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from infra.certificate import read_sealed, write_sealed
from infra.errors import VimiError
from infra.run_folder import RunFolder
from infra.storage import exists
from infra.validation_cells import KEPT, SINCE_START, Cell, rows_name
from model.condition import Prompt
from model.data.buckets import Bucket
from model.data.loader import RowGroups
from model.data.plan import Source
from model.data.shards import index_shards, open_shards
from model.encodings.store import open_encodings
from model.prompt.select import select
from model.training.checkpoint import find_checkpoint, read_facts
from model.training.config import Stage2Config, StageConfig, config_of
from model.training.loop import Training
from model.training.validation.loss import CHOICES, QUANTILES, Chosen, Validation, choose_rows

RIGHT = CHOICES.index("right")


def find_kept(config: Stage2Config) -> dict[str, Any] | str:
    """Which rows are watched, as JSON; or in words why none are.

    Raises:
        ConfigError: `stage1_prompts` is set, and can't be read.
    """
    try:
        trained = first_stage(config)
        shards = open_shards(config.stage1_prompts or trained.prompts)
        if config.encodings and not trained.encodings and config.encoder.clip is None:
            return "its prompts aren't encoded, and a language model is not loaded for them"
        encodings = open_encodings(trained.encodings)
    except VimiError as error:
        if config.stage1_prompts is not None:
            raise
        return str(error)
    frac = trained.validation.held_out_frac
    index = index_shards(shards, trained.shapes, held_out_frac=frac)
    rows = choose_rows(trained.shapes, len(shards.groups), index, config.validation.num_samples)
    return {
        "prompts": shards.uri,
        "encodings": encodings.uri if encodings else None,
        "held_out_frac": frac,
        "documents": max(trained.documents),
        "buckets": [asdict(bucket) for bucket in trained.shapes],
        "rows": [asdict(row) for row in rows if row.media == "video"],
    }


def first_stage(config: Stage2Config) -> StageConfig:
    """The config of the stage 1 that it all began with.

    Raises:
        ConfigError: no checkpoint there.
    """
    found: StageConfig = config
    while isinstance(found, Stage2Config):
        start = find_checkpoint(found.start_from)
        found = config_of(read_facts(start), start, own=config)
    return found


def prepare_kept(config: StageConfig) -> str | None:
    """Write down for the ranks which rows are watched; in words why none are, None for stage 1."""
    if not isinstance(config, Stage2Config):
        return None
    found = find_kept(config)
    write_sealed(RunFolder(config.out).kept, {"rows": []} if isinstance(found, str) else found)
    return found if isinstance(found, str) else None


class Kept(Validation):
    """Stage 1's rows in a run of stage 2. Rank r takes rows r, r + W, ...; all ranks call `run` alike."""

    def __init__(self, training: Training) -> None:
        self.training, self.rows = training, []
        place = training.run.kept
        if not isinstance(training.config, Stage2Config) or not exists(place):
            return
        found = read_sealed(place)
        if not found["rows"]:
            return
        self.documents = found["documents"]
        self.rows = [_chosen(row) for row in found["rows"]]
        self.groups = RowGroups(
            open_shards(found["prompts"]),
            tuple(Bucket(**bucket) for bucket in found["buckets"]),
            held_out_frac=found["held_out_frac"],
            encodings=open_encodings(found["encodings"]),
        )

    def prompts(self, number: int) -> dict[str, Prompt]:
        """A row's prompt with its own documents."""
        return {"right": select(self._prompt(number), self.documents)}

    def _record(self, table: Tensor, tasks: list[int], there: Tensor) -> dict[str, Any]:
        """Mean losses over all rows, and how much higher they are than before the first step."""
        losses, place = table[:, RIGHT], self.training.run.kept_start
        record: dict[str, Any] = {rows_name(KEPT): len(losses)}
        for quantile, level in zip((None, *QUANTILES), (losses.mean(-1), *losses.unbind(-1)), strict=True):
            record[Cell(KEPT, "right", quantile).name] = float(level.mean())
        if self.training.position == 0 and self.training.rank == 0:
            write_sealed(place, {"losses": losses.tolist()})
        elif self.training.position and exists(place):
            before = torch.tensor(read_sealed(place)["losses"], dtype=torch.float64)
            more = (losses - before).mean(-1)
            record[SINCE_START] = float(more.mean())
            if len(more) > 1:
                record[f"{SINCE_START} error"] = float(more.std()) / math.sqrt(len(more))
        return record


def _chosen(row: dict[str, Any]) -> Chosen:
    bucket, task = row["source"]["stream"]
    return Chosen(row["media"], Source(**{**row["source"], "stream": (bucket, task)}), row["held_out"])

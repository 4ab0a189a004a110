"""A loss that can be read: the same rows, noise levels and noise every time.

    grid = sigma quantile x retrieval on/off x medium

On means as many documents as training reads at most (`documents`), off means none. Noise is keyed by the
prompt's id, so the numbers are equal to the last bit before and after a resume, for any number of ranks, in
the loop or beside it; and comparable between runs on the same shards. Rows of a held-out split where there
is one.
"""

from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor

from model.data.batch import Batch, collate, read_prompt
from model.data.buckets import VALIDATION
from model.data.inputs import most_documents
from model.data.loader import RowGroups
from model.data.order import permute_all
from model.data.plan import Source, count_streams
from model.data.sample import read_sample
from model.generator import Generator
from model.prompt.encoder import PromptEncoder
from model.prompt.select import select
from model.step import Draws, losses, sample_generator, sample_key
from model.training.build import Conditioner
from model.training.stages import StageConfig
from model.training.targets import Targets


@dataclass(frozen=True)
class Observed:
    """A model that is looked at, with its way to rows and prompts: the loop's own, or a checkpoint's."""

    config: StageConfig
    model: Generator
    encoder: PromptEncoder
    targets: Targets
    row_groups: RowGroups
    dtype: torch.dtype | None
    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def condition(self) -> Conditioner:
        return Conditioner(self.config, self.encoder, self.device)


@dataclass(frozen=True)
class Chosen:
    """A row of the grid."""

    media: str
    source: Source
    held_out: bool


def choose_rows(config: StageConfig, index: pa.Table, num_groups: int, count: int) -> list[Chosen]:
    """`count` rows of each medium: held-out ones if there are any, else rows of the training."""
    chosen, streams = [], count_streams(index, num_groups)
    for number, bucket in enumerate(config.shapes):
        ours = {s: n for s, n in streams.items() if s[0] == number}
        kept = {s: n for s, n in ours.items() if s[1] == VALIDATION}
        rows = [
            (stream, group, row)
            for stream, counts in (kept or ours).items()
            for group in np.flatnonzero(counts).tolist()
            for row in range(int(counts[group]))
        ]
        for stream, group, row in (rows[n] for n in (permute_all(len(rows), 0)[:count] if rows else [])):
            chosen.append(Chosen(bucket.media, Source(number, group, row, stream), bool(kept)))
    return chosen


class Validation:
    """The fixed grid of one run. Rank r takes rows r, r + W, ...; all ranks call `run` alike."""

    def __init__(self, observed: Observed, index: pa.Table) -> None:
        self.observed, self.config = observed, observed.config
        count, groups = self.config.validation.num_samples, len(observed.row_groups.shards.groups)
        self.samples = choose_rows(self.config, index, groups, count) if count else []

    def run(self) -> dict[str, Any]:
        """`val/loss` and one number per cell, e.g. `val/loss video retrieval on q0.35`."""
        if not self.samples:
            return {}
        observed, model = self.observed, self.observed.model
        was_training = model.training
        model.eval()
        # Each rank fills its own rows and sums are taken over all of them in one order, so the number of
        # ranks doesn't show in the last bit.
        table = torch.zeros(len(self.samples), 2, len(self.config.validation.quantiles), dtype=torch.float64)
        for first in range(0, len(self.samples), observed.world_size):
            # Sharded models run in step: a rank without a row of its own repeats the last one, uncounted.
            mine = first + observed.rank
            source = self.samples[min(mine, len(self.samples) - 1)].source
            for column, retrieval in enumerate((True, False)):
                found = self._losses(source, retrieval)
                if mine < len(self.samples):
                    table[mine, column] = found
        if observed.world_size > 1:
            table = table.to(observed.device)
            dist.all_reduce(table)
        model.train(was_training)
        return self._record(table.cpu())

    def _record(self, table: Tensor) -> dict[str, Any]:
        """Means over rows of `table`: losses, [rows, retrieval on/off, quantiles]."""
        held_out = any(chosen.held_out for chosen in self.samples)
        losses_of, cells = {}, {}
        for medium in sorted({chosen.media for chosen in self.samples}):
            rows = [n for n, chosen in enumerate(self.samples) if chosen.media == medium]
            for column, documents in enumerate(("on", "off")):
                means = table[rows, column].mean(0)
                losses_of[f"val/loss {medium} retrieval {documents}"] = float(means.mean())
                for quantile, mean in zip(self.config.validation.quantiles, means.tolist(), strict=True):
                    cells[f"val/cell {medium} retrieval {documents} q{quantile:g}"] = mean
        return {"val/held_out": int(held_out), **losses_of, **cells}

    @torch.no_grad()
    def _losses(self, source: Source, retrieval: bool) -> Tensor:
        """One row's loss at each quantile, with one noise: `quantiles` float64 on the CPU."""
        batch = self._read(source, retrieval)
        observed, quantiles = self.observed, self.config.validation.quantiles
        count, device = len(quantiles), observed.device
        video = observed.targets(batch)
        edm = observed.targets.edm(video)
        key = int(batch.prompt_ids[0][:15], 16)
        generator = sample_generator(0, key, "validation", device)
        noise = torch.randn(video.shape, generator=generator, device=device)
        normal = torch.tensor([NormalDist().inv_cdf(q) for q in quantiles])
        draws = Draws(
            eps=noise.expand(count, -1, -1, -1, -1),
            sigma=edm.training_sigma(normal).to(device),
            self_conditioned=torch.ones(count, dtype=torch.bool, device=device),
            keys=torch.full((count,), sample_key(0, key, "layers"), device=device),
        )
        condition = observed.condition(batch.prompts, batch.fps, batch.original_size_px, batch.encoded)
        condition = condition.select(torch.zeros(count, dtype=torch.long, device=device))
        video, dtype = video.expand(count, -1, -1, -1, -1), observed.dtype
        draws = replace(draws, small=observed.targets.fixed_small(video, key))
        model, small = observed.model, observed.targets.small_size
        each = losses(model, edm, video, condition, draws, dtype=dtype, dropout=False, small_size=small)
        return each.double().cpu()

    def _read(self, source: Source, retrieval: bool) -> Batch:
        groups = self.observed.row_groups
        row = groups.row(source, 0)
        prompt = select(read_prompt(row), most_documents(self.config) if retrieval else 0)
        bucket = groups.buckets[source.bucket]
        return collate([read_sample(row, bucket, position=0, prompt=prompt)])

"""A loss that can be read: the same rows, noise levels and noise every time.

    grid = sigma quantile x retrieval on/off x medium

Noise is keyed by the prompt's id, so the numbers are equal to the last bit before and after a resume,
and comparable between runs on the same shards. Rows of a held-out split where there is one.
"""

from dataclasses import replace
from statistics import NormalDist
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor

from model.data.batch import VALIDATION, Batch, collate, read_prompt, read_sample
from model.data.order import permute_all
from model.data.plan import Source, count_streams
from model.prompt import select
from model.step import Draws, losses, sample_generator, sample_key
from model.training.loop import Training


class Validation:
    """The fixed grid of one run. Rank r takes rows r, r + W, ...; results are summed over ranks."""

    def __init__(self, training: Training, index: pa.Table) -> None:
        self.training, self.config = training, training.config
        self.held_out = False
        self.samples = self._choose(index) if self.config.validation.num_samples else []

    def _choose(self, index: pa.Table) -> list[tuple[str, Source]]:
        """(medium, row) of the grid: held-out rows if there are any, else rows of the training."""
        loader, chosen = self.training.loader, []
        streams = count_streams(index, len(loader.row_groups.shards.groups))
        for number, bucket in enumerate(self.config.shapes):
            ours = {s: n for s, n in streams.items() if s[0] == number}
            kept = {s: n for s, n in ours.items() if s[1] == VALIDATION}
            self.held_out |= bool(kept)
            rows = [
                (stream, group, row)
                for stream, counts in (kept or ours).items()
                for group in np.flatnonzero(counts).tolist()
                for row in range(int(counts[group]))
            ]
            some = permute_all(len(rows), 0)[: self.config.validation.num_samples] if rows else []
            for stream, group, row in (rows[n] for n in some):
                chosen.append((bucket.media, Source(number, group, (row,), stream)))
        return chosen

    def run(self) -> dict[str, Any]:
        """`val/loss` and one number per cell, e.g. `val/loss video retrieval on q0.35`."""
        if not self.samples:
            return {}
        training = self.training
        training.model.eval()
        cells = [
            (media, documents, quantile)
            for media in sorted({m for m, _ in self.samples})
            for documents in ("on", "off")
            for quantile in self.config.validation.quantiles
        ]
        sums = torch.zeros(len(cells), 2, dtype=torch.float64)
        for first in range(0, len(self.samples), training.world_size):
            # Sharded models run in step: a rank without a row of its own repeats the last one, uncounted.
            mine = first + training.rank
            media, source = self.samples[min(mine, len(self.samples) - 1)]
            for documents in ("on", "off"):
                each = self._losses(source, documents == "on") * (mine < len(self.samples))
                for quantile, loss in zip(self.config.validation.quantiles, each, strict=True):
                    cell = cells.index((media, documents, quantile))
                    sums[cell] += torch.stack([loss, torch.ones(()) * (mine < len(self.samples))])
        if training.world_size > 1:
            sums = sums.to(training.device)
            dist.all_reduce(sums)
        training.model.train()
        return self._record(cells, sums.cpu())

    def _record(self, cells: list[tuple[str, str, float]], sums: Tensor) -> dict[str, Any]:
        means = (sums[:, 0] / sums[:, 1].clamp(min=1)).tolist()
        record: dict[str, Any] = {"val/held_out": int(self.held_out)}
        for medium in sorted({c[0] for c in cells}):
            for documents in ("on", "off"):
                mine = [m for m, c in zip(means, cells, strict=True) if c[:2] == (medium, documents)]
                record[f"val/loss {medium} retrieval {documents}"] = sum(mine) / len(mine)
        for mean, (medium, documents, quantile) in zip(means, cells, strict=True):
            record[f"val/cell {medium} retrieval {documents} q{quantile:g}"] = mean
        return record

    @torch.no_grad()
    def _losses(self, source: Source, retrieval: bool) -> Tensor:
        """One row's loss at each quantile, with one noise: `quantiles` float64 on the CPU."""
        batch = self._read(source, retrieval)
        training, quantiles = self.training, self.config.validation.quantiles
        count, device = len(quantiles), self.training.device
        video = training.targets(batch)
        edm = training.targets.edm(video)
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
        condition = training.condition(batch.prompts, batch.fps, batch.original_size_px)
        condition = condition.select(torch.zeros(count, dtype=torch.long, device=device))
        video, dtype = video.expand(count, -1, -1, -1, -1), training.replica.autocast_dtype
        draws = replace(draws, small=training.targets.fixed_small(video, key))
        model, small = training.replica.model, training.targets.small_size
        each = losses(model, edm, video, condition, draws, dtype=dtype, dropout=False, small_size=small)
        return each.double().cpu()

    def _read(self, source: Source, retrieval: bool) -> Batch:
        groups = self.training.loader.row_groups
        row = groups.row(source, 0)
        prompt = select(read_prompt(row), None if retrieval else 0)
        bucket = groups.buckets[source.bucket]
        return collate([read_sample(row, bucket, position=0, prompt=prompt)])

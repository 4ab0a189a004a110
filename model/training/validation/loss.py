"""Validation loss by noise level, what is given, medium and task, while training: the same grid every time.

Documents are a prompt's own, as many as training reads at most (right), none, or another row's (shuffled):
wrong ones cost a model that reads them more than none do. A task of stage 2 is also measured with all that its
prompts show (references own) and with nothing shown, words in its place (none). What is compared differs in
nothing else, so the differences of a row are paired. Noise is keyed by the prompt's id, so the numbers are
equal to the last bit before and after a resume and for any number of ranks, and comparable between runs on the
same shards. Nothing is drawn from the training's randomness.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice, zip_longest
from statistics import NormalDist
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor

from infra.errors import DataError
from infra.run_folder import HELD_OUT
from infra.validation_cells import AXES, Cell, rows_name
from model.condition import Prompt, References
from model.data.batch import TASKS, Batch, collate, noise_key, read_prompt
from model.data.buckets import VALIDATION as KEPT_BACK
from model.data.buckets import Bucket
from model.data.inputs import SHOWN
from model.data.order import permute_all
from model.data.plan import Source, count_streams
from model.data.sample import read_sample
from model.data.shards import Stream
from model.encodings.store import StoredEncoder
from model.prompt.select import retrieved, select, with_retrieved
from model.step import Draws, losses, sample_generator, sample_key
from model.training.loop import Training

QUANTILES = (0.1, 0.35, 0.65, 0.9)
"""Of the training's distribution of noise levels (ours)."""
CHOICES: tuple[str, ...] = ("none", "right", "shuffled", "bare")
"""Prompts of a row: without documents, with its own, with another row's, and with nothing shown at all. Every
row has the first; a row that lacks another counts there with what it has.
"""
WentOn = Callable[[str, int, int], None]
"""Called between the parts of a look, on all ranks alike: what it is, parts done, all parts. May raise."""


@dataclass(frozen=True)
class Chosen:
    """A row that is looked at."""

    media: str
    source: Source
    held_out: bool


def choose_rows(buckets: Sequence[Bucket], num_groups: int, index: pa.Table, count: int) -> list[Chosen]:
    """`count` rows of each bucket: held-out ones if there are any, else rows of the training.

    As many of each task: the rarest would else have none, or too few for a number of its own. Those of a task
    that has fewer go to the others.
    """
    chosen, streams = [], count_streams(index, num_groups) if count else {}
    for number, bucket in enumerate(buckets):
        ours = {s: n for s, n in streams.items() if s[0] == number}
        kept = {s: n for s, n in ours.items() if s[1].startswith(KEPT_BACK)}
        tasks = [_shuffled(stream, counts, count) for stream, counts in (kept or ours).items()]
        turns = (source for turn in zip_longest(*tasks) for source in turn if source is not None)
        chosen += [Chosen(bucket.media, source, bool(kept)) for source in islice(turns, count)]
    return chosen


def _shuffled(stream: Stream, counts: np.ndarray, count: int) -> list[Source]:
    """Up to `count` rows of a stream that has `counts` in each row group, the same each time."""
    ends = np.cumsum(counts)
    places = permute_all(int(ends[-1]), 0)[:count]
    groups = np.searchsorted(ends, places, side="right")
    rows = places - (ends - counts)[groups]
    return [Source(stream[0], int(g), int(r), stream) for g, r in zip(groups, rows, strict=True)]


def rows_of(training: Training, index: pa.Table, count: int) -> list[Chosen]:
    """Of a training's own rows."""
    groups = training.loader.row_groups
    return choose_rows(groups.buckets, len(groups.shards.groups), index, count)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode without gradients, and back."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


class Validation:
    """The fixed grid of one run. Rank r takes rows r, r + W, ...; all ranks call `run` alike."""

    def __init__(self, training: Training, index: pa.Table) -> None:
        self.training, self.groups = training, training.loader.row_groups
        self.rows = rows_of(training, index, training.config.validation.num_samples)

    def run(self, went_on: WentOn = lambda what, done, total: None) -> dict[str, Any]:
        """Numbers named as `infra.validation_cells` says; {} without rows."""
        training, rows = self.training, self.rows
        # Each rank fills its own rows and sums are taken over all of them in one order, so the number of
        # ranks doesn't show in the last bit.
        table = torch.zeros(len(rows), len(CHOICES), len(QUANTILES), dtype=torch.float64)
        facts = torch.zeros(len(rows), 1 + len(CHOICES), dtype=torch.long)
        with evaluating(training.model):
            for first in range(0, len(rows), training.world_size):
                # Sharded models run in step: a rank without a row of its own repeats the last one, uncounted.
                mine = first + training.rank
                number = min(mine, len(rows) - 1)
                prompts = self.prompts(number)
                found = self._of_prompts(number, list(prompts.values()))
                if mine < len(rows):
                    places = [CHOICES.index(name) for name in prompts]
                    table[mine, places] = found
                    facts[mine, 0] = self._task(number)
                    facts[mine, [1 + place for place in places]] = 1
                went_on("validation", min(first + training.world_size, len(rows)), len(rows))
        if training.world_size > 1 and rows:
            table, facts = table.to(training.device), facts.to(training.device)
            dist.all_reduce(table)
            dist.all_reduce(facts)
        facts = facts.cpu()
        return self._record(table.cpu(), facts[:, 0].tolist(), facts[:, 1:].bool()) if rows else {}

    def _of_prompts(self, number: int, prompts: list[Prompt]) -> Tensor:
        """`prompts quantiles` losses; as many passes on each rank, for a sharded model."""
        training, most = self.training, len(prompts)
        if training.world_size > 1:
            count = torch.tensor(most, device=training.device)
            dist.all_reduce(count, dist.ReduceOp.MAX)
            most = int(count)
        source = self.rows[number].source
        whole = self._prompt(number)
        found = [self._losses(source, prompts[min(n, len(prompts) - 1)], whole) for n in range(most)]
        return torch.stack(found[: len(prompts)])

    def prompts(self, number: int) -> dict[str, Prompt]:
        """Those of CHOICES that a row's prompt has."""
        whole, most = self._prompt(number), max(self.training.config.documents)
        none, right, bare = select(whole, 0), select(whole, most), select(whole, 0, SHOWN)
        found = {"none": none}
        if none != right:
            found["right"] = right
            others = self._other_documents(number, retrieved(right)) if self._encodes else None
            if others is not None:
                found["shuffled"] = with_retrieved(right, others)
        return found if bare == none or not self._can_encode(number, bare) else {**found, "bare": bare}

    def _can_encode(self, number: int, prompt: Prompt) -> bool:
        """Whether a part of a row's prompt is stored, or may be encoded now."""
        stored = self._row(number).get("stored")
        return self._encodes or (stored is not None and stored.prompt(prompt) is not None)

    def _other_documents(self, number: int, own: Prompt) -> Prompt | None:
        """The documents of the next row of the same medium that has some and shares none with this row; where
        all share, of the next that has not the same.
        """
        rows, most, similar = self.rows, max(self.training.config.documents), None
        for step in range(1, len(rows)):
            other = (number + step) % len(rows)
            if rows[other].media != rows[number].media:
                continue
            found = retrieved(select(self._prompt(other), most))
            if found and set(found).isdisjoint(own):
                return found
            if found and similar is None and found != own:
                similar = found
        return similar

    @property
    def _encodes(self) -> bool:
        """Whether prompts may be encoded that no encodings hold: a language model is not loaded for them."""
        is_stored = isinstance(self.training.encoder, StoredEncoder)
        return not is_stored or self.training.config.encoder.clip is not None

    def _row(self, number: int) -> dict[str, Any]:
        return self.groups.row(self.rows[number].source, 0)

    def _prompt(self, number: int) -> Prompt:
        return read_prompt(self._row(number))

    def _task(self, number: int) -> int:
        """The place of its task among those of stage 2; -1 in stage 1."""
        task = self._row(number)["task"]
        return [*TASKS].index(task) if task in TASKS else -1

    def _record(self, table: Tensor, tasks: list[int], there: Tensor) -> dict[str, Any]:
        """Means over rows, by medium and in stage 2 also by task.

        `table` holds the losses, [rows, CHOICES, QUANTILES], and `there` which of CHOICES each row has.
        """
        groups: dict[str, list[int]] = {}
        for number, (chosen, task) in enumerate(zip(self.rows, tasks, strict=True)):
            groups.setdefault(chosen.media, []).append(number)
            if task >= 0:
                groups.setdefault(f"{chosen.media} {[*TASKS][task]}", []).append(number)
        record: dict[str, Any] = {HELD_OUT: int(any(chosen.held_out for chosen in self.rows))}
        for of, rows in sorted(groups.items()):
            record |= summarise(of, table[rows], there[rows], is_task=" " in of)
        return record

    def _losses(self, source: Source, prompt: Prompt, whole: Prompt) -> Tensor:
        """The loss of a row with a part of its `whole` prompt at each quantile, with one noise: `quantiles`
        float64 on the CPU.
        """
        training, targets, device = self.training, self.training.targets, self.training.device
        batch, count = self._read(source, prompt), len(QUANTILES)
        video = targets(batch)
        objective = targets.objective(video)
        key = noise_key(batch.tasks[0], batch.clip_ids[0])
        noise = torch.randn(
            video.shape, generator=sample_generator(0, key, "validation", device), device=device
        )
        normal = torch.tensor([NormalDist().inv_cdf(q) for q in QUANTILES])
        draws = Draws(
            eps=noise.expand(count, -1, -1, -1, -1),
            sigma=objective.training_sigma(normal).to(device),
            self_conditioned=torch.ones(count, dtype=torch.bool, device=device),
            keys=torch.full((count,), sample_key(0, key, "layers"), device=device),
        )
        condition = training.condition(
            batch.prompts, batch.fps, batch.original_size_px, batch.encoded, self._references(source, prompt)
        )
        given = training.condition.has_first_frame([whole])  # its loss is over the same frames without it
        video = video.expand(count, -1, -1, -1, -1)
        each = losses(
            training.model,
            objective,
            video,
            condition.select(torch.zeros(count, dtype=torch.long, device=device)),
            replace(draws, small=targets.fixed_small(video, key)),
            dtype=training.replica.dtype,
            dropout=False,
            but_first=None if given is None else given.to(device).expand(count),
            small_size=targets.small_size,
        )
        return each.double().cpu()

    def _references(self, source: Source, prompt: Prompt) -> References | None:
        """Its pictures, from what is stored of its row if they are there: another row's documents are not."""
        stored = self.groups.row(source, 0).get("stored")
        try:
            return self.training.condition.references(prompt, stored=stored)
        except DataError:
            return self.training.condition.references(prompt)

    def _read(self, source: Source, prompt: Prompt) -> Batch:
        row, bucket = self.groups.row(source, 0), self.groups.buckets[source.bucket]
        return collate([read_sample(row, bucket, position=0, prompt=prompt)])


def summarise(of: str, losses: Tensor, there: Tensor, *, is_task: bool = False) -> dict[str, float]:
    """Mean losses by what was given and noise level, and what the best gains, with its standard error.

    Losses are means over all rows, a row that lacks a choice counting with what it has; gains are over the rows
    that have both, since the others gain nothing for sure.

    `losses` is [rows, CHOICES, QUANTILES], `there` [rows, CHOICES]: which of them each row has.
    """
    loss = dict(zip(CHOICES, losses.unbind(1), strict=True))
    has = dict(zip(CHOICES, there.unbind(1), strict=True))
    right = torch.where(has["right"][:, None], loss["right"], loss["none"])
    shuffled = torch.where(has["shuffled"][:, None], loss["shuffled"], right)
    record: dict[str, float] = {rows_name(of): len(losses)}
    given = {"right": right, "none": loss["none"], "shuffled": shuffled}
    record |= _axis(of, "documents", {k: v for k, v in given.items() if has[k].any()}, has)
    if is_task:
        bare = torch.where(has["bare"][:, None], loss["bare"], loss["none"])
        record |= _axis(of, "references", {"own": right, "none": bare}, {"none": has["right"] | has["bare"]})
    return record


def _axis(of: str, axis: str, given: dict[str, Tensor], has: dict[str, Tensor]) -> dict[str, float]:
    """Of one axis: choice -> losses [rows, QUANTILES], and -> the rows that have it beside the best."""
    record: dict[str, float] = {}
    best = AXES[axis][0]
    for place, quantile in enumerate((None, *QUANTILES)):
        level = {k: v.mean(-1) if quantile is None else v[:, place - 1] for k, v in given.items()}
        for name, values in level.items():
            record[Cell(of, name, quantile, axis=axis).name] = float(values.mean())
        for name in given if best in given else ():
            if name == best:
                continue
            gain = (level[name] - level[best])[has[name] & has.get(best, has[name])]
            cell = Cell(of, name, quantile, is_gain=True, axis=axis)
            if len(gain):
                record[cell.name] = float(gain.mean())
            if len(gain) > 1:
                record[replace(cell, is_error=True).name] = float(gain.std()) / math.sqrt(len(gain))
    return record

"""Metrics of sampled videos while training: `validation.metrics`, over all and for each task of stage 2.

    score/fvd n64                        of 64 sampled videos against the targets of the same rows
    score/fvd subject_driven n21 low     the lower end of its interval, for one task

The number of videos is part of the name, since the value depends on it: curves of other n are other curves. So
few videos show where a run goes; what is to be compared with others, `vimi-train evaluate` measures.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import torch.distributed as dist

from infra.progress import say
from infra.run_folder import SCORE
from model.data.batch import TASKS, Role, read_prompt
from model.data.sample import read_sample
from model.evaluate.extract import opened
from model.evaluate.metric import Features, Metric, Video
from model.evaluate.networks import NETWORKS, NetworkConfig, network_of, opener
from model.evaluate.scores import chosen, folds_of, score
from model.sampling.maker import GuidanceConfig, Maker
from model.sampling.requests import caption_of
from model.training.loop import Training
from model.training.validation.loss import WentOn, evaluating, rows_of
from model.training.validation.preview import GUIDANCE_WEIGHT, Preview


class VideoScores(Preview):
    """The same rows each time. Rank r makes videos r, r + W, ...; all ranks call `score` alike."""

    what = "scores"

    def __init__(self, training: Training, index: pa.Table) -> None:
        self.training, validation = training, training.config.validation
        self.metrics: dict[str, type[Metric]] = chosen(validation.metrics)
        rows = rows_of(training, index, validation.metrics_videos if self.metrics else 0)
        self.rows = [row for row in rows if row.media == "video"]
        self.network = opener(NetworkConfig(**validation.networks), training.device)
        self.real: dict[int, Features] = {}
        self.prompts: dict[int, Features] = {}
        self.told: set[str] = set()
        """Metrics that had no score, and of which that was said."""

    def score(self, went_on: WentOn = lambda what, done, total: None) -> dict[str, float]:
        """Numbers of a record; {} without metrics or videos, and on all ranks but the first."""
        training, mine = self.training, []
        guidance = GuidanceConfig(weight=GUIDANCE_WEIGHT)
        maker = Maker(training.model, training.config, training.encoder, training.targets.latents, guidance)
        with evaluating(training.model):
            for first in range(0, len(self.rows), training.world_size):
                # Sharded models run in step: a rank without a video of its own makes the last one, uncounted.
                number = first + training.rank
                frames, entry = self._video(
                    maker, min(number, len(self.rows) - 1), partial(self._stepped, went_on, first)
                )
                if number < len(self.rows):
                    self._look_once(number)
                    found = self._features(frames)
                    mine.append((number, entry["task"], found, self.real[number], self.prompts[number]))
        parts: list[Any] = [mine]
        if training.world_size > 1:
            parts = [None] * training.world_size
            dist.all_gather_object(parts, mine)
        looked_at = sorted((one for part in parts for one in part), key=lambda one: one[0])
        return self._record(looked_at) if training.rank == 0 and looked_at else {}

    def _features(self, frames: Any) -> Features:
        names = {name for metric in self.metrics.values() for name in metric.needs if name in NETWORKS}
        return {name: self.network(name)(frames) for name in sorted(names)}

    def _look_once(self, number: int) -> None:
        """Features of the row's own target and prompt, which stay the same."""
        if number in self.real:
            return
        groups, source = self.training.loader.row_groups, self.rows[number].source
        row = groups.row(source, 0)
        prompt = read_prompt(row)
        target = read_sample(row, groups.buckets[source.bucket], position=0, prompt=prompt)
        self.real[number] = self._features(target.pixels)
        found: dict[str, Any] = {}
        pictures = [opened(s.image) for s in prompt if s.role == Role.SUBJECT and s.image]
        for name in {name for metric in self.metrics.values() for name in metric.needs}:
            network = self.network(network_of(name))
            if name.endswith("_text"):
                found[name] = network.texts([caption_of(prompt)])[0]
            elif name.endswith("_references") and pictures:
                found[name] = network.pictures(pictures)
        self.prompts[number] = found

    def _record(self, looked_at: Sequence[tuple[int, str, Features, Features, Features]]) -> dict[str, float]:
        """Scores over all videos, and over those of each task where there are several tasks."""
        record: dict[str, float] = {}
        tasks = {"": looked_at} | {t: [one for one in looked_at if one[1] == t] for t in TASKS}
        for task, some in tasks.items():
            if len(some) < 2:
                continue
            folds = folds_of([f"{number:09d}" for number, *_ in some])
            videos = [
                (Video(str(number), features, is_real=is_real, fold=fold), {} if is_real else prompt)
                for (number, _, found, real, prompt), fold in zip(some, folds, strict=True)
                for features, is_real in ((real, True), (found, False))
            ]
            scores, failures = score(self.metrics, videos)
            self._tell({} if task else failures)
            for name, value in scores.items():
                key = f"{SCORE}{name}{f' {task}' if task else ''} n{value.n}"
                record[key] = value.value
                if value.interval is not None:
                    record |= {f"{key} low": value.interval[0], f"{key} high": value.interval[1]}
        return record

    def _tell(self, failures: Mapping[str, str]) -> None:
        """Say once of each metric why the records lack it."""
        for name, why in failures.items():
            if name not in self.told:
                say(f"  not {SCORE}{name}: {why}")
        self.told |= failures.keys()

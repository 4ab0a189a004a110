"""Sampled previews while training: the same few prompts and noise every time, laid out as by `sample`.

Nothing is drawn from the training's randomness.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch.distributed as dist
from torch.nn import functional as F

from infra.certificate import Certificate, FileEntry, entry_of, write_certificate
from infra.run_folder import RunFolder
from infra.samples import read_samples, write_samples
from infra.storage import join, read_bytes
from model.data.batch import read_prompt
from model.data.sample import read_sample
from model.encodings.store import StoredEncoder
from model.prompt.select import select
from model.sampling.film import to_frames, write_video
from model.sampling.maker import GuidanceConfig, Maker
from model.sampling.requests import SampleRequest, describe_prompt
from model.training.config import WEIGHTS
from model.training.loop import Training
from model.training.validation.loss import WentOn, evaluating, rows_of

NUM_VIDEOS = 4
"""Videos of a preview, from the rows that validation reads (ours)."""
NUM_STEPS = 64
"""Sampling steps of a preview; Snap Video's base model is good from 64."""
GUIDANCE_WEIGHT = 4.0
"""Classifier-free guidance of a preview, as in `vimi-train sample`."""
TITLE_CHARS = 60
"""Of a prompt, in the title of its contact sheet."""


class Preview:
    """The same few prompts, each time. Rank r makes videos r, r + W, ...; all ranks call `make` alike."""

    what = "preview"

    def __init__(self, training: Training, index: pa.Table) -> None:
        self.training = training
        rows = rows_of(training, index, NUM_VIDEOS)
        self.rows = ([chosen for chosen in rows if chosen.media == "video"] or rows)[:NUM_VIDEOS]

    def make(self, went_on: WentOn = lambda what, done, total: None) -> dict[str, bytes]:
        """Sample, write into the run's folder; contact sheets by title. Equal weights give equal bytes."""
        training, rows = self.training, self.rows
        folder, made = training.run.samples(training.position), []
        guidance = GuidanceConfig(weight=GUIDANCE_WEIGHT)
        maker = Maker(training.model, training.config, training.encoder, training.targets.latents, guidance)
        with evaluating(training.model):
            for first in range(0, len(rows), training.world_size):
                # Sharded models run in step: a rank without a video of its own makes the last one, unwritten.
                mine = first + training.rank
                stepped = partial(self._stepped, went_on, first)
                frames, entry = self._video(maker, min(mine, len(rows) - 1), stepped)
                if mine < len(rows):
                    said, files = write_video(folder, f"sample-{mine:03d}", frames, entry["fps"])
                    made.append((mine, entry | said, [entry_of(*file) for file in files.items()]))
        found: list[Any] = [made]
        if training.world_size > 1:
            found = [None] * training.world_size
            dist.all_gather_object(found, made)
        if training.rank:
            return {}
        self._certify(folder, sorted((video for part in found for video in part), key=lambda video: video[0]))
        return contact_sheets(training.run, training.position)

    def _certify(self, folder: str, made: list[tuple[int, dict[str, Any], list[FileEntry]]]) -> None:
        """What the page of a report compares with the files that it shows; samples.json comes last."""
        config, count = self.training.config, len(made)
        files = [entry for _, _, entries in made for entry in entries]
        certificate = Certificate(
            job="preview", config_hash=config.hash(), num_in=count, num_out=count, files=files
        )
        write_certificate(folder, certificate)
        entries = [entry for _, entry, _ in made]
        write_samples(folder, entries, run=config.out, position=self.training.position, ema=WEIGHTS)

    def _stepped(self, went_on: WentOn, first: int, step: int) -> None:
        """Sampling steps of all ranks' videos; `first` is the first video that they are at."""
        at_once = min(self.training.world_size, len(self.rows) - first)
        went_on(self.what, first * NUM_STEPS + (step + 1) * at_once, len(self.rows) * NUM_STEPS)

    def _video(
        self, maker: Maker, number: int, on_step: Callable[[int], None]
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Frames uint8 `t h w 3` of one row's prompt, and what samples.json says of them."""
        training, chosen = self.training, self.rows[number]
        groups = training.loader.row_groups
        row, bucket = groups.row(chosen.source, 0), groups.buckets[chosen.source.bucket]
        if isinstance(training.encoder, StoredEncoder):
            training.encoder.row = row["stored"]
        prompt = select(read_prompt(row), max(training.config.documents))
        sample = read_sample(row, bucket, position=0, prompt=prompt)
        fps = sample.fps if math.isfinite(sample.fps) else 1.0
        request = SampleRequest(prompt, fps, sample.original_size_px, seed=number)
        if training.targets.small_size is None:
            size = (bucket.height_px, bucket.width_px)
            videos = maker.films(
                [request], num_steps=NUM_STEPS, num_frames=bucket.num_frames, size_px=size, on_step=on_step
            )
        else:  # an upsampler's answer to the small version of the row's own target
            target = sample.video.float() / 127.5 - 1
            small = F.interpolate(target, size=training.targets.small_size, mode="area").to(training.device)
            videos = maker.enlarge(small[None], [request], num_steps=NUM_STEPS, level=0.0, on_step=on_step)
        return to_frames(videos[0]), {
            "prompt": describe_prompt(prompt),
            "task": row["task"],
            "prompt_id": row["prompt_id"],
            "held_out": chosen.held_out,
            "seed": number,
            "fps": fps,
            "num_steps": NUM_STEPS,
            "guidance": f"cfg {GUIDANCE_WEIGHT:g}",
            "ema": WEIGHTS,
        }


def contact_sheets(run: RunFolder, position: int) -> dict[str, bytes]:
    """The sheets of the videos sampled at a position as PNG, by number and prompt."""
    folder = run.samples(position)
    return {
        f"{number} {' '.join(entry['prompt'].split())[:TITLE_CHARS]}": read_bytes(join(folder, entry["sheet"]))
        for number, entry in enumerate(read_samples(folder))
    }

"""Videos sampled while training, laid out as by `vimi-train sample` (`sampled.py` says where).

Prompts are the first rows that validation reads, and each has a seed of its own: from one checkpoint to the
next only the weights differ.
"""

import hashlib
import math
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from infra.storage import join, write_bytes, write_json
from model.data.batch import read_prompt
from model.data.inputs import most_documents
from model.data.sample import read_sample
from model.encodings.store import StoredEncoder
from model.prompt.select import select
from model.sampling.ask import describe_prompt
from model.sampling.config import GuidanceConfig
from model.sampling.film import contact_sheet, encode_mp4, scale_to_look_at, to_frames
from model.sampling.maker import Asked, Maker
from model.sampling.restore import Restored
from model.training.sampled import preview_uri
from model.training.validate import Observed, choose_rows


class Preview:
    """The same few prompts, each time. Rank r makes videos r, r + W, ...; all ranks call `make` alike."""

    def __init__(self, observed: Observed, index: pa.Table) -> None:
        self.observed, self.options = observed, observed.config.preview
        groups = len(observed.row_groups.shards.groups)
        rows = choose_rows(observed.config, index, groups, self.options.num_videos)
        videos = [chosen for chosen in rows if chosen.media == "video"] or rows
        self.rows = videos[: self.options.num_videos]

    @torch.no_grad()
    def make(self, position: int) -> None:
        """Sample and write; the same weights give the same bytes."""
        observed, folder = self.observed, preview_uri(self.observed.config.out, position)
        was_training = observed.model.training
        observed.model.eval()
        maker, entries = self._maker(), []
        for first in range(0, len(self.rows), observed.world_size):
            # Sharded models run in step: a rank without a video of its own makes the last one, unwritten.
            mine = first + observed.rank
            frames, entry = self._video(maker, min(mine, len(self.rows) - 1))
            if mine < len(self.rows):
                entries.append((mine, write_video(folder, mine, frames, entry)))
        observed.model.train(was_training)
        found: list[Any] = [entries]
        if observed.world_size > 1:
            found = [None] * observed.world_size
            dist.all_gather_object(found, entries)
        if observed.rank == 0:
            samples = [entry for _, entry in sorted((e for part in found for e in part), key=lambda e: e[0])]
            facts = {"run": observed.config.out, "position": position, "ema": self.options.ema}
            write_json(join(folder, "samples.json"), {**facts, "samples": samples})

    def _maker(self) -> Maker:
        observed, space = self.observed, self.observed.targets.space
        facts = {"token_dim": observed.encoder.dim, "encoder": observed.encoder.identity_hash}
        restored = Restored(observed.model, observed.config, facts, observed.config.out, space)
        guidance = GuidanceConfig(weight=self.options.guidance_weight)
        return Maker(restored, guidance, beside=observed)

    def _video(self, maker: Maker, number: int) -> tuple[np.ndarray, dict[str, Any]]:
        """Frames uint8 `t h w 3` of one row's prompt, and what samples.json says of them."""
        groups, chosen = self.observed.row_groups, self.rows[number]
        row, bucket = groups.row(chosen.source, 0), groups.buckets[chosen.source.bucket]
        if isinstance(self.observed.encoder, StoredEncoder):
            self.observed.encoder.row = row["stored"]
        prompt = select(read_prompt(row), most_documents(self.observed.config))
        sample = read_sample(row, bucket, position=0, prompt=prompt)
        fps = sample.fps if math.isfinite(sample.fps) else 1.0
        asked = Asked(prompt, fps, sample.original_size_px, seed=number)
        if self.observed.targets.small_size is None:
            size, steps = (bucket.height_px, bucket.width_px), self.options.num_steps
            video = maker.film(asked, num_steps=steps, num_frames=bucket.num_frames, size_px=size)
        else:
            video = self._enlarged(maker, asked, sample.video)
        frames = to_frames(video)
        entry = {
            "prompt": describe_prompt(prompt),
            "task": row["task"],
            "prompt_id": row["prompt_id"],
            "held_out": chosen.held_out,
            "seed": number,
            "fps": fps,
            "num_steps": self.options.num_steps,
            "guidance": f"cfg {self.options.guidance_weight:g}",
            "ema": self.options.ema,
            "frames_sha256": hashlib.sha256(frames.tobytes()).hexdigest(),
        }
        return frames, entry

    def _enlarged(self, maker: Maker, asked: Asked, target: Tensor) -> Tensor:
        """An upsampler's answer to the small version of the row's own target."""
        size = self.observed.targets.small_size
        small = F.interpolate(target.float() / 127.5 - 1, size=size, mode="area").to(self.observed.device)
        return maker.enlarge(small, asked, num_steps=self.options.num_steps, level=0.0)


def write_video(folder: str, number: int, frames: np.ndarray, entry: dict[str, Any]) -> dict[str, Any]:
    """Write mp4 and contact sheet; the entry with their names."""
    name, scale = f"sample-{number:03d}", scale_to_look_at(frames.shape[2])
    files = {
        "video": (f"{name}.mp4", encode_mp4(frames, entry["fps"], scale=scale)),
        "sheet": (f"{name}.png", contact_sheet(frames, scale=max(1, scale // 2))),
    }
    for place, data in files.values():
        write_bytes(join(folder, place), data)
    return entry | {key: place for key, (place, _) in files.items()}

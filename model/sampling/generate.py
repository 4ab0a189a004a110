"""`vimi-train sample`: a checkpoint and prompts -> mp4, contact sheet, samples.json. No Ray.

Each video starts from noise that is a function of its seed and, for rows of shards, of its prompt's id, and is
made `batch_size` at a time, in order: the same command gives the same files.
"""

import hashlib
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from infra.certificate import Certificate, FileEntry, entry_of, write_certificate
from infra.claim import open_job
from infra.progress import ProgressPrinter, say
from infra.samples import write_samples
from infra.storage import join, write_bytes
from model.sampling.base import open_base
from model.sampling.documents import (
    Found,
    describe_documents,
    document_pictures,
    keep_segments,
    num_shared,
)
from model.sampling.film import to_frames, write_video
from model.sampling.maker import Maker, open_maker
from model.sampling.plan import NOTHING, SampleConfig, check, made_by, plan_videos, weights_hash
from model.sampling.requests import (
    SampleRequest,
    describe_prompt,
    prompt_hash,
)
from model.training.checkpoint import checkpoint_hash, find_checkpoint
from model.training.parallel import pick_device
from model.training.state import restore_generator


def run(config: SampleConfig, found: Found = NOTHING) -> Certificate:
    """Make the videos; the same command finds them made.

    `found`: caption of a prompt in words -> row of PROMPTS whose documents it gets (`with_found`).
    """
    check(config, found)
    uri, base = made_by(config)
    work = plan_videos(config, base, found)
    inputs = {
        "checkpoint": weights_hash(config, uri),
        "prompts": hashlib.sha256("".join(prompt_hash(r.prompt) for r in work).encode()).hexdigest()[:16],
    }
    if config.upsampler is not None:
        inputs["upsampler"] = checkpoint_hash(find_checkpoint(config.upsampler.run))
    if config.documents == "shuffled":
        own = plan_videos(config.model_copy(update={"documents": "right"}), base, found)
        if shared := num_shared(own, work):
            say(
                f"  note: {shared} of {len(work)} shuffled prompts hold a document of their own: too few others"
            )
    done = open_job(config.out, job="sample", config=config, inputs=inputs)
    if done is not None:
        return done
    started_s = time.monotonic()
    sampler = Sampler(config, uri)
    progress = ProgressPrinter("sample", len(work), unit="videos")
    entries, files = [], []
    for first in range(0, len(work), config.batch_size):
        requests = work[first : first + config.batch_size]
        for number, (request, video) in enumerate(zip(requests, sampler.videos(requests), strict=True), first):
            entry, written = sampler.write(f"sample-{number:03d}", request, video)
            entries.append(entry)
            files += written
        progress.add(len(requests))  # a batch is made at once: its first video would tell a wrong rate
    progress.close()
    return certify(config, uri, entries, files, inputs=inputs, wall_s=time.monotonic() - started_s)


def certify(
    config: SampleConfig,
    checkpoint: str,
    entries: Sequence[dict[str, Any]],
    files: Sequence[FileEntry],
    *,
    inputs: dict[str, str],
    wall_s: float = 0.0,
) -> Certificate:
    """Write samples.json beside the videos of a checkpoint, and the certificate of all of them."""
    write_samples(
        config.out,
        entries,
        run=config.source,
        checkpoint=checkpoint,
        ema=config.ema,
        documents=config.documents,
    )
    certificate = Certificate(
        job="sample",
        config_hash=config.hash(),
        num_in=len(entries),
        num_out=len(entries),
        files=list(files),
        inputs=inputs,
        wall_s=wall_s,
    )
    write_certificate(config.out, certificate)
    return certificate


def open_weights(config: SampleConfig, uri: str, device: torch.device) -> Maker:
    """What `made_by` found, loaded."""
    if config.base is None:
        return open_maker(restore_generator(uri, ema=config.ema, device=device), config.guidance)
    return open_base(made_by(config)[1], config.guidance, device)


class Sampler:
    """The base model at `uri`, and an upsampler behind it if the config names one."""

    def __init__(self, config: SampleConfig, uri: str) -> None:
        self.config, device = config, pick_device()
        self.base = open_weights(config, uri, device)
        self.upsampler: Maker | None = None
        if config.upsampler is not None:
            large = restore_generator(config.upsampler.run, ema=config.upsampler.ema, device=device)
            self.upsampler = open_maker(large, config.upsampler.guidance, beside=self.base)

    def write(self, name: str, request: SampleRequest, video: Tensor) -> tuple[dict[str, Any], list[FileEntry]]:
        """Write the files of one video `t c h w`; (entry of samples.json, files of the certificate)."""
        config, guidance = self.config, self.config.guidance
        documents = document_pictures(name, request.prompt)
        segments, pictures = keep_segments(name, request.prompt)
        frames = to_frames(video)
        said, files = write_video(config.out, name, frames, request.fps, above=list(documents.values()))
        pictures |= documents
        for path, data in pictures.items():
            write_bytes(join(config.out, path), data)
        entry = {
            "prompt": describe_prompt(request.prompt),
            "segments": segments,
            "task": request.task,
            "prompt_id": request.prompt_id,
            "clip_id": request.clip_id,
            "documents": config.documents,
            "documents_of": request.documents_of,
            "retrieved": describe_documents(name, request),
            "seed": request.seed,
            "fps": request.fps,
            "num_steps": config.num_steps,
            "guidance": f"{guidance.scheme} {guidance.weight:g}",
            "ema": config.ema,
            "upsampler": config.upsampler.run if config.upsampler else None,
            **said,
        }
        return entry, [entry_of(*file) for file in (files | pictures).items()]

    @torch.no_grad()
    def videos(self, requests: Sequence[SampleRequest]) -> Tensor:
        """`b t c h w` pixels in about [-1, 1], a video for each request."""
        config = self.config
        size, frames = config.size_px, config.num_frames
        videos = self.base.films(requests, num_steps=config.num_steps, num_frames=frames, size_px=size)
        if self.upsampler is None or config.upsampler is None:
            return videos
        how = config.upsampler
        return self.upsampler.enlarge(videos, requests, num_steps=how.num_steps, level=how.level)

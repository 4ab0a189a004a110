"""`vimi-train sample`: a checkpoint and prompts -> mp4, contact sheet, samples.json. No Ray.

Each video is made on its own from noise that is a function of its seed, so the same command gives the
same files, whatever else is asked for with it.
"""

import hashlib
import math
import time
from typing import Any

import torch

from infra.claim import open_job
from infra.errors import ConfigError
from infra.progress import ProgressPrinter
from infra.storage import (
    Certificate,
    FileEntry,
    absolute,
    join,
    read_bytes,
    write_bytes,
    write_certificate,
    write_json,
)
from model.prompt.select import select
from model.sampling.ask import Request, describe_prompt, from_file, from_shards, parse_prompt, prompt_hash
from model.sampling.config import GuidanceConfig, SampleConfig, UpsampleConfig
from model.sampling.film import contact_sheet, encode_mp4, scale_to_look_at, to_frames
from model.sampling.maker import Asked, Maker
from model.sampling.restore import Restored, check_average, config_of, restore_generator
from model.training.checkpoint import COMMITTED, find_checkpoint, read_facts
from model.training.parallel import pick_device

__all__ = ["GuidanceConfig", "SampleConfig", "Sampler", "UpsampleConfig", "check", "run"]


def check(config: SampleConfig) -> str:
    """Refuse what can't work before anything is loaded; the plan in words."""
    uri = find_checkpoint(absolute(config.run))
    check_average(uri, config.ema)
    requests = read_requests(config, uri)
    count = len(requests) * len(config.seeds)
    check_cascade(config, uri)
    trained = read_facts(uri)["config"]["num_frames"]
    if (config.num_frames or trained) > trained:
        raise ConfigError(f"num_frames {config.num_frames}", legal=f"at most {trained}, as trained")
    check_size(config, uri)
    return f"{count} videos of {config.num_frames or trained} frames from {uri} ({config.ema})"


def check_size(config: SampleConfig, uri: str) -> None:
    """Refuse a size that the model has not seen.

    Raises:
        ConfigError: names those that it has.
    """
    base = config_of(read_facts(uri))
    legal = {(base.height_px, base.width_px), *((b.height_px, b.width_px) for b in base.shapes)}
    if config.size_px is not None and config.size_px not in legal:
        raise ConfigError(
            f"size_px {list(config.size_px)}", legal=" or ".join(str(list(s)) for s in sorted(legal))
        )


def check_cascade(config: SampleConfig, uri: str) -> None:
    """Refuse an upsampler in the base model's place, and a cascade whose sizes don't meet.

    Raises:
        ConfigError: says which.
    """
    base = config_of(read_facts(uri))
    if base.upsampler is not None:
        raise ConfigError(f"{uri} is an upsampler", cure="give a base model's run, and this one as --upsampler")
    if config.upsampler is None:
        return
    place = find_checkpoint(absolute(config.upsampler.run))
    check_average(place, config.upsampler.ema)
    large = config_of(read_facts(place))
    if large.upsampler is None:
        raise ConfigError(
            f"{place} is no upsampler", cure="train one: `upsampler: {...}` in the stage's config"
        )
    made, taken = config.size_px or (base.height_px, base.width_px), large.upsampler.small_size_px
    frames = config.num_frames or base.num_frames
    if made != taken or frames > large.num_frames:
        raise ConfigError(
            f"the base model makes {frames} frames of {made[0]} x {made[1]} pixels",
            legal=f"what this upsampler takes: up to {large.num_frames} frames of {taken[0]} x {taken[1]}",
        )


def with_absolute_paths(config: SampleConfig) -> SampleConfig:
    update: dict[str, Any] = {"out": absolute(config.out), "run": absolute(config.run)}
    if config.upsampler is not None:
        update["upsampler"] = config.upsampler.model_copy(update={"run": absolute(config.upsampler.run)})
    return config.model_copy(update=update)


def _hash_of_checkpoint(uri: str) -> str:
    return hashlib.sha256(read_bytes(join(uri, COMMITTED))).hexdigest()[:16]


def open_sampler(config: SampleConfig, uri: str, upsampler: str | None) -> "Sampler":
    """The generators of the checkpoints at `uri` and `upsampler`, loaded."""
    device = pick_device()
    large = None
    if upsampler is not None and config.upsampler is not None:
        large = restore_generator(upsampler, ema=config.upsampler.ema, device=device)
    return Sampler(config, restore_generator(uri, ema=config.ema, device=device), large)


def read_requests(config: SampleConfig, uri: str) -> list[Request]:
    """All prompts that the config asks for.

    Raises:
        ConfigError: none, or one that can't be read.
    """
    instruct = read_facts(uri)["stage"] == "stage2"
    images, requests = list(config.images), []
    for text in config.prompts:
        mine = [images.pop(0) for _ in range(min(text.count("<image>"), len(images)))]
        prompt = parse_prompt(text, mine, instruct=instruct)
        requests.append(Request(describe_prompt(prompt), prompt))
    if images:
        raise ConfigError(f"{len(images)} images too many", legal="one for each <image> of the prompts")
    if config.prompts_file:
        requests += from_file(config.prompts_file, instruct=instruct)
    if config.prompts_uri:
        requests += from_shards(absolute(config.prompts_uri), config.rows)
    if not requests:
        raise ConfigError("no prompts", cure='give a prompt ("A dog runs."), prompts_file or prompts_uri')
    return requests


def run(config: SampleConfig) -> Certificate:
    """Make the videos; the same command finds them made."""
    check(config)
    config = with_absolute_paths(config)
    uri = find_checkpoint(config.run)
    requests = read_requests(config, uri)
    inputs = {
        "checkpoint": _hash_of_checkpoint(uri),
        "prompts": hashlib.sha256("".join(prompt_hash(r.prompt) for r in requests).encode()).hexdigest()[:16],
    }
    large = find_checkpoint(config.upsampler.run) if config.upsampler else None
    if large is not None:
        inputs["upsampler"] = _hash_of_checkpoint(large)
    done = open_job(config.out, job="sample", config=config, inputs=inputs)
    if done is not None:
        return done
    started_s = time.monotonic()
    sampler = open_sampler(config, uri, large)
    work = [(request, seed) for request in requests for seed in config.seeds]
    progress = ProgressPrinter("sample", len(work), unit="videos")
    entries, files = [], []
    for number, (request, seed) in enumerate(work):
        entry, written = sampler.make(number, request, seed)
        entries.append(entry)
        files += written
        progress.add()
    progress.close()
    facts = {"run": config.run, "checkpoint": uri, "ema": config.ema}
    write_json(join(config.out, "samples.json"), {**facts, "samples": entries})
    certificate = Certificate(
        job="sample",
        config_hash=config.hash(exclude={"out"}),
        num_in=len(work),
        num_out=len(entries),
        files=files,
        inputs=inputs,
        wall_s=time.monotonic() - started_s,
    )
    write_certificate(config.out, certificate)
    return certificate


class Sampler:
    """A base model, and an upsampler behind it if the config names one."""

    def __init__(self, config: SampleConfig, base: Restored, upsampler: Restored | None = None) -> None:
        self.config = config
        self.base = Maker(base, config.guidance)
        self.upsampler: Maker | None = None
        if upsampler is not None and config.upsampler is not None:
            self.upsampler = Maker(upsampler, config.upsampler.guidance, beside=self.base)

    def make(self, number: int, request: Request, seed: int) -> tuple[dict[str, Any], list[FileEntry]]:
        """Sample one video and write its files; (entry of samples.json, files of the certificate)."""
        fps = request.fps if request.fps and math.isfinite(request.fps) else self.config.fps
        frames = to_frames(self.video(request, seed, fps))
        scale = scale_to_look_at(frames.shape[2])
        name = f"sample-{number:03d}"
        files = {
            f"{name}.mp4": encode_mp4(frames, fps, scale=scale),
            f"{name}.png": contact_sheet(frames, scale=max(1, scale // 2)),
        }
        for path, data in files.items():
            write_bytes(join(self.config.out, path), data)
        guidance = self.config.guidance
        entry = {
            "prompt": request.name,
            "task": request.task,
            "prompt_id": request.prompt_id,
            "video": f"{name}.mp4",
            "sheet": f"{name}.png",
            "seed": seed,
            "fps": fps,
            "num_steps": self.config.num_steps,
            "guidance": f"{guidance.scheme} {guidance.weight:g}",
            "ema": self.config.ema,
            "upsampler": self.config.upsampler.run if self.config.upsampler else None,
            "frames_sha256": hashlib.sha256(frames.tobytes()).hexdigest(),
        }
        return entry, [
            FileEntry(path=p, rows=1, num_bytes=len(d), sha256=hashlib.sha256(d).hexdigest())
            for p, d in files.items()
        ]

    @torch.no_grad()
    def video(self, request: Request, seed: int, fps: float) -> torch.Tensor:
        """`t c h w` pixels in about [-1, 1]."""
        size = request.original_size_px or self.config.original_size_px
        asked = Asked(select(request.prompt, self.config.num_documents), fps, size, seed)
        video = self.base.film(
            asked,
            num_steps=self.config.num_steps,
            num_frames=self.config.num_frames,
            size_px=self.config.size_px,
        )
        options = self.config.upsampler
        if self.upsampler is None or options is None:
            return video
        return self.upsampler.enlarge(video, asked, num_steps=options.num_steps, level=options.level)

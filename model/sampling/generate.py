"""`vimi-train sample`: a checkpoint and prompts -> mp4, contact sheet, samples.json. No Ray.

Each video is made on its own from noise that is a function of its seed, so the same command gives the
same files, whatever else is asked for with it.
"""

import hashlib
import math
import time
from typing import Any, Literal

import torch
from pydantic import Field

from infra.claim import open_job
from infra.config import Config
from infra.errors import ConfigError
from infra.progress import Progress
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
from model.edm import edm_for
from model.guidance import FULL, Guidance
from model.prompt import PromptEncoder, load_prompt_encoder, select
from model.sample import Denoiser, sample_ode
from model.sampling.ask import Request, describe_prompt, from_file, from_shards, parse_prompt, prompt_hash
from model.sampling.film import contact_sheet, encode_mp4, scale_to_look_at, to_frames
from model.sampling.restore import WEIGHTS, Restored, check_average, restore_generator
from model.step import sample_generator
from model.training.build import Conditioner
from model.training.checkpoint import COMMITTED, find_checkpoint, read_facts
from model.training.parallel import pick_device
from model.training.telemetry import say


class GuidanceConfig(Config):
    """How estimates with and without parts of the prompt are combined (model/guidance.py)."""

    scheme: Literal["none", "cfg", "retrieval", "alchemist", "phantom"] = "cfg"
    """cfg: classifier-free guidance, as Snap Video; the others weigh text and pictures apart."""
    weight: float = 4.0
    """1 = no guidance (cfg). Snap Video sweeps 0 to 16 and does not state its choice; 4 is ours."""
    image_weight: float = 1.0
    """Of the pictures, in schemes that weigh them apart."""
    threshold: float | None = Field(default=0.995, gt=0, le=1)
    """Quantile of dynamic thresholding, which Snap Video uses; 0.995 is Imagen's. null = off."""
    oscillate_from: int | None = None
    """Step from which the weight oscillates with 1, which Snap Video does; null = constant."""


class SampleConfig(Config):
    """What to sample. Prompts come from `prompts`, `prompts_file` and `prompts_uri`, one after another."""

    run: str
    """Folder of a stage1 or stage2 run, or one of its checkpoints."""
    out: str
    """Folder or URI of the videos."""
    prompts: tuple[str, ...] = ()
    """Prompts in words; `<image>` marks the place of a picture."""
    images: tuple[str, ...] = ()
    """Pictures for the placeholders of all `prompts`, in order: `path`, or `role:path` with role subject,
    background, first_frame or retrieved."""
    prompts_file: str | None = None
    """JSONL file of prompts (model/sampling/ask.py)."""
    prompts_uri: str | None = None
    """Folder of prompt shards: their documents and pictures come with them."""
    rows: int = Field(default=4, ge=1)
    """How many prompts of `prompts_uri`."""
    num_documents: int | None = Field(default=None, ge=0)
    """Retrieved documents that stay in each prompt; null = all."""
    ema: str = WEIGHTS
    """`weights`, a stored average by name (power-0.05, half-life-...), or `power-<sigma_rel>` of any width,
    reconstructed from the stored ones (EDM2)."""
    seeds: tuple[int, ...] = (0,)
    """One video for each prompt and seed."""
    num_steps: int = Field(default=256, ge=1)
    """Sampling steps; 256 (Snap Video's base model; good from 64)."""
    guidance: GuidanceConfig = GuidanceConfig()
    fps: float = Field(default=24.0, gt=0)
    """Frame rate to condition on and to write, for prompts that don't bring their own; 24 (VIMI)."""
    original_size_px: tuple[int, int] = (288, 512)
    """(height, width) of the original to condition on, likewise; VIMI's output size."""
    num_frames: int | None = Field(default=None, ge=1)
    """Frames; null = as trained."""


def check(config: SampleConfig) -> str:
    """Refuse what can't work before anything is loaded; the plan in words."""
    uri = find_checkpoint(absolute(config.run))
    check_average(uri, config.ema)
    requests = read_requests(config, uri)
    count = len(requests) * len(config.seeds)
    trained = read_facts(uri)["config"]["num_frames"]
    if (config.num_frames or trained) > trained:
        raise ConfigError(f"num_frames {config.num_frames}", legal=f"at most {trained}, as trained")
    return f"{count} videos of {config.num_frames or trained} frames from {uri} ({config.ema})"


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
    config = config.model_copy(update={"out": absolute(config.out), "run": absolute(config.run)})
    uri = find_checkpoint(config.run)
    requests = read_requests(config, uri)
    inputs = {
        "checkpoint": hashlib.sha256(read_bytes(join(uri, COMMITTED))).hexdigest()[:16],
        "prompts": hashlib.sha256("".join(prompt_hash(r.prompt) for r in requests).encode()).hexdigest()[:16],
    }
    done = open_job(config.out, job="sample", config=config, inputs=inputs)
    if done is not None:
        return done
    started_s = time.monotonic()
    sampler = Sampler(config, restore_generator(uri, ema=config.ema, device=pick_device()))
    work = [(request, seed) for request in requests for seed in config.seeds]
    progress = Progress("sample", len(work), unit="videos")
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


def check_encoder(encoder: PromptEncoder, restored: Restored) -> None:
    """Refuse an encoder of another width; say so when its weights or arithmetic differ."""
    if encoder.dim != restored.facts["token_dim"]:
        raise ConfigError(
            f"the prompt encoder gives {encoder.dim} numbers a token, {restored.uri} was trained with "
            f"{restored.facts['token_dim']}",
            cure="use the encoder that the run was trained with",
        )
    if encoder.identity_hash != restored.facts["encoder"]:
        say(f"  note: {restored.uri} was trained with other weights or arithmetic of its prompt encoder")


class Sampler:
    """A restored generator with its prompt encoder."""

    def __init__(self, config: SampleConfig, restored: Restored) -> None:
        self.config, self.restored = config, restored
        self.device = next(restored.model.parameters()).device
        encoder = load_prompt_encoder(restored.config.encoder, self.device)
        check_encoder(encoder, restored)
        self.condition = Conditioner(restored.config, encoder, self.device)
        self.guidance = Guidance(**config.guidance.model_dump())

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
            "frames_sha256": hashlib.sha256(frames.tobytes()).hexdigest(),
        }
        return entry, [
            FileEntry(path=p, rows=1, num_bytes=len(d), sha256=hashlib.sha256(d).hexdigest())
            for p, d in files.items()
        ]

    @torch.no_grad()
    def video(self, request: Request, seed: int, fps: float) -> torch.Tensor:
        """`t c h w` in about [-1, 1]."""
        trained = self.restored.config
        num_frames = self.config.num_frames or trained.num_frames
        edm = edm_for(num_frames, trained.height_px, trained.width_px, sigma_data=trained.sigma_data)
        shape = (1, num_frames, 3, trained.height_px, trained.width_px)
        generator = sample_generator(seed, 0, "noise", self.device)
        noise = torch.randn(shape, generator=generator, device=self.device)
        size = torch.tensor([request.original_size_px or self.config.original_size_px])
        prompt = select(request.prompt, self.config.num_documents)
        conditions = {
            branch: self.condition([select(prompt, None, branch)], torch.tensor([fps]), size.float())
            for branch in {FULL, *self.guidance.branches}
        }
        denoiser = Denoiser(
            self.restored.model,
            edm,
            conditions,
            self.guidance,
            dtype=torch.bfloat16 if trained.parallel.dtype == "bfloat16" else None,
        )
        return sample_ode(denoiser, edm, noise, num_steps=self.config.num_steps)[0]

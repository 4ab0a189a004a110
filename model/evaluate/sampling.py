"""Samples a run's videos for an evaluation: units of a job that any number of workers share.

A unit is one batch of the prompts in their order; a video is a function of its seed and prompt, so which worker
makes it can't be seen.
"""

from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

import torch

from infra.certificate import input_certificate
from infra.run_folder import split_checkpoint
from infra.samples import read_facts, read_samples
from model.condition import Prompt
from model.data.batch import Role
from model.prompt.select import retrieved
from model.sampling.generate import Sampler
from model.sampling.plan import SampleConfig, made_by, plan_videos
from model.sampling.requests import SampleRequest, caption_of
from model.training.config import StageConfig


def planned(config: SampleConfig) -> tuple[StageConfig, list[SampleRequest]]:
    """What the run was trained by, and the requests in order."""
    _, base = made_by(config)
    return base, plan_videos(config, base)


FILES = "h264 crf 12, enlarged by a whole factor to about 320 pixels in width; scored as made"
"""What became of the pixels before they were scored, for the manifest."""


def video_name(number: int) -> str:
    return f"sample-{number:03d}"


def prompt_facts(prompt: Prompt) -> dict[str, Any]:
    """Its words, and whether it has subjects' pictures, before any of it is written."""
    pictures = [segment for segment in prompt if segment.role == Role.SUBJECT and segment.image]
    words = [segment.text or "" for segment in pictures]
    return {"text": caption_of(prompt), "references": ["a picture"] * len(pictures), "words": words}


def learned_with_documents(base: StageConfig, requests: Iterable[SampleRequest]) -> tuple[bool, int]:
    """Whether the run was trained with documents, and how many of the prompts have some."""
    return max(base.documents) > 0, sum(bool(retrieved(request.prompt)) for request in requests)


def batches(config: SampleConfig, count: int) -> Iterator[dict[str, int]]:
    """Payloads of the units."""
    for first in range(0, count, config.batch_size):
        yield {"first": first, "count": min(config.batch_size, count - first)}


class SampleWorker:
    """Payload of `batches` -> receipt with the entries of samples.json and of the certificate."""

    def __init__(self, config: SampleConfig) -> None:
        torch.set_num_threads(1)  # sums depend on it
        self.config = config

    @cached_property
    def requests(self) -> list[SampleRequest]:
        return planned(self.config)[1]

    @cached_property
    def sampler(self) -> Sampler:
        return Sampler(self.config, made_by(self.config)[0])

    def __call__(self, payload: dict[str, int]) -> dict[str, Any]:
        first, count = payload["first"], payload["count"]
        requests = self.requests[first : first + count]
        entries, files = [], []
        for number, (request, video) in enumerate(
            zip(requests, self.sampler.videos(requests), strict=True), first
        ):
            entry, written = self.sampler.write(video_name(number), request, video)
            entries.append(entry)
            files += [file.model_dump() for file in written]
        return {"entries": entries, "files": files}


def system_of(config: SampleConfig, checkpoint: str, num_with_documents: int) -> dict[str, Any]:
    """What made the videos, for the manifest: no places, but what they hold."""
    found = split_checkpoint(made_by(config)[0])
    places = {"run", "base", "prompts_uri", "prompts_file", "prompts", "images", "rows"}
    how = {name: value for name, value in config.identity().items() if name not in places}
    return {
        "run": found[0].name if found else config.source.rpartition("/")[2],
        "position": found[1] if found else None,
        "checkpoint": checkpoint,
        "prompts_with_documents": num_with_documents,
        "files": FILES,
        **how,
    }


def system_of_samples(folder: str) -> dict[str, Any]:
    """The same of a folder of `vimi-train sample`, as far as it tells.

    Raises:
        DataError: its samples.json is damaged.
    """
    facts, entries, certificate = read_facts(folder), read_samples(folder), input_certificate(folder)
    found = split_checkpoint(facts.get("checkpoint") or "")
    told = {name: entries[0][name] for name in ("num_steps", "guidance") if entries and name in entries[0]}
    return {
        "run": found[0].name if found else str(facts.get("run", "")).rpartition("/")[2],
        "position": found[1] if found else facts.get("position"),
        "checkpoint": (certificate.inputs if certificate else {}).get("checkpoint"),
        "ema": facts.get("ema", ""),
        "documents": facts.get("documents"),
        "seeds": sorted({entry["seed"] for entry in entries if "seed" in entry}),
        "files": FILES,
        **told,
    }

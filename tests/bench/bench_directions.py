"""When a training of the world begins to read the direction in its captions.

    make evidence                                    # its quick form makes the prompts
    python tests/bench/bench_directions.py evidence/quick [--samples 24000] [--set backbone.head_dim=32 ...]

The quick form's training on one core, by its own config and schedule. Every 4,000 samples, over the clips of
nouns it never saw: how much their loss rises at three noise levels when the caption's direction is turned
round. Zero: it is not read.
"""

import argparse
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from model.condition import Condition, Prompt
from model.data.batch import Role, as_video, read_prompt
from model.data.sample import read_pixels
from model.prompt.select import select
from model.step import network_input
from model.training.config import Stage1Config
from model.training.loop import Training
from pipeline.shards import ShardSet
from tests.model.runs import ROOT, open_training

SIGMAS = (1.0, 3.0, 10.0)
EVERY_SAMPLES = 4000
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}


def turned(prompt: Prompt) -> Prompt:
    """The same with the caption's direction turned round."""
    return tuple(
        replace(s, text=" ".join(OPPOSITE.get(word, word) for word in (s.text or "").split()))
        if s.role == Role.CAPTION
        else s
        for s in prompt
    )


class Probe:
    """Unseen clips at fixed noise, with their captions and with those turned round."""

    def __init__(self, training: Training) -> None:
        self.training = training
        rows = list(unseen_rows(training.config.prompts))
        frames = [read_pixels(row, training.config.shapes[0])[0] for row in rows]
        self.videos = torch.stack([as_video(each) for each in frames]).float() / 127.5 - 1
        self.noise = torch.randn(self.videos.shape, generator=torch.Generator().manual_seed(3))
        fps = torch.full((len(rows),), 8.0)
        size = torch.tensor([[row["height_px"], row["width_px"]] for row in rows])
        prompts = [select(read_prompt(row), 1, frozenset()) for row in rows]
        self.told = training.condition(prompts, fps, size)
        self.turned = training.condition([turned(prompt) for prompt in prompts], fps, size)

    @torch.no_grad()
    def rises(self) -> list[float]:
        """Loss with the direction turned round minus loss as told, at each of `SIGMAS`."""
        return [float((self._losses(s, self.turned) - self._losses(s, self.told)).mean()) for s in SIGMAS]

    def _losses(self, level: float, condition: Condition) -> Tensor:
        objective = self.training.targets.objective(self.videos)
        sigma = torch.full((len(self.videos),), level)
        x = network_input(objective, objective.add_noise(self.videos, self.noise, sigma), sigma)
        return objective.loss(self.training.model(x, sigma, condition)[0], self.videos, self.noise, sigma)


def unseen_rows(folder: str) -> Iterator[dict[str, Any]]:
    shards = ShardSet(folder)
    for group in range(len(shards)):
        yield from (row for row in shards.read_row_group(group).to_pylist() if row["split"] != "train")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", help="of the quick form: prompts and encoded lie there")
    parser.add_argument("--samples", type=int, default=24000)
    parser.add_argument("--set", nargs="*", default=[], help="fields of the training's config")
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe = ROOT / "infra/configs/evidence/stage1.yaml"
    os.chdir(options.folder)
    with tempfile.TemporaryDirectory() as out:
        fields = [*options.set, f"out={out}/run", "num_workers=1"]
        training = open_training(Stage1Config.load(recipe, overrides=fields))
        probe, losses = Probe(training), list[float]()
        print(f"{'samples':>8}  training loss   rise at sigma {SIGMAS}")
        while training.position < options.samples:
            losses.append(float(training.step().loss))
            if training.position % EVERY_SAMPLES == 0:
                rises = "".join(f"{rise:>+9.4f}" for rise in probe.rises())
                print(f"{training.position:>8,}  {sum(losses) / len(losses):>13.4f}   {rises}", flush=True)
                losses.clear()
        training.close()


if __name__ == "__main__":
    main()

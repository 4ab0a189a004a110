"""The heaviest micro-batch that a run can meet, blank: tried first, so that memory runs out now or never."""

from dataclasses import replace

import torch

from model.condition import Condition
from model.data.batch import Batch
from model.prompt.encoder import PromptEncoder
from model.training.build import Conditioner
from model.training.stages import StageConfig
from model.training.targets import Targets


def heaviest(
    config: StageConfig,
    count: int,
    *,
    encoder: PromptEncoder,
    targets: Targets,
    condition: Conditioner,
    stored: bool,
) -> tuple[Batch, Condition]:
    """The largest bucket with the longest prompts and the most references.

    Args:
        config: of the run.
        count: samples of a micro-batch on one rank.
        encoder: of the run; its width and dtype are asked for.
        targets: of the run.
        condition: of the run.
        stored: latents are read, so the autoencoder need not be tried.
    """
    bucket = max(config.shapes, key=lambda b: b.num_frames * b.height_px * b.width_px)
    sizes = (bucket.num_frames, bucket.height_px, bucket.width_px)
    length = config.encoder.max_tokens
    plain = torch.zeros(count, length, dtype=torch.long)
    fps, size = torch.full((count,), 24.0), torch.full((count, 2), 288.0)
    names = [""] * count
    pixels = torch.zeros(count, sizes[0], 3, *sizes[1:]).byte()
    batch = Batch([0] * count, names, names, [()] * count, pixels, fps, size)
    if stored:
        batch = replace(batch, latents=torch.zeros(count, *targets.space.shape(*sizes)))
    pictures = condition.most_references(count)
    return batch, Condition(
        tokens=torch.zeros(count, length, encoder.dim, dtype=encoder.dtype),
        mask=torch.ones(count, length, dtype=torch.bool),
        role=plain,
        segment=plain,
        fps=fps,
        original_size_px=size,
        references=pictures,
        reference_mask=None if pictures is None else torch.ones(pictures.shape[:2], dtype=torch.bool),
    )

"""When something is due: a function of the position alone, so all ranks agree and a resumed run keeps it."""

from typing import Literal

from model.training.stages import StageConfig

What = Literal["log", "checkpoint", "validation", "preview"]


def is_due(config: StageConfig, what: What, position: int) -> bool:
    """Whether the step that led to `position` crossed a multiple of the interval, or is the last."""
    if what == "validation" and not config.validation.num_samples:
        return False
    if what == "preview" and not config.preview.num_videos:
        return False
    if position >= config.total_samples:
        return True
    every = _interval(config, what)
    return every is not None and position // every > (position - config.batch_size) // every


def is_observed(config: StageConfig, position: int) -> bool:
    """Whether the model of this moment is validated or sampled from."""
    return is_due(config, "validation", position) or is_due(config, "preview", position)


def _interval(config: StageConfig, what: What) -> int | None:
    """Samples between two; None = only at the end."""
    return {
        "log": config.log.every_samples,
        "checkpoint": config.checkpoint.every_samples,
        "validation": config.validation.every_samples or config.checkpoint.every_samples,
        "preview": config.preview.every_samples,
    }[what]

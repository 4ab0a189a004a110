"""What a run starts from: its own last checkpoint, or the other stage's."""

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from infra.errors import TrainingError
from model.ema import Ema
from model.generator import Generator
from model.prompt.encoder import PromptEncoder
from model.training.checkpoint import (
    CheckpointWriter,
    find_checkpoint,
    latest_checkpoint,
    load_state,
    read_facts,
)
from model.training.stages import Stage2Config, StageConfig
from model.training.state import from_average, make_emas, state_of
from model.training.targets import Targets, check_same_space


class Fresh(Protocol):
    """A training whose parts are there and hold nothing yet."""

    config: StageConfig
    encoder: PromptEncoder
    targets: Targets
    optimizer: Optimizer
    emas: dict[str, Ema]
    writer: CheckpointWriter

    @property
    def model(self) -> Generator: ...


def restore(training: Fresh) -> int:
    """Continue from the run's last checkpoint, or start stage 2 from stage 1's; the position."""
    training.writer.clean()
    if dist.is_initialized():
        dist.barrier()
    config, found = training.config, latest_checkpoint(training.config.out)
    if found is not None:
        position = int(facts_of(training, found)["position"])
        state = state_of(training.model, training.optimizer, training.emas)
        load_state(found, state)
        torch.set_rng_state(state["rng"])
        for ema in training.emas.values():
            ema.samples = position
        return position
    if isinstance(config, Stage2Config):
        start = find_checkpoint(config.start_from)
        facts_of(training, start)
        load_state(start, from_average(training.model, config.start_ema))
        training.emas = make_emas(training.model, config)
    return 0


def facts_of(training: Fresh, checkpoint: str) -> dict[str, Any]:
    """Its facts, if our prompt encoder is the one that it was trained with.

    Raises:
        TrainingError: another encoder, or another space.
    """
    facts = read_facts(checkpoint)
    ours = training.encoder.identity_hash
    if facts["encoder"] != ours:
        raise TrainingError(
            f"{checkpoint} was trained with another prompt encoder (its weights, limits or arithmetic "
            f"differ: {facts['encoder'][:12]} there, {ours[:12]} now)"
        )
    check_same_space(training.targets.space, facts, checkpoint)
    return facts

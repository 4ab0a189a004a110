"""A trained generator out of a checkpoint: the weights, a stored average, or one made after training."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from infra.errors import ConfigError
from infra.storage import join
from model.ema import Snapshot, reconstruct
from model.generator import Generator
from model.sampling.config import WEIGHTS
from model.space import Space
from model.training.build import make_generator
from model.training.checkpoint import (
    checkpoint_uri,
    committed_positions,
    find_checkpoint,
    load_state,
    read_facts,
    tensors_in,
)
from model.training.stages import StageConfig, config_class
from model.training.state import from_average, weights_of
from model.training.targets import space_in

__all__ = ["WEIGHTS", "Restored", "check_average", "config_of", "restore_generator"]


@dataclass(frozen=True)
class Restored:
    """A generator on `device`, in eval mode, with the config and the facts that it was trained by."""

    model: Generator
    config: StageConfig
    facts: dict[str, Any]
    uri: str
    space: Space


def config_of(facts: dict[str, Any]) -> StageConfig:
    return config_class(facts["stage"]).model_validate(facts["config"])


def check_average(uri: str, ema: str) -> None:
    """Refuse an average that the checkpoint neither holds nor lets us reconstruct.

    Raises:
        ConfigError: names the averages that there are.
    """
    facts = read_facts(uri)
    if ema == WEIGHTS or ema in facts["emas"] or (_width(ema) is not None and _snapshots(uri)):
        return
    legal = [WEIGHTS, *facts["emas"], "power-<sigma_rel> (reconstructed from stored power averages)"]
    raise ConfigError(f"ema {ema!r} of {uri}", legal=", ".join(legal))


def restore_generator(run: str, *, ema: str = WEIGHTS, device: torch.device) -> Restored:
    """Load the generator of a run (its latest checkpoint) or of one checkpoint.

    Args:
        run: folder of a run, or one of its checkpoints.
        ema: `weights`, a stored average by name, or `power-<sigma_rel>` of another width.
        device: where it goes.
    """
    uri = find_checkpoint(run)
    facts = read_facts(uri)
    check_average(uri, ema)
    config = config_of(facts)
    space = space_in(facts)
    model = make_generator(config, facts["token_dim"], space)
    stored = ema == WEIGHTS or ema in facts["emas"]
    load_state(uri, from_average(model, None if ema == WEIGHTS or not stored else ema))
    if not stored:
        _load_reconstructed(model, uri, _width(ema) or 0.0, facts["position"])
    return Restored(model.to(device).eval(), config, facts, uri, space)


def _width(ema: str) -> float | None:
    try:
        return float(ema.removeprefix("power-")) if ema.startswith("power-") else None
    except ValueError:
        return None


def _snapshots(uri: str) -> list[tuple[str, str, Snapshot]]:
    """(checkpoint, name, snapshot) of every stored power average up to `uri`, oldest first."""
    run, _, last = uri.rpartition("/checkpoints/samples-")
    found = []
    for position in committed_positions(run) if run else []:
        if 0 < position <= int(last):
            place = checkpoint_uri(run, position)
            for name, profile in read_facts(place)["emas"].items():
                if "sigma_rel" in profile:
                    found.append((place, name, Snapshot(position, profile["sigma_rel"])))
    return found


def _load_reconstructed(model: Generator, uri: str, sigma_rel: float, position: int) -> None:
    """Post-hoc EMA (EDM2, section 3.2): mix the stored averages into one of another width."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    stored: list[tuple[Snapshot, dict[str, Tensor]]] = []
    for place, profile, snapshot in _snapshots(uri):
        tensors = {f"ema.{profile}.{name}": torch.zeros_like(p) for name, p in named.items()}
        load_state(place, tensors)
        prefix = f"ema.{profile}."
        stored.append((snapshot, {k.removeprefix(prefix): v for k, v in tensors.items()}))
    mixed = reconstruct(stored, position, sigma_rel)
    with torch.no_grad():
        for name, p in named.items():
            p.copy_(mixed[name])


def weights_in(uri: str) -> int:
    """Parameters and buffers that the checkpoint's model holds."""
    return sum(s.numel() for name, s in tensors_in(uri).items() if name.startswith("model."))


def run_of(uri: str) -> str:
    """The run's folder of a checkpoint (or the checkpoint's own when it was moved)."""
    return uri.rpartition("/checkpoints/")[0] or join(uri)


def named_weights(model: Generator) -> dict[str, Tensor]:
    """Parameters and buffers by plain name, on the CPU, contiguous."""
    return {
        name.removeprefix("model."): value.detach().cpu().contiguous()
        for name, value in weights_of(model).items()
    }

"""State of a training run as one flat dictionary of named tensors, and its restoration.

    model.<parameter>  optim.<parameter>.<moment>  ema.<average>.<parameter>  rng

Tensors are shared with the run, so loading into them *is* restoring. The learning rate is a function
of the position and the data order of (seed, position): neither needs to be stored.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from infra.errors import ConfigError, TrainingError
from infra.run_folder import split_checkpoint
from model.backbones.folder import base_sha256
from model.ema import Ema, Snapshot, reconstruct
from model.generator import Generator, start_upsampler
from model.space import Space
from model.training.build import describe_space, make_generator, space_in
from model.training.checkpoint import find_checkpoint, load_state, read_facts
from model.training.config import WEIGHTS, StageConfig, config_of
from model.training.parallel import plain_name


def state_of(model: nn.Module, optimizer: Optimizer, emas: dict[str, Ema]) -> dict[str, Tensor]:
    """The run's tensors by name."""
    state = weights_of(model)
    for name, p in model.named_parameters():
        for key, value in optimizer.state.get(p, {}).items():
            state[f"optim.{plain_name(name)}.{key}"] = value
    for average, ema in emas.items():
        for name, value in ema.weights.items():
            state[f"ema.{average}.{plain_name(name)}"] = value
    state["rng"] = torch.get_rng_state()
    return state


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """`model.<name>` -> parameter or buffer; what is frozen is the base's, and is read from there."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    kept = ((name, value) for name, value in model.state_dict().items() if name not in frozen)
    return {f"model.{plain_name(name)}": value for name, value in kept}


def from_average(model: nn.Module, ema: str | None) -> dict[str, Tensor]:
    """The same tensors under the names that they have in a checkpoint's EMA; None = the weights."""
    weights = weights_of(model)
    if ema is None:
        return weights
    trained = {f"model.{plain_name(name)}" for name, p in model.named_parameters() if p.requires_grad}
    return {
        (f"ema.{ema}.{name.removeprefix('model.')}" if name in trained else name): value
        for name, value in weights.items()
    }


def hash_tensors(tensors: dict[str, Tensor]) -> str:
    """Hex sha256 over names and bytes; a collective where tensors are sharded."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        whole: Any = value.full_tensor() if isinstance(value, DTensor) else value
        flat = whole.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name} {flat.dtype} {list(value.shape)}".encode())
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def facts_for(checkpoint: str, encoder: str, space: Space, *, base: str | None = None) -> dict[str, Any]:
    """A checkpoint's facts, if it was trained with this prompt encoder in this space, on this base (hashes).

    Raises:
        TrainingError: another encoder, space or base.
    """
    facts = read_facts(checkpoint)
    if facts["encoder"] != encoder:
        raise TrainingError(
            f"{checkpoint} was trained with another prompt encoder (its weights, limits or arithmetic "
            f"differ: {facts['encoder'][:12]} there, {encoder[:12]} now)"
        )
    if space_in(facts) != space:
        there, here = describe_space(space_in(facts)), describe_space(space)
        raise TrainingError(f"{checkpoint} was trained in {there}, this run works in {here}")
    check_base(checkpoint, facts, base)
    return facts


def check_base(checkpoint: str, facts: dict[str, Any], base: str | None) -> None:
    """Refuse adapters of another base model.

    Raises:
        TrainingError: its weights differ.
    """
    if facts.get("base") != base:
        there, here = (str(each)[:12] for each in (facts.get("base"), base))
        raise TrainingError(
            f"{checkpoint} was trained on a base model of other weights ({there} there, {here} now); cure: put "
            "the trained one back in its place"
        )


def trained_by(run: str, *, own: StageConfig | None = None) -> tuple[str, StageConfig]:
    """A run's latest checkpoint (or the one that is named), and the config that it was trained by.

    `own` as in `config_of`.
    """
    uri = find_checkpoint(run)
    return uri, config_of(read_facts(uri), uri, own=own)


def start_from_base(generator: Generator, config: StageConfig, base: str) -> list[str]:
    """Copy a base model's weights into a fresh upsampler (Snap Video: "initialised from base").

    Returns:
        Names of the tensors that have no counterpart and keep their own start.

    Raises:
        ConfigError: the base model works on another number of channels, or isn't there.
    """
    restored = restore_generator(base, device=torch.device("cpu"), own=config).model
    mine, theirs = generator.backbone_config, restored.backbone_config
    if (mine.out_channels, type(mine)) != (theirs.out_channels, type(theirs)):
        raise ConfigError(
            f"{base} makes {theirs.out_channels} channels by a {type(theirs).__name__}",
            legal=f"a base model of {mine.out_channels} channels and a {type(mine).__name__}",
        )
    return start_upsampler(generator, restored)


@dataclass(frozen=True)
class Restored:
    """A trained generator on `device`, in eval mode, with the config and the facts that it was trained by."""

    model: Generator
    config: StageConfig
    facts: dict[str, Any]
    uri: str

    @property
    def space(self) -> Space:
        return space_in(self.facts)


def restore_generator(
    run: str, *, ema: str = WEIGHTS, device: torch.device, own: StageConfig | None = None
) -> Restored:
    """Load the generator of a run (its latest checkpoint) or of one checkpoint.

    `ema` is `weights`, a stored average by name, or `power-<sigma_rel>` of another width; `own` as in
    `config_of`.
    """
    uri = find_checkpoint(run)
    check_average(uri, ema)
    facts = read_facts(uri)
    config = config_of(facts, uri, own=own)
    check_base(uri, facts, None if config.pretrained is None else base_sha256(config.pretrained.model))
    model = make_generator(config, facts["token_dim"], space_in(facts))
    stored = ema == WEIGHTS or ema in facts["emas"]
    load_state(uri, from_average(model, None if ema == WEIGHTS or not stored else ema))
    if not stored:
        _load_reconstructed(model, uri, _width(ema) or 0.0, facts["position"])
    return Restored(model.to(device).eval(), config, facts, uri)


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


def _width(ema: str) -> float | None:
    try:
        return float(ema.removeprefix("power-")) if ema.startswith("power-") else None
    except ValueError:
        return None


def _snapshots(uri: str) -> list[tuple[str, str, Snapshot]]:
    """(checkpoint, name, snapshot) of every stored power average up to `uri`, oldest first."""
    found, here = [], split_checkpoint(uri)
    for position in here[0].positions() if here else []:
        if here and 0 < position <= here[1]:
            place = here[0].checkpoint(position)
            for name, profile in read_facts(place)["emas"].items():
                if "sigma_rel" in profile:
                    found.append((place, name, Snapshot(position, profile["sigma_rel"])))
    return found


def _load_reconstructed(model: Generator, uri: str, sigma_rel: float, position: int) -> None:
    """Post-hoc EMA (EDM2, section 3.2): mix the stored averages into one of another width."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    stored: list[tuple[Snapshot, dict[str, Tensor]]] = []
    for place, average, snapshot in _snapshots(uri):
        prefix = f"ema.{average}."
        tensors = {prefix + name: torch.zeros_like(p) for name, p in named.items()}
        load_state(place, tensors)
        stored.append((snapshot, {k.removeprefix(prefix): v for k, v in tensors.items()}))
    mixed = reconstruct(stored, position, sigma_rel)
    with torch.no_grad():
        for name, p in named.items():
            p.copy_(mixed[name])

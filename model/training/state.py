"""All of a training run that a checkpoint holds, as one flat dictionary of named tensors.

    model.<parameter>  optim.<parameter>.<moment>  ema.<profile>.<parameter>  rng

Tensors are shared with the run, so loading into them *is* restoring. The learning rate is a function
of the position and the data order of (seed, position): neither needs to be stored.
"""

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from model.ema import Ema, HalfLife, PowerFunction, Profile
from model.muon import muon
from model.optim import GroupOptimizer, adam_moments, adamw, cosine_factor, lamb
from model.training.parallel import plain_name
from model.training.stages import EmaConfig, StageConfig

MAKERS = {"lamb": lamb, "adamw": adamw, "muon": muon}


def make_optimizer(model: nn.Module, config: StageConfig) -> Optimizer:
    """The configured optimizer with its moments in place (zero), so that a checkpoint can fill them."""
    options = config.optim
    optimizer = MAKERS[options.name](
        model, lr=options.lr, betas=options.betas, weight_decay=options.weight_decay
    )
    for group in optimizer.param_groups:
        for p in group["params"]:
            if isinstance(optimizer, GroupOptimizer):
                optimizer.moments(p, group)
            else:
                optimizer.state[p] = adam_moments(p, p.device)  # torch's AdamW has no such door
    return optimizer


def set_learning_rate(optimizer: Optimizer, config: StageConfig, position: int) -> float:
    """Cosine with warm-up, as a function of the samples seen; the rate of the next step."""
    warmup = min(config.optim.warmup_samples, config.total_samples // 10) // config.batch_size
    step = position // config.batch_size
    rate = config.optim.lr * cosine_factor(step, warmup, config.num_steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def ema_profiles(config: EmaConfig, total_samples: int) -> dict[str, Profile]:
    """Name in the checkpoint -> profile."""
    profiles: dict[str, Profile] = {}
    for samples in config.half_life_samples:
        profiles[f"half-life-{samples}"] = HalfLife(min(samples, max(1, total_samples // 10)))
    for width in config.sigma_rel:
        profiles[f"power-{width:g}"] = PowerFunction(width)
    return profiles


def make_emas(model: nn.Module, config: StageConfig) -> dict[str, Ema]:
    profiles = ema_profiles(config.ema, config.total_samples)
    return {name: Ema(model, profile) for name, profile in profiles.items()}


def state_of(model: nn.Module, optimizer: Optimizer, emas: dict[str, Ema]) -> dict[str, Tensor]:
    """The run's tensors by name."""
    state = weights_of(model)
    for name, p in model.named_parameters():
        for key, value in optimizer.state.get(p, {}).items():
            state[f"optim.{plain_name(name)}.{key}"] = value
    for profile, ema in emas.items():
        for name, value in ema.weights.items():
            state[f"ema.{profile}.{plain_name(name)}"] = value
    state["rng"] = torch.get_rng_state()
    return state


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """`model.<name>` -> parameter or buffer."""
    return {f"model.{plain_name(name)}": value for name, value in model.state_dict().items()}


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

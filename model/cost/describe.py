"""A generator on one page: parameters, tokens, FLOPs by part, and memory, without building it."""

from typing import Any

from model.condition import ConditionConfig
from model.cost.flops import count_parameters, forward_flops, sizes, training_flops
from model.cost.memory import activation_bytes
from model.edm import sigma_in
from model.fit_layout import FitConfig
from model.generator import BackboneConfig, preset


def describe(
    name: str,
    *,
    condition: ConditionConfig | None = None,
    prompt_tokens: int = 128,
    num_references: int = 0,
    batch: int = 1,
    half: bool = True,
    self_condition_rate: float = 0.9,
    **changes: Any,
) -> dict[str, Any]:
    """What a preset is and costs.

    Args:
        name: of the preset.
        condition: shapes of the condition; defaults to tokens of width 1,024 (T5-11B's).
        prompt_tokens: tokens of one prompt; the default is this project's guess at a caption with
            one retrieved document.
        num_references: reference pictures of 64 px read in `plus` mode.
        batch: samples per device, for the memory.
        half: train in bf16 autocast.
        self_condition_rate: 0 leaves the first pass out.
        changes: fields of the preset to change, as `num_frames=8`.

    Raises:
        ValueError: no such preset or field.
    """
    backbone, condition = preset(name, **changes), condition or ConditionConfig()
    n = sizes(backbone, condition, prompt_tokens=prompt_tokens, num_references=num_references)
    params = count_parameters(backbone, condition)
    forward = forward_flops(backbone, condition, n, prompt_tokens=prompt_tokens)
    training = training_flops(
        backbone, condition, n, prompt_tokens=prompt_tokens,
        self_condition_rate=self_condition_rate,
    )  # fmt: skip
    memory = {
        key: activation_bytes(
            backbone, n, batch=batch, half=half, checkpoint=key == "checkpointed",
            num_parameters=params["total"],
        )
        for key in ("stored", "checkpointed")
    }  # fmt: skip
    return {
        "preset": name,
        "video": [backbone.num_frames, backbone.height_px, backbone.width_px],
        "sigma_in": sigma_in(backbone.num_frames, backbone.height_px, backbone.width_px),
        "parameters": params,
        "tokens": {"patches": n.patches, "latents": n.latents, "condition": n.tokens}
        | _groups(backbone, n.patches),
        "forward_flops": {**forward, "total": sum(forward.values())},
        "training_flops": {**training, "total": sum(training.values())},
        "batch": batch,
        "precision": "bf16 autocast" if half else "fp32",
        "activation_bytes": memory,
        "state_bytes": _state_bytes(params["total"]),
    }


def _groups(backbone: BackboneConfig, patches: int) -> dict[str, int]:
    if not isinstance(backbone, FitConfig):
        return {}
    a = backbone.layout
    return {
        "groups": a.num_groups,
        "patches per group": patches // a.num_groups,
        "latents per group": a.latents_per_group,
    }


def _state_bytes(parameters: int) -> dict[str, int]:
    """Memory that does not depend on the batch, in float32, over all shards together."""
    each = 4 * parameters
    return {"weights": each, "gradients": each, "optimizer (2 moments)": 2 * each, "each EMA": each}


def render(d: dict[str, Any]) -> str:
    """The page, as text for a terminal."""
    frames, height, width = d["video"]
    lines = [
        f"{d['preset']}: {frames} frames of {height} x {width}, sigma_in {d['sigma_in']:g}",
        *_section("parameters", {k: _scaled(v) for k, v in d["parameters"].items()}),
        *_section("tokens of a sample", {k: f"{v:,}" for k, v in d["tokens"].items()}),
        *_section("FLOPs of a forward pass", _shares(d["forward_flops"])),
        *_section("FLOPs of a training sample", _shares(d["training_flops"])),
        *_section(
            f"activations of {d['batch']} sample(s), {d['precision']}",
            {k: _gib(v) for k, v in d["activation_bytes"].items()},
        ),
        *_section("state, over all shards", {k: _gib(v) for k, v in d["state_bytes"].items()}),
    ]
    return "\n".join(lines)


def _section(title: str, rows: dict[str, str]) -> list[str]:
    return ["", title, *(f"  {name:<28}{value:>22}" for name, value in rows.items())]


def _shares(parts: dict[str, int]) -> dict[str, str]:
    total = parts["total"]
    return {k: f"{_scaled(v)} {v / total:>7.1%}" for k, v in parts.items()}


def _scaled(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3f} {unit}"
    return f"{value:g}"


def _gib(value: int) -> str:
    return f"{value / 2**30:.2f} GiB"

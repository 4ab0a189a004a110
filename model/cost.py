"""Parameters, FLOPs and activation memory of a generator, counted on the meta device.

Two FLOPs per multiply-add of matrix products and of attention, by torch's counter; elementwise work is
not counted. Activations are the tensors that autograd saves, and attention is assumed to be fused (flash or
memory-efficient), so that no map of queries by keys is stored. All of it works for any backbone.
"""

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.backbones.base import BackboneConfig
from model.backbones.presets import preset
from model.condition import NUM_SCALARS, Condition, ConditionConfig
from model.edm import sigma_in
from model.generator import Generator, SmallVideo, build_generator


def on_meta(backbone: BackboneConfig, condition: ConditionConfig) -> Generator:
    """The network without its numbers, so that none is too large."""
    with torch.device("meta"):
        return build_generator(backbone, condition)


def count_parameters(backbone: BackboneConfig, condition: ConditionConfig) -> dict[str, int]:
    """Parameters of the embedder, the backbone and both."""
    model = on_meta(backbone, condition)
    total = sum(p.numel() for p in model.parameters())
    inner = sum(p.numel() for p in model.backbone.parameters())
    return {"condition embedder": total - inner, "backbone": inner, "total": total}


References = tuple[int, int, int]
"""(n, h, w) of the pictures that a sample shows the generator itself, in pixels or latents; n = 0: none."""
NO_REFERENCES: References = (0, 0, 0)


def blank_inputs(
    model: Generator,
    *,
    batch: int,
    prompt_tokens: int,
    shape: tuple[int, int, int] | None = None,
    references: References = NO_REFERENCES,
) -> dict[str, Any]:
    """Arguments of `Generator.forward` for videos of `shape` (t, h, w); by default the backbone's own."""
    backbone = model.backbone_config
    t, h, w = shape or (backbone.num_frames, backbone.height_px, backbone.width_px)
    video, level = torch.zeros(batch, t, backbone.out_channels, h, w), torch.ones(batch)
    zeros = torch.zeros(batch, prompt_tokens, dtype=torch.long)
    condition = Condition(
        tokens=torch.zeros(batch, prompt_tokens, model.condition_config.token_dim), mask=zeros == 0,
        role=zeros, segment=zeros, fps=level, original_size_px=torch.ones(batch, 2),
    )  # fmt: skip
    if references[0]:
        n, channels = references[0], model.condition_config.reference_channels
        place = torch.zeros(batch, n, dtype=torch.long)
        pictures = torch.zeros(batch, n, channels, *references[1:])
        condition = replace(
            condition,
            references=pictures,
            reference_mask=place == 0,
            reference_role=place,
            reference_place=place,
        )
    small = SmallVideo(video, level) if model.is_upsampler else None
    return {"x": video, "sigma": level, "condition": condition, "small": small}


def forward_flops(
    backbone: BackboneConfig,
    condition: ConditionConfig,
    *,
    prompt_tokens: int,
    references: References = NO_REFERENCES,
) -> dict[str, int]:
    """FLOPs of one self-conditioned forward pass of a sample, by part.

    A part is a module of a block, in all blocks together, or a module around the blocks.
    """
    model = on_meta(backbone, condition)
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        inputs = blank_inputs(model, batch=1, prompt_tokens=prompt_tokens, references=references)
        z = torch.zeros(1, *model.z_shape) if model.z_shape[0] else None
        with FlopCounterMode(display=False) as counter:
            model(**inputs, z_prev=z)
    parts: dict[str, int] = {}
    for name, counts in counter.get_flop_counts().items():
        part = _part(name)
        if part is not None:
            parts[part] = parts.get(part, 0) + sum(counts.values())
    return parts | {"total": counter.get_total_flops()}


def _part(module: str) -> str | None:
    """`Generator.backbone.blocks.3.think.0` -> `think`; None for modules within those and around them."""
    _, *path = module.split(".")
    if path[:1] == ["backbone"] and path[1:2] in (["blocks"], ["transformer_blocks"]):
        inner = [word for word in path[3:] if not word.isdigit()]
        return inner[0] if len(inner) == 1 else None
    if path[:1] == ["backbone"]:
        return path[1] if len(path) == 2 else None
    return path[0] if len(path) == 1 else None


@cache
def training_flops(
    backbone: BackboneConfig,
    condition: ConditionConfig,
    *,
    prompt_tokens: int,
    shape: tuple[int, int, int] | None = None,
    references: References = NO_REFERENCES,
    self_condition_rate: float = 0.9,
) -> dict[str, int]:
    """FLOPs of one training step of one sample, without recomputation.

    The first pass of self-conditioning runs for the whole batch if its rate is not zero, and ends with the
    latents. What nobody trains has no gradient to be counted: the noisy video, the encoder's tokens, the
    scalars, and the latents of the first pass.

    `shape` is (t, h, w) of the video, by default the backbone's own.
    """
    model = on_meta(replace(backbone, checkpoint=False), condition)
    has_first = model.z_shape[0] > 0 and self_condition_rate > 0
    counters = [FlopCounterMode(display=False) for _ in range(3)]
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH):
        sizes = {"prompt_tokens": prompt_tokens, "shape": shape, "references": references}
        inputs, z = blank_inputs(model, batch=1, **sizes), None
        with counters[0], torch.no_grad():
            if has_first:
                _, z = model(**inputs, latents_only=True)
        with counters[1]:
            answer, _ = model(**inputs, z_prev=z)
        with counters[2]:
            answer.sum().backward()
    first, forward, backward = (counter.get_total_flops() for counter in counters)
    return {
        "first pass": first,
        "forward": forward,
        "backward": backward,
        "total": first + forward + backward,
    }


def activation_bytes(
    backbone: BackboneConfig,
    condition: ConditionConfig,
    *,
    batch: int,
    prompt_tokens: int,
    references: References = NO_REFERENCES,
    half: bool,
) -> dict[str, int]:
    """Bytes of a batch's activations between forward and backward: all `stored`, or `checkpointed`.

    Checkpointed, each block keeps its inputs, and one block at a time is computed again.

    `half`: autocast to a 16-bit type; its copies of the weights count. What is frozen is kept in that type.
    """
    model = on_meta(replace(backbone, checkpoint=False), condition)
    for p in model.parameters():
        if half and not p.requires_grad:
            p.data = p.data.to(torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        inputs = blank_inputs(model, batch=batch, prompt_tokens=prompt_tokens, references=references)
        z = torch.zeros(batch, *model.z_shape) if model.z_shape[0] else None
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            around, blocks, their_inputs = _saved_bytes(model, {**inputs, "z_prev": z})
    return {"stored": around + blocks, "checkpointed": around + their_inputs + blocks // len(model.blocks)}


def _saved_bytes(model: Generator, inputs: dict[str, Any]) -> tuple[int, int, int]:
    """Bytes that autograd saves in a forward pass: around the blocks and in them; and those of their inputs."""
    counted = {"around": 0, "blocks": 0, "inputs": 0}
    place = "around"
    saved = {p.untyped_storage()._cdata for p in model.parameters()}
    read: set[int] = set()

    def count(tensor: Tensor, name: str, known: set[int]) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            known.add(storage._cdata)
            counted[name] += storage.nbytes()

    def save(tensor: Tensor) -> Tensor:
        count(tensor, place, saved)
        return tensor

    def enter(block: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal place
        place = "blocks"
        for value in args:
            if isinstance(value, Tensor) and value.requires_grad:
                count(value, "inputs", read)

    def leave(*_: Any) -> None:
        nonlocal place
        place = "around"

    for block in model.blocks:
        block.register_forward_pre_hook(enter)
        block.register_forward_hook(leave)
    with saved_tensors_hooks(save, lambda tensor: tensor):
        _answer = model(**inputs)  # holds what was saved, so that no two storages share an address
    return counted["around"], counted["blocks"], counted["inputs"]


def describe(
    name: str,
    *,
    prompt_tokens: int = 128,
    batch: int = 1,
    references: References = NO_REFERENCES,
    reference_patch: int = 16,
    **changes: Any,
) -> dict[str, Any]:
    """What a preset is and costs, in bf16 autocast and behind an encoder of width 1,024 (T5-11B's).

    `prompt_tokens` is this project's guess at a caption with one retrieved document; `references` are pictures
    that a sample shows the generator itself, in patches of `reference_patch`; `changes` are fields of the
    preset, as `num_frames=8`.

    Raises:
        ValueError: no such preset or field.
    """
    mode, count = "plus" if references[0] else "faithful", references[0]
    backbone = preset(name, **changes)
    condition = ConditionConfig(
        mode=mode, reference_channels=backbone.out_channels, reference_patch=reference_patch
    )
    params = count_parameters(backbone, condition)
    each = 4 * params["total"]
    seen = count * (references[1] // reference_patch) * (references[2] // reference_patch)
    tokens = {"prompt": prompt_tokens} | ({f"{count} reference(s)": seen} if count else {})
    sizes: dict[str, Any] = {"prompt_tokens": prompt_tokens, "references": references}
    return {
        "preset": name,
        "video": [backbone.num_frames, backbone.height_px, backbone.width_px],
        "sigma_in": sigma_in(backbone.num_frames, backbone.height_px, backbone.width_px),
        "parameters": params,
        "tokens": {
            **backbone.tokens(),
            **tokens,
            "condition": NUM_SCALARS + sum(tokens.values()) + backbone.is_upsampler,
        },
        "forward_flops": forward_flops(backbone, condition, **sizes),
        "training_flops": training_flops(backbone, condition, **sizes),
        "batch": batch,
        "activation_bytes": activation_bytes(backbone, condition, batch=batch, half=True, **sizes),
        # float32, whatever the batch
        "state_bytes": {
            "weights": each, "gradients": each, "optimizer (2 moments)": 2 * each, "each EMA": each,
        },
    }  # fmt: skip


def render(d: dict[str, Any]) -> str:
    """The page, as text for a terminal."""
    frames, height, width = d["video"]
    lines = [
        f"{d['preset']}: {frames} frames of {height} x {width}, sigma_in {d['sigma_in']:g}",
        *section("parameters", {k: scaled(v) for k, v in d["parameters"].items()}),
        *section("tokens of a sample", {k: f"{v:,}" for k, v in d["tokens"].items()}),
        *section("FLOPs of a forward pass", _shares(d["forward_flops"])),
        *section("FLOPs of a training sample", _shares(d["training_flops"])),
        *section(
            f"activations of {d['batch']} sample(s), bf16 autocast",
            {k: gib(v) for k, v in d["activation_bytes"].items()},
        ),
        *section("state, over all shards", {k: gib(v) for k, v in d["state_bytes"].items()}),
    ]
    return "\n".join(lines)


def section(title: str, rows: dict[str, str]) -> list[str]:
    return ["", title, *(f"  {name:<28}{value:>22}" for name, value in rows.items())]


def _shares(parts: dict[str, int]) -> dict[str, str]:
    total = parts["total"]
    return {k: f"{scaled(v)} {v / total:>7.1%}" for k, v in parts.items()}


def scaled(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3f} {unit}"
    return f"{value:g}"


def gib(value: int) -> str:
    return f"{value / 2**30:.2f} GiB"

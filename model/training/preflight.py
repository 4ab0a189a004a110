"""The trainer's preflight: everything that can be refused before Ray starts, each in one line."""

import hashlib
import importlib.util
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from infra.certificate import read_sealed, write_sealed
from infra.errors import ConfigError, DataError
from infra.run_folder import RunFolder
from infra.storage import read_bytes, write_bytes
from model.backbones.folder import base_sha256, check_weights, read_base
from model.backbones.presets import PRESETS, preset
from model.cost import on_meta
from model.data.buckets import VALIDATION
from model.data.shards import Shards, index_shards, open_parquet, open_shards
from model.edm import sigma_in
from model.encodings.make import check_encodings
from model.encodings.store import open_encodings
from model.evaluate.networks import NetworkConfig
from model.evaluate.scores import Given, chosen, obstacles
from model.prompt.load import check_prompt_encoder
from model.space import Space
from model.training.build import (
    backbone_of,
    condition_config,
    make_plan,
    measure_space,
    objective_of,
    reference_shape,
)
from model.training.checkpoint import checkpoint_hash, find_checkpoint, read_facts
from model.training.config import Stage2Config, StageConfig, config_of
from model.training.metrics import TRACKERS
from model.training.pretrained import check_pretrained
from model.training.state import trained_by

DEPTHS = ("num_blocks", "layers_per_block")
"""Fields of a backbone that multiply its layers."""


@dataclass(frozen=True)
class Ready:
    """What the preflight found: the shards, the targets' space, the checkpoint that stage 2 starts from, the
    hash of a pretrained base, and what is legal but seldom meant.
    """

    shards: Shards
    space: Space
    start_from: str | None
    base: str | None = None
    note: str | None = None

    @property
    def inputs(self) -> dict[str, str]:
        found = {"prompts": self.shards.certificate.content_hash()}
        if self.base is not None:
            found["base"] = self.base
        if self.start_from is not None:
            found["start_from"] = checkpoint_hash(self.start_from)
        return found


def inspect(config: StageConfig, *, reach: bool = True) -> Ready:
    """Look at every input without Ray.

    `reach` False: the hub is not asked for the prompt encoder, and of a pretrained base and its autoencoder the
    configs are read alone, so that neither weights are fetched nor hashed.

    Raises:
        ConfigError: one line: what is wrong, what is legal, how to cure it.
    """
    shards = open_shards(config.prompts)
    if shards.certificate.job == "benchmark":
        raise ConfigError(
            f"{config.prompts} holds the prompts of a benchmark",
            legal="the output of `vimi-data augment` or `vimi-data instruct`",
            cure="train on other prompts, made with guard.exclude set to its exclude.jsonl",
        )
    encodings = open_encodings(config.encodings)
    if encodings is not None:
        if config.augment_references:
            raise ConfigError(
                "augment_references draws new pictures for each sample, which encodings made beforehand lack",
                legal="encodings, or augment_references",
                cure="--set augment_references=false",
            )
        check_encodings(config, encodings, shards)
    else:
        check_prompt_encoder(config.encoder, reach=reach)
    if config.pretrained is not None:
        read_base(config.pretrained.model)  # before its autoencoder is asked for
    space = measure_space(config, encodings, reach=reach)
    check_backbone(config, space)
    if config.upsampler is not None and config.upsampler.start_from is not None:
        trained_by(config.upsampler.start_from, own=config)
    check_trackers(config.trackers)
    # Pictures of subjects come with stage 2's tasks; augment's prompts have none.
    check_metrics(config, has_references=shards.certificate.job != "augment")
    check_workers(config, config.num_workers or 1, len(shards.groups))
    start_from = None
    if isinstance(config, Stage2Config):
        start_from = find_checkpoint(config.start_from)
        check_same_model(config, start_from)
        if config.stage1_prompts is not None:
            open_shards(config.stage1_prompts)
    note = check_targets(config, shards)
    base = base_sha256(config.pretrained.model) if config.pretrained is not None and reach else None
    return Ready(shards, space, start_from, base, note)


def check_backbone(config: StageConfig, space: Space) -> None:
    if config.pretrained is not None:
        check_weights(read_base(config.pretrained.model))
        backbone = check_pretrained(config, config.pretrained, space)
        size = (backbone.num_frames, backbone.out_channels, backbone.height_px, backbone.width_px)
        objective_of(config, size)
        return
    if config.preset not in PRESETS and ":" not in config.preset:
        raise ConfigError(f"preset {config.preset!r}", legal=", ".join(PRESETS))
    try:
        named = preset(config.preset)
        for name, value in dict(config.backbone).items():
            check_size(name, value, getattr(named, name, None))
        backbone = backbone_of(config, space)
        with torch.device("meta"):
            backbone.build()
    except ConfigError:
        raise
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:
        raise ConfigError(
            f"backbone: {config.backbone}: {error}", legal="sizes that a network can have"
        ) from None
    for bucket in config.shapes:
        if bucket.num_frames > config.num_frames:
            raise ConfigError(
                f"bucket of {bucket.num_frames} frames", legal=f"at most num_frames {config.num_frames}"
            )


def check_size(name: str, value: Any, default: Any) -> None:
    """Refuse numbers that would build nothing, or without end; what else is legal the backbone knows.

    Raises:
        ConfigError: a count below 1 or beyond any network's, a share outside of [0, 1].
    """
    if isinstance(default, bool) or not isinstance(default, int | float):
        return
    most = 128 if name in DEPTHS else 65536
    if isinstance(default, float):
        if not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ConfigError(f"backbone.{name} = {value!r}", legal="a share in [0, 1]")
    elif not isinstance(value, int) or not 1 <= value <= most:
        raise ConfigError(f"backbone.{name} = {value!r}", legal=f"a whole number from 1 to {most}")


def check_workers(config: StageConfig, workers: int | tuple[int, int], num_groups: int) -> None:
    """Refuse batches that don't divide, and workers that would have nothing to read."""
    most = workers if isinstance(workers, int) else workers[1]
    if isinstance(workers, int) and config.batch_size % (workers * config.accumulation):
        raise ConfigError(
            f"batch_size {config.batch_size} is not divisible by {workers} workers x accumulation "
            f"{config.accumulation}",
            legal=f"a multiple of {workers * config.accumulation}",
            cure="change batch_size, accumulation or num_workers",
        )
    if config.micro_batch < most:
        raise ConfigError(
            f"{most} workers, but a micro-batch of {config.micro_batch} samples (batch_size / accumulation)",
            legal=f"at most {config.micro_batch} workers",
            cure="change batch_size, accumulation or num_workers",
        )
    if most > num_groups:
        raise ConfigError(
            f"{most} workers, but {config.prompts} has {num_groups} row groups",
            legal=f"at most {num_groups} workers",
            cure="fewer workers, or make the shards with smaller row groups",
        )
    if config.parallel.mode == "hsdp" and isinstance(workers, tuple):
        raise ConfigError(
            f"parallel.mode hsdp with num_workers {list(workers)}",
            legal="hybrid sharding needs a fixed number of workers",
        )


def check_metrics(config: StageConfig, *, has_references: bool) -> None:
    """Refuse metrics that this run's videos can't have, or whose weights are missing.

    Raises:
        ConfigError: says which and why.
    """
    validation, n = config.validation, config.validation.metrics_videos
    shortest = min((b.num_frames for b in config.shapes if b.media == "video"), default=config.num_frames)
    given = Given(
        n=n,
        n_real=n,
        has_text=True,
        has_references=has_references,
        has_words=False,
        num_frames=shortest,
    )
    for name, why in obstacles(chosen(validation.metrics), given, NetworkConfig(**validation.networks)).items():
        raise ConfigError(f"validation.metrics {name}: {why}")


def check_trackers(names: tuple[str, ...]) -> None:
    """Refuse a tracker that is not installed, before a worker stumbles over it."""
    for name in names:
        package = TRACKERS[name.partition(":")[0]].package
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"tracker {name!r}, but the package {package} is not installed",
                cure=f"pip install -e '.[{package}]', or leave it out: metrics.jsonl is always there",
            )


SIZES = [
    *("media", "height_px", "width_px"),
    *("target.kind", "target.num_frames", "target.height_px", "target.width_px"),
]
LEAST_SHARE = 0.5
"""Of the size that a base model makes, what stored frames must have along each side. Ours: between that and the
whole they are enlarged, with a note."""


def check_targets(config: StageConfig, shards: Shards) -> str | None:
    """Refuse shards whose targets are much smaller than the videos to be made, and note those that are a little
    smaller, or shorter.

    `frames` targets have one size for all rows; `video` and `reference` targets are as large as their
    source, so that a corpus may hold some small ones. The first row group speaks for all.

    Returns:
        What to note; None where they are as large and as long as wanted.

    Raises:
        ConfigError: for an upsampler none is as large as its output; else all are frames of less than half of
            the size.
    """
    group = shards.groups[0]
    rows = open_parquet(group.uri).read_row_group(group.index, columns=SIZES).to_pylist()
    smallest = min(config.shapes, key=lambda bucket: bucket.height_px * bucket.width_px)
    wanted, stored = (smallest.height_px, smallest.width_px), {_size(row) for row in rows}
    if any(height >= wanted[0] and width >= wanted[1] for height, width in stored):
        return _shortness(config, rows)
    kinds = {row["target"]["kind"] for row in rows}
    largest = max(stored, key=lambda size: size[0] * size[1])
    share = min(largest[0] / wanted[0], largest[1] / wanted[1])
    learner = "generator" if config.upsampler is None else "upsampler"
    found = (
        f"{config.prompts} holds {' and '.join(sorted(kinds))} of at most {largest[0]} x {largest[1]} pixels "
        f"(height x width), the {learner} learns to make {wanted[0]} x {wanted[1]}"
    )
    if config.upsampler is None and (kinds != {"frames"} or share >= LEAST_SHARE):
        return f"{found}: they are enlarged"
    raise ConfigError(
        found,
        legal="targets at least that large",
        cure="make them again with vimi-data augment --set target.kind=video (or reference, or a larger "
        f"target.height_px and width_px), from sources of at least {wanted[0]} x {wanted[1]}",
    )


def _shortness(config: StageConfig, rows: list[dict[str, Any]]) -> str | None:
    """A note on stored videos of fewer frames than any bucket for videos has."""
    wanted = min((bucket.num_frames for bucket in config.shapes if bucket.media == "video"), default=0)
    targets = [row["target"] for row in rows if row["media"] == "video"]
    stored = [target["num_frames"] for target in targets if target["kind"] == "frames"]
    if not stored or max(stored) >= wanted:
        return None
    return (
        f"{config.prompts} holds videos of {max(stored)} frames, the generator learns to make {wanted}: some "
        "are shown twice; cure: make them again with vimi-data augment --set "
        f"target.num_frames={wanted} (or target.kind=video)"
    )


def _size(row: dict[str, Any]) -> tuple[int, int]:
    """(height, width) in pixels of what a row's target can give."""
    target = row["target"]
    return target["height_px"] or row["height_px"] or 0, target["width_px"] or row["width_px"] or 0


SAME = (
    "preset",
    "num_frames",
    "height_px",
    "width_px",
    "backbone",
    "references",
    "reference_patch_px",
    "sigma_data",
    "small_size_px",
    "autoencoder",
)


def check_same_model(config: Stage2Config, start_from: str) -> None:
    """Refuse to finetune a checkpoint of another network, autoencoder or prompt encoder; names the fields."""
    facts = read_facts(start_from)
    trained = config_of(facts, start_from, own=config)
    differences = [
        f"{name}: {getattr(trained, name)!r} there, {getattr(config, name)!r} now"
        for name in SAME
        if getattr(trained, name) != getattr(config, name)
    ]
    there, here = trained.encoder.identity(), config.encoder.identity()
    differences += [
        f"encoder.{k}: {there.get(k)!r} there, {here[k]!r} now" for k in here if there.get(k) != here[k]
    ]
    if differences:
        raise ConfigError(
            f"{start_from} is another model ({'; '.join(differences)})",
            cure="give stage 2 the same values, or another --from",
        )
    if config.start_ema is not None and config.start_ema not in facts["emas"]:
        raise ConfigError(f"start_ema {config.start_ema!r}", legal=", ".join(facts["emas"]) or "null")


def prepare_index(config: StageConfig, shards: Shards) -> pa.Table:
    """The index of the shards' streams, made once a run and kept in its folder.

    Raises:
        ConfigError: the shards hold no row for the buckets, or lack a task of the mixture.
    """
    try:
        index = read_index(config.out)
        if VALIDATION.strip() not in index["task"].unique().to_pylist():
            return index  # else of an earlier version, which did not tell held-out rows' tasks
    except (DataError, FileNotFoundError):
        pass  # none yet, or a damaged one: it is made of the shards alone
    index = index_shards(shards, config.shapes, held_out_frac=config.validation.held_out_frac)
    make_plan(config, index, len(shards.groups))
    write_index(config.out, index)
    return index


def write_index(run: str, index: pa.Table) -> None:
    """Keep the index in a run's folder, with its hash."""
    place, sink = RunFolder(run), pa.BufferOutputStream()
    pq.write_table(index, sink)
    data = sink.getvalue().to_pybytes()
    write_bytes(place.index, data)
    write_sealed(place.index_hash, {"sha256": hashlib.sha256(data).hexdigest()})


def read_index(run: str) -> pa.Table:
    """The index that `prepare_index` left.

    Raises:
        FileNotFoundError: it didn't yet.
        DataError: damaged.
    """
    place = RunFolder(run)
    data = read_bytes(place.index)
    if hashlib.sha256(data).hexdigest() != read_sealed(place.index_hash).get("sha256"):
        raise DataError(f"{place.index} is damaged; cure: the same command of the run makes it again")
    return pq.read_table(pa.BufferReader(data))


def plan_text(config: StageConfig, ready: Ready) -> str:
    """What --dry-run prints: the sizes that follow from the config."""
    backbone = backbone_of(config, ready.space)
    condition = condition_config(config, 1024, ready.space)
    model = on_meta(backbone, condition)
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    named = config.preset if config.pretrained is None else config.pretrained.model
    share = f", {trained:,} of them trained" if trained < parameters else ""
    rows, workers = ready.shards.num_rows, config.num_workers
    on = f"{workers[0]} to {workers[1]}" if isinstance(workers, tuple) else str(workers or "all")
    lines = [
        f"{config.stage}: {parameters:,} parameters{share} ({named}, encoder width 1024 assumed)",
        f"{config.num_steps:,} steps of {config.batch_size} samples in {config.accumulation} micro-batches "
        f"on {on} workers",
        f"{rows:,} prompts in {len(ready.shards.groups):,} row groups: "
        f"{config.total_samples / rows:.2f} epochs",
    ]
    space = f"latents of autoencoder {config.autoencoder}" if ready.space.is_latent else "pixels"
    if config.pretrained is not None:
        lines.append(
            f"{space}: {backbone.num_frames} x {backbone.out_channels} x "
            f"{backbone.height_px} x {backbone.width_px}, flow matching"
        )
    elif ready.space.is_latent or config.upsampler:
        small = f", from {config.small_size_px}" if config.upsampler else ""
        lines.append(
            f"{space}: {backbone.num_frames} x {backbone.out_channels} x "
            f"{backbone.height_px} x {backbone.width_px}, sigma_in "
            f"{sigma_in(backbone.num_frames, backbone.height_px, backbone.width_px):g}{small}"
        )
    if config.references == "plus":
        lines.append(references_text(config, ready.space))
    if ready.start_from:
        lines.append(f"starts from {ready.start_from}")
    if ready.note:
        lines.append(f"note: {ready.note}")
    return "\n".join(lines)


def references_text(config: StageConfig, space: Space) -> str:
    """At what size the generator sees pictures itself, and whether it goes on from a first frame as it is."""
    height, width = config.reference_size_px
    _, rows, columns = reference_shape(config, space)
    side = condition_config(config, 0, space).reference_patch
    goes_on = (
        "" if space.has_first_frame else "; first frames through the encoder alone, as latents hold several"
    )
    return f"references of {height} x {width} px in {(rows // side) * (columns // side)} tokens each{goes_on}"

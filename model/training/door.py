"""The door of the trainer: everything that can be refused before Ray starts, each in one line."""

import hashlib
import importlib.util
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from infra.errors import ConfigError
from infra.storage import absolute, exists, join, read_bytes, write_bytes
from model.data.shards import Shards, index_shards, open_shards
from model.edm import sigma_in
from model.encodings.make import check_encodings
from model.encodings.store import open_encodings
from model.generator import PRESETS
from model.sampling.config import WEIGHTS
from model.space import PIXELS, Space
from model.training.build import backbone_of, make_plan
from model.training.checkpoint import COMMITTED, find_checkpoint, read_facts
from model.training.stages import Stage2Config, StageConfig, config_class
from model.training.state import ema_profiles
from model.training.targets import describe_space, open_space
from model.training.upsampler import check_upsampler


@dataclass(frozen=True)
class Ready:
    """What the door found: the shards, and the checkpoint that stage 2 starts from."""

    shards: Shards
    start_from: str | None
    space: Space = PIXELS

    @property
    def inputs(self) -> dict[str, str]:
        found = {"prompts": self.shards.certificate.content_hash()}
        if self.start_from is not None:
            found["start_from"] = hashlib.sha256(read_bytes(join(self.start_from, COMMITTED))).hexdigest()[:16]
        return found


def resolve(config: StageConfig) -> StageConfig:
    """The same config with absolute places, as every process must see them."""
    places: dict[str, object] = {name: absolute(getattr(config, name)) for name in ("out",)}
    if isinstance(config, Stage2Config):
        places["start_from"] = absolute(config.start_from)
    if config.upsampler is not None and config.upsampler.start_from is not None:
        base = absolute(config.upsampler.start_from)
        places["upsampler"] = config.upsampler.model_copy(update={"start_from": base})
    places["encodings"] = absolute(config.encodings) if config.encodings else None
    return config.model_copy(update=places)


def inspect(config: StageConfig) -> Ready:
    """Look at every input without Ray.

    Raises:
        ConfigError: one line: what is wrong, what is legal, how to cure it.
    """
    shards = open_shards(config.prompts)
    encodings = open_encodings(config.encodings)
    if encodings is not None:
        check_encodings(config, encodings, shards)
    space = open_space(config, encodings)
    check_preset(config, space)
    check_upsampler(config, shards)
    check_parallel(config)
    check_preview(config)
    check_logger(config)
    check_workers(config, config.num_workers or 1, len(shards.groups))
    start_from = None
    if isinstance(config, Stage2Config):
        start_from = find_checkpoint(config.start_from)
        check_same_model(config, start_from)
    return Ready(shards, start_from, space)


def check_preset(config: StageConfig, space: Space = PIXELS) -> None:
    if config.preset not in PRESETS:
        raise ConfigError(f"preset {config.preset!r}", legal=", ".join(PRESETS))
    try:
        backbone_of(config, space)
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(f"backbone: {error}") from None
    for bucket in config.shapes:
        if bucket.num_frames > config.num_frames:
            raise ConfigError(
                f"bucket of {bucket.num_frames} frames", legal=f"at most num_frames {config.num_frames}"
            )


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
    if config.parallel.mode == "fsdp" and isinstance(workers, int) and workers % config.parallel.replicas:
        raise ConfigError(
            f"parallel.replicas {config.parallel.replicas} doesn't divide {workers} workers",
            legal="a divisor of the number of workers (typically the number of nodes)",
        )


def check_parallel(config: StageConfig) -> None:
    """Refuse hybrid sharding that nothing would shard, or whose groups would change under way."""
    if config.parallel.replicas == 1:
        return
    if config.parallel.mode != "fsdp" or isinstance(config.num_workers, tuple):
        raise ConfigError(
            f"parallel.replicas {config.parallel.replicas} with mode {config.parallel.mode} and num_workers "
            f"{config.num_workers}",
            legal="hybrid sharding needs mode fsdp and a fixed number of workers",
        )


def check_preview(config: StageConfig) -> None:
    """Refuse an average that the run doesn't keep."""
    legal = [WEIGHTS, *ema_profiles(config.ema, config.total_samples)]
    if config.preview.ema not in legal:
        raise ConfigError(f"preview.ema {config.preview.ema!r}", legal=", ".join(legal))


def check_logger(config: StageConfig) -> None:
    """Refuse a logger that is not installed, before a worker stumbles over it."""
    if config.log.wandb_project and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"log.wandb_project {config.log.wandb_project!r}, but the package wandb is not installed",
            cure="pip install -e '.[wandb]', or leave it out: TensorBoard and metrics.jsonl are always there",
        )


SAME = (
    *("preset", "num_frames", "height_px", "width_px", "backbone", "references", "sigma_data"),
    *("autoencoder", "upsampler from"),
)


def check_same_model(config: Stage2Config, start_from: str) -> None:
    """Refuse to finetune a checkpoint of another network or prompt encoder; names the fields."""
    facts = read_facts(start_from)
    theirs_whole = config_class(facts["stage"]).model_validate(facts["config"])  # fills in newer fields
    there, here = theirs_whole.model_dump(mode="json"), config.model_dump(mode="json")
    for values, whole in ((there, theirs_whole), (here, config)):
        values["upsampler from"] = whole.upsampler.small_size_px if whole.upsampler else None
    differences = [f"{k}: {there.get(k)!r} there, {here[k]!r} now" for k in SAME if there.get(k) != here[k]]
    theirs, ours = theirs_whole.encoder.identity(), config.encoder.identity()
    differences += [
        f"encoder.{k}: {theirs.get(k)!r} there, {ours[k]!r} now" for k in ours if theirs.get(k) != ours[k]
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
    place = join(config.out, "index.parquet")
    if exists(place):
        return read_index(config.out)
    index = index_shards(shards, config.shapes, held_out_frac=config.validation.held_out_frac)
    make_plan(config, index, len(shards.groups))
    sink = pa.BufferOutputStream()
    pq.write_table(index, sink)
    write_bytes(place, sink.getvalue().to_pybytes())
    return index


def read_index(run: str) -> pa.Table:
    return pq.read_table(pa.BufferReader(read_bytes(join(run, "index.parquet"))))


def workers_text(config: StageConfig) -> str:
    workers = config.num_workers
    return f"{workers[0]} to {workers[1]}" if isinstance(workers, tuple) else str(workers or "all")


def plan_text(config: StageConfig, ready: Ready) -> str:
    """What --dry-run prints: the sizes that follow from the config."""
    import torch

    from model.condition import ConditionConfig
    from model.generator import Generator

    backbone = backbone_of(config, ready.space)
    with torch.device("meta"):
        model = Generator(backbone, ConditionConfig(mode=config.references))
    parameters = sum(p.numel() for p in model.parameters())
    rows = ready.shards.num_rows
    lines = [
        f"{config.stage}: {parameters:,} parameters ({config.preset}, encoder width 1024 assumed)",
        f"{config.num_steps:,} steps of {config.batch_size} samples in {config.accumulation} micro-batches "
        f"on {workers_text(config)} workers",
        f"{rows:,} prompts in {len(ready.shards.groups):,} row groups: "
        f"{config.total_samples / rows:.2f} epochs",
    ]
    if ready.space.is_latent or config.upsampler:
        small = f", from {config.upsampler.small_size_px}" if config.upsampler else ""
        lines.append(
            f"{describe_space(ready.space)}: {backbone.num_frames} x {backbone.out_channels} x "
            f"{backbone.height_px} x {backbone.width_px}, sigma_in "
            f"{sigma_in(backbone.num_frames, backbone.height_px, backbone.width_px):g}{small}"
        )
    if ready.start_from:
        lines.append(f"starts from {ready.start_from}")
    return "\n".join(lines)

"""Stage 1 and stage 2 under Ray Train: read it aloud.

    run(config)   the driver: door, claim, Ray, one TorchTrainer, certificate
    train(config) one worker: open or resume, step, log, save, until the samples are seen

`ray.train.report` waits for the controller's next poll (0.5 to 2 s), so it is called with a committed
checkpoint and never with a mere metric. The run's own folder says where to resume; Ray's snapshot of an
earlier driver is not asked.
"""

from typing import Any

from infra.claim import open_job
from infra.cluster import ray_session
from infra.errors import TrainingError
from infra.storage import Certificate, delete, filesystem, join, write_json
from model.training.door import (
    check_workers,
    inspect,
    plan_text,
    prepare_index,
    read_index,
    resolve,
    storage_of,
)
from model.training.outcome import certify, refuse_failed, say_where_it_stands
from model.training.stages import SPEED_ONLY, Stage1Config, Stage2Config, StageConfig, config_class
from model.training.telemetry import Follower, draw_curves, say

__all__ = ["Stage1Config", "Stage2Config", "check", "run"]


def check(config: StageConfig) -> str:
    """Refuse what can't work before Ray starts; the plan in words."""
    config = resolve(config)
    return plan_text(config, inspect(config))


def run(config: StageConfig) -> Certificate:
    """Train to the end; the same command continues a run that was stopped."""
    config = resolve(config)
    ready = inspect(config)
    done = open_job(config.out, job=config.stage, config=config, inputs=ready.inputs, hash_exclude=SPEED_ONLY)
    if done is not None:
        say(f"  {config.out} is already complete: {done.num_out:,} samples")
        return done
    prepare_index(config, ready.shards)
    position = say_where_it_stands(config)
    with ray_session(config.ray), Follower(config.out, config.total_samples, position=position):
        fit(config, num_groups=len(ready.shards.groups))
    refuse_failed(config.out)
    draw_curves(config.out)
    return certify(config, ready.inputs)


def fit(config: StageConfig, *, num_groups: int) -> None:
    """One TorchTrainer; a dead worker or node restarts the group from the last checkpoint."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    workers = config.num_workers or max(1, gpus)
    check_workers(config, workers, num_groups)
    for leftover in ("checkpoints/checkpoint_manager_snapshot.json", "failure.json"):
        delete(join(config.out, *leftover.split("/")))
    trainer = TorchTrainer(
        train,
        train_loop_config={"stage": config.stage, "config": config.model_dump(mode="json")},
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpus else "gloo", timeout_s=300),
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": max(1, cpus // workers), **({"GPU": 1} if gpus else {})},
        ),
        run_config=RunConfig(
            name="checkpoints",
            failure_config=FailureConfig(max_failures=config.max_failures),
            **storage_of(config.out),  # pyright: ignore[reportArgumentType]
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        last = next((line for line in reversed(str(error).splitlines()) if line.strip()), "unknown")
        raise TrainingError(f"training stopped after {config.max_failures} restarts: {last}") from error


def train(words: dict[str, Any]) -> None:
    """The loop of one worker."""
    from infra.telemetry import RunMetrics
    from model.training.loop import NonFiniteError, Training
    from model.training.report import Reporter
    from model.training.validate import Validation

    config = config_class(words["stage"]).model_validate(words["config"])
    index = read_index(config.out)
    training = Training(config, index)
    validation = Validation(training, index)
    reporter = Reporter(training, metrics=RunMetrics().publish)
    try:
        if training.device.type == "cuda":
            training.rehearse()
        while training.position < config.total_samples:
            outcome = training.step()
            reporter.note(outcome)
            if reporter.is_due("log"):
                reporter.log(outcome)
            if reporter.is_due("validation"):
                reporter.write(validation.run())
            if reporter.is_due("checkpoint"):
                announce(training.writer.wait(), reporter.last)
                training.save(reporter.last)
        announce(training.writer.wait(), reporter.last)
        reporter.finish()
    except NonFiniteError as error:  # on all ranks alike: another try would end the same
        if training.rank == 0:
            write_json(join(config.out, "failure.json"), {"error": str(error)})
    finally:
        reporter.close()
        training.close()


def announce(uri: str | None, metrics: dict[str, Any]) -> None:
    """Tell Ray Train of a checkpoint that is committed; all ranks call it alike."""
    import ray.train
    from ray.train import Checkpoint, CheckpointUploadMode

    if uri is None:
        return
    fs, path = filesystem(uri)
    here = ray.train.get_context().get_world_rank() == 0
    ray.train.report(
        metrics,
        checkpoint=Checkpoint(path, fs) if here else None,
        checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
    )

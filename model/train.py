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
from infra.storage import (
    Certificate,
    delete,
    exists,
    filesystem,
    join,
    read_json,
    write_certificate,
    write_json,
)
from model.checkpoint import latest_checkpoint, read_facts
from model.door import check_workers, inspect, plan_text, prepare_index, read_index, resolve, storage_of
from model.stages import SPEED_ONLY, Stage1Config, Stage2Config, StageConfig, config_class
from model.telemetry import draw_curves, say

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
    with ray_session(config.ray):
        fit(config, num_groups=len(ready.shards.groups))
    refuse_failed(config.out)
    draw_curves(config.out)
    return certify(config, ready.inputs)


def fit(config: StageConfig, *, num_groups: int) -> None:
    """One TorchTrainer; a dead worker or node restarts the group from the last checkpoint."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    workers = config.num_workers or max(1, gpus)
    check_workers(config, workers, num_groups)
    for leftover in ("checkpoint_manager_snapshot.json",):
        delete(join(config.out, "checkpoints", leftover))
    delete(join(config.out, "failure.json"))
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
    except ray.train.TrainingFailedError as error:
        last = next((line for line in reversed(str(error).splitlines()) if line.strip()), "unknown")
        raise TrainingError(f"training stopped after {config.max_failures} restarts: {last}") from error


def train(words: dict[str, Any]) -> None:
    """The loop of one worker."""
    from model.loop import Training
    from model.report import Reporter
    from model.validate import Validation

    config = config_class(words["stage"]).model_validate(words["config"])
    index = read_index(config.out)
    training = Training(config, index)
    validation = Validation(training, index)
    reporter = Reporter(training, metrics=ray_gauges())
    try:
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
    except TrainingError as error:  # known on all ranks: another try would end the same
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


def ray_gauges() -> Any:
    """Ray metrics `vimi_train_*`: the dashboard and Grafana show what the terminal shows."""
    from ray.util.metrics import Gauge

    names = ("loss", "samples", "samples_per_s", "data_frac", "mfu")
    gauges = {name: Gauge(f"vimi_train_{name}", f"training: {name}") for name in names}

    def publish(record: dict[str, Any]) -> None:
        for name in names:
            if name in record:
                gauges[name].set(float(record[name]))

    return publish


def refuse_failed(run: str) -> None:
    place = join(run, "failure.json")
    if exists(place):
        raise TrainingError(read_json(place)["error"])


def certify(config: StageConfig, inputs: dict[str, str]) -> Certificate:
    """The run's certificate: samples seen, the last checkpoint and what it says of itself."""
    last = latest_checkpoint(config.out)
    if last is None:
        raise TrainingError(f"{config.out}: no checkpoint was committed")
    facts, final = read_facts(last), read_json(join(config.out, "final.json"))
    certificate = Certificate(
        job=config.stage,
        config_hash=config.hash(exclude={"out", "ray", "num_workers", *SPEED_ONLY}),
        num_in=config.total_samples,
        num_out=facts["position"],
        inputs=inputs,
        facts={"checkpoint": last.removeprefix(config.out + "/"), **final},
        wall_s=final["wall_s"],
    )
    write_certificate(config.out, certificate)
    return certificate

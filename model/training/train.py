"""Stage 1 and stage 2 under Ray Train: read it aloud.

    run(config)   the driver: door, claim, Ray, one TorchTrainer, certificate
    train(words)  one worker: open or resume, step, log, look, save, until the samples are seen

`ray.train.report` waits for the controller's next poll (0.5 to 2 s), so it is called with a committed
checkpoint and never with a mere metric. The run's own folder says where to resume; Ray's snapshot of an
earlier driver is not asked.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from infra.claim import open_job
from infra.cluster import ray_session
from infra.storage import Certificate, filesystem, join, write_json
from model.training.door import inspect, plan_text, prepare_index, read_index, resolve
from model.training.driver import KEEP_MEMORY, fit
from model.training.outcome import certify, has_arrived, refuse_failed, say_where_it_stands, tidy
from model.training.stages import SPEED_ONLY, Stage1Config, Stage2Config, StageConfig, config_class
from model.training.telemetry import Follower, draw_curves, say

__all__ = ["Stage1Config", "Stage2Config", "check", "run", "train"]


def check(config: StageConfig) -> str:
    """Refuse what can't work before Ray starts; the plan in words."""
    config = resolve(config)
    return plan_text(config, inspect(config))


def run(config: StageConfig) -> Certificate:
    """Train to the end; the same command continues a run that was stopped.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM, after a last checkpoint.
    """
    config = resolve(config)
    ready = inspect(config)
    done = open_job(
        config.out,
        job=config.stage,
        config=config,
        inputs=ready.inputs,
        hash_exclude={"prompts", "start_from", *SPEED_ONLY},  # `inputs` holds what these two lead to
        portable=True,
    )
    if done is not None:
        say(f"  {config.out} is already complete: {done.num_out:,} samples")
        return done
    prepare_index(config, ready.shards)
    position = say_where_it_stands(config)
    with ray_session(config.ray, KEEP_MEMORY), Follower(config.out, config.total_samples, position=position):
        while True:
            fit(config, train, num_groups=len(ready.shards.groups))
            refuse_failed(config.out)
            if has_arrived(config):
                break
            say("  a worker was told to leave, and saved before it did; the run goes on from there")
    tidy(config)
    draw_curves(config.out)
    return certify(config, ready.inputs)


def train(words: dict[str, Any], after_step: Callable[[int], None] | None = None) -> None:
    """The loop of one worker; `after_step` hears the position that a step led to."""
    import torch

    from infra.spare import ask_later
    from infra.telemetry import RunMetrics
    from model.training.loop import NonFiniteError, Training
    from model.training.notices import Notices
    from model.training.observe import Observer, awaited
    from model.training.report import Reporter

    config = config_class(words["stage"]).model_validate(words["config"])
    torch.set_num_threads(words["threads"])
    index = read_index(config.out)
    training = Training(config, index, held=partial(awaited, config) if words["aside"] else tuple)
    observer = None if words["aside"] else Observer(training, index)
    reporter = Reporter(training, metrics=RunMetrics().publish, aside=words["aside"])
    notices = Notices(config.out, looks=training.rank == 0)
    spare = ask_later(30.0) if config.spare_workers else None
    try:
        if training.device.type == "cuda":
            training.rehearse()
        while training.position < config.total_samples and not notices.leave:
            outcome = training.step()
            reporter.note(outcome)
            if reporter.is_due("log"):
                reporter.log(outcome)
                notices.listen(training.agree, preempted())
            if observer is not None:
                reporter.write(observer.look())
            if reporter.is_due("checkpoint") or notices.save:
                announce(training.writer.wait(), reporter.last)
                training.save(reporter.last)
            if after_step is not None:
                after_step(training.position)
        announce(training.writer.wait(), reporter.last)
        reporter.finish()
    except NonFiniteError as error:  # on all ranks alike: another try would end the same
        if training.rank == 0:
            write_json(join(config.out, "failure.json"), {"error": str(error)})
    finally:
        if spare is not None:
            spare.cancel()
        notices.close()
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


def preempted() -> bool:
    """Whether a node of this run is about to be taken away; all ranks ask alike (it is a barrier of 3 ms)."""
    import ray.train

    return ray.train.get_preemption_info() is not None

"""Stage 1 and stage 2 under Ray Train: read it aloud.

    run(config)   the driver: door, claim, Ray, one TorchTrainer, certificate
    train(words)  one worker: open or resume, then learn
    learn(...)    the loop: step, log, look, save, until the samples are seen

`ray.train.report` waits for the controller's next poll (0.5 to 2 s), so it is called with a committed
checkpoint and never with a mere metric. The run's own folder says where to resume; Ray's snapshot of an
earlier driver is not asked.
"""

from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Any

import torch

from infra.claim import open_job
from infra.cluster import ray_session
from infra.spare import spare_after
from infra.storage import Certificate, filesystem, join, write_json
from model.training.door import inspect, plan_text, prepare_index, read_index, resolve
from model.training.driver import KEEP_MEMORY, fit
from model.training.finite import NonFiniteError
from model.training.follow import Follower
from model.training.loop import Training
from model.training.notices import Notices
from model.training.observe import Observer, awaited
from model.training.outcome import certify, has_arrived, refuse_failed, say_where_it_stands, tidy
from model.training.report import Reporter
from model.training.stages import SPEED_ONLY, Stage1Config, Stage2Config, StageConfig, config_class
from model.training.telemetry import draw_curves, say
from model.training.trackers import RayGauges

SPARE_AFTER_S = 30.0
"""A run that has lasted so long is worth a spare for its workers: shorter ones are cheaper to wait for."""

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


def train(words: dict[str, Any], after_step: Callable[[int], None] = lambda position: None) -> None:
    """One worker of the run; `after_step` hears the position that each step led to."""
    config, aside = config_class(words["stage"]).model_validate(words["config"]), words["aside"]
    torch.set_num_threads(words["threads"])
    index, held = read_index(config.out), partial(awaited, config) if aside else tuple
    with (
        closing(Training(config, index, held=held)) as training,
        closing(Reporter(training, aside=aside, trackers=[RayGauges(config.out)])) as reporter,
        closing(Notices(config.out, looks=training.rank == 0)) as notices,
        spare_after(SPARE_AFTER_S if config.spare_workers else None),
    ):
        observer = None if aside else Observer(training, index)
        try:
            learn(training, observer, reporter, notices, after_step)
        except NonFiniteError as error:  # on all ranks alike: another try would end the same
            if training.rank == 0:
                write_json(join(config.out, "failure.json"), {"error": str(error)})


def learn(
    training: Training,
    observer: Observer | None,
    reporter: Reporter,
    notices: Notices,
    after_step: Callable[[int], None],
) -> None:
    """Step, log, look, save, until all samples are seen or the ranks are told to leave."""
    if training.device.type == "cuda":
        training.rehearse()
    while training.position < training.config.total_samples and not notices.leave:
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
        after_step(training.position)
    announce(training.writer.wait(), reporter.last)
    reporter.finish()


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

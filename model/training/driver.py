"""Runs stage 1 or stage 2 under Ray Train: preflight, workers, supervision, certificate.

    run(config)   the driver: preflight, claim, Ray, one TorchTrainer, certificate
    train(words)  one worker: open or resume, then learn
    learn(...)    the loop: step, record, save, look, until the samples are seen

`ray.train.report` waits for the controller's next poll (0.5 to 2 s), so it is called with a committed
checkpoint and never with a mere metric. The run's own folder says where to resume; Ray's snapshot of an
earlier driver is not asked.
"""

import os
import threading
from collections.abc import Callable
from contextlib import ExitStack, closing
from typing import Any

import pyarrow as pa
import torch

from infra.certificate import Certificate, read_sealed, write_certificate, write_sealed
from infra.claim import alone, open_job
from infra.cluster import is_cluster, ray_session, wants_gpus
from infra.errors import ConfigError, DataError, TrainingError, VimiError
from infra.progress import say
from infra.run_folder import COMMITTED, RunFolder
from infra.storage import delete, filesystem, is_remote
from model.data.shards import Shards
from model.training.checkpoint import last_line, read_facts
from model.training.config import Stage1Config, Stage2Config, StageConfig, config_class
from model.training.loop import NonFiniteError, Training
from model.training.metrics import MetricsLog, RayGauges, draw_curves, open_trackers
from model.training.preflight import check_workers, inspect, plan_text, prepare_index, read_index
from model.training.report import Reporter, RunPrinter, write_restart
from model.training.stop_signals import Interrupts, StopSignals, ToldToLeave, trap_sigterm
from model.training.validation.kept import Kept, prepare_kept
from model.training.validation.loss import Validation
from model.training.validation.preview import Preview
from model.training.validation.video_scores import VideoScores

__all__ = ["Stage1Config", "Stage2Config", "check", "run", "train"]

KEEP_MEMORY = {"MIMALLOC_PURGE_DELAY": "-1"}
"""Arrow's allocator keeps what row groups leave behind for the next ones: to fetch memory anew from the system
costs more than to read them, and the loader's cache bounds it."""
MAX_FAILURES = 3
"""Restarts after a worker or node died, without a new checkpoint in between, before the run gives up (ours)."""
Loop = Callable[[dict[str, Any]], None]


def check(config: StageConfig) -> str:
    """Refuse what can't work before Ray starts; the plan in words."""
    return plan_text(config, inspect(config, reach=False))


def run(config: StageConfig) -> Certificate:
    """Train to the end; the same command continues a run that was stopped.

    Raises:
        KeyboardInterrupt: Ctrl-C, after a last checkpoint.
        SystemExit: SIGTERM, likewise.
    """
    ready, folder = inspect(config), RunFolder(config.out)
    done = open_job(config.out, job=config.stage, config=config, inputs=ready.inputs, portable=True)
    if done is not None:
        say(f"  {config.out} is already complete: {done.num_out:,} samples")
        return done
    if ready.note:
        say(f"  note: {ready.note}")
    with alone(config.out):
        carry_out(config, ready.shards, folder)
        return certify(config, ready.inputs)


def carry_out(config: StageConfig, shards: Shards, folder: RunFolder) -> None:
    """Train in a Ray session until all samples are seen."""
    prepare_index(config, shards)
    if (why := prepare_kept(config)) is not None:
        say(f"  note: what this run forgets of stage 1 is not watched: {why}")
    position = say_where_it_goes_on(folder, config.total_samples)
    with (
        ray_session(config.ray, KEEP_MEMORY),
        RunPrinter(folder, config.total_samples, position=position),
    ):
        while True:
            fit(config, train, num_groups=len(shards.groups))
            if last_position(folder) >= config.total_samples:
                break
            say("  a worker was told to leave, and saved before it did; the run goes on from there")
    draw_curves(folder)


def say_where_it_goes_on(run: RunFolder, total: int) -> int:
    """Samples seen at the last whole checkpoint; what lies after it and is none gets a line."""
    position = last_position(run)
    for torn in run.half_written():
        if torn > position:
            where = f"from {position:,}" if position else "from the start"
            say(f"  note: checkpoint {torn:,} has no {COMMITTED}, so it is not whole; the run goes on {where}")
    if position:
        say(f"  resumes at {position:,} of {total:,} samples")
    return position


def last_position(run: RunFolder) -> int:
    return max(run.positions(), default=0)


def certify(config: StageConfig, inputs: dict[str, str]) -> Certificate:
    """The run's certificate: samples seen, the last checkpoint and what it says of itself."""
    run = RunFolder(config.out)
    last, final = run.checkpoint(last_position(run)), read_sealed(run.final)
    certificate = Certificate(
        job=config.stage,
        config_hash=config.hash(),
        num_in=config.total_samples,
        num_out=read_facts(last)["position"],
        inputs=inputs,
        facts={"checkpoint": last.removeprefix(config.out + "/"), **final},
        wall_s=final["wall_s"],
    )
    write_certificate(config.out, certificate)
    return certificate


def train(words: dict[str, Any], after_step: Callable[[int], None] = lambda position: None) -> None:
    """One worker of the run; `after_step` hears the position that each step led to."""
    config = config_class(words["stage"]).model_validate(words["config"])
    torch.set_num_threads(int(words["threads"] or cpus_of_worker()))  # sums depend on it
    run = RunFolder(config.out)
    if run.failed() is not None:
        return
    with ExitStack() as stack:
        try:
            index = read_index(config.out)
            training = stack.enter_context(closing(Training(config, index)))
            reporter = stack.enter_context(closing(Reporter(training, open_log(training))))
            signals = stack.enter_context(closing(StopSignals(run, training.agree, looks=training.rank == 0)))
        except VimiError as error:
            note_failure(run, error)
            raise
        try:
            learn(training, Looks(training, index, reporter, signals), reporter, signals, after_step)
        except NonFiniteError as error:  # on all ranks alike
            if training.rank == 0:
                note_failure(run, error)
        except (ConfigError, DataError) as error:
            note_failure(run, error)
            raise


def note_failure(run: RunFolder, error: VimiError) -> None:
    """Write down what another try would meet again: Ray Train's next workers leave, the driver raises it."""
    kind = next((kind for kind in (ConfigError, DataError) if isinstance(error, kind)), TrainingError)
    write_sealed(run.failure, {"kind": kind.__name__, "error": str(error)})


def learn(
    training: Training,
    looks: "Looks",
    reporter: Reporter,
    signals: StopSignals,
    after_step: Callable[[int], None],
) -> None:
    """Step, record, save, look, until all samples are seen or the ranks are told to leave."""
    config = training.config
    if training.device.type == "cuda":
        training.rehearse()
    if training.position:
        looks.look()  # a kill may have come between the checkpoint and the look at it
    else:
        looks.begin()
    while training.position < config.total_samples and not signals.leave:
        result = training.step()
        reporter.note(result)
        if config.is_due(config.log_every_samples, training.position):
            reporter.record(result)
            signals.heed(preempted())
        signals.listen()
        if config.is_due(config.checkpoint.every_samples, training.position) or signals.save:
            save(training, reporter)
        looks.look()
        after_step(training.position)
    if training.position != training.saved_at:
        save(training, reporter)  # told to leave while looking
    announce(training.writer.wait(), reporter.last)
    reporter.finish()


def save(training: Training, reporter: Reporter) -> None:
    """Begin a checkpoint of this moment; the one before it is whole by then, and Ray hears of it."""
    announce(training.writer.wait(), reporter.last)
    training.save(reporter.last)


class Looks:
    """Validation with each checkpoint, and previews now and then: what is due and not yet in the log."""

    def __init__(self, training: Training, index: pa.Table, reporter: Reporter, signals: StopSignals) -> None:
        self.training, self.reporter, self.signals = training, reporter, signals
        self.validation, self.preview = Validation(training, index), Preview(training, index)
        self.scores, self.kept = VideoScores(training, index), Kept(training)

    def begin(self) -> None:
        """Before the first step, what stage 1 knew: later looks are compared with it."""
        log, training = self.reporter.log, self.training
        try:
            if self.kept.rows and training.agree(log is not None and training.position not in log.validated):
                self.reporter.write(self.kept.run(self._went_on))
        except ToldToLeave:
            pass
        finally:
            self.reporter.progressed(None)

    def look(self) -> None:
        """All ranks call it alike; when they are told to leave it ends early, and a later life looks again."""
        training, config, position = self.training, self.training.config, self.training.position
        if self.signals.leave:
            return
        log = self.reporter.log
        validates = config.is_due(config.checkpoint.every_samples, position)
        every = config.preview_every_samples
        shows = every != 0 and config.is_due(every, position)
        scores = config.is_due(config.validation.metrics_every_samples, position) and bool(self.scores.rows)
        try:
            if validates and training.agree(log is not None and position not in log.validated):
                found = self.validation.run(self._went_on)
                self.reporter.write(found | self.kept.run(self._went_on))
            if shows and training.agree(log is not None and position not in log.shown):
                self.reporter.show(self.preview.make(self._went_on))
            if scores and training.agree(log is not None and position not in log.scored):
                self.reporter.write(self.scores.score(self._went_on))
        except ToldToLeave:
            pass
        finally:
            self.reporter.progressed(None)

    def _went_on(self, what: str, done: int, total: int) -> None:
        """What `Validation` and `Preview` call after each of their parts."""
        self.reporter.progressed({"what": what, "done": done, "total": total})
        self.signals.listen()
        if self.signals.leave:
            raise ToldToLeave


def open_log(training: Training) -> MetricsLog | None:
    """The run's log on the first rank, cut back to where the run goes on."""
    if training.rank:
        return None
    config, position = training.config, training.position
    named = open_trackers(
        config.trackers, training.run, position=position, config=config.model_dump(mode="json")
    )
    return MetricsLog(training.run, [RayGauges(training.run.uri), *named], position=position)


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


def fit(config: StageConfig, loop: Loop, *, num_groups: int) -> None:
    """Train until the workers leave; a dead worker or node restarts the group from the last checkpoint.

    Raises:
        TrainingError: what failed would fail again, or no life came further than the one before.
    """
    from ray.train import TrainingFailedError

    run = RunFolder(config.out)
    for leftover in (run.ray_snapshot, run.failure, run.stop, run.progress):
        delete(leftover)
    while True:
        before = last_position(run)
        trainer = make_trainer(config, loop, num_groups=num_groups)
        try:
            with Interrupts(run):
                in_thread(trainer.fit)
        except TrainingFailedError as error:
            if run.failed() is None:
                if last_position(run) > before:
                    continue
                raise TrainingError(
                    f"training stopped after {MAX_FAILURES} restarts: {last_line(error)}"
                ) from error
        if (failed := run.failed()) is not None:
            raise {"ConfigError": ConfigError, "DataError": DataError}.get(failed["kind"], TrainingError)(
                failed["error"]
            )
        return


def make_trainer(config: StageConfig, loop: Loop, *, num_groups: int) -> Any:
    """Ray's trainer, which asks for its workers' resources and waits until they are there."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    workers, each = resources(config)
    check_workers(config, workers, num_groups)
    words = {
        "stage": config.stage,
        "config": config.model_dump(mode="json"),
        "threads": os.environ.get("OMP_NUM_THREADS"),
    }
    fs, path = filesystem(config.out)
    return TorchTrainer(
        loop,
        train_loop_config=words,
        torch_config=torch_config("cpu:gloo,cuda:nccl" if "GPU" in each else "gloo"),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu="GPU" in each, resources_per_worker=each),
        run_config=RunConfig(
            name="checkpoints",
            storage_path=path,
            storage_filesystem=fs if is_remote(config.out) else None,
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
            callbacks=[restart_callback(config.out)],
        ),
    )


def resources(config: StageConfig) -> tuple[int | tuple[int, int], dict[str, float]]:
    """Workers, and what each of them asks Ray for.

    This machine's CPUs are shared out. Of a cluster each asks for one, as any node has it with its GPU, and
    takes its share of the node that it comes to.

    Raises:
        ConfigError: a cluster without a GPU yet, and the config doesn't say how many workers want one.
    """
    import ray

    here, has_gpus = ray.cluster_resources(), wants_gpus(config.ray)
    gpus = int(here.get("GPU", 0)) if has_gpus else 0
    if config.num_workers is None and has_gpus and not gpus:
        raise ConfigError(
            "num_workers null, and the cluster has no GPU yet that could be counted",
            cure="say how many: --workers 8, or a range: --workers 1-8",
        )
    workers = config.num_workers or max(1, gpus)
    most = workers if isinstance(workers, int) else workers[1]
    cpus = 1 if is_cluster(config.ray) else max(1, int(here.get("CPU", 1)) // most)
    return workers, {"CPU": cpus, **({"GPU": 1} if has_gpus else {})}


def cpus_of_worker() -> int:
    """This worker's share of the CPUs of its node."""
    import ray
    import ray.train

    node = ray.get_runtime_context().get_node_id()
    cpus = next(n["Resources"].get("CPU", 1) for n in ray.nodes() if n["NodeID"] == node)
    return max(1, int(cpus) // ray.train.get_context().get_local_world_size())


def torch_config(backend: str) -> Any:
    """Ray's process group, in workers that note a SIGTERM instead of dying of it."""
    from ray.train.torch import TorchConfig
    from ray.train.torch.config import _TorchBackend

    class Backend(_TorchBackend):
        def on_training_start(self, worker_group: Any, backend_config: Any) -> None:
            super().on_training_start(worker_group, backend_config)
            worker_group.execute(trap_sigterm)  # runs in the main thread, where signals arrive

    class Config(TorchConfig):
        @property
        def backend_cls(self) -> type[Backend]:
            return Backend

    return Config(backend=backend, timeout_s=300)


def restart_callback(run: str) -> Any:
    """What Ray's controller calls when workers have failed: it writes down what of."""
    from ray.train import UserCallback

    class Restarts(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            if RunFolder(run).failed() is None:  # else nothing goes on
                write_restart(RunFolder(run), worker_exceptions)

    return Restarts()


def in_thread(work: Callable[[], object]) -> None:
    """Run `work` beside the main thread, which stays free for signals (Ray's own handler aborts unsaved)."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised again in the main thread
            failed.append(error)

    thread = threading.Thread(target=run, name="fit", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    if failed:
        raise failed[0]

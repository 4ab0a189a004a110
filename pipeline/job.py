"""A job that may be killed at any moment: units in, receipts out, certificate last.

`run_job` is the sequence that every command of the data side follows. Ray Data runs the work; `journal.py`
gives what Ray Data's own checkpoint does not (it loses rows after fan-out): a unit of work is done only
when its whole receipt stands in a journal.

    units (a list or a generator, in a fixed order)
      -> windows -> ray.data map over blocks -> worker(payload) -> one receipt a unit,
         appended to the block's own journal file as one whole line
      -> `Receipts`, read back in unit order: the same for any number of workers and any kills
      -> the job writes its tables from them and certifies

Killed in the middle, the same command reads the journals and runs what is missing: at most the unit
that each worker had in hand is done again.
"""

import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypedDict, cast

import pyarrow as pa
from pydantic import Field

from infra.certificate import Certificate, write_certificate
from infra.claim import alone, open_job
from infra.cluster import RayConfig, quiet_ray_data, ray_session
from infra.config import Config, Incidental, Location, canonical_json
from infra.errors import TooManyFailuresError
from infra.progress import ProgressPrinter
from infra.storage import delete, list_files
from infra.telemetry import JobMetrics
from pipeline.journal import JournalWriter, Receipt, Receipts, Unit
from pipeline.schema import Status, content_id
from pipeline.shards import PREFIX

WINDOW_UNITS = 4096
"""Units in flight: the bound of the driver's memory. Ours."""
MakeWorker = Callable[[], Callable[[dict[str, Any]], Receipt]]


class JobConfig(Config):
    """Base of every job's config: where the output goes and where the work runs."""

    out: Incidental[Location]
    """Folder or URI of the output."""
    num_workers: Incidental[int | None] = Field(default=None, ge=1, le=65536)
    """Workers at once; None = as many as the CPUs (or GPUs) allow, of a cluster as many as it grows to."""
    ray: Incidental[RayConfig] = RayConfig()
    """Where the job runs."""


class NetworkJobConfig(JobConfig):
    """Base of the config of a job whose workers run networks."""

    num_gpus: Incidental[float] = Field(default=0.0, ge=0, le=64)
    """GPUs of a worker; 0 = CPUs. With GPUs workers live as long as the job."""


def run_job(
    job: str,
    config: JobConfig,
    inputs: dict[str, str],
    *,
    work: Callable[[], Receipts],
    finish: Callable[[Receipts], Certificate],
) -> Certificate:
    """Run a job, or continue one that was stopped; a finished one is recognised and left alone.

    The config's identity and `inputs` (name -> content hash) claim the folder `out`; `work` and `finish` as in
    `carry_out`.

    Raises:
        ConfigError: `out` is not writable, or holds the output of another config or input.
        TooManyFailuresError: by `finish`, when too many rows failed.
    """
    done = open_job(config.out, job=job, config=config, inputs=inputs)
    return done or carry_out(config, work=work, finish=finish)


def carry_out(
    config: JobConfig, *, work: Callable[[], Receipts], finish: Callable[[Receipts], Certificate]
) -> Certificate:
    """Do the work in a Ray session, write the tables, certify last; then the journals may go.

    `work` is called in the session and runs all units that have no receipt yet (see `run_units`); `finish`
    writes the tables from the receipts and gives the certificate, which is stamped here.
    """
    started_s = time.time()
    with alone(config.out):
        with ray_session(config.ray):
            receipts = work()
        certificate = finish(receipts)
        _delete_torn(config.out)
        now_s = time.time()
        certificate = certificate.model_copy(update={"created_at_s": now_s, "wall_s": now_s - started_s})
        write_certificate(config.out, certificate)
        receipts.clear()
    return certificate


def _delete_torn(out: str) -> None:
    """Half-written shards that a kill left beside their names."""
    for file in list_files(out, recursive=False):
        if file.rpartition("/")[2].startswith(f".{PREFIX}"):
            delete(file)


def output_hash(config: Config, inputs: dict[str, str]) -> str:
    """16 hex digits: what the output depends on, and not where anything lies."""
    return content_id(canonical_json([config.identity(), inputs]).decode())[:16]


class Fates(TypedDict):
    """The part of a certificate that says what became of the rows."""

    num_in: int
    num_out: int
    filtered: dict[str, int]
    dead: dict[str, int]


def count_fates(counts: Mapping[str, int]) -> Fates:
    """Rows by status -> the certificate's counts: in = out + filtered + dead."""
    fates = {Status(name): count for name, count in sorted(counts.items()) if count}
    return {
        "num_in": sum(fates.values()),
        "num_out": fates.get(Status.OK, 0),
        "filtered": {status.value: count for status, count in fates.items() if status.is_filtered},
        "dead": {status.value: count for status, count in fates.items() if status.is_dead},
    }


def refuse_failures(
    counts: Mapping[str, int],
    max_failed_frac: float,
    *,
    what: str,
    rejected: Iterable[Mapping[str, Any]] = (),
) -> None:
    """Stop a job that has gone wrong.

    `what` says what the rows are and what didn't become of them ("clips could not become prompts"); the message
    shows the first of the `rejected` that is dead.

    Raises:
        TooManyFailuresError: more rows are dead; names the reasons, by count.
    """
    fates = count_fates(counts)
    failed = sum(fates["dead"].values())
    if failed <= max_failed_frac * fates["num_in"]:
        return
    reasons = ", ".join(f"{name} {count:,}" for name, count in fates["dead"].items())
    first = next((row for row in rejected if Status(row["status"]).is_dead), None)
    shown = f"; the first: {first['source_uri']}: {first['status']} ({first['error']})" if first else ""
    raise TooManyFailuresError(
        f"{failed:,} of {fates['num_in']:,} {what} ({reasons}), more than max_failed_frac={max_failed_frac:g} "
        f"allows{shown}"
    )


class BlockRunner:
    """The Ray Data callable: runs a block of units with one worker and journals each receipt."""

    def __init__(self, make_worker: MakeWorker, folder: str, key: str):
        self.make_worker, self.folder, self.key = make_worker, folder, key

    def __call__(self, block: pa.Table) -> pa.Table:
        worker = self._worker()
        ids, payloads = block["unit_id"].to_pylist(), block["payload"].to_pylist()
        journal = JournalWriter(self.folder, content_id(*ids))
        finished = journal.finished()  # not empty for a retried block: a worker died
        notes = []
        try:
            for unit_id, payload in zip(ids, payloads, strict=True):
                receipt: Receipt = {}
                if unit_id not in finished:
                    receipt = worker(json.loads(payload))
                    journal.append(unit_id, receipt)
                notes.append(json.dumps(receipt.get("notes", {})))
        finally:
            journal.close()
        return pa.table({"unit_id": ids, "notes": notes})

    def _worker(self) -> Callable[[dict[str, Any]], Receipt]:
        if self.key not in _WORKERS:
            _WORKERS.clear()
            _WORKERS[self.key] = self.make_worker()
        return _WORKERS[self.key]


# Ray reuses its worker processes: a model that one task has loaded serves the next tasks of its job too.
_WORKERS: dict[str, Callable[[dict[str, Any]], Receipt]] = {}


def run_units(
    out: str,
    units: Iterable[Unit],
    make_worker: MakeWorker,
    *,
    what: str,
    total: int | None = None,
    num_workers: int | None = None,
    units_per_task: int = 1,
    num_cpus: float = 1.0,
    num_gpus: float = 0.0,
    actors: bool = False,
    watch: Callable[[dict[str, int]], None] | None = None,
) -> Receipts:
    """Run every unit that has no receipt yet; call inside a `ray_session`.

    Args:
        out: the job's folder; journals lie below it.
        units: in a fixed order; ids unique. A generator is consumed window by window.
        make_worker: picklable; makes the function payload -> receipt in the worker process, where it
            loads its model. The receipt is JSON; its optional `notes` {status: rows} go to the progress
            line. It must not raise for bad content: that is a row with a status.
        what: name for the progress line.
        total: number of units, for the ETA.
        num_workers: workers at once; None = as many as the session has room for, or grows to.
        units_per_task: units of one Ray task; more costs less overhead.
        num_cpus: CPUs a worker.
        num_gpus: GPUs a worker.
        actors: keep workers (and the model in them) alive over the whole run; else Ray tasks.
        watch: called with the notes of each finished task; may raise to stop a job that goes wrong.

    Returns:
        All receipts, earlier runs' included.
    """
    from ray import cloudpickle

    quiet_ray_data()
    receipts = Receipts(out)
    progress = ProgressPrinter(what, total, unit="units")
    metrics = JobMetrics(what)
    pickled = cloudpickle.dumps(make_worker)  # pyright: ignore[reportPrivateImportUsage]
    key = content_id(out, pickled.hex())
    resources = {"num_workers": num_workers, "num_cpus": num_cpus, "num_gpus": num_gpus, "actors": actors}
    run_blocks = partial(_run_blocks, arguments=(make_worker, receipts.folder, key), **resources)
    for window in _windows(units, WINDOW_UNITS):
        todo = [unit for unit in window if unit.id not in receipts]
        progress.skip(len(window) - len(todo))
        blocks = [_block(todo[i : i + units_per_task]) for i in range(0, len(todo), units_per_task)]
        for count, notes in run_blocks(blocks) if blocks else ():
            progress.add(count, notes)
            metrics.add(count, notes)
            if watch is not None:
                watch(notes)
    progress.close()
    receipts.refresh()
    return receipts


def run_networks(
    config: NetworkJobConfig, units: Sequence[Unit], make_worker: MakeWorker, *, what: str
) -> Receipts:
    """`run_units` where workers run networks: on GPUs they keep them as long as the job lives."""
    return run_units(
        config.out,
        units,
        make_worker,
        what=what,
        total=len(units),
        num_workers=config.num_workers,
        num_gpus=config.num_gpus,
        actors=config.num_gpus > 0,
    )


def _run_blocks(
    blocks: list[pa.Table],
    *,
    arguments: tuple[MakeWorker, str, str],
    num_workers: int | None,
    num_cpus: float,
    num_gpus: float,
    actors: bool,
) -> Iterator[tuple[int, dict[str, int]]]:
    """Run `BlockRunner(*arguments)` on each block, as Ray tasks or in actors that keep their worker alive.

    Yields:
        (units, notes) of each block as it is done.
    """
    import ray.data

    size = min(num_workers, len(blocks)) if num_workers else None  # Ray warns of idle workers
    if actors:
        pool: Any = ray.data.ActorPoolStrategy(min_size=size or 1, max_size=size or len(blocks))
    else:
        pool = ray.data.TaskPoolStrategy(size=size)
    runner: Any = BlockRunner if actors else BlockRunner(*arguments)
    options: dict[str, Any] = {"fn_constructor_args": arguments} if actors else {}
    results = ray.data.from_arrow(blocks).map_batches(
        runner,
        batch_size=None,
        batch_format="pyarrow",
        compute=pool,
        num_cpus=num_cpus,
        num_gpus=num_gpus or None,
        **options,
    )
    batches = results.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    for batch in cast("Iterator[pa.Table]", batches):
        notes = Counter[str]()
        for text in batch["notes"].to_pylist():
            notes.update(json.loads(text))
        yield len(batch), dict(notes)


def _windows(units: Iterable[Unit], size: int) -> Iterator[list[Unit]]:
    iterator = iter(units)
    while window := list(itertools.islice(iterator, size)):
        yield window


def _block(units: list[Unit]) -> pa.Table:
    return pa.table({"unit_id": [u.id for u in units], "payload": [json.dumps(u.payload) for u in units]})

"""Checkpoints: sharded, written in the background, committed last, read by any number of ranks.

    run/checkpoints/samples-000000001600/
        __0_0.distcp ... .metadata    tensors, by torch.distributed.checkpoint
        committed.json                facts (position, config, code version), the hash of each file and
                                      its own; written last

A folder without committed.json is no checkpoint. Only tensors are stored by torch; everything else is
JSON, and the index that torch pickles is read by an unpickler that knows nothing but tensors' types.
"""

import hashlib
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, distribute_tensor

from infra.certificate import VERSION, FileEntry, check_files, read_sealed, write_sealed
from infra.checkpoint_files import SafeReader, files_writer
from infra.errors import ConfigError, DataError, TrainingError
from infra.run_folder import COMMITTED, RunFolder, split_checkpoint
from infra.storage import delete, exists, join, read_bytes, read_json
from model.optim import local_shard

FORMAT = 4
"""Layout of the tensors' names and of the config; a reader refuses one that it doesn't know."""
ROLE_TABLE = ".role.weight"
"""In the names of the tensors that have a row for each role of a prompt."""
State = dict[str, Tensor]


def find_checkpoint(uri: str) -> str:
    """The checkpoint meant by a run's folder (its latest) or by a checkpoint's own folder.

    Raises:
        ConfigError: neither.
    """
    if exists(join(uri, COMMITTED)):
        return uri
    found = RunFolder(uri).latest_checkpoint()
    if found is None:
        raise ConfigError(
            f"no committed checkpoint at {uri}",
            legal="a run's folder, or one of its checkpoints/samples-*",
            cure="run `vimi-train stage1` first, or again if it was stopped",
        )
    return found


def read_facts(uri: str) -> dict[str, Any]:
    """What the checkpoint says of itself: position, stage, config, version, names of the EMAs.

    Raises:
        ConfigError: written by a version of this project whose layout we don't know.
        TrainingError: damaged.
    """
    place = join(uri, COMMITTED)
    try:
        facts = read_json(place)
        if isinstance(facts, dict):
            check_format(facts, f"checkpoint {uri}")  # older ones bear no hash
        return read_sealed(place)
    except DataError as error:
        raise damaged(uri, error) from None


def check_format(facts: dict[str, Any], what: str) -> None:
    """Refuse what was written in another layout of the network or its names.

    Raises:
        ConfigError: says which, and by which version.
    """
    if facts.get("format") != FORMAT:
        raise ConfigError(
            f"{what} has format {facts.get('format')} (vimi {facts.get('version')})",
            legal=f"format {FORMAT} (vimi {VERSION})",
            cure="use it with that version, or train again",
        )


def check_whole(uri: str) -> None:
    """Refuse a checkpoint with a file that is not as it was written; each is read through once a process.

    Ranks share the files among them and come to one mind, so all of them call this alike.

    Raises:
        TrainingError: names the file, and the run's last checkpoint before this one.
    """
    facts, error = read_facts(uri), None
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    mine = facts["files"][dist.get_rank() if ranks > 1 else 0 :: ranks]
    try:
        check_files(uri, [FileEntry(**entry) for entry in mine])
    except DataError as found:
        error = found
    found_by: list[DataError | None] = [error]
    if ranks > 1:
        found_by = [None] * ranks
        dist.all_gather_object(found_by, error)
    for each in found_by:
        if each is not None:
            raise damaged(uri, each)


def damaged(uri: str, error: DataError) -> TrainingError:
    """What is said of a damaged checkpoint: the file, and the run's last whole one before it."""
    found = split_checkpoint(uri)
    run, here = found or (RunFolder(uri), 0)
    before = [position for position in (run.positions() if found else []) if position < here]
    cure = f"use {run.checkpoint(before[-1])}, the one before it" if before else "restore it, or train again"
    if before:
        cure += f"; to continue the run from there, delete {uri}"
    return TrainingError(f"checkpoint is damaged: {str(error).partition('; cure:')[0]}; cure: {cure}")


def checkpoint_hash(uri: str) -> str:
    """16 hex digits of what the checkpoint says of itself, each file's hash among it."""
    return hashlib.sha256(read_bytes(join(uri, COMMITTED))).hexdigest()[:16]


class CheckpointWriter:
    """Saves in the background; at most one save is under way, and all ranks call it alike.

    The newest `num_to_keep` checkpoints stay; None = all.
    """

    def __init__(self, run: RunFolder, *, num_to_keep: int | None = None) -> None:
        self.run, self.num_to_keep = run, num_to_keep
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        # Collectives of a thread need a group of their own, or they mix with the step's.
        many = dist.is_initialized() and dist.get_world_size() > 1
        self.group: Any = dist.new_group(backend="gloo") if many else None
        self.staging = Staging()
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending: Future[str] | None = None
        self.copied = Event()
        self.copied.set()

    def clean(self) -> None:
        """Delete what a kill left half written; call once at the start, with a barrier behind it."""
        if self.rank:
            return
        for position in self.run.half_written():
            delete(self.run.checkpoint(position))

    def save(self, state: State, facts: dict[str, Any]) -> None:
        """Copy `state` aside, write and commit it, in the background; until `settle` nobody may change it.

        So the copy runs beside the next forward and backward pass, which only read the weights.
        """
        self.wait()
        self.copied.clear()
        uri = self.run.checkpoint(facts["position"])
        if any(value.is_cuda for value in state.values()):  # begun here, in the order of this thread's work
            self.pending = self.pool.submit(self._write, uri, self._copy(state), facts)
        else:
            self.pending = self.pool.submit(lambda: self._write(uri, self._copy(state), facts))

    def settle(self) -> None:
        """From here on the state may change: it is copied, or the device will do that first. An error comes
        from `wait`.
        """
        self.copied.wait()
        self.staging.let_change()

    def _copy(self, state: State) -> State:
        try:
            return self.staging.copy(state)
        finally:
            self.copied.set()

    def wait(self) -> str | None:
        """Wait for the save under way; its folder, or None when there was none.

        Raises:
            TrainingError: it could not be written.
        """
        pending, self.pending = self.pending, None
        try:
            return pending.result() if pending else None
        except (Exception, CheckpointException) as error:  # storage fails in many ways; all mean this
            raise TrainingError(f"checkpoint could not be written: {last_line(error)}") from error

    def close(self) -> None:
        self.wait()
        self.pool.shutdown()

    def _write(self, uri: str, state: State, facts: dict[str, Any]) -> str:
        self.staging.wait()
        if exists(join(uri, COMMITTED)):
            return uri  # an earlier life of this run came further than its last report
        storage, files = files_writer(uri)
        save(state, storage_writer=storage, process_group=self.group, no_dist=self.group is None)
        written: list[Any] = [files.written]
        if self.group is not None:
            written = [None] * dist.get_world_size(self.group)
            dist.all_gather_object(written, files.written, group=self.group)
        if self.rank == 0:
            entries = [entry.model_dump() for each in written for _, entry in sorted(each.items())]
            about = {"format": FORMAT, "version": VERSION, "files": entries}
            write_sealed(join(uri, COMMITTED), {**facts, **about})
            prune(self.run, self.num_to_keep)
        return uri


def prune(run: RunFolder, num_to_keep: int | None) -> None:
    """Delete all but the newest checkpoints; None keeps all."""
    positions = run.positions()
    for position in positions[:-num_to_keep] if num_to_keep else []:
        uri = run.checkpoint(position)
        delete(join(uri, COMMITTED))  # first, so that a half-deleted one is none
        delete(uri)


def last_line(error: BaseException) -> str:
    """The line that says what happened, out of the traceback that torch folds into its message."""
    return next((line for line in reversed(str(error).splitlines()) if line.strip()), repr(error))


def load_state(uri: str, state: State) -> None:
    """Fill `state`'s tensors in place, each rank its part, whatever the number of ranks that wrote it.

    A table of roles may have fewer rows there: roles have been appended since, and keep what they have here.

    Raises:
        TrainingError: damaged; or names or shapes differ from the checkpoint's, the first few are named.
    """
    check_whole(uri)
    there = tensors_in(uri)
    missing = sorted(name for name in state if name not in there)
    shorter = {
        name: torch.zeros(there[name], dtype=value.dtype)
        for name, value in state.items()
        if ROLE_TABLE in name and name in there and is_shorter(there[name], value.shape)
    }
    other = [
        f"{name} is {tuple(there[name])} there, {tuple(value.shape)} here"
        for name, value in state.items()
        if name in there and name not in shorter and tuple(there[name]) != tuple(value.shape)
    ]
    if missing or other:
        reasons = "; ".join([*(f"{name} is not there" for name in missing), *other][:4])
        raise TrainingError(f"checkpoint {uri} does not fit this model: {reasons}")
    alone = not dist.is_initialized() or dist.get_world_size() == 1
    with warnings.catch_warnings():
        # That one process loads alone is meant, and no news to whoever runs `sample`.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load({**state, **shorter}, storage_reader=SafeReader(uri), no_dist=alone)
    for name, rows in shorter.items():
        fill_rows(state[name], rows)


def is_shorter(there: torch.Size, here: torch.Size) -> bool:
    return len(there) == len(here) > 0 and there[1:] == here[1:] and there[0] < here[0]


@torch.no_grad()
def fill_rows(table: Tensor, rows: Tensor) -> None:
    """Write the first rows of a table, sharded or not; the others stay."""
    if isinstance(table, DTensor):
        whole = table.full_tensor()
        whole[: len(rows)] = rows.to(whole.device)
        table.copy_(distribute_tensor(whole, table.device_mesh, table.placements))
    else:
        table[: len(rows)] = rows.to(table.device)


def tensors_in(uri: str) -> dict[str, torch.Size]:
    """Names and shapes of a checkpoint's tensors; reads the index only."""
    found = SafeReader(uri).read_metadata().state_dict_metadata
    return {name: m.size for name, m in found.items() if isinstance(m, TensorStorageMetadata)}


class Staging:
    """Copies of a state for its checkpoints: on the CPU, in the same memory each time.

    From a GPU they are made by a stream of their own into page-locked memory, while the next passes run, which
    only read the state; what would change it is put behind them in the device's own queue, so the processor
    waits for nothing. (torch's stager locks the pages of a tensor that is made anew, as the random state is,
    once more at each save, which fails at the second one.) The memory is made by
    `prepare`, or at the first copy.
    """

    def __init__(self) -> None:
        self.copies: dict[str, Tensor] = {}
        self.stream: torch.cuda.Stream | None = None
        self.finished: torch.cuda.Event | None = None

    def prepare(self, state: dict[str, Tensor]) -> None:
        """Make the memory beforehand: to lock its pages would hold the first save up."""
        for name, value in state.items():
            if name not in self.copies:
                self.copies[name] = room_for(value)

    def copy(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copy, or on a GPU begin to; the tensors are whole after `wait`, and the next call reuses them."""
        self.prepare(state)
        on_gpu = any(value.is_cuda for value in state.values())
        if not on_gpu:
            self._enqueue(state)
        else:
            self.stream = self.stream or torch.cuda.Stream()
            self.stream.wait_stream(torch.cuda.current_stream())  # the optimizer's last step comes first
            with torch.cuda.stream(self.stream):
                self._enqueue(state)
                self.finished = torch.cuda.Event(blocking=True)  # a thread waits for it
                self.finished.record()
        return {name: self.copies[name] for name in state}

    def _enqueue(self, state: dict[str, Tensor]) -> None:
        for name, value in state.items():
            source = local_shard(value).detach()
            local_shard(self.copies[name]).copy_(source, non_blocking=True)
            if self.stream is not None and source.is_cuda:
                source.record_stream(self.stream)

    def wait(self) -> None:
        """Until the copies are whole; any thread may ask."""
        if self.finished is not None:
            self.finished.synchronize()

    def let_change(self) -> None:
        """What this thread asks of the GPU from now on happens after the copies; it doesn't wait itself."""
        if self.finished is not None:
            torch.cuda.current_stream().wait_event(self.finished)


def room_for(value: Tensor) -> Tensor:
    """An empty tensor of the same shape on the CPU, page-locked for a GPU's; of a sharded one, a like shard."""
    if isinstance(value, DTensor):
        shard = value.detach().to("cpu", copy=True)
        setattr(shard, "_local_tensor", room_for(value.to_local()))  # noqa: B010 - torch's own way
        return shard
    return torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)

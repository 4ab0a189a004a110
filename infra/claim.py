"""Claims an output folder for (job, config, inputs), and recognises it at the next start.

The same command finds its own folder and continues; another config or input is refused with the fields
that differ, so that no output is ever half one thing and half another.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml

from infra.certificate import Certificate, read_certificate, read_sealed, write_sealed
from infra.config import Config
from infra.errors import ConfigError, DataError
from infra.storage import absolute, check_writable, exists, is_remote, join, read_bytes, write_bytes

JOB_FILE, CONFIG_FILE = "job.json", "config.yaml"
CONFIG_HASH = "config_sha256"


def open_job(
    out: str, *, job: str, config: Config, inputs: dict[str, str], portable: bool = False
) -> Certificate | None:
    """Claim the folder `out` for this job, or recognise it as ours.

    The resolved `config` is saved beside the output; its identity and the `inputs` (name -> content hash) make
    the claim. `portable`: paths count by their last part, so that the output and its inputs may be moved.

    Returns:
        The certificate when the output is already whole; None when there is work to do.

    Raises:
        ConfigError: `out` is not writable, or holds the output of another config or input.
        DataError: what claims it is damaged.
    """
    check_writable(out)
    done = find_job(out, job=job, config=config, inputs=inputs, portable=portable)
    place = join(out, JOB_FILE)
    if not exists(place):
        text = config.to_yaml().encode()
        write_bytes(join(out, CONFIG_FILE), text)
        claim = {"job": job, "config": config.identity(), "inputs": inputs}
        write_sealed(place, {**claim, CONFIG_HASH: hashlib.sha256(text).hexdigest()})
    return done


def find_job(
    out: str, *, job: str, config: Config, inputs: dict[str, str], portable: bool = False
) -> Certificate | None:
    """What `open_job` gives and refuses, without claiming the folder: nothing is written."""
    place = join(out, JOB_FILE)
    if exists(place):
        saved, claim = read_sealed(place), {"job": job, "config": config.identity(), "inputs": inputs}
        if saved.get("job") != job:
            raise ConfigError(f"{out} holds the output of {saved.get('job')}", cure="choose another --out")
        saved.pop(CONFIG_HASH, None)
        if portable:
            saved, claim = _last_parts(saved), _last_parts(claim)
        differences = _differences(saved, claim)
        if differences:
            raise ConfigError(
                f"{out} holds the output of another {job} run ({'; '.join(differences)})",
                cure="choose another --out, or delete that folder",
            )
    return read_certificate(out, job=job)


def read_job_config(out: str) -> dict[str, Any]:
    """The config that a job saved beside its output, where it lies too.

    Raises:
        DataError: it is missing, damaged or edited.
    """
    place = join(absolute(out), CONFIG_FILE)
    try:
        text, claim = read_bytes(place), read_sealed(join(absolute(out), JOB_FILE))
    except FileNotFoundError:
        raise DataError(f"{out} holds no {CONFIG_FILE}; cure: restore it, or make that folder again") from None
    if hashlib.sha256(text).hexdigest() != claim.get(CONFIG_HASH):
        raise DataError(f"{place} is not what the job wrote: it was damaged or edited; cure: restore it")
    return yaml.safe_load(text)


@contextmanager
def alone(out: str) -> Iterator[None]:
    """Hold a local folder for this process alone; the lock ends with the process, however it ends.

    Raises:
        ConfigError: another process works on it.
    """
    if is_remote(out):
        yield
        return
    import fcntl

    handle = os.open(absolute(out), os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another process works on {out}", cure="wait until it is done, or choose another --out"
            ) from None
        yield
    finally:
        os.close(handle)


def _differences(saved: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in sorted({*saved, *now}):
        before, after = saved.get(key), now.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key}: {_short(before)} there, {_short(after)} now")
    return found


def _last_parts(value: Any) -> Any:
    """The same with every absolute path and URI cut to its last part."""
    if isinstance(value, dict):
        return {key: _last_parts(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_last_parts(item) for item in value]
    is_place = isinstance(value, str) and (value.startswith("/") or "://" in value)
    return value.rstrip("/").rpartition("/")[2] if is_place else value


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."

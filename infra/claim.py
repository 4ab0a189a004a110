"""Claims an output folder for (job, config, inputs), and recognises it at the next start.

The same command finds its own folder and continues; another config or input is refused with the fields
that differ, so that no output is ever half one thing and half another.
"""

import json
from typing import Any

from infra.config import Config
from infra.errors import ConfigError
from infra.storage import (
    Certificate,
    check_writable,
    exists,
    join,
    read_certificate,
    read_json,
    write_bytes,
    write_json,
)

JOB_FILE = "job.json"


def open_job(
    out: str,
    *,
    job: str,
    config: Config,
    inputs: dict[str, str],
    hash_exclude: set[str] | None = None,
    portable: bool = False,
) -> Certificate | None:
    """Claim the folder `out` for this job, or recognise it as ours.

    Args:
        out: output folder.
        job: the job's name, as in its certificate.
        config: the resolved config; saved beside the output.
        inputs: name -> content hash of each input.
        hash_exclude: fields that can't change the output (worker counts, where Ray runs, `out`).
        portable: paths count by their last part, so that the output and its inputs may be moved.

    Returns:
        The certificate when the output is already whole; None when there is work to do.

    Raises:
        ConfigError: `out` is not writable, or holds the output of another config or input.
    """
    check_writable(out)
    exclude = {"out", "ray", "num_workers", *(hash_exclude or ())}
    claim = {
        "job": job,
        "config": {name: value for name, value in config.identity().items() if name not in exclude},
        "inputs": inputs,
    }
    place = join(out, JOB_FILE)
    if exists(place):
        saved = read_json(place)
        if portable:
            saved, claim = _last_parts(saved), _last_parts(claim)
        differences = _differences(saved, claim)
        if differences:
            raise ConfigError(
                f"{out} holds the output of another {job} run ({'; '.join(differences)})",
                cure="choose another --out, or delete that folder",
            )
    else:
        write_json(place, claim)
        write_bytes(join(out, "config.yaml"), config.to_yaml().encode())
    return read_certificate(out, job=job)


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

"""`vimi-data validate`: proves a set of prompt shards, trusting nothing that the job said about itself.

certificate    there, complete, in = out + filtered + dead
files          each with its certified size and sha256; none missing, none that is not listed
schema         every shard has the columns and types of `schema.PROMPTS`
rows           row counts, meta.parquet, unique ids, ids recomputed from their content
segments       order, ranks, scores, flags, every picture decodable and of bounded size
targets        sizes add up for all; a sample is decoded
guard          each law again, one document at a time, straight from the memory and the exclusion file
"""

from collections import Counter
from typing import Any

import numpy as np
import yaml

from infra.config import Config
from infra.errors import ConfigError, DataError
from infra.storage import Certificate, absolute, join, read_bytes, read_certificate
from pipeline.media.phash import hamming, mirror_mask
from pipeline.memory import Memory, open_memory
from pipeline.memory.embed.worker import row_doc_id
from pipeline.prompts.exclusion import Exclusion, read_exclusion, source_name
from pipeline.prompts.guard import EVALUATION_SPLITS, RA_CM3, GuardConfig
from pipeline.report.shard_checks import (
    Report,
    check_files,
    check_meta,
    check_prompt,
    check_rejected,
    check_target,
    read_rows,
)
from pipeline.schema import clip_id
from pipeline.shards import META_FILE, SHARD_JOBS

SAMPLED_TARGETS = 64
"""Targets that are decoded, evenly over the set; all are measured. Ours."""
Row = dict[str, Any]
FACTS = [
    "doc_id",
    "text",
    "source_uri",
    "source_sha256",
    "start_s",
    "end_s",
    "split",
    "phash",
    "image_embedding",
]


class ValidateConfig(Config):
    """What to prove."""

    prompts: str
    """Folder made by `vimi-data augment` or `vimi-data instruct`."""
    memory: str | None = None
    """Memory to check the guard's laws against; None = where the job says it was."""


def validate(config: ValidateConfig) -> Report:
    """Check everything; problems are collected, not raised.

    Raises:
        ConfigError: there is nothing certified at that place.
    """
    uri, report = absolute(config.prompts), Report()
    certificate = _certificate(uri, report)
    whole = check_files(uri, certificate, report)
    if META_FILE not in whole:
        return report
    check_meta(uri, certificate, whole, report)
    check_rejected(uri, certificate, whole, report)
    shards = [entry.path for entry in certificate.files if entry.path.startswith("part-")]
    step = max(1, certificate.num_out // SAMPLED_TARGETS)
    seen: Counter[str] = Counter()
    number = 0
    for name in (name for name in shards if name in whole):
        for row in read_rows(uri, name):
            seen[row["prompt_id"]] += 1
            check_prompt(row, f"{name} {row['prompt_id']}", report)
            if number % step == 0:
                check_target(row, f"{name} {row['prompt_id']}", report)
            number += 1
    report.checked["prompts"] = number
    for twice in (key for key, count in seen.items() if count > 1):
        report.add("ids", f"{twice} stands {seen[twice]} times")
    check_guard(uri, [name for name in shards if name in whole], config, certificate, report)
    return report


def _certificate(uri: str, report: Report) -> Certificate:
    try:
        certificate = read_certificate(uri)
    except DataError as error:
        raise ConfigError(str(error), cure="make the shards again") from None
    if certificate is None or certificate.job not in SHARD_JOBS:
        made = f"was made by {certificate.job!r}" if certificate else "holds no certificate"
        raise ConfigError(
            f"{uri} {made}",
            legal="the output folder of `vimi-data augment` or `vimi-data instruct`",
            cure="run that command first, or again if it was stopped",
        )
    try:
        certificate.check()
    except DataError as error:
        report.add("certificate", str(error))
    report.checked["certificate"] = 1
    return certificate


def check_guard(
    uri: str, names: list[str], config: ValidateConfig, certificate: Certificate, report: Report
) -> None:
    """Check every retrieved document of every prompt in the shards `names`."""
    made_with = yaml.safe_load(read_bytes(join(uri, "config.yaml")))
    facts = certificate.facts
    if "memory" not in made_with and made_with.get("prompts"):  # instruct: the laws are augment's
        prompts = absolute(made_with["prompts"])
        made_with = yaml.safe_load(read_bytes(join(prompts, "config.yaml")))
        facts = (read_certificate(prompts) or certificate).facts
    place = config.memory or made_with.get("memory")
    if place is None:
        return
    try:
        memory = open_memory(absolute(place), version=facts.get("memory_version"))
    except ConfigError as error:
        report.add("guard", f"can't be checked: {error}; give memory if it was moved")
        return
    guard = GuardConfig.model_validate(made_with.get("guard") or {})
    if guard.max_similarity is None:
        guard = guard.model_copy(update={"max_similarity": facts.get("max_similarity")})
    listed = Exclusion()
    if guard.exclude is not None:
        listed = read_exclusion(guard.exclude, source_pattern=guard.source_pattern)
    for name in names:
        rows = list(read_rows(uri, name))
        facts = _facts(rows, memory)
        for row in rows:
            where = f"{name} {row['prompt_id']}"
            own = facts.get(row_doc_id(row))
            if (reason := _excluded(row["clip_id"], row, own, guard, listed)) is not None:
                report.add("guard", f"{where}: the clip itself: {reason}")
            shown = (s["document"]["doc_id"] for s in row["segments"] if s["document"])
            for doc_id in dict.fromkeys(shown):
                report.checked["documents against the guard"] += 1
                for problem in problems(row, own, facts.get(doc_id), guard, listed):
                    report.add("guard", f"{where}: document {doc_id}: {problem}")


def _facts(rows: list[Row], memory: Memory) -> dict[str, Row]:
    """What the memory says of the shown documents, and of the prompts' own."""
    shown = [s["document"]["doc_id"] for row in rows for s in row["segments"] if s["document"]]
    wanted = list(dict.fromkeys([*shown, *(row_doc_id(row) for row in rows)]))
    return {row["doc_id"]: row for row in memory.rows(wanted, FACTS).to_pylist()}


def problems(
    row: Row, own: Row | None, document: Row | None, guard: GuardConfig, listed: Exclusion
) -> list[str]:
    """Which laws this document breaks beside this clip."""
    if document is None:
        return ["not in the memory"]
    found = []
    if row["source_sha256"] and row["source_sha256"] == document["source_sha256"]:
        found.append("from the same file")
    names = [source_name(r["source_uri"] or "", guard.source_pattern) for r in (row, document)]
    if names[0] and names[0] == names[1]:
        found.append("from the same source video")
    source = document["source_sha256"] or document["source_uri"]
    clip = clip_id(source, document["start_s"] or 0.0, document["end_s"] or 0.0, document["text"])
    ids = clip if document["doc_id"] not in listed.ids else document["doc_id"]
    if (reason := _excluded(ids, document, document, guard, listed)) is not None:
        found.append(reason)
    if own is not None:
        if _copies(own["phash"], document["phash"], guard):
            found.append("a copy by perceptual hash")
        pair = [np.asarray(r["image_embedding"], np.float32).astype(float) for r in (own, document)]
        bound = RA_CM3 if guard.max_similarity is None else guard.max_similarity
        if bound < 1 and float(pair[0] @ pair[1]) > bound + 1e-6:
            found.append(f"similarity {float(pair[0] @ pair[1]):.4f}")
    return found


def _copies(one: int | None, other: int | None, guard: GuardConfig) -> bool:
    if not one or not other or guard.max_hash_bits < 0:
        return False
    mirrored = hamming(one ^ mirror_mask(), other) <= guard.max_hash_bits
    return mirrored or hamming(one, other) <= guard.max_hash_bits


def _excluded(row_id: str, row: Row, pictured: Row | None, guard: GuardConfig, listed: Exclusion) -> str | None:
    """Why a clip or document belongs to an evaluation set; None = it doesn't."""
    if (row["split"] or "").lower() in EVALUATION_SPLITS:
        return f"of the split {row['split']}"
    phash = (pictured or {}).get("phash") or 0
    near = phash and any(hamming(phash, p) <= guard.max_hash_bits for p in listed.phashes)
    source = source_name(row["source_uri"] or "", guard.source_pattern)
    is_listed = row_id in listed.ids or row["source_sha256"] in listed.hashes
    return "in the exclusion file" if is_listed or source in listed.sources or near else None

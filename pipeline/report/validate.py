"""`vimi-data validate`: proves a set of prompt shards, trusting nothing that the job said about itself.

certificate    there, complete, in = out + filtered + dead
files          each with its certified size and sha256; none missing, none that is not listed
schema         every shard has the columns and types of `schema.PROMPTS`
rows           row counts, meta.parquet, unique ids, ids recomputed from their content
segments       order, ranks, scores, flags, every picture decodable and of bounded size
targets        sizes add up for all; a sample is decoded
guard          the guard's rules again, on what the memory itself says of the documents that are shown
"""

from array import array
from collections import Counter
from hashlib import blake2b
from itertools import chain
from typing import Any

import numpy as np

from infra.certificate import Certificate, read_certificate
from infra.claim import read_job_config
from infra.config import Config
from infra.errors import DataError, VimiError
from infra.storage import absolute
from pipeline.memory import Memory, open_memory
from pipeline.memory.embed.worker import row_doc_id
from pipeline.memory.vectors import vectors_numpy
from pipeline.prompts.augment.facts import excluded, guarded_clip, guarded_documents
from pipeline.prompts.exclusion import Exclusion, read_exclusion
from pipeline.prompts.guard import GuardConfig, Verdict, judge
from pipeline.report.shard_checks import (
    Report,
    check_files,
    check_meta,
    check_prompt,
    check_rejected,
    check_target,
    read_rows,
)
from pipeline.shards import META_FILE, is_shard, shard_certificate

SAMPLED_TARGETS = 64
"""Targets that are decoded, evenly over the set; all are measured. Ours."""
Row = dict[str, Any]
FACTS = ("doc_id", "text", "source_uri", "source_sha256", "start_s", "end_s", "split", "phash")
VECTOR = "image_embedding"
BROKEN = {
    Verdict.SELF: "the clip itself",
    Verdict.SIBLING: "from the same source video",
    Verdict.EVALUATION: "of an evaluation set",
    Verdict.DUPLICATE: "a copy by perceptual hash",
    Verdict.SIMILAR: "too similar by its embedding",
}
"""What each verdict of the guard says of a document."""


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
    certificate = shard_certificate(uri)
    report.checked["certificate"] = 1
    try:
        certificate.check()
    except DataError as error:
        report.add("certificate", str(error))
    whole = check_files(uri, certificate, report)
    if META_FILE not in whole:
        return report
    check_meta(uri, certificate, whole, report)
    check_rejected(uri, certificate, whole, report)
    shards = [entry.path for entry in certificate.files if is_shard(entry.path)]
    step = max(1, certificate.num_out // SAMPLED_TARGETS)
    ids, number = array("Q"), 0
    for name in (name for name in shards if name in whole):
        for row in read_rows(uri, name):
            ids.append(_hash(row["prompt_id"]))
            check_prompt(row, f"{name} {row['prompt_id']}", report)
            if number % step == 0:
                check_target(row, f"{name} {row['prompt_id']}", report)
            number += 1
    report.checked["prompts"] = number
    check_unique(uri, [name for name in shards if name in whole], np.frombuffer(ids, np.uint64), report)
    check_guard(uri, [name for name in shards if name in whole], config, certificate, report)
    return report


def check_unique(uri: str, names: list[str], hashes: np.ndarray, report: Report) -> None:
    """Tell of ids that stand in several rows; `hashes` are of all rows' ids: 8 bytes a row, not a string."""
    each, counts = np.unique(hashes, return_counts=True)
    repeated = set(each[counts > 1].tolist())
    if not repeated:
        return
    read = chain.from_iterable(read_rows(uri, name, ["prompt_id"]) for name in names)
    found = Counter(row["prompt_id"] for row in read if _hash(row["prompt_id"]) in repeated)
    for twice in (key for key, count in found.items() if count > 1):
        report.add("ids", f"{twice} stands {found[twice]} times")


def _hash(name: str) -> int:
    return int.from_bytes(blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def check_guard(
    uri: str, names: list[str], config: ValidateConfig, certificate: Certificate, report: Report
) -> None:
    """Check every retrieved document of every prompt in the shards `names`."""
    made_with = read_job_config(uri)
    facts = certificate.facts
    if "memory" not in made_with and made_with.get("prompts"):  # instruct: the laws are augment's
        prompts = absolute(made_with["prompts"])
        made_with = read_job_config(prompts)
        facts = (read_certificate(prompts) or certificate).facts
    place = config.memory or made_with.get("memory")
    if place is None:
        return
    try:
        memory = open_memory(absolute(place), version=facts.get("memory_version"))
    except VimiError as error:
        report.add("guard", f"can't be checked: {error}; give memory if it was moved")
        return
    guard = GuardConfig.model_validate(made_with.get("guard") or {})
    if guard.max_similarity is None:
        guard = guard.model_copy(update={"max_similarity": facts.get("max_similarity")})
    listed = Exclusion()
    if guard.exclude is not None:
        listed = read_exclusion(guard.exclude, source_pattern=guard.source_pattern)
    for name in names:
        _check_documents(name, list(read_rows(uri, name)), memory, guard, listed, report)


def _check_documents(
    name: str, rows: list[Row], memory: Memory, guard: GuardConfig, listed: Exclusion, report: Report
) -> None:
    """The guard's own rules on each shown document of a shard, with what the memory itself says of it."""
    shown = [list(dict.fromkeys(s["document"]["doc_id"] for s in r["segments"] if s["document"])) for r in rows]
    wanted = list(dict.fromkeys([*chain(*shown), *map(row_doc_id, rows)]))
    table = memory.rows(wanted, [*FACTS, VECTOR])
    place = {doc_id: number for number, doc_id in enumerate(table["doc_id"].to_pylist())}
    vectors, phashes = vectors_numpy(table[VECTOR].combine_chunks()), table["phash"].to_pylist()
    documents = guarded_documents(table, vectors, guard, listed)
    own = [place.get(row_doc_id(row)) for row in rows]
    clips = [{**row, "phash": None if n is None else phashes[n]} for row, n in zip(rows, own, strict=True)]
    reasons = excluded(clips, guard, listed)
    for row, clip, n, doc_ids, reason in zip(rows, clips, own, shown, reasons, strict=True):
        where = f"{name} {row['prompt_id']}"
        report.checked["documents against the guard"] += len(doc_ids)
        if reason is not None:
            report.add("guard", f"{where}: the clip itself: {reason}")
        for doc_id in (doc_id for doc_id in doc_ids if doc_id not in place):
            report.add("guard", f"{where}: document {doc_id}: not in the memory")
        known = [doc_id for doc_id in doc_ids if doc_id in place]
        facts = guarded_clip(clip, (), None if n is None else vectors[n], guard)
        verdicts = judge(guard, facts, documents, np.array([place[doc_id] for doc_id in known], np.int64))
        for doc_id, verdict in zip(known, verdicts.tolist(), strict=True):
            if verdict != Verdict.ALLOWED:
                report.add("guard", f"{where}: document {doc_id}: {BROKEN[verdict]}")

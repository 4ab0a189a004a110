"""Where the page's contents come from, what became of every row, and what to run next."""

import json
import shlex
from datetime import UTC, datetime
from typing import Any

from infra.certificate import Certificate
from infra.progress import bytes_in_words, span
from pipeline.report.read import Parts, ReportConfig
from pipeline.schema import RETRIABLE

UNITS = {
    "crawl": "rows",
    "build-index": "clips",
    "augment": "clips",
    "subjects": "phrases",
    "instruct": "draws",
}
SENTENCES = {
    "crawl": "The corpus, good rows and bad.",
    "build-index": "Each good one becomes a document of the memory.",
    "augment": "Each caption meets the memory and becomes a prompt.",
    "subjects": "Each phrase in each frame gets a cut-out or has a reason.",
    "instruct": "A draw is a clip and a task; it ends as an instruction or has a reason.",
}


def fates(parts: Parts) -> list[dict[str, Any]]:
    """For each job: in = out + filtered (by reason) + dead (by reason), as a bar and a list."""
    return [_fate(job, certificate) for job, (_, certificate) in parts.certificates.items()]


def _fate(job: str, certificate: Certificate) -> dict[str, Any]:
    filtered = sorted(certificate.filtered.items(), key=lambda item: -item[1])
    dead = sorted(certificate.dead.items(), key=lambda item: -item[1])
    rows = [("kept", "kept", certificate.num_out)]
    rows += [("filtered", _words(name), count) for name, count in filtered if count]
    rows += [("dead", _words(name), count) for name, count in dead if count]
    total = max(certificate.num_in, 1)
    return {
        "job": job,
        "unit": UNITS[job],
        "sentence": SENTENCES[job],
        "num_in": certificate.num_in,
        "rows": [{"style": s, "name": n, "count": c, "share": c / total} for s, n, c in rows],
    }


def _words(status: str) -> str:
    return status.removeprefix("filtered_").replace("_", " ")


def summary(parts: Parts) -> list[dict[str, str]]:
    """The page in a handful of numbers."""
    tiles = []
    found = {job: certificate for job, (_, certificate) in parts.certificates.items()}
    if "crawl" in found:
        crawl = found["crawl"]
        tiles.append(_tile(crawl.num_out, "good clips", f"of {crawl.num_in:,} rows"))
    if "build-index" in found:
        model = found["build-index"].facts.get("model", {})
        name = model.get("name", "") if isinstance(model, dict) else str(model)
        tiles.append(_tile(found["build-index"].num_out, "documents", f"CLIP {name}".strip()))
    if parts.prompts:
        tiles.append(_tile(parts.prompts.num_rows, "multimodal prompts", "stage 1"))
    if parts.instructions:
        tiles.append(_tile(parts.instructions.num_rows, "instructions", "stage 2"))
    for run in parts.runs:
        last = run.records[-1].get("samples", 0) if run.records else 0
        tiles.append(_tile(int(last), "samples trained", run.name))
    return tiles


def _tile(number: int, what: str, more: str) -> dict[str, str]:
    return {"number": f"{number:,}", "what": what, "more": more}


def retrieval(parts: Parts) -> list[str]:
    """What augment measured of its documents: do they say anything of their targets?"""
    if "augment" not in parts.certificates:
        return []
    _, certificate = parts.certificates["augment"]
    bare = certificate.facts.get("num_documents", {}).get("0", 0)
    count = f"{certificate.num_out - bare:,} of {certificate.num_out:,} prompts have documents"
    remarks = [count, *certificate.facts.get("remarks", ())]
    return [f"{remark[:1].upper()}{remark[1:]}." for remark in remarks]


def provenance(parts: Parts) -> list[dict[str, Any]]:
    """One line for each certificate: when, how long, hashes, files, facts."""
    items = [(job, folder, certificate) for job, (folder, certificate) in parts.certificates.items()]
    items += [(run.name, run.uri, run.certificate) for run in parts.runs if run.certificate]
    return [_origin(name, folder, certificate) for name, folder, certificate in items]


def _origin(name: str, folder: str, certificate: Certificate) -> dict[str, Any]:
    made = datetime.fromtimestamp(certificate.created_at_s, UTC)
    return {
        "name": name,
        "folder": "/".join(folder.rsplit("/", 2)[-2:]),
        "made": made.strftime("%Y-%m-%d %H:%M UTC") if certificate.created_at_s else "",
        "took": span(certificate.wall_s) if certificate.wall_s else "",
        "version": certificate.version,
        "config_hash": certificate.config_hash,
        "content_hash": certificate.content_hash(),
        "files": f"{len(certificate.files):,}",
        "size": bytes_in_words(sum(entry.num_bytes for entry in certificate.files)),
        "inputs": certificate.inputs,
        "facts": json.dumps(certificate.facts, indent=1, ensure_ascii=False)[:6000],
    }


def next_steps(config: ReportConfig, parts: Parts) -> list[dict[str, str]]:
    """Commands that make sense now, each with its reason; words in capitals are for the reader to choose."""
    steps: list[tuple[str, str]] = []
    found = {job: certificate for job, (_, certificate) in parts.certificates.items()}
    clips, memory, prompts, instructions, run = (
        shlex.quote(place) if place else name
        for place, name in [
            (config.clips, "CLIPS"),
            (config.memory, "MEMORY"),
            (config.prompts, "PROMPTS"),
            (config.instructions, "INSTRUCTIONS"),
            (config.runs[-1] if config.runs else None, "RUN"),
        ]
    )
    train = "--config CONFIG --out OUT"
    lost = sum(n for status, n in found["crawl"].dead.items() if status in RETRIABLE) if "crawl" in found else 0
    if lost:
        reason = f"{lost:,} rows failed; a retry may cure them."
        steps.append((f"vimi-data redrive {clips} --out OUT", reason))
    if not config.clips and not found:
        steps.append(("vimi-data crawl VIDEOS --out CLIPS", "Start from your own videos."))
    if not config.memory:
        reason = "Make the memory that captions are looked up in."
        steps.append((f"vimi-data build-index {clips} --out MEMORY", reason))
    elif not config.prompts:
        reason = "Give every caption its in-context examples."
        steps.append((f"vimi-data augment {clips} --memory {memory} --out PROMPTS", reason))
    if config.prompts:
        steps.append((f"vimi-data validate {prompts}", "Prove the shards from scratch before they travel."))
        if not config.runs:
            steps.append((f"vimi-train stage1 {prompts} {train}", "Pretrain the generator on these prompts."))
        if not config.instructions:
            reason = "Make the three tasks of stage 2."
            steps.append((f"vimi-data instruct {prompts} --out INSTRUCTIONS", reason))
    if config.instructions and len(config.runs) < 2:
        reason = "Tune the generator on these instructions."
        steps.append((f"vimi-train stage2 {instructions} --from {run} {train}", reason))
    if config.runs and not config.samples:
        reason = "See what the generator has learnt."
        steps.append((f'vimi-train sample {run} "A dog runs on grass." --out SAMPLES', reason))
    return [{"command": command, "reason": reason} for command, reason in steps]

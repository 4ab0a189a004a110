"""One slice of the captions -> one shard and its receipt. Runs in a Ray worker."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from infra.storage import join
from pipeline.job import Receipt
from pipeline.memory.embed.units import read_slice
from pipeline.prompts.augment.config import AugmentConfig
from pipeline.prompts.augment.match import Match
from pipeline.prompts.augment.target import Row, Target
from pipeline.prompts.augment.workbench import Workbench, workbench
from pipeline.schema import CLIPS, PROMPTS, Role, Status, Task, prompt_id
from pipeline.shards import rejected_row, shard_name, write_shard

ORIGIN = (
    "source_uri",
    "source_sha256",
    "start_s",
    "end_s",
    "width_px",
    "height_px",
    "source_name",
    "licence",
    "split",
)


@dataclass(frozen=True)
class AugmentWorker:
    """Picklable: payload -> receipt. `config_hash` names what the output depends on."""

    config: AugmentConfig
    config_hash: str

    def __call__(self, payload: dict[str, Any]) -> Receipt:
        bench = workbench(self.config.model_dump_json())
        rows = [row for piece in payload["pieces"] for row in good_rows(*piece)]
        silent = [row for row in rows if not has_caption(row)]
        rows, left_out = bench.without_excluded([row for row in rows if has_caption(row)])
        left_out += [rejected_row(row, Status.FILTERED_NO_CAPTION, "no caption") for row in silent]
        rows, targets, failed = bench.with_targets(rows)
        matches = bench.match(rows, targets)
        pictures = bench.pictures(matches)
        prompts = [
            self._prompt(row, target, match, bench, pictures)
            for row, target, match in zip(rows, targets, matches, strict=True)
        ]
        file = None
        if prompts:
            place = join(self.config.out, shard_name(payload["number"]))
            entry = write_shard(place, prompts, PROMPTS, row_group_rows=self.config.row_group_rows)
            file = entry.model_dump()
        lost = [*left_out, *failed]
        return {
            "file": file,
            "num_in": len(rows) + len(lost),
            "rejected": lost,
            "max_similarity": bench.matcher.guard.max_similarity if any(m.docs for m in matches) else None,
            "refused": dict(sum((Counter(match.refused) for match in matches), Counter())),
            "documents": dict(Counter(str(len(match.docs)) for match in matches)),
            "notes": dict(Counter(row["status"] for row in lost)),
        }

    def _prompt(
        self, row: Row, target: Target, match: Match, bench: Workbench, pictures: dict[str, bytes]
    ) -> dict[str, Any]:
        fewer = len(match.docs) < self.config.retrieve.k
        return {
            "prompt_id": prompt_id(Task.PRETRAIN, row["clip_id"], self.config_hash),
            "task": Task.PRETRAIN.value,
            "clip_id": row["clip_id"],
            "media": row["media"],
            "caption": row["caption"],
            "segments": [
                *self._segments(match, bench, pictures),
                {"type": "text", "role": Role.CAPTION.value, "text": row["caption"]},
            ],
            "num_documents": len(match.docs),
            "flags": ["fewer_than_k"] if fewer else [],
            "target": target.value,
            **{name: row[name] for name in ORIGIN},
            "fps": row["fps"],
            "memory_version": bench.memory.version,
            "model_hash": bench.memory.model_hash,
            "config_hash": self.config_hash,
        }

    def _segments(self, match: Match, bench: Workbench, pictures: dict[str, bytes]) -> list[dict[str, Any]]:
        """Retrieved text and picture of each document, best first (the order of VIMI's figure)."""
        found: list[dict[str, Any]] = []
        rows = bench.documents.table.take(pa.array(match.docs, pa.int64())).to_pylist()
        places = zip(rows, match.scores, match.similarities, strict=True)
        for rank, (row, score, similarity) in enumerate(places, start=1):
            document = {
                "doc_id": row["doc_id"],
                "retriever": self.config.retrieve.retriever,
                "rank": rank,
                "score": score,
                "clip_similarity": similarity,
                **{name: row[name] for name in ORIGIN[:4]},
            }
            retrieved = {"role": Role.RETRIEVED.value, "document": document}
            found.append({"type": "text", "text": row["text"] or "", **retrieved})
            if pictures.get(row["doc_id"]):
                found.append({"type": "image", "image": pictures[row["doc_id"]], **retrieved})
        return found


def good_rows(uri: str, start: int, rows: int) -> list[Row]:
    """The usable ones of rows [start, start + rows) of a part."""
    table = read_slice(uri, start, rows, CLIPS.names)
    return [row for row in table.to_pylist() if row["status"] == Status.OK]


def has_caption(row: Row) -> bool:
    return bool((row["caption"] or "").strip())

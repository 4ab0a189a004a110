"""Held-out rows of our own data: of prompt shards those that training keeps back, of a crawl its test split."""

from typing import Any

from infra.certificate import input_certificate
from infra.errors import ConfigError
from infra.splits import is_held_out
from pipeline.prompts.benchmark.item import Exam, Item
from pipeline.schema import CLIPS, Media, Status
from pipeline.shards import SHARD_JOBS, ShardSet, open_part, shards_of

Row = dict[str, Any]


def read_own(source: str, *, held_out_frac: float) -> Exam:
    """Prompts of the held-out rows, in the source's order.

    Args:
        source: output of crawl, augment or instruct.
        held_out_frac: as in the training's config (`validation.held_out_frac`): the same clips are kept back.

    Raises:
        ConfigError: another place, or nothing held out there.
    """
    certificate = input_certificate(source)
    job = certificate.job if certificate else None
    if certificate is not None and job == "crawl":
        clips = (row for part in shards_of(source, certificate) for row in _clips(part))
        rows = [row for row in clips if _counts(row, held_out_frac)]
        items = [_of_clip(row) for row in rows]
    elif job in SHARD_JOBS:
        rows = _rows(source, held_out_frac)
        items = [Item(key=row["prompt_id"], caption=row["caption"], row=row) for row in rows]
    else:
        raise ConfigError(f"no data of ours at {source}", legal="the output of crawl, augment or instruct")
    if not items:
        raise ConfigError(
            f"no row of {source} is held out",
            legal="rows of a test or val split, or of parents that held_out_frac keeps back",
            cure="--set held_out_frac=0.05, and the same in the training's validation.held_out_frac",
        )
    return Exam(items, [_listed(row) for row in rows], {"held_out_frac": held_out_frac})


def _clips(part: str) -> list[Row]:
    return open_part(part).read(columns=CLIPS.names).to_pylist()


def _counts(row: Row, frac: float) -> bool:
    is_good = (
        row["status"] == Status.OK and row["media"] == Media.VIDEO and bool((row["caption"] or "").strip())
    )
    return is_good and _kept_back(row, frac)


def _kept_back(row: Row, frac: float) -> bool:
    """The trainer's own rule."""
    return is_held_out(row["source_sha256"] or row["source_uri"] or "", row["split"], frac)


def _of_clip(row: Row) -> Item:
    return Item(
        key=row["clip_id"],
        caption=row["caption"].strip(),
        video=row["local_uri"],
        split=row["split"] or "held out",
        start_s=row["start_s"] or 0.0,
        end_s=row["end_s"],
    )


def _rows(source: str, frac: float) -> list[Row]:
    shards = ShardSet(source)
    rows = (row for group in range(len(shards)) for row in shards.read_row_group(group).to_pylist())
    return [row for row in rows if row["media"] == Media.VIDEO and _kept_back(row, frac)]


def _listed(row: Row) -> dict[str, str]:
    """By what documents of the same source are known: where the bytes lie now says nothing of it."""
    return {name: row[name] for name in ("clip_id", "source_uri", "source_sha256") if row[name]}

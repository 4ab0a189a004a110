"""`vimi-data caption`: a model's words for clips that have none, or too few; the old ones are kept beside them.

    certified clips ─ slices ─▶ workers: frames, an image-text-to-text model, CLIP's second look ─▶ clips

The result is a crawl's output like any other, in a folder of its own. A silent clip that the crawl left out is
judged by the crawl's own filters once it has a caption. A caption that CLIP finds unlike its clip is not used:
a silent clip leaves with that status, another keeps the words that it had.
"""

import string
from collections import Counter
from collections.abc import Iterator
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image
from pydantic import Field, field_validator

from infra.certificate import Certificate, require_certificate
from infra.clip import ClipConfig, check_clip, load_clip
from infra.config import Incidental, Location, NameOrFolder
from infra.errors import ConfigError
from infra.pictures import decode_picture, fit_inside
from infra.pretrained import weights_version
from infra.storage import join
from pipeline.clips.crawl import JOB
from pipeline.clips.filters import FilterConfig
from pipeline.clips.redrive import crawl_config
from pipeline.clips.table import Row, write_clips
from pipeline.job import NetworkJobConfig, count_fates, refuse_failures, run_job, run_networks
from pipeline.journal import Receipt, Receipts, Unit
from pipeline.media.frames import clip_times, decode_frames
from pipeline.media.isolate import Isolated
from pipeline.media.store import open_media, read_media, row_errors
from pipeline.schema import CLIPS, Media, RowError, Status, clip_id, content_id
from pipeline.shards import read_slice

if TYPE_CHECKING:
    from infra.clip import Clip
    from pipeline.clips.captioner import Captioner

WHAT = "caption"
MODEL_FIELD = "model"
LOOK_PX = 448
"""Longest side of the frames that the model sees; bounds the tokens of families that take pictures at their own
size. Ours."""


class CaptionConfig(NetworkJobConfig):
    """Clips -> clips with captions. `out` gets a whole table, the captioned rows in their places."""

    clips: Incidental[Location]
    """Certified output of a crawl (or of a redrive, or of this)."""
    model: Incidental[NameOrFolder] = "HuggingFaceTB/SmolVLM-500M-Instruct"
    """Hub name or folder of an image-text-to-text model of transformers (SmolVLM, Qwen-VL, LLaVA, ...). What it
    holds decides the output, not where it lies."""
    which: Literal["silent", "poor", "all"] = "silent"
    """silent: clips without a caption; poor: also those of fewer than `min_words` words; all: every clip."""
    min_words: int = Field(default=4, ge=1, le=1000)
    """Words of a caption that is not poor. Ours."""
    prompt: str = "Describe in one sentence what happens in this video."
    """What the model is asked, after the frames; `{caption}` stands for the words that the clip has."""
    num_frames: int = Field(default=4, ge=1, le=64)
    """Frames that the model sees, evenly spaced; of a picture one. Ours."""
    max_tokens: int = Field(default=64, ge=1, le=4096)
    """Longest answer, tokens. Ours."""
    batch_size: int = Field(default=8, ge=1, le=1024)
    """Clips that the model answers at once. Ours."""
    clip: ClipConfig | None = ClipConfig()
    """The CLIP that looks whether a caption is of its clip; null = every answer is believed."""
    min_similarity: float = Field(default=0.2, ge=-1, le=1)
    """Least cosine of a caption with the mean of the frames. Ours, for ViT-B-32 of LAION-2B, whose unrelated
    pairs lie about .1 and right ones about .3; other CLIPs have other scales."""
    unit_rows: int = Field(default=256, ge=1, le=65536)
    """Rows of the table that make one unit of work: what a kill loses at most, for each worker. Ours."""
    timeout_s: Incidental[float] = Field(default=120.0, gt=0, le=86_400)
    """Time that the frames of one clip may take to be decoded; then it is a row `timeout`."""
    max_failed_frac: Incidental[float] = Field(default=0.5, ge=0, le=1)
    """Ceiling on dead rows, as a share of all rows. Ours."""

    @field_validator("prompt")
    @classmethod
    def _names_captions_alone(cls, value: str) -> str:
        try:
            names = {name for _, name, _, _ in string.Formatter().parse(value) if name is not None}
        except ValueError as error:
            raise ValueError(f"{error}; legal: words, and {{caption}}; double other braces") from None
        if not value.strip() or names - {"caption"}:
            raise ValueError("legal: words, and {caption} for those that the clip has; double other braces")
        return value


def check(config: CaptionConfig) -> FilterConfig:
    """Preflight: the clips are whole, model and CLIP are there, and the output is another folder.

    Raises:
        ConfigError: which of these is not so.
    """
    require_certificate(config.clips, job=JOB, made_by="vimi-data crawl")
    if config.out == config.clips:
        raise ConfigError("the output is the input", cure="choose another --out")
    from pipeline.clips.captioner import check_captioner

    check_captioner(config.model, field=MODEL_FIELD)
    if config.clip is not None:
        check_clip(config.clip)
    filters = crawl_config(config.clips).filters
    return filters.model_copy(update={"require_caption": True})


def run(config: CaptionConfig) -> Certificate:
    """Caption, or continue what was stopped; a finished one is recognised and left alone.

    Raises:
        ConfigError: see `check`.
        TooManyFailuresError: more dead rows than `max_failed_frac`.
    """
    filters = check(config)
    source = require_certificate(config.clips, job=JOB, made_by="vimi-data crawl")
    version = weights_version(config.model, "captioner", field=MODEL_FIELD)
    inputs = {"clips": source.content_hash(), "model": version}
    units = list(plan_units(config, source))
    worker = partial(Worker, config, filters, name_of(config.model, version))
    work = partial(run_networks, config, units, worker, what=WHAT)
    finish = partial(_finish, config, filters, inputs, units)
    return run_job(JOB, config, inputs, work=work, finish=finish)


def name_of(model: str, version: str) -> str:
    """How rows call the model: the hub's name and commit, or a folder's last part and hash."""
    return version if "@" in version else f"{model.rstrip('/').rpartition('/')[2]}@{version[:12]}"


def plan_units(config: CaptionConfig, source: Certificate) -> Iterator[Unit]:
    """Slices of the table's files, in order."""
    for file in source.files:
        for start in range(0, file.rows, config.unit_rows):
            payload = {"file": file.path, "start": start, "rows": min(config.unit_rows, file.rows - start)}
            yield Unit(content_id(file.path, start), payload)


class Worker:
    """Captions the rows of a slice that want it; the model is loaded when the first one comes."""

    def __init__(self, config: CaptionConfig, filters: FilterConfig, name: str) -> None:
        self.config, self.filters, self.name = config, filters, name
        self.device = "cuda" if config.num_gpus else "cpu"
        self.child = Isolated(timeout_s=config.timeout_s)

    @cached_property
    def captioner(self) -> "Captioner":
        from pipeline.clips.captioner import Captioner

        return Captioner(self.config.model, self.device, field=MODEL_FIELD)

    @cached_property
    def clip(self) -> "Clip | None":
        return load_clip(self.config.clip, self.device) if self.config.clip is not None else None

    def close(self) -> None:
        self.child.close()

    def __call__(self, payload: dict[str, Any]) -> Receipt:
        place = join(self.config.clips, payload["file"])
        rows = read_slice(place, payload["start"], payload["rows"], CLIPS.names).to_pylist()
        wanted = [n for n, row in enumerate(rows) if wants_caption(row, self.config)]
        changed: dict[str, Row] = {}
        counts: Counter[str] = Counter()
        for start in range(0, len(wanted), self.config.batch_size):
            batch = wanted[start : start + self.config.batch_size]
            for n, (row, what) in zip(batch, self.caption([rows[n] for n in batch]), strict=True):
                counts[what] += 1
                if row is not None:
                    changed[str(n)] = row
        return {"changed": changed, "counts": dict(counts), "notes": dict(counts)}

    def caption(self, rows: list[Row]) -> list[tuple[Row | None, str]]:
        """For each row the one that takes its place (None = it stays), and what became of it."""
        seen = [self._frames(row) for row in rows]
        shown = {n: list(frames) for n, frames in enumerate(seen) if not isinstance(frames, RowError)}
        asked = [self.config.prompt.format(caption=rows[n].get("caption") or "") for n in shown]
        answers = self.captioner.answer(list(shown.values()), asked, max_tokens=self.config.max_tokens)
        said = dict(zip(shown, answers, strict=True))
        out: list[tuple[Row | None, str]] = []
        for n, (row, frames) in enumerate(zip(rows, seen, strict=True)):
            if isinstance(frames, RowError):
                out.append(({**row, "status": frames.status.value, "error": str(frames)}, "unreadable"))
            else:
                out.append(self._use(row, frames, said[n]))
        return out

    def _frames(self, row: Row) -> np.ndarray | RowError:
        try:
            return self.child.call("pipeline.clips.caption:look", row, self.config.num_frames)
        except RowError as error:
            return error
        except Exception as error:  # noqa: BLE001 - the row boundary: one odd file must cost one row
            return RowError(Status.UNDECODABLE, f"{type(error).__name__}: {error}"[:300])

    def _use(self, row: Row, frames: np.ndarray, words: str) -> tuple[Row | None, str]:
        """The row with a model's words, if they are any and of this clip."""
        similarity = self._similarity(frames, words) if words else 0.0
        if not words:
            return _refused(row, Status.FILTERED_NO_CAPTION, "the model says nothing"), "nothing said"
        if similarity is not None and similarity < self.config.min_similarity:
            reason = f"similarity {similarity:.3f} < {self.config.min_similarity:g}: {words[:80]}"
            return _refused(row, Status.FILTERED_UNLIKE_CAPTION, reason), "unlike"
        made = rewritten(row, words, self.name)
        if made["status"] != Status.OK.value:
            made = self._judge(made)
        return made, "captioned"

    def _similarity(self, frames: np.ndarray, words: str) -> float | None:
        """Cosine of the words with the mean of the frames."""
        if self.clip is None:
            return None
        mean = self.clip.encode_images(list(frames)).mean(axis=0)
        return float(self.clip.encode_texts([words])[0] @ mean / max(float(np.linalg.norm(mean)), 1e-6))

    def _judge(self, row: Row) -> Row:
        """A clip that the crawl left out unseen, by the filters that it has not met."""
        try:
            return self.child.call("pipeline.clips.parent:judge_clip", row, self.filters)
        except RowError as error:
            return {**row, "status": error.status.value, "error": str(error)}
        except Exception as error:  # noqa: BLE001 - the row boundary: one odd file must cost one row
            told = f"{type(error).__name__}: {error}"[:300]
            return {**row, "status": Status.UNDECODABLE.value, "error": told}


def wants_caption(row: Row, config: CaptionConfig) -> bool:
    """Is it a good clip whose words are to be replaced, or one that was left out for having none?"""
    if row["status"] == Status.FILTERED_NO_CAPTION:
        return True
    if row["status"] != Status.OK:
        return False
    words = len((row["caption"] or "").split())
    return config.which == "all" or words == 0 or (config.which == "poor" and words < config.min_words)


def rewritten(row: Row, words: str, model: str) -> Row:
    """The row with a model's words: it is another clip to everything that reads it, and says what it was."""
    found = row.get("caption_found") if row.get("caption_model") else row["caption"]
    source = row["source_sha256"] or row["source_uri"]
    return {
        **row,
        "clip_id": clip_id(source, row["start_s"] or 0.0, row["end_s"] or 0.0, words),
        "caption": words,
        "caption_found": found,
        "caption_model": model,
    }


def _refused(row: Row, status: Status, reason: str) -> Row | None:
    """A silent clip leaves; another stays as it was."""
    if (row["caption"] or "").strip():
        return None
    return {**row, "status": status.value, "error": reason}


def look(row: Row, num_frames: int) -> np.ndarray:
    """The frames that a model is shown: uint8 `n h w 3`, longest side at most `LOOK_PX`. Runs in a child.

    Raises:
        RowError: the source gives none.
    """
    uri, sha256 = row["local_uri"] or row["source_uri"], row["source_sha256"]
    with row_errors():
        if row["media"] == Media.IMAGE:
            return np.asarray(fit_inside(decode_picture(read_media(uri, sha256)), LOOK_PX))[None]
        times_s = clip_times(row["start_s"] or 0.0, row["end_s"] or 0.0, num_frames)
        frames = decode_frames(open_media(uri, sha256), times_s)
        return np.stack([np.asarray(fit_inside(Image.fromarray(frame), LOOK_PX)) for frame in frames])


def merged(config: CaptionConfig, units: list[Unit], receipts: Receipts) -> Iterator[Row]:
    """The table's rows in their order, with those that were captioned replaced."""
    for unit, receipt in receipts.in_order(units):
        place = join(config.clips, unit.payload["file"])
        rows = read_slice(place, unit.payload["start"], unit.payload["rows"], CLIPS.names).to_pylist()
        for n, row in enumerate(rows):
            yield receipt["changed"].get(str(n), row)


def _finish(
    config: CaptionConfig,
    filters: FilterConfig,
    inputs: dict[str, str],
    units: list[Unit],
    receipts: Receipts,
) -> Certificate:
    files, statuses = write_clips(
        config.out, partial(merged, config, units, receipts), filters.near_duplicate_bits
    )
    refuse_failures(statuses, config.max_failed_frac, what="rows failed")
    counts: Counter[str] = Counter()
    for _, receipt in receipts.in_order(units):
        counts.update(receipt["counts"])
    asked = sum(counts.values())
    return Certificate(
        job=JOB,
        config_hash=config.hash(),
        **count_fates(statuses),
        files=files,
        inputs=inputs,
        facts={
            "units": len(units),
            "captions": {"asked": asked, **dict(sorted(counts.items()))},
            "remarks": [_told(asked, counts, config)],
        },
    )


def _told(asked: int, counts: Counter[str], config: CaptionConfig) -> str:
    rest = ", ".join(f"{name} {n:,}" for name, n in sorted(counts.items()) if name != "captioned")
    bound = f" (similarity below {config.min_similarity:g} is unlike)" if counts["unlike"] else ""
    return f"captions: {counts['captioned']:,} of {asked:,} asked for" + (f"; {rest}{bound}" if rest else "")

"""`vimi-data world`: a corpus in which only a retrieved picture tells what a noun looks like.

Each concept has a colour, a second colour, a shape, a texture and a nonsense noun of its own. A clip: "a blick
moves left". A document: "a blick", a picture of that thing at another place and size, on another background.
What a noun that training never saw looks like, only its document tells.

    videos/*.mp4, videos.jsonl       clips: id, path, caption, split
    pictures/*.jpg, pictures.jsonl   documents: id, path, caption
    pictures_shuffled.jsonl          the same pictures, each with the text of another: a control
    concepts.parquet                 what each noun looks like, and how each clip shows it

It goes through the commands like any other corpus, with the guard as it is: documents that the guard would take
for copies of a clip of their noun are drawn again.
"""

import io
import json
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import av
import numpy as np
from PIL import Image
from pydantic import Field, field_validator, model_validator

from infra.certificate import Certificate, FileEntry, entry_of, write_certificate
from infra.claim import alone, find_job, open_job
from infra.config import Config, Incidental, Location
from infra.errors import ConfigError
from infra.progress import ProgressPrinter
from infra.storage import delete, join, list_files, write_bytes
from infra.videos import X264
from pipeline.media.phash import mirror_mask, phash64
from pipeline.prompts.guard import frame_hashes
from pipeline.shards import write_shard
from pipeline.world.concepts import (
    CONCEPTS,
    Concept,
    Motion,
    draw_concept,
    draw_ground,
    draw_motion,
    draw_place,
    generator,
    nouns,
)
from pipeline.world.draw import GROUNDS, SHAPES, TEXTURES, film, picture

JOB = "world"
FPS = 6
"""Of the videos: as augment takes frames by default, so that a target of as many frames has all of them."""
STORED_PX = 96
"""Least side of the stored videos: smaller ones are enlarged by a whole factor. crawl leaves out pictures of
fewer than 64 pixels by default, and instruct things of fewer than 48."""
MIN_BITS = 15
"""Bits of 64 in which a document's perceptual hash must differ from those of all frames of its noun's clips:
the guard's default bound is 10, and encoding and scaling move a hash by a few. Ours."""
MAX_NOUNS = 100_000
"""With those of the distractors: half of the words that `nouns` can make."""
WRITERS = 16
"""Threads that write: each file is on the disk before it counts, which is waiting."""
TRIES = 200
"""Draws of one document. Ours."""
CRF = 10
"""x264's constant rate factor of the videos, whose colours are not halved (4:4:4): a mean error of a level."""
JPEG_QUALITY = 95
SPLITS = {True: "train", False: "validation"}
"""Of clips whose noun is seen in training, and of others: augment makes prompts of both, and training keeps the
second kind for validation. (Rows of the splits `test` and `val` belong to an evaluation: augment leaves them
out.)"""
PLACE = " in a room"
"""Ends some captions: a place that instruct can show by a picture of the clip's background."""

Row = dict[str, Any]
Share = Annotated[float, Field(gt=0.05, le=1)]


class WorldConfig(Config):
    """A controlled corpus."""

    out: Incidental[Location]
    """Folder or URI of the corpus."""
    size_px: int = Field(default=16, ge=8, le=512, multiple_of=4)
    """Side of the square clips as they are meant to be trained on, pixels; a multiple of a generator's patch
    of 4. Stored videos are larger by a whole factor, 96 pixels at least."""
    frames: int = Field(default=4, ge=4, le=128, multiple_of=2)
    """Frames of a clip, at 6 a second; even, so that a training may take every second one."""
    picture_px: int = Field(default=96, ge=64, le=1024)
    """Side of the documents' pictures, pixels."""
    nouns: int = Field(default=2000, ge=1, le=100_000)
    """Nouns for training: 1,600 to 2,000 of them taught a small network in minutes."""
    unseen: int = Field(default=128, ge=1, le=100_000)
    """Nouns that training never sees: claims are measured on them."""
    clips: int = Field(default=1, ge=1, le=100)
    """Clips of each noun, each with a motion and a background of its own."""
    distractors: int = Field(default=2, ge=0, le=10)
    """Documents for each noun whose text names it but whose picture shows another thing: "a dorp, unlike a
    blick"."""
    backgrounds: tuple[str, ...] = Field(default=("plain", "gradient"), min_length=1)
    """Patterns of the clips' backgrounds: plain, gradient, waves, stripes, clouds."""
    picture_backgrounds: tuple[str, ...] = Field(default=("clouds",), min_length=1)
    """Patterns of the documents' backgrounds. To the guard and the offline CLIP a third of the pictures on
    plain ones and on gradients are copies of their clips, 2 % of those on waves and stripes, none on clouds (of
    100 each, at the default sizes)."""
    picture_sizes: tuple[Share, Share] = (0.78, 1.0)
    """Least and largest size of a thing in a document, shares of the side; 0.6 to 0.75 in the clips."""
    shapes: tuple[str, ...] = Field(default=("square", "disc", "diamond", "cross", "triangle"), min_length=1)
    """Shapes of things: square, disc, diamond, cross, triangle, ring, star, bar."""
    textures: tuple[str, ...] = Field(default=tuple(TEXTURES), min_length=1)
    """Textures of things: plain, stripes across, stripes down, checks, dots."""
    places: float = Field(default=0.5, ge=0, le=1)
    """Share of the captions that end in a place, "in a room", which looks different in each clip: instruct can
    show it by a picture of the background."""
    seed: int = Field(default=0, ge=0, le=2**63 - 1)
    """The same seed, and the same values of all other fields, give the same bytes."""

    @field_validator("backgrounds", "picture_backgrounds", "shapes", "textures")
    @classmethod
    def _can_be_drawn(cls, value: tuple[str, ...], info: Any) -> tuple[str, ...]:
        legal = {"shapes": SHAPES, "textures": TEXTURES}.get(info.field_name, GROUNDS)
        for name in value:
            if name not in legal:
                raise ValueError(f"{name!r}; legal: {', '.join(legal)}")
        return value

    @model_validator(mode="after")
    def _can_be_made(self) -> "WorldConfig":
        if self.picture_sizes[0] > self.picture_sizes[1]:
            raise ValueError(f"picture_sizes {list(self.picture_sizes)}; legal: the smaller one first")
        count = (self.nouns + self.unseen) * (1 + self.distractors)
        if count > MAX_NOUNS:
            raise ValueError(f"{count:,} nouns with those of the distractors; legal: up to {MAX_NOUNS:,}")
        return self

    @property
    def stored_px(self) -> int:
        """Side of the stored videos."""
        return self.size_px * -(-STORED_PX // self.size_px)


def check(config: WorldConfig) -> str:
    """The plan in words.

    Raises:
        ConfigError: `out` holds another world, or something else.
    """
    find_job(config.out, job=JOB, config=config, inputs={})
    count = config.nouns + config.unseen
    return (
        f"{count * config.clips:,} clips of {config.frames} x {config.stored_px} x {config.stored_px} pixels, "
        f"{count * (1 + config.distractors):,} documents of {config.picture_px} x {config.picture_px} pixels"
    )


def run(config: WorldConfig) -> Certificate:
    """Make the world; one that was stopped is made anew to the same bytes, a whole one is left alone.

    Raises:
        ConfigError: `out` is not writable, or holds another world.
    """
    check(config)
    done = open_job(config.out, job=JOB, config=config, inputs={})
    if done is not None:
        return done
    with alone(config.out):
        for file in list_files(config.out):
            if file.rpartition("/")[2].startswith("."):
                delete(file)  # half-written when the run before was killed
        return _make(config)


def _make(config: WorldConfig) -> Certificate:
    started_s = time.time()
    files, clips, documents, rows = [], [], [], []
    progress = ProgressPrinter(JOB, config.nouns + config.unseen, unit="nouns")
    with ThreadPoolExecutor(WRITERS) as pool:
        pending: deque[Future[FileEntry]] = deque()
        for made in make_all(config):
            pending += [pool.submit(_write, config.out, *file) for file in made.files.items()]
            files += [pending.popleft().result() for _ in range(len(pending) - 8 * WRITERS)]
            clips += made.clips
            documents += made.documents
            rows += made.rows
            progress.add()
        files += [entry.result() for entry in pending]
    progress.close()
    manifests = {
        "videos.jsonl": clips,
        "pictures.jsonl": documents,
        "pictures_shuffled.jsonl": with_texts_of_others(documents, 1 + config.distractors),
    }
    for path, lines in manifests.items():
        data = "".join(json.dumps(line) + "\n" for line in lines).encode()
        files.append(_write(config.out, path, data, rows=len(lines)))
    files.append(write_shard(join(config.out, "concepts.parquet"), rows, CONCEPTS, row_group_rows=4096))
    count, now_s = len(clips) + len(documents), time.time()
    highlights = {
        "nouns": f"{config.nouns:,} for training, {config.unseen:,} never seen",
        "clips": f"{len(clips):,}",
        "documents": f"{len(documents):,}",
    }
    certificate = Certificate(
        job=JOB,
        config_hash=config.hash(),
        num_in=count,
        num_out=count,
        files=files,
        facts={"highlights": highlights},
        created_at_s=now_s,
        wall_s=now_s - started_s,
    )
    write_certificate(config.out, certificate)
    return certificate


def with_texts_of_others(documents: Sequence[Row], step: int) -> list[Row]:
    """The documents, each with the text of the one `step` places on: nothing fits any more.

    Args:
        documents: lines of pictures.jsonl, those of one noun together.
        step: documents of one noun, so that a noun's own picture stands at the noun after it.
    """
    told = [*documents[step:], *documents[:step]]
    return [{**line, "caption": other["caption"]} for line, other in zip(documents, told, strict=True)]


def _write(out: str, path: str, data: bytes, rows: int = 1) -> FileEntry:
    write_bytes(join(out, path), data)
    return entry_of(path, data, rows)


@dataclass(frozen=True)
class Made:
    """All that a world holds of one noun."""

    files: dict[str, bytes]
    clips: list[Row]
    """Lines of videos.jsonl."""
    documents: list[Row]
    """Lines of pictures.jsonl."""
    rows: list[Row]
    """Of `CONCEPTS`: the noun's, then its distractors'."""


def make_all(config: WorldConfig) -> Iterator[Made]:
    """The world, noun by noun; those never seen in training first."""
    names = nouns(config.seed)
    own = [next(names) for _ in range(config.unseen + config.nouns)]
    others = [[next(names) for _ in range(config.distractors)] for _ in own]
    for number, (noun, strangers) in enumerate(zip(own, others, strict=True)):
        yield make_noun(config, number, noun, strangers)


def make_noun(config: WorldConfig, number: int, noun: str, strangers: list[str]) -> Made:
    """The clips and documents of one noun, and those of its distractors."""
    draw = partial(draw_concept, shapes=config.shapes, textures=config.textures)
    concept = draw(noun, generator(config.seed, 1, number))
    files: dict[str, bytes] = {}
    shown, lines, hashes = [], [], []
    seen = number >= config.unseen
    for take in range(config.clips):
        random = generator(config.seed, 2, number, take)
        clip, frames = _draw_clip(config, concept, random)
        path = f"videos/{noun}-{take}.mp4"
        files[path] = encode_video(frames)
        shown.append({"video": path, **clip})
        lines.append({"id": f"{noun}-{take}", "path": path, "caption": clip["caption"], "split": SPLITS[seen]})
        hashes += [*frame_hashes(frames), *frame_hashes(_halved(frames))]  # augment hashes small frames
    told = [(concept, noun, f"a {noun}")]
    for place, other in enumerate(strangers):
        random = generator(config.seed, 3, number, place)
        told.append((draw(other, random, unlike=concept), other, f"a {other}, unlike a {noun}"))
    documents, rows = [], []
    for place, (thing, name, text) in enumerate(told):
        path = f"pictures/{name}.jpg"
        files[path] = _draw_document(config, thing, hashes, (number, place))
        documents.append({"id": name, "path": path, "caption": text})
        row = {"seen": seen, "clips": shown} if place == 0 else {"seen": None, "clips": []}
        rows.append({**_describe(thing), **row, "documents": [{"picture": path, "text": text}]})
    return Made(files, lines, documents, rows)


def _draw_clip(config: WorldConfig, concept: Concept, random: np.random.Generator) -> tuple[Row, np.ndarray]:
    """What the table says of a clip, and its frames uint8 `t h w 3`."""
    motion: Motion = draw_motion(random)
    name, ground = draw_ground(random, config.backgrounds, behind=concept.look)
    place = PLACE if random.random() < config.places else ""
    frames = film(
        concept.look,
        ground,
        size=motion.size,
        places=motion.places(config.frames),
        side_px=config.stored_px,
    )
    return {
        "caption": f"a {concept.noun} moves {motion.direction}{place}",
        "motion": motion.direction,
        "size": motion.size,
        "start": motion.start,
        "end": motion.end,
        "background": name,
        "background_rgb": ground.colour,
        "pattern": ground.kind,
    }, frames


def _draw_document(config: WorldConfig, concept: Concept, hashes: list[int], stream: tuple[int, int]) -> bytes:
    """A JPEG of the thing that is no copy of a frame of the clips, judged as the guard judges."""
    theirs = np.array(hashes, np.uint64)
    theirs = np.concatenate([theirs, theirs ^ np.uint64(mirror_mask())])
    for attempt in range(TRIES):
        random = generator(config.seed, 4, *stream, attempt)
        size, place = draw_place(random, config.picture_sizes)
        _, ground = draw_ground(random, config.picture_backgrounds, behind=concept.look)
        drawn = picture(concept.look, ground, size=size, place=place, side_px=config.picture_px)
        if np.bitwise_count(theirs ^ np.uint64(phash64(drawn))).min() >= MIN_BITS:
            return _jpeg(drawn)
    raise ConfigError(
        f"{TRIES} pictures of a {concept.noun} were all near-duplicates of its clips",
        cure="fewer clips, or picture_backgrounds with patterns: waves, stripes, clouds",
    )


def _halved(frames: np.ndarray) -> np.ndarray:
    """Frames uint8 `t h w 3` at half their size."""
    count, height, width, _ = frames.shape
    return frames.reshape(count, height // 2, 2, width // 2, 2, 3).mean(axis=(2, 4)).astype(np.uint8)


def _describe(concept: Concept) -> Row:
    look = concept.look
    return {
        "noun": concept.noun,
        "colour": concept.colour,
        "colour_rgb": look.colour,
        "second_colour_rgb": look.second_colour,
        "shape": look.shape,
        "texture": look.texture,
    }


def _jpeg(drawn: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(drawn).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def encode_video(frames: np.ndarray) -> bytes:
    """h264 mp4 of uint8 `t h w 3` with colours at full size; the same frames give the same bytes."""
    sink = io.BytesIO()
    with av.open(sink, "w", format="mp4") as container:
        options = {"crf": str(CRF), "preset": "veryfast", **X264}
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv444p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return sink.getvalue()

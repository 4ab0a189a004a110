"""Schemas of all tables: column, type, unit, meaning. Imports pyarrow and nothing else.

    CLIPS    what crawl makes      one row per clip or picture, good or bad
    MEMORY   what build-index makes one row per document (LanceDB)
    PROMPTS  what augment and instruct make: one schema for both stages, one row per training clip
    CROPS    what subjects makes   one row per phrase and frame, found or not, with its cut-out
    PAIRS    beside instructions   cut-outs of a clip and of another place: all that are used, some that are not

Ids are content hashes: the same content has the same id on every machine, in any order.
"""

import hashlib
from dataclasses import dataclass
from enum import StrEnum

import pyarrow as pa

SCHEMA_VERSION = 1
ADDED = frozenset({"caption_found", "caption_model"})
"""Columns that tables of earlier versions lack; there they are null."""
MAX_CAPTION_CHARS = 10_000
"""Longer texts are no captions: nothing that reads them sees more than some hundred words. Ours."""


class Status(StrEnum):
    """What became of a row. `OK` goes on; `FILTERED_*` was left out on purpose; the rest failed."""

    OK = "ok"
    # left out on purpose
    FILTERED_NO_CAPTION = "filtered_no_caption"
    FILTERED_TOO_SHORT = "filtered_too_short"
    FILTERED_TOO_LONG = "filtered_too_long"
    FILTERED_TOO_SMALL = "filtered_too_small"
    FILTERED_STATIC = "filtered_static"
    FILTERED_ASPECT = "filtered_aspect"
    FILTERED_DUPLICATE = "filtered_duplicate"
    FILTERED_NEAR_DUPLICATE = "filtered_near_duplicate"
    FILTERED_PLUGIN = "filtered_plugin"
    FILTERED_MOTION = "filtered_motion"
    FILTERED_QUALITY = "filtered_quality"
    FILTERED_UNLIKE_CAPTION = "filtered_unlike_caption"
    FILTERED_NO_SUBJECT = "filtered_no_subject"
    FILTERED_NO_DOCUMENT = "filtered_no_document"
    FILTERED_NOT_VIDEO = "filtered_not_video"
    FILTERED_EVAL_SPLIT = "filtered_eval_split"
    # failed: a retry may help
    UNREACHABLE = "unreachable"
    TIMEOUT = "timeout"
    RATE_LIMITED = "rate_limited"
    CRASHED = "crashed"
    # failed: a retry will not help
    NOT_FOUND = "not_found"
    REFUSED = "refused"
    OPTED_OUT = "opted_out"
    TOO_LARGE = "too_large"
    EMPTY = "empty"
    WRONG_TYPE = "wrong_type"
    NO_VIDEO = "no_video"
    UNDECODABLE = "undecodable"
    CHANGED = "changed"
    BAD_CAPTION = "bad_caption"
    BAD_RANGE = "bad_range"
    BAD_ROW = "bad_row"

    @property
    def is_filtered(self) -> bool:
        return self.value.startswith("filtered_")

    @property
    def is_dead(self) -> bool:
        return self is not Status.OK and not self.is_filtered

    @property
    def is_retriable(self) -> bool:
        return self in RETRIABLE


RETRIABLE = frozenset({Status.UNREACHABLE, Status.TIMEOUT, Status.RATE_LIMITED, Status.CRASHED})


class RowError(Exception):
    """This row can't be used: `status` is its fate, the message its `error`."""

    def __init__(self, status: Status, reason: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(status, reason)  # both: it crosses processes
        self.status, self.reason, self.retry_after_s = status, reason, retry_after_s

    def __str__(self) -> str:
        return self.reason


class Media(StrEnum):
    VIDEO = "video"
    IMAGE = "image"


class Role(StrEnum):
    """What a segment of a prompt is for; `ROLES` says what follows from it."""

    CAPTION = "caption"
    INSTRUCTION = "instruction"
    RETRIEVED = "retrieved"
    SUBJECT = "subject"
    BACKGROUND = "background"
    FIRST_FRAME = "first_frame"


@dataclass(frozen=True)
class RoleFacts:
    """What dropout, guidance and reference pictures do with segments of a role."""

    kind: str
    """Condition kind that is switched on and off together: text, retrieved, subject or frame."""
    is_scene: bool = False
    """Its picture is a whole scene: resized to cover, where others are shown whole, on white."""


ROLES: dict[str, RoleFacts] = {
    Role.CAPTION: RoleFacts("text"),
    Role.INSTRUCTION: RoleFacts("text"),
    Role.RETRIEVED: RoleFacts("retrieved"),
    Role.SUBJECT: RoleFacts("subject"),
    Role.BACKGROUND: RoleFacts("subject", is_scene=True),
    Role.FIRST_FRAME: RoleFacts("frame", is_scene=True),
}
"""Every role that a prompt may hold. A role's place is the id that the model embeds: only append."""


class Task(StrEnum):
    """What the generator is asked to do (VIMI's three instructions; PRETRAIN is stage 1)."""

    PRETRAIN = "pretrain"
    SUBJECT_DRIVEN = "subject_driven"
    VIDEO_PREDICTION = "video_prediction"
    TEXT_TO_VIDEO = "text_to_video"


@dataclass(frozen=True)
class TaskFacts:
    """How a prompt asks for a task of stage 2."""

    instruction: str
    """The line in front, of VIMI's second figure; two end in an ellipsis there, whose words are unpublished."""
    role: Role
    """Whose picture in a user's prompt asks for this task."""


TASKS: dict[Task, TaskFacts] = {
    Task.SUBJECT_DRIVEN: TaskFacts("Generate a video with the text and image.", Role.SUBJECT),
    Task.VIDEO_PREDICTION: TaskFacts("Generate a video with the text and first frame.", Role.FIRST_FRAME),
    Task.TEXT_TO_VIDEO: TaskFacts("Generate a video with the retrieved text-image.", Role.RETRIEVED),
}
"""The tasks of stage 2."""


class TargetKind(StrEnum):
    FRAMES = "frames"
    """uint8 t h w 3, already at the training size."""
    VIDEO = "video"
    """Encoded video bytes (mp4) of the clip."""
    REFERENCE = "reference"
    """`source_uri` and `[start_s, end_s]` only."""


def _field(name: str, kind: pa.DataType, meaning: str, nullable: bool = True) -> pa.Field:
    return pa.field(name, kind, nullable=nullable, metadata={"meaning": meaning})


_ORIGIN = [
    _field("source_uri", pa.string(), "path or URL of the parent video or picture"),
    _field("source_sha256", pa.string(), "hex sha256 of the parent's bytes; null if never read"),
    _field("start_s", pa.float64(), "start of the clip in its parent, seconds; 0 for pictures"),
    _field("end_s", pa.float64(), "end of the clip in its parent, seconds; 0 for pictures"),
    _field("width_px", pa.int32(), "display width (rotation applied)"),
    _field("height_px", pa.int32(), "display height (rotation applied)"),
    _field("source_name", pa.string(), "name of the corpus that the row came from"),
    _field("licence", pa.string(), "licence if the corpus states one"),
    _field("split", pa.string(), "train, val or test if the corpus states one"),
]

ORIGIN = tuple(field.name for field in _ORIGIN)
"""Columns that say where a clip comes from: they go with it into the memory and the prompts."""

CLIPS = pa.schema(
    [
        _field("clip_id", pa.string(), "content hash, see clip_id()", False),
        _field("media", pa.string(), "video or image", False),
        _field("caption", pa.string(), "text as found, stripped, or by a model; null if none"),
        *_ORIGIN,
        _field("local_uri", pa.string(), "where the fetched bytes lie; equals source_uri for files"),
        _field("fps", pa.float64(), "average frames per second of the parent; null for pictures"),
        _field("num_frames", pa.int64(), "frames in the clip; 1 for pictures"),
        _field("phash", pa.uint64(), "64-bit perceptual hash of the middle frame"),
        _field("etag", pa.string(), "HTTP ETag, for a conditional re-crawl"),
        _field("last_modified", pa.string(), "HTTP Last-Modified, likewise"),
        _field("attempt", pa.int32(), "how many times the parent was tried"),
        _field("status", pa.string(), "a Status", False),
        _field("error", pa.string(), "why, if not ok"),
        _field("caption_found", pa.string(), "text as found, where a model wrote the caption"),
        _field("caption_model", pa.string(), "the model that wrote the caption; null = as found"),
    ],
    metadata={"table": "clips", "schema_version": str(SCHEMA_VERSION)},
)


def memory_schema(embedding_dim: int) -> pa.Schema:
    """Schema of the LanceDB table of documents; embeddings are unit vectors in float16."""
    vector = pa.list_(pa.float16(), embedding_dim)
    return pa.schema(
        [
            pa.field(
                "doc_id",
                pa.string(),
                nullable=False,
                # Without this, concurrent merge_insert duplicates keys silently (measured).
                metadata={"lance-schema:unenforced-primary-key": "true"},
            ),
            _field("text", pa.string(), "the document's text: what BM25 reads"),
            _field("image", pa.binary(), "JPEG of the picture or key frame, bounded size"),
            _field("image_embedding", vector, "CLIP image tower; mean of key frames, unit norm"),
            _field("text_embedding", vector, "CLIP text tower, unit norm"),
            _field("document_embedding", vector, "RA-CM3 document vector: unit mean of both"),
            _field("phash", pa.uint64(), "64-bit perceptual hash of the picture"),
            _field("media", pa.string(), "video (key frame of a clip) or image"),
            *_ORIGIN,
        ],
        metadata={"table": "memory", "schema_version": str(SCHEMA_VERSION)},
    )


DOCUMENT = pa.struct(
    [
        _field("doc_id", pa.string(), "document of the memory"),
        _field("retriever", pa.string(), "bm25, clip or hybrid"),
        _field("rank", pa.int32(), "1 = best, after the guard"),
        _field("score", pa.float32(), "the retriever's own score"),
        _field("clip_similarity", pa.float32(), "cosine of the caption's and the picture's CLIP vectors"),
        _field("source_uri", pa.string(), "parent of the picture"),
        _field("source_sha256", pa.string(), "hash of the parent"),
        _field("start_s", pa.float64(), "seconds"),
        _field("end_s", pa.float64(), "seconds"),
    ]
)

SEGMENT = pa.struct(
    [
        _field("type", pa.string(), "text or image"),
        _field("role", pa.string(), "a Role"),
        _field("text", pa.string(), "for text; for a subject image the word that it replaces"),
        _field("image", pa.binary(), "JPEG or PNG bytes, bounded size; null for text"),
        _field("document", DOCUMENT, "provenance of a retrieved segment; null otherwise"),
    ]
)

TARGET = pa.struct(
    [
        _field("kind", pa.string(), "a TargetKind"),
        _field("data", pa.binary(), "frames: uint8 t h w 3, C order; video: mp4; reference: null"),
        _field("num_frames", pa.int32(), "t"),
        _field("height_px", pa.int32(), "h"),
        _field("width_px", pa.int32(), "w"),
        _field("fps", pa.float64(), "frame rate of these frames; inf for pictures"),
    ]
)

PROMPTS = pa.schema(
    [
        _field("prompt_id", pa.string(), "content hash, see prompt_id()", False),
        _field("task", pa.string(), "a Task", False),
        _field("clip_id", pa.string(), "the target clip", False),
        _field("media", pa.string(), "video or image: what the target is", False),
        _field("caption", pa.string(), "the clip's own caption", False),
        _field("segments", pa.list_(SEGMENT), "the prompt in order: retrieved (rank order), then content"),
        _field("num_documents", pa.int32(), "retrieved documents; below k if the guard left fewer"),
        _field("flags", pa.list_(pa.string()), "e.g. fewer_than_k"),
        _field("target", TARGET, "what the generator learns to make"),
        *_ORIGIN,
        _field("fps", pa.float64(), "original frames per second: the generator conditions on it"),
        _field("memory_version", pa.string(), "tag of the memory's committed version"),
        _field("model_hash", pa.string(), "identity of the CLIP that embedded the memory"),
        _field("config_hash", pa.string(), "of the job that made the row"),
    ],
    metadata={"table": "prompts", "schema_version": str(SCHEMA_VERSION)},
)

TOKENS = pa.struct([_field("data", pa.binary(), "tokens of one segment: `l e`, C order")])

VARIANT = pa.struct(
    [
        _field("key", pa.string(), "hex sha256 of the encoder's content hash and the prompt"),
        _field("blocks", pa.list_(pa.int32()), "its blocks of tokens, in order: indices in `blocks`"),
        _field("roles", pa.list_(pa.int32()), "for each block the role of its segment: index in ROLES"),
        _field("segments", pa.list_(pa.int32()), "for each block the place of its segment in the prompt"),
    ]
)

LATENTS = pa.struct(
    [
        _field("key", pa.string(), "hex sha256 of the autoencoder's content hash, the target and the bucket"),
        _field("data", pa.binary(), "float32 t c h w, C order"),
        _field("shape", pa.list_(pa.int32()), "t, c, h, w"),
        _field("fps", pa.float64(), "frame rate of the frames that were encoded; inf for pictures"),
    ]
)

PICTURE = pa.struct(
    [
        _field("key", pa.string(), "hex sha256 of the autoencoder's content hash, the picture and its size"),
        _field("data", pa.binary(), "float32 c h w, C order"),
        _field("shape", pa.list_(pa.int32()), "c, h, w"),
    ]
)

ENCODINGS = pa.schema(
    [
        _field(
            "prompt_id",
            pa.string(),
            "the row of PROMPTS that this is made of: same place",
            False,
        ),
        _field("blocks", pa.list_(TOKENS), "blocks of tokens that the variants share"),
        _field("variants", pa.list_(VARIANT), "what training can draw of the prompt, encoded"),
        _field("latents", LATENTS, "the target in latent space; null when only prompts are encoded"),
        _field("pictures", pa.list_(PICTURE), "what the generator sees itself, in latent space; else none"),
        _field("status", pa.string(), "a Status", False),
        _field("error", pa.string(), "why, if not ok"),
    ],
    metadata={"table": "encodings", "schema_version": str(SCHEMA_VERSION)},
)

CROPS = pa.schema(
    [
        _field("crop_id", pa.string(), "content hash of clip, document, place in the caption and frame", False),
        _field("clip_id", pa.string(), "the clip that it was cut out of, or whose document it is from", False),
        _field("doc_id", pa.string(), "document of the memory that it was cut out of; null: the clip itself"),
        _field("clip_source", pa.string(), "what the clips of one parent share: its hash, or its URI", False),
        _field("source_uri", pa.string(), "parent of the clip or document"),
        _field("source_sha256", pa.string(), "hash of the parent"),
        _field("start_s", pa.float64(), "start of the clip or document in its parent, seconds"),
        _field("end_s", pa.float64(), "end of the clip or document in its parent, seconds"),
        _field("split", pa.string(), "the clip's: train, val or test if the corpus states one"),
        _field("frac", pa.float64(), "where in the clip its frame lies, 0..1"),
        _field("phrase", pa.string(), "the words that it stands for; null: the caption names nothing usable"),
        _field("head", pa.string(), "their noun"),
        _field("start", pa.int32(), "place of the phrase in the caption, characters"),
        _field("end", pa.int32(), "its end, exclusive"),
        _field("nature", pa.string(), "living, product, place or other"),
        _field("box", pa.list_(pa.int32()), "left, top, right, bottom in the frame, pixels"),
        _field("mask", pa.binary(), "PNG of its alpha in the box; null for places"),
        _field(
            "image", pa.binary(), "JPEG: the thing on white, the place; small what was left out, or its frame"
        ),
        _field("vector", pa.list_(pa.float32()), "CLIP's unit vector of the picture; null without CLIP"),
        _field("score", pa.float32(), "how sure the finder was, 0..1"),
        _field("from_target", pa.bool_(), "cut out of the target's own, often small frames: no source"),
        _field("status", pa.string(), "a Status", False),
        _field("error", pa.string(), "why, if not ok"),
    ],
    metadata={"table": "crops", "schema_version": str(SCHEMA_VERSION)},
)

CROP_PLACES = pa.schema(
    [
        _field("clip_id", pa.string(), "a clip", False),
        _field("clip_source", pa.string(), "what the clips of one parent share, as in CROPS", False),
        _field("file", pa.string(), "the file that holds crops of it", False),
        _field("row_group", pa.int32(), "and the row group in that file", False),
    ],
    metadata={"table": "crop_places", "schema_version": str(SCHEMA_VERSION)},
)

PAIRS = pa.schema(
    [
        _field("clip_id", pa.string(), "the target clip", False),
        _field("phrase", pa.string(), "the words that the picture stands for", False),
        _field("nature", pa.string(), "living, product, place or other", False),
        _field("target_crop", pa.string(), "crop_id of the clip's own cut-out", False),
        _field("reference_crop", pa.string(), "crop_id of the other one", False),
        _field("similarity", pa.float32(), "cosine of their CLIP vectors", False),
        _field("fate", pa.string(), "used, spare, near_duplicate or too_unlike", False),
    ],
    metadata={"table": "pairs", "schema_version": str(SCHEMA_VERSION)},
)

REJECTED = pa.schema(
    [
        _field("row_id", pa.string(), "clip_id or doc_id of the row", False),
        _field("source_uri", pa.string(), "where it came from"),
        _field("status", pa.string(), "a Status", False),
        _field("error", pa.string(), "why"),
    ],
    metadata={"table": "rejected", "schema_version": str(SCHEMA_VERSION)},
)


def content_id(*parts: str | int | float | None) -> str:
    """24 hex digits of sha256 over the parts, each length-prefixed so that no two lists collide."""
    digest = hashlib.sha256()
    for part in parts:
        data = b"\xff" if part is None else str(part).encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()[:24]


def clip_id(source: str, start_s: float, end_s: float, caption: str | None) -> str:
    """Id of a clip: `source` is the parent's sha256, or its URI when its bytes could not be read."""
    return content_id("clip", source, round(start_s * 1000), round(end_s * 1000), caption)


def doc_id(source: str, start_s: float, end_s: float, text: str) -> str:
    return content_id("doc", source, round(start_s * 1000), round(end_s * 1000), text)


def crop_id(clip: str, document: str | None, start: int | None, frac: float | None) -> str:
    return content_id("crop", clip, document, start, frac)


def prompt_id(task: str, clip: str, config_hash: str) -> str:
    return content_id("prompt", task, clip, config_hash)


def check_table(found: pa.Schema, expected: pa.Schema, what: str) -> None:
    """Raise ValueError unless `found` has the columns and types of `expected`, in order."""
    missing = [f"{f.name}: {f.type}" for f in expected if f.name not in (*found.names, *ADDED)]
    wrong = [
        f"{f.name}: {found.field(f.name).type}, expected {f.type}"
        for f in expected
        if f.name in found.names and not found.field(f.name).type.equals(f.type)
    ]
    if missing or wrong:
        raise ValueError(f"{what}: missing columns {missing or 'none'}, wrong types {wrong or 'none'}")

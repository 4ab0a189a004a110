"""Tiny generators, conditions and prompt shards that the tests of this floor share: real Parquet, JPEG, mp4."""

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import nn

from infra.storage import Certificate, FileEntry, write_certificate
from model.condition import ROLES, Condition, ConditionConfig
from model.data.shards import open_shards
from model.fit import FitConfig
from model.generator import Generator
from model.training.door import prepare_index, read_index
from model.training.loop import Training
from model.training.stages import Stage1Config
from pipeline.schema import PROMPTS
from pipeline.shards import write_meta

TINY_FIT = FitConfig(
    num_frames=4, height_px=12, width_px=16, patch_px=4, group_height=3, group_width=2,
    patch_dim=32, patch_head_dim=16, num_latents=8, latent_dim=48, latent_head_dim=16,
    condition_dim=32, num_blocks=2, layers_per_block=1, dropout=0.0,
)  # fmt: skip


@pytest.fixture(scope="session")
def tiny_fit() -> FitConfig:
    """A FIT of 2 groups and 8 latents for videos of 4 x 12 x 16."""
    return TINY_FIT


@pytest.fixture
def make_condition() -> Callable[..., Condition]:
    """A batch of random conditions; `lengths` are the numbers of real tokens."""

    def make(batch: int = 2, length: int = 5, dim: int = 24, seed: int = 0, references: int = 0):
        g = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, length + 1, (batch,), generator=g)
        pictures = torch.rand(batch, references, 3, 16, 16, generator=g) * 2 - 1
        return Condition(
            tokens=torch.randn(batch, length, dim, generator=g),
            mask=torch.arange(length) < lengths[:, None],
            role=torch.randint(len(ROLES), (batch, length), generator=g),
            segment=torch.randint(4, (batch, length), generator=g),
            fps=torch.where(torch.rand(batch, generator=g) < 0.3, torch.inf, 6.0),
            original_size_px=torch.randint(100, 1000, (batch, 2), generator=g),
            references=pictures if references else None,
            reference_mask=torch.ones(batch, references, dtype=torch.bool) if references else None,
        )

    return make


@pytest.fixture
def make_generator() -> Callable[..., Generator]:
    """A generator whose zero-started weights are shaken, so that every path carries signal."""

    def make(config=TINY_FIT, *, token_dim: int = 24, shaken: bool = True, **condition):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            generator = Generator(config, ConditionConfig(token_dim=token_dim, **condition))
            if shaken:
                shake(generator)
        return generator

    return make


def shake(model: nn.Module) -> None:
    """Add noise to every parameter in place."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)


COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 220), "white": (240, 240, 240)}
MakeShards = Callable[..., Path]


def moving_square(number: int, *, num_frames: int, height: int, width: int) -> np.ndarray:
    """uint8 `t h w 3`: a square of the row's colour that moves right."""
    colour = list(COLOURS.values())[number % len(COLOURS)]
    frames = np.full((num_frames, height, width, 3), 20 + number % 5, np.uint8)
    for t in range(num_frames):
        left = (number * 3 + t * 2) % (width - 6)
        frames[t, height // 3 : height // 3 + 6, left : left + 6] = colour
    return frames


def jpeg(frame: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, format="JPEG", quality=90)
    return buffer.getvalue()


def mp4(frames: np.ndarray, fps: int = 8) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "4"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv444p"
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return buffer.getvalue()


def prompt_row(
    number: int,
    *,
    kind: str = "frames",
    media: str = "video",
    task: str = "pretrain",
    num_frames: int = 8,
    height: int = 24,
    width: int = 40,
) -> dict[str, Any]:
    """One row of PROMPTS: a retrieved document, a caption, a moving square."""
    t = 1 if media == "image" else num_frames
    frames = moving_square(number, num_frames=t, height=height, width=width)
    name = list(COLOURS)[number % len(COLOURS)]
    document = {"doc_id": f"doc-{number % 7}", "retriever": "bm25", "rank": 1, "score": 1.0}
    segments = [
        {"type": "text", "role": "retrieved", "text": f"a {name} thing", "image": None, "document": document},
        {"type": "image", "role": "retrieved", "text": None, "image": jpeg(frames[0]), "document": document},
        {"type": "text", "role": "caption", "text": f"a {name} square moves to the right", "image": None},
    ]
    data = {"frames": frames.tobytes(), "video": None, "reference": None}[kind]
    if kind == "video":
        data = mp4(frames)
    prompt_id = hashlib.sha256(f"{number}{kind}{media}{task}".encode()).hexdigest()[:24]
    return {
        "prompt_id": prompt_id,
        "task": task,
        "clip_id": f"clip-{number:06d}",
        "media": media,
        "caption": segments[-1]["text"],
        "segments": segments,
        "num_documents": 1,
        "flags": [],
        "target": {
            "kind": kind,
            "data": data,
            "num_frames": t,
            "height_px": height,
            "width_px": width,
            "fps": float("inf") if media == "image" else 8.0,
        },
        "source_uri": f"/nowhere/{number}.mp4",
        "source_sha256": None,
        "start_s": 0.0,
        "end_s": 0.0 if media == "image" else t / 8,
        "width_px": width,
        "height_px": height,
        "fps": None if media == "image" else 8.0,
        "memory_version": "test-1",
        "model_hash": "0" * 16,
        "config_hash": "0" * 16,
    }


def write_shards(
    folder: Path, rows: list[dict[str, Any]], *, job: str, group_rows: int, file_rows: int
) -> Path:
    """The layout of `vimi-data augment`: part files, meta.parquet, certificate."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for start in range(0, len(rows), file_rows):
        name = f"part-{len(files):05d}.parquet"
        table = pa.Table.from_pylist(rows[start : start + file_rows], schema=PROMPTS)
        pq.write_table(table, folder / name, row_group_size=group_rows)
        data = (folder / name).read_bytes()
        files.append(
            FileEntry(
                path=name,
                rows=len(table),
                num_bytes=len(data),
                sha256=hashlib.sha256(data).hexdigest(),
            )
        )
    files.append(write_meta(str(folder), files, row_group_rows=group_rows))
    certificate = Certificate(job=job, config_hash="0" * 16, num_in=len(rows), num_out=len(rows), files=files)
    write_certificate(str(folder), certificate)
    return folder


@pytest.fixture
def make_shards(tmp_path: Path) -> MakeShards:
    """Call it with num_rows, name, job, group_rows and options of `prompt_row`; gives the folder."""

    def make(
        num_rows: int = 40,
        *,
        name: str = "prompts",
        job: str = "augment",
        group_rows: int = 4,
        file_rows: int = 16,
        rows: list[dict[str, Any]] | None = None,
        **options: Any,
    ) -> Path:
        rows = rows or [prompt_row(n, **options) for n in range(num_rows)]
        return write_shards(tmp_path / name, rows, job=job, group_rows=group_rows, file_rows=file_rows)

    return make


@pytest.fixture
def make_row() -> Callable[..., dict[str, Any]]:
    return prompt_row


TINY_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
TINY_BACKBONE = {
    "patch_dim": 32,
    "patch_head_dim": 16,
    "num_latents": 8,
    "latent_dim": 48,
    "latent_head_dim": 16,
    "condition_dim": 32,
    "num_blocks": 2,
    "layers_per_block": 1,
    "group_height": 3,
    "group_width": 2,
    "dropout": 0.1,
}


def write_tiny_encoder(folder: Path) -> dict[str, Any]:
    """Write a random CLIP as a user's local files; the config of a prompt encoder over it."""
    import open_clip

    (folder / "tiny.json").write_text(json.dumps(TINY_CLIP))
    torch.manual_seed(0)
    torch.save({"state_dict": open_clip.CLIP(**TINY_CLIP).state_dict()}, folder / "tiny.pt")
    clip = {"name": str(folder / "tiny.json"), "pretrained": str(folder / "tiny.pt"), "precision": "fp32"}
    return {"kind": "clip", "clip": clip}


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Config of a prompt encoder over a random CLIP, from local files."""
    return write_tiny_encoder(tmp_path_factory.mktemp("clip"))


def tiny_stage(prompts: Path, out: Path, encoder: dict[str, Any]) -> dict[str, Any]:
    """Values of a Stage1Config that trains a tiny FIT in seconds."""
    return {
        "prompts": str(prompts),
        "out": str(out),
        "samples": 40,
        "batch_size": 4,
        "preset": "fit-tiny",
        "num_frames": 4,
        "height_px": 12,
        "width_px": 16,
        "backbone": TINY_BACKBONE,
        "encoder": encoder,
        "optim": {"name": "adamw", "lr": 1e-3},
        "validation": {"num_samples": 2, "held_out_frac": 0},
        "preview": {"num_videos": 0},
        "checkpoint": {"every_samples": 8, "num_to_keep": None},
        "log": {"every_samples": 4, "tensorboard": False},
        "order": {"lanes": 6, "shuffle_rows": 5},
    }


@pytest.fixture
def stage_values(make_shards: MakeShards, tiny_encoder: dict[str, Any], tmp_path: Path) -> Callable:
    """Call it with changed fields; gives values of a tiny Stage1Config over fresh shards."""

    def make(**changes: Any) -> dict[str, Any]:
        if "prompts" not in changes:
            changes["prompts"] = str(make_shards(22, num_frames=4, height=12, width=16))
        return tiny_stage(Path(changes["prompts"]), tmp_path / "run", tiny_encoder) | changes

    return make


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: dict[str, Any]) -> Stage1Config:
    """A run of two steps with two checkpoints; read it, don't train it on."""
    folder = tmp_path_factory.mktemp("trained")
    rows = [prompt_row(n, num_frames=4, height=12, width=16) for n in range(22)]
    write_shards(folder / "prompts", rows, job="augment", group_rows=4, file_rows=16)
    values = tiny_stage(folder / "prompts", folder / "run", tiny_encoder)
    config = Stage1Config.model_validate(values)
    prepare_index(config, open_shards(config.prompts))
    training = Training(config, read_index(config.out))
    for _ in range(2):
        training.step()
        training.save({})
    training.close()
    return config


def image_autoencoder() -> Any:
    """AutoencoderKL, 4 pixels to a latent of 4 channels, each frame by itself."""
    import diffusers

    kind: Any = diffusers.AutoencoderKL  # pyright: ignore[reportPrivateImportUsage]
    return kind(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.3,
        shift_factor=0.1,
    )


def video_autoencoder() -> Any:
    """AutoencoderKLWan, 8 pixels and 4 frames (after the first) to a latent of 3 channels."""
    import diffusers

    kind: Any = diffusers.AutoencoderKLWan  # pyright: ignore[reportPrivateImportUsage]
    return kind(
        base_dim=4,
        z_dim=3,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3],
        latents_std=[2.0, 1.5, 0.5],
    )


@pytest.fixture(scope="session")
def autoencoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """`image` and `video` -> config of a random diffusers autoencoder in a folder."""
    found = {}
    for name, make in {"image": image_autoencoder, "video": video_autoencoder}.items():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            folder = tmp_path_factory.mktemp(name)
            make().save_pretrained(folder)
        found[name] = {"kind": "diffusers", "model": str(folder)}
    return found


LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': '}}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<image>{% else %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)


@pytest.fixture(scope="session")
def tiny_mllm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Config of a prompt encoder over a random LLaVA in a folder."""
    import tokenizers
    import transformers

    classes: Any = transformers
    tokenizer: Any = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>", "<image>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["a red square moves to the right"], trainer)
    words = classes.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=special[3:],
    )
    language = classes.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(words),
        pad_token_id=words.pad_token_id,
    )
    vision = classes.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
    )
    config = classes.LlavaConfig(
        vision_config=vision,
        text_config=language,
        image_token_index=words.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    processor = classes.LlavaProcessor(
        classes.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        words,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    folder = tmp_path_factory.mktemp("mllm")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classes.LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return {"kind": "mllm", "model": str(folder), "max_tokens": 256}

"""Tiny generators, conditions, encoders and runs that the tests of this floor share."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from model.backbones.fit import FitConfig
from model.condition import Condition, ConditionConfig
from model.data.shards import open_shards
from model.generator import Generator
from model.training.config import Stage1Config
from model.training.loop import Training
from model.training.preflight import prepare_index, read_index
from model.training.validation import preview
from tests.model.prompt_tables import prompt_row, write_shards

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
            role=torch.randint(6, (batch, length), generator=g),
            segment=torch.randint(4, (batch, length), generator=g),
            fps=torch.where(torch.rand(batch, generator=g) < 0.3, torch.inf, 6.0),
            original_size_px=torch.randint(100, 1000, (batch, 2), generator=g),
            references=pictures if references else None,
            reference_mask=torch.ones(batch, references, dtype=torch.bool) if references else None,
            reference_role=torch.randint(6, (batch, references), generator=g) if references else None,
            reference_place=torch.arange(references).expand(batch, -1) if references else None,
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


MakeShards = Callable[..., Path]


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
    return {"clip": clip}


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
        "reference_size_px": [16, 16],
        "reference_patch_px": 8,
        "optim": {"name": "adamw", "lr": 1e-3},
        "validation": {"num_samples": 2, "held_out_frac": 0},
        "preview_every_samples": 0,
        "checkpoint": {"every_samples": 8, "num_to_keep": None},
        "log_every_samples": 4,
        "trackers": [],
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


@pytest.fixture(scope="session")
def autoencoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """`image` and `video` -> folder of a random diffusers autoencoder."""
    from tests.model.tiny_autoencoders import kl, wan

    found = {}
    for name, make in {"image": kl, "video": wan}.items():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            folder = tmp_path_factory.mktemp(name)
            make().save_pretrained(folder)
        found[name] = str(folder)
    return found


@pytest.fixture(scope="session")
def tiny_mllm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Config of a prompt encoder over a random LLaVA in a folder."""
    from tests.model.prompt.tiny_mllms import made

    folder = tmp_path_factory.mktemp("mllm")
    for part in made("llava"):
        part.save_pretrained(folder)
    return {"model": str(folder), "max_tokens": 256}


@pytest.fixture
def short_previews(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two videos of two steps."""
    monkeypatch.setattr(preview, "NUM_VIDEOS", 2)
    monkeypatch.setattr(preview, "NUM_STEPS", 2)

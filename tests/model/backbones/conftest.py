"""Tiny pretrained models in folders, and trainings that start from them."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.model.backbones.tiny_bases import SAVERS
from tests.model.conftest import MakeShards, tiny_stage

Values = Callable[..., dict[str, Any]]
SIZE: dict[str, Any] = {"num_frames": 5, "height": 32, "width": 48}
"""Of the clips: 2 x 3 x 4 x 6 latents, 2 x 2 x 3 patches."""


@pytest.fixture(scope="session")
def save_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Folder of a random model of a family, made once."""
    return cache(lambda family: SAVERS[family](tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="session", params=sorted(SAVERS))
def folder(request: pytest.FixtureRequest, save_base: Callable[[str], str]) -> str:
    """The same of every family, one after another."""
    return save_base(request.param)


@pytest.fixture(scope="session")
def wan(save_base: Callable[[str], str]) -> str:
    """Folder of a random Wan."""
    return save_base("WanTransformer3DModel")


@pytest.fixture
def base_values(make_shards: MakeShards, tiny_encoder: dict[str, Any], tmp_path: Path, wan: str) -> Values:
    """Call it with changed fields, those of the backbone by their own names; values of a tiny Stage1Config."""

    def make(*, model: str = wan, text: str = "append", lora: Any = (), **changes: Any) -> dict[str, Any]:
        backbone: dict[str, Any] = {"kind": "diffusers", "model": model, "text": text}
        backbone["lora"] = {"rank": 4} if lora == () else lora
        if "prompts" not in changes:
            changes["prompts"] = str(make_shards(12, **SIZE))
        values = tiny_stage(Path(changes["prompts"]), tmp_path / "run", {**tiny_encoder, "max_tokens": 384})
        del values["reference_size_px"]  # that of the videos
        size = {"num_frames": 5, "height_px": 32, "width_px": 48, "batch_size": 2, "ema": ["power-0.05"]}
        return {**values, **size, "backbone": backbone, **changes}

    return make

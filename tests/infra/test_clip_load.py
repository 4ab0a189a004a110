"""Where a CLIP comes from: known by what it holds, loaded from four kinds of place or refused."""

import json
import pickle
import time
from pathlib import Path
from typing import Any

import pytest

from infra.clip import Clip, ClipConfig, check_clip, load_clip, stored_version
from infra.errors import ConfigError
from tests.infra.tiny_clips import MODELS, save_tiny


def test_identity_follows_weights_and_preprocessing(tmp_path: Path) -> None:
    def load(seed: int, mean: float = 0.5) -> Clip:
        name, weights = save_tiny(tmp_path, MODELS["vit"], seed=seed)
        values = {"model_cfg": MODELS["vit"], "preprocess_cfg": {"mean": [mean] * 3}}
        Path(name).write_text(json.dumps(values))
        return load_clip(ClipConfig(name=name, pretrained=weights))

    first = load(0)
    assert first.model_hash == load(0).model_hash
    assert first.model_hash != load(1).model_hash
    assert first.model_hash != load(0, mean=0.4).model_hash
    assert json.loads(json.dumps(first.identity)) == first.identity


def test_the_stored_version_follows_the_weights_without_loading_them(tmp_path: Path) -> None:
    name, weights = save_tiny(tmp_path, MODELS["vit"])
    config = ClipConfig(name=name, pretrained=weights)
    first = stored_version(config)
    assert stored_version(config) == first
    Path(weights).write_bytes(b"another model at the same place")
    assert stored_version(config) != first
    assert stored_version(ClipConfig()) == "ViT-B-32/laion2b_s34b_b79k"
    assert stored_version(ClipConfig(name="offline")) not in ("", first)


def test_class_vectors_are_made_anew_when_the_cache_is_damaged_or_unwritable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = load_clip(ClipConfig(name="offline"))
    file = next((tmp_path / "vimi").glob("conse-*.npy"))
    file.write_bytes(file.read_bytes()[:500])
    second = load_clip(ClipConfig(name="offline"))
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    third = load_clip(ClipConfig(name="offline"))
    assert first.model_hash == second.model_hash == third.model_hash


def test_an_open_clip_config_folder_brings_its_own_preprocessing(tmp_path: Path) -> None:
    _, weights = save_tiny(tmp_path, MODELS["vit"])
    config = {"model_cfg": MODELS["vit"], "preprocess_cfg": {"mean": [0.1, 0.2, 0.3]}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    name = str(tmp_path / "open_clip_config.json")
    clip = load_clip(ClipConfig(name=name, pretrained=weights))
    assert clip.preprocessing.mean == (0.1, 0.2, 0.3) and clip.preprocessing.size == (32, 32)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (ClipConfig(name="vit-b32"), ["vit-b32", "ViT-B-32", "offline"]),
        (ClipConfig(pretrained="laion"), ["'laion'", "laion2b_s34b_b79k"]),
        (ClipConfig(name="nowhere.json"), ["nowhere.json"]),
    ],
)
def test_wrong_names_are_refused_with_legal_ones_before_anything_is_read(
    config: ClipConfig, words: list[str]
) -> None:
    for door in (check_clip, load_clip):
        with pytest.raises(ConfigError) as caught:
            door(config)
        message = str(caught.value)
        assert "\n" not in message and all(word in message for word in words)


def test_wrong_files_are_refused_in_one_line(tmp_path: Path) -> None:
    name, weights = save_tiny(tmp_path, MODELS["vit"])
    other = tmp_path / "other"
    other.mkdir()
    _, foreign = save_tiny(other, MODELS["resnet"])
    (tmp_path / "hostile.pt").write_bytes(pickle.dumps(Hostile()))
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "no.json").write_text("{}")
    (tmp_path / "torn.json").write_text("{")
    cases = [
        (name, str(tmp_path / "absent.pt")),
        (name, str(tmp_path / "hostile.pt")),
        (name, str(tmp_path / "empty.pt")),
        (name, foreign),
        (str(tmp_path / "no.json"), weights),
        (str(tmp_path / "torn.json"), weights),
    ]
    for config, checkpoint in cases:
        with pytest.raises(ConfigError) as caught:
            load_clip(ClipConfig(name=config, pretrained=checkpoint))
        assert "\n" not in str(caught.value)
    assert not Hostile.was_run


class Hostile:
    """A checkpoint that runs code when it is unpickled."""

    was_run = False

    def __reduce__(self) -> tuple[Any, ...]:
        return setattr, (Hostile, "was_run", True)


@pytest.mark.parametrize("name", ["hf-hub:nobody/has-this-model", "ViT-B-32"])
def test_an_unreachable_hub_is_refused_at_once_and_names_the_offline_choice(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    for door in (check_clip, load_clip):
        with pytest.raises(ConfigError, match=r"can't be reached.*offline") as caught:
            door(ClipConfig(name=name, pretrained="laion400m_e31"))
        assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 10

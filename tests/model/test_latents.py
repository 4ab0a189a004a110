"""Latent space over real diffusers classes with random weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from infra.errors import ConfigError
from model.edm import sigma_in
from model.latents import Latents, load_latents
from model.training.build import edm_of
from tests.model.tiny_autoencoders import cogvideox, kl, ltx, tiny, wan

KINDS: dict[str, tuple[Callable[[], Any], int, int]] = {
    "image kl": (kl, 4, 1),
    "image tiny": (tiny, 4, 1),
    "video wan": (wan, 8, 4),
    "video cogvideox": (cogvideox, 8, 4),
    "video ltx": (ltx, 8, 8),
}
"""Name -> (maker, pixels to a latent, frames to a latent)."""


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest) -> tuple[Latents, int, int]:
    torch.manual_seed(0)
    make, factor_px, factor_frames = KINDS[request.param]
    return Latents(make(), frames_per_call=3), factor_px, factor_frames


def video(num_frames: int, height: int = 32, width: int = 48, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(num_frames)
    return torch.rand(batch, num_frames, 3, height, width, generator=generator) * 2 - 1


def test_factors_are_those_of_the_class(made: tuple[Latents, int, int]) -> None:
    latents, factor_px, factor_frames = made
    assert (latents.space.factor_px, latents.space.factor_frames) == (factor_px, factor_frames)
    assert latents.is_video == (factor_frames > 1)


@pytest.mark.parametrize("num_frames", [1, 5, 8, 16])
def test_shapes_come_out_as_promised_for_any_length(made: tuple[Latents, int, int], num_frames: int) -> None:
    latents, _, _ = made
    clip = video(num_frames)
    z = latents.encode(clip)
    assert z.shape[1:] == latents.space.shape(num_frames, 32, 48) and z.dtype == torch.float32
    out = latents.decode(z, num_frames)
    assert out.shape == clip.shape and out.abs().max() <= 1 and out.isfinite().all()


def test_a_clip_has_one_encoding_whatever_its_batch(made: tuple[Latents, int, int]) -> None:
    latents, _, _ = made
    clip = video(8)
    torch.testing.assert_close(latents.encode(clip)[1:], latents.encode(clip[1:]), atol=1e-5, rtol=1e-4)


def test_nothing_is_trained(made: tuple[Latents, int, int]) -> None:
    latents, _, _ = made
    assert not any(p.requires_grad for p in latents.model.parameters())
    assert not latents.model.training
    z = latents.encode(video(1)).requires_grad_(True)  # an ordinary tensor: training can go on from it
    (z.sum() * 2).backward()
    assert z.grad is not None


def test_scaling_follows_the_models_config() -> None:
    torch.manual_seed(0)
    image = kl()
    latents = Latents(image)
    clip = video(1, batch=1)
    raw = image.encode(clip[:, 0]).latent_dist.mode()
    torch.testing.assert_close(latents.encode(clip)[:, 0], (raw - 0.1) * 0.3)
    expected = image.decode(raw).sample.clamp(-1, 1)
    torch.testing.assert_close(latents.decode(latents.encode(clip))[:, 0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("make", [wan, ltx])
def test_per_channel_standards_of_a_video_autoencoder_are_used(make: Callable[[], Any]) -> None:
    """Wan's stand in its config, LTX's beside its weights."""
    torch.manual_seed(0)
    model = make()
    latents = Latents(model)
    clip = video(9, batch=1)
    raw = model.encode(clip.transpose(1, 2)).latent_dist.mode().transpose(1, 2)
    said = {
        wan: ([0.1, -0.2, 0.3], [2.0, 1.5, 0.5]),
        ltx: (torch.linspace(-0.3, 0.4, 8), torch.linspace(0.5, 2.0, 8)),
    }
    mean, std = (torch.as_tensor(values).view(-1, 1, 1) for values in said[make])
    z = latents.encode(clip)
    torch.testing.assert_close(z, (raw - mean) / std)
    expected = model.decode(raw.transpose(1, 2)).sample.transpose(1, 2).clamp(-1, 1)
    torch.testing.assert_close(latents.decode(z), expected, atol=1e-4, rtol=1e-4)


def test_a_decoder_that_wants_a_time_is_told_that_no_noise_is_left() -> None:
    """As its pipeline does unless told otherwise: LTX 0.9.1 and later."""
    torch.manual_seed(0)
    model = ltx(timestep_conditioning=True)
    latents = Latents(model)
    z = latents.encode(video(9, batch=1))
    mean, std = (values.view(-1, 1, 1) for values in (model.latents_mean, model.latents_std))
    raw = (z * std + mean).transpose(1, 2)
    expected = model.decode(raw, torch.zeros(1)).sample.transpose(1, 2).clamp(-1, 1)
    torch.testing.assert_close(latents.decode(z), expected, atol=1e-4, rtol=1e-4)


def test_a_decoder_that_draws_noise_gives_one_video_and_leaves_the_global_state_alone() -> None:
    """As LTX 0.9.1's does; its weight of the noise is 0 in a fresh model."""
    model = ltx(timestep_conditioning=True, decoder_inject_noise=(True, True, True, True, True))
    for name, scale in model.named_parameters():
        if "per_channel_scale" in name:
            scale.data.fill_(0.5)
    latents, z = Latents(model), torch.randn(2, 2, 8, 2, 3, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    first, state = latents.decode(z), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(latents.decode(z), first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)
    alone = torch.cat([latents.decode(one[None]) for one in z])
    torch.testing.assert_close(alone, first, atol=1e-5, rtol=1e-5)


def test_frames_of_an_image_autoencoder_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    latents = Latents(tiny(), frames_per_call=2)
    clip = video(5)
    alone = torch.stack([latents.encode(clip[:, n : n + 1])[:, 0] for n in range(5)], dim=1)
    torch.testing.assert_close(latents.encode(clip), alone, atol=1e-5, rtol=1e-4)


@settings(max_examples=50, deadline=None)
@given(frames=st.integers(1, 64), height=st.integers(1, 64), width=st.integers(1, 64))
def test_sigma_in_is_that_of_the_latent_clip(frames: int, height: int, width: int) -> None:
    space = image_latents().space
    shape = space.shape(frames, height * space.factor_px, width * space.factor_px)
    assert edm_of({}, shape).sigma_in == pytest.approx(sigma_in(frames, height, width))


_KEPT: list[Latents] = []


def image_latents() -> Latents:
    if not _KEPT:
        _KEPT.append(Latents(tiny()))
    return _KEPT[0]


def test_a_size_that_does_not_divide_is_refused_with_the_next_legal_one() -> None:
    with pytest.raises(ConfigError, match="36 x 64"):
        image_latents().space.shape(16, 34, 63)


def test_a_saved_autoencoder_loads_from_its_folder_or_from_a_pipelines(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = kl()
    model.save_pretrained(tmp_path / "alone")
    model.save_pretrained(tmp_path / "pipeline" / "vae")
    expected = Latents(model).encode(video(2))
    for name in ("alone", "pipeline"):
        loaded = load_latents(str(tmp_path / name))
        torch.testing.assert_close(loaded.encode(video(2)), expected)


def test_identity_is_of_the_files_to_the_last_bit_however_they_are_cut(tmp_path: Path) -> None:
    torch.manual_seed(0)
    kl().save_pretrained(tmp_path / "whole")
    kept = load_latents(str(tmp_path / "whole"))
    kept.model.save_pretrained(tmp_path / "cut", max_shard_size="20KB")
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 1
    assert load_latents(str(tmp_path / "cut")).identity_hash == kept.identity_hash
    file = tmp_path / "whole" / "diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-4] ^= 1  # the least bit of a float32, which bfloat16 doesn't have
    file.write_bytes(data)
    assert load_latents(str(tmp_path / "whole")).identity_hash != kept.identity_hash


def test_what_is_no_autoencoder_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    for name in (str(tmp_path / "empty"), str(tmp_path / "other"), "nobody/has-this"):
        with pytest.raises(ConfigError) as caught:
            load_latents(name)
        assert "\n" not in str(caught.value) and "cure" in str(caught.value)

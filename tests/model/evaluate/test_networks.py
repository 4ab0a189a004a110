"""What each network sees of a video; tiny or random instances of its class stand in for weights of a hub."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from infra.errors import ConfigError
from infra.storage import write_bytes
from model.evaluate.extract import MAX_REFERENCES, Extractor, FeatureCache
from model.evaluate.metric import Video
from model.evaluate.networks import NETWORKS, Motion, Network, NetworkConfig, opener, resize, squeeze
from model.evaluate.scores import chosen, score
from model.evaluate.subject import SubjectNetwork, alone, square
from tests.infra import tiny_grounders

CPU = torch.device("cpu")


def noise(t: int = 4, h: int = 24, w: int = 32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (t, h, w, 3), np.uint8)


def config(**values: Any) -> NetworkConfig:
    return NetworkConfig.model_validate(values)


def test_motion_is_the_mean_difference_of_neighbours() -> None:
    frames = np.zeros((3, 4, 4, 3), np.uint8)
    frames[1] = 255
    frames[2, :2] = 255
    assert Motion(config(), CPU)(frames).tolist() == [1.0, 0.5]
    assert Motion(config(), CPU)(frames[:1]).shape == (0,)


@pytest.mark.parametrize("size", [(8, 5), (50, 70), (24, 32)])
def test_resizing_is_torchs_and_keeps_flat_pictures(size: tuple[int, int]) -> None:
    picture = torch.from_numpy(noise(1)[0]).permute(2, 0, 1).float()
    theirs = F.interpolate(picture[None], size=size, mode="bilinear", align_corners=False)[0]
    assert torch.allclose(resize(picture, size, "bilinear"), theirs, atol=1e-3)
    assert resize(torch.full((3, 24, 32), 255.0), size, "bilinear").unique().tolist() == [255.0]


def test_tensorflows_resizing_takes_corners() -> None:
    row = torch.tensor([[[0.0, 10.0, 20.0, 30.0]]])
    assert resize(row, (1, 2), "tensorflow").tolist() == [[[0.0, 20.0]]]
    assert resize(row, (1, 2), "bilinear").tolist() == [[[5.0, 25.0]]]
    assert resize(row, (1, 8), "tensorflow")[0, 0].tolist() == [0, 5, 10, 15, 20, 25, 30, 30]


def test_squeeze_resizes_and_crops() -> None:
    frames = np.zeros((2, 40, 80, 3), np.uint8)
    frames[:, :, 20:60] = 200  # the middle square
    assert squeeze(frames, (8, 8), config(crop="center"), CPU).unique().tolist() == [200.0]
    whole = squeeze(frames, (8, 8), config(), CPU)
    assert whole.shape == (1, 3, 2, 8, 8) and whole[..., 0].max() == 0
    rough, smooth = (
        squeeze(noise(1, 64, 64), (8, 8), config(resize=r), CPU) for r in ("bilinear", "antialias")
    )
    assert smooth.std() < 0.5 * rough.std()


class Classifier(nn.Module):
    """Looks at the mean of the red channel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        red = x[:, 0].mean(dim=[1, 2, 3]) / 255
        return torch.stack([red, 1 - red], 1)


class BrightBox(nn.Module):
    """A detector: the box of all pixels above 200, its score their share of the brightest; ends exclusive."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bright = torch.nonzero(x[0].mean(0) > 200).float()
        if len(bright) == 0:
            return torch.zeros(0, 5)
        low, high = bright.min(0).values, bright.max(0).values + 1
        score = torch.ones(1)
        return torch.cat([low[1:2], low[:1], high[1:2], high[:1], score])[None]


class Colour(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=[2, 3]) + 1


def test_the_best_face_of_a_frame_is_cut_out_and_seen(tmp_path: Path) -> None:
    torch.jit.script(BrightBox()).save(tmp_path / "detector.pt")
    torch.jit.script(Colour()).save(tmp_path / "arcface.pt")
    own = config(face_detector=str(tmp_path / "detector.pt"), face=str(tmp_path / "arcface.pt"))
    network = NETWORKS["face"](own, CPU)
    frames = np.zeros((2, 40, 60, 3), np.uint8)
    frames[0, 10:20, 30:50] = (255, 255, 204)
    found = network(frames)
    assert found[0] == pytest.approx([2, 2, 1.6], abs=1e-3) and not found[1].any()
    crop = Image.new("RGB", (30, 30), (51, 0, 0))  # no face is found in it: it is one
    assert network.pictures([crop])[0] == pytest.approx([0.4, 0, 0], abs=1e-3)
    assert {"detector", "arcface"} < set(network.identity)
    with pytest.raises(ConfigError, match=r"no ArcFace; .*--set networks\.face=FILE"):
        NETWORKS["face"].find(config(face_detector=str(tmp_path / "detector.pt")))


def test_c3d_is_any_torchscript_and_probabilities_are_seen(tmp_path: Path) -> None:
    torch.jit.script(Classifier()).save(tmp_path / "c3d.pt")
    network = NETWORKS["c3d"](config(c3d=str(tmp_path / "c3d.pt")), CPU)
    frames = np.zeros((16, 30, 40, 3), np.uint8)
    frames[..., 0] = 51
    assert np.exp(network(frames)) == pytest.approx([0.2, 0.8], rel=1e-3)
    assert len(network.identity["sha256"]) == 64


@pytest.fixture(scope="session")
def random_inception(tmp_path_factory) -> Path:
    from model.evaluate.inception import FidInception

    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(FidInception().state_dict(), place)
    return place


def test_inception_gives_pooled_features(random_inception: Path) -> None:
    network = NETWORKS["inception"](config(inception=str(random_inception)), CPU)
    found = network(noise(2))
    assert found.shape == (2, 2048) and np.isfinite(found).all() and not np.array_equal(found[0], found[1])


def test_inception_has_the_layers_of_the_published_file(random_inception: Path) -> None:
    state = torch.load(random_inception, weights_only=True)
    assert state["fc.weight"].shape == (1008, 2048) and "AuxLogits.fc.weight" not in state
    assert state["Mixed_7c.branch_pool.conv.weight"].shape == (192, 2048, 1, 1)


def test_inceptions_average_leaves_padding_out() -> None:
    from model.evaluate.inception import FidE, FidLastE, _average

    assert _average(torch.ones(1, 1, 3, 3)).unique().tolist() == [1.0]
    assert FidLastE(8).largest and not FidE(8).largest


@pytest.mark.slow
def test_raft_gives_a_length_for_each_pair(tmp_path: Path) -> None:
    from torchvision.models.optical_flow import raft_large

    torch.manual_seed(0)
    torch.save(raft_large(weights=None).state_dict(), tmp_path / "raft.pth")
    network = NETWORKS["raft"](config(raft=str(tmp_path / "raft.pth")), CPU)
    found = network(noise(3, 128, 136))
    assert found.shape == (2,) and np.isfinite(found).all() and (found >= 0).all()


class Strictness(nn.Module):
    """Gives as a flow whether convolutions are in full float32 and by kernels of the same bits each time."""

    def forward(self, one: torch.Tensor, two: torch.Tensor) -> list[torch.Tensor]:
        cudnn = torch.backends.cudnn
        return [torch.full((1, 2, 1, 1), float(cudnn.deterministic and not cudnn.allow_tf32))]


def test_raft_looks_exactly() -> None:
    network = NETWORKS["raft"](config(), CPU)
    vars(network)["model"] = Strictness()  # in place of the loaded weights
    assert network(noise(2, 128, 128)).all()


@pytest.mark.parametrize("name", ["inception", "raft", "c3d"])
def test_a_foreign_file_is_refused_in_a_line(tmp_path: Path, name: str) -> None:
    torch.save({"weight": torch.zeros(3)}, tmp_path / "x.pth")
    network = NETWORKS[name](config(**{name: str(tmp_path / "x.pth")}), CPU)
    with pytest.raises(ConfigError, match=r"x\.pth is") as error:
        network(noise(2, 128, 128))
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=f"--set networks.{name}=FILE"):
        NETWORKS[name].find(config())


@pytest.fixture(scope="session")
def tiny_dino(tmp_path_factory) -> str:
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    torch.manual_seed(0)
    folder = str(tmp_path_factory.mktemp("dino"))
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    ViTModel(ViTConfig(image_size=32, patch_size=16, **sizes)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_dino_gives_class_tokens_of_frames_and_pictures_alike(tiny_dino: str) -> None:
    network = NETWORKS["dino"](config(dino=tiny_dino), CPU)
    frames = noise(3)
    assert network(frames).shape == (3, 16)
    assert network.pictures([Image.fromarray(frames[0])])[0] == pytest.approx(network(frames[:1])[0])
    assert (
        network.identity["weight_hash"] == NETWORKS["dino"](config(dino=tiny_dino), CPU).identity["weight_hash"]
    )


@pytest.fixture(scope="session")
def tiny_finders(tmp_path_factory) -> tuple[str, str]:
    """A random GroundingDINO and a random SAM, sure of whatever it cuts out."""
    folder = tmp_path_factory.mktemp("finders")
    detector = tiny_grounders.save("grounding_dino", folder / "detector")
    return detector, tiny_grounders.save("sam", folder / "segmenter")


def test_subjects_are_found_by_their_words(
    tiny_dino: str, tiny_finders: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    detector, segmenter = tiny_finders
    network = SubjectNetwork(config(dino=tiny_dino, detector=detector, segmenter=segmenter), CPU)
    frames = noise(2, 48, 64)
    box = network.box(Image.fromarray(frames[0]), "red square")
    assert box is not None and 0 <= box[0] < box[2] <= 64 and 0 <= box[1] < box[3] <= 48
    found = network.about(frames, ["red square", "cat", "red square"])
    assert found.shape == (2, 3, 16) and np.array_equal(found[:, 0], found[:, 2])
    assert network.pictures([Image.fromarray(frames[0])]).shape == (1, 16)
    assert network.identity == SubjectNetwork(network.config, CPU).identity
    monkeypatch.setattr("model.evaluate.subject.MIN_MASK", 2.0)  # SAM is never so sure
    assert not network.about(frames, ["cat"]).any()
    monkeypatch.setattr("model.evaluate.subject.MIN_BOX", 2.0)
    assert network.box(Image.fromarray(frames[0]), "cat") is None


def test_a_subject_is_cut_out_on_white() -> None:
    frame, mask = np.full((10, 20, 3), 7, np.uint8), np.zeros((10, 20), bool)
    mask[2:4, 5:15] = True
    cut = alone(frame, mask, (4.0, 2.0, 16.0, 4.0))
    assert cut.size == (12, 2) and cut.getpixel((0, 0)) == (255, 255, 255) and cut.getpixel((1, 1)) == (7, 7, 7)
    assert square(cut).size == (12, 12) and square(cut).getpixel((5, 5)) == (7, 7, 7)


@pytest.fixture
def subjects(tmp_path: Path, tiny_dino: str, tiny_finders: tuple[str, str]) -> Extractor:
    detector, segmenter = tiny_finders
    own = config(dino=tiny_dino, detector=detector, segmenter=segmenter)
    return Extractor(own, ["subject", "subject_references"], FeatureCache(str(tmp_path)), {}, CPU)


def test_features_of_subjects_hang_on_their_words(subjects: Extractor) -> None:
    assert subjects.video_keys("video") == {}  # a video without references has none
    keys = subjects.video_keys("video", ["cat"])
    assert keys != subjects.video_keys("video", ["red square"])
    subjects.video(keys, ["subject"], noise(2, 48, 64), ["cat"])
    assert subjects.cache.require(keys["subject"]).shape == (2, 1, 16)


def test_as_many_words_count_as_reference_pictures_do(subjects: Extractor) -> None:
    pictures, words = [png(seed) for seed in range(MAX_REFERENCES + 2)], ["cat"] * (MAX_REFERENCES + 2)
    keys = subjects.video_keys("video", words)
    assert keys == subjects.video_keys("video", words[:MAX_REFERENCES])
    subjects.video(keys, ["subject"], noise(1, 48, 64), words)
    shown = {name: subjects.cache.require(key) for name, key in subjects.references(pictures).items()}
    video = Video("a", {"subject": subjects.cache.require(keys["subject"])})
    assert score(chosen(["subject"]), [(video, shown)])[0]["subject"].n == 1


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(noise(1, 16, 16, seed)[0]).save(buffer, "PNG")
    return buffer.getvalue()


def clip_config(tiny_encoder: dict[str, Any]) -> NetworkConfig:
    return config(clip=tiny_encoder["clip"])


def test_clip_vectors_are_unit_and_of_their_own_video(tiny_encoder: dict[str, Any]) -> None:
    network: Network = opener(clip_config(tiny_encoder), CPU)("clip")
    found = network(noise(3))
    assert found.shape == (3, 16) and np.linalg.norm(found, axis=1) == pytest.approx(np.ones(3), rel=1e-5)
    assert network.texts(["a dog", "a much longer text of a cat"])[:1] == pytest.approx(
        network.texts(["a dog"])
    )
    assert network.identity["precision"] == "fp32"


def test_features_are_kept_and_damaged_ones_made_again(tmp_path: Path, tiny_encoder: dict[str, Any]) -> None:
    cache = FeatureCache(str(tmp_path))
    names = ["clip", "clip_references", "clip_text", "motion"]
    extractor = Extractor(clip_config(tiny_encoder), names, cache, {"num_frames": 3}, CPU)
    keys = extractor.video_keys("video")
    assert extractor.missing(keys) == ["clip", "motion"]
    extractor.video(keys, ["clip", "motion"], noise(3))
    assert not extractor.missing(keys)
    kept = cache.require(keys["clip"])
    file = tmp_path / keys["clip"][:2] / f"{keys['clip']}.npy"
    write_bytes(str(file), file.read_bytes()[:-3] + b"\0\0\0")
    assert extractor.missing(keys) == ["clip"]
    extractor.video(keys, ["clip"], noise(3))
    assert np.array_equal(cache.require(keys["clip"]), kept)
    other = Extractor(clip_config(tiny_encoder), names, cache, {"num_frames": 4}, CPU)
    assert not set(other.video_keys("video").values()) & set(keys.values())
    assert extractor.text("a dog")["clip_text"] == other.text("a dog")["clip_text"]
    assert extractor.references([]) == {}

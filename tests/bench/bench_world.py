"""What limits a small generator in the world: backbones and settings at equal processor time.

    python tests/bench/bench_world.py [--seconds 240] [--only NAME ...]

Clips of 4 frames of 16 x 16 px, their nouns' documents as references (`plus`); words are frozen random
vectors, so that nothing but the generator is measured: one for the direction, or a prompt as a frozen encoder
reads it (`sentences`), which says it in a part of one token among 23. Each variant trains for the same seconds
of one core. Then, of nouns it never saw: the squared error of one denoising by noise level; and what
`pipeline.world.judge` sees in sampled videos with their own document, none, and another noun's.
"""

import argparse
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.backbones.presets import preset
from model.condition import Condition, ConditionConfig
from model.data.batch import ROLES, Role
from model.edm import Edm, edm_for
from model.ema import Ema, HalfLife
from model.generator import Generator
from model.guidance import FULL
from model.optim import OPTIMIZERS
from model.sample import Denoiser, sample_ode
from pipeline.world.concepts import DIRECTIONS, draw_concept, draw_ground, draw_motion, draw_place, generator
from pipeline.world.draw import TEXTURES, film, picture
from pipeline.world.judge import judge_video
from tests.bench.bench_quality import DEVICE, train

FRAMES, SIDE_PX, TOKEN_DIM = 4, 16, 64
SIGMAS = (0.3, 1.0, 3.0, 10.0)
CAPTION = list(ROLES).index(Role.CAPTION)
SHAPES = ("square", "disc", "diamond", "cross", "triangle")
FIT: dict[str, Any] = {
    "patch_dim": 128, "num_latents": 32, "latent_dim": 128, "latent_head_dim": 32, "qk_norm": True,
    "group_height": 4, "group_width": 4,
}  # fmt: skip
DIT: dict[str, Any] = {"dim": 128, "head_dim": 32, "num_blocks": 4, "qk_norm": True}
NARROW = DIT | {"dim": 64, "condition_dim": 64}


@dataclass(frozen=True)
class Variant:
    """One line of the table."""

    preset: str = "fit-tiny"
    backbone: dict[str, Any] = field(default_factory=lambda: FIT)
    batch: int = 32
    optimizer: str = "muon"
    lr: float = 5e-3
    log_mean: float = 0.0
    log_std: float = 1.6
    reference_patch: int = 8
    documents: float = 0.9
    """Share of the nouns that have a document in training."""
    sentences: bool = False
    """The direction stands among the tokens of a caption and of a document."""


VARIANTS = {
    "fit": Variant(),
    "fit, batch 16": Variant(batch=16),
    "fit, AdamW, batch 16": Variant(batch=16, optimizer="adamw", lr=2e-3),
    "fit, ln sigma -1.2 +- 1.2": Variant(log_mean=-1.2, log_std=1.2),
    "fit, ln sigma -0.5 +- 1.6": Variant(log_mean=-0.5),
    "dit": Variant("dit-tiny", DIT),
    "dit, patches of 2 px": Variant("dit-tiny", DIT | {"patch_px": 2}),
    "dit, patches of 8 px": Variant("dit-tiny", DIT | {"patch_px": 8}),
    "dit, AdamW, batch 16": Variant("dit-tiny", DIT, batch=16, optimizer="adamw", lr=2e-3),
    "dit of 64": Variant("dit-tiny", NARROW, lr=1e-2),
    "dit of 64, pixel head": Variant("dit-tiny", NARROW | {"pixel_dim": 16}, lr=1e-2),
    "dit of 64, pixel head of 24": Variant("dit-tiny", NARROW | {"pixel_dim": 24}, lr=1e-2),
    "dit of 64, pixel head, references of 4 px": Variant(
        "dit-tiny", NARROW | {"pixel_dim": 16}, lr=1e-2, reference_patch=4
    ),
    "dit of 64, pixel head, documents always": Variant(
        "dit-tiny", NARROW | {"pixel_dim": 16}, lr=1e-2, documents=1
    ),
    "dit of 64, pixel head, documents for half": Variant(
        "dit-tiny", NARROW | {"pixel_dim": 16}, lr=1e-2, documents=0.5
    ),
    "dit of 64, pixel head, sentences": Variant(
        "dit-tiny", NARROW | {"pixel_dim": 16}, lr=1e-2, sentences=True
    ),
    "dit of 64, pixel head, sentences, eight heads": Variant(
        "dit-tiny", NARROW | {"pixel_dim": 16, "head_dim": 8}, lr=1e-2, sentences=True
    ),
    "dit of 64, lr 2e-2": Variant("dit-tiny", NARROW, lr=2e-2),
    "dit of 64, batch 64": Variant("dit-tiny", NARROW, batch=64, lr=1e-2),
    "dit of 64, AdamW": Variant("dit-tiny", NARROW, optimizer="adamw", lr=5e-3),
}


@dataclass(frozen=True)
class Clips:
    """Clips of some nouns, and what they show."""

    videos: Tensor
    """`b t c h w` in [-1, 1]."""
    pictures: Tensor
    """`b 1 c h w` in [-1, 1], of the nouns' documents."""
    directions: Tensor
    """`b` int64."""
    truth: list[tuple[str, str, str, float]]
    """(colour, shape, direction, size)."""
    sentences: bool = False
    """Their prompts are sentences, not a word."""

    def condition(self, pictures: Tensor, present: Tensor) -> Condition:
        """Of all clips, with these documents where `present` (`b` bool) says so."""
        count = len(self.videos)
        one = torch.ones(count, 1, dtype=torch.long)
        tokens, role, segment = self._sentences() if self.sentences else self._words()
        return Condition(
            tokens=tokens,
            mask=torch.ones(tokens.shape[:2], dtype=torch.bool),
            role=role.expand(count, -1),
            segment=segment.expand(count, -1),
            fps=torch.full((count,), 8.0),
            original_size_px=torch.full((count, 2), SIDE_PX),
            references=pictures,
            reference_mask=present[:, None],
            reference_role=one * list(ROLES).index(Role.RETRIEVED),
            reference_place=one,
        ).to(DEVICE)

    def _words(self) -> tuple[Tensor, Tensor, Tensor]:
        """(`b 1 e` tokens, role, segment): nothing but the direction."""
        words = _random(0, len(DIRECTIONS), 1, TOKEN_DIM)
        return words[self.directions], torch.tensor([CAPTION]), torch.tensor([0])

    def _sentences(self) -> tuple[Tensor, Tensor, Tensor]:
        """(`b 23 e` tokens, roles, segments) of a document's six words, its picture's nine cells and a caption
        of eight words. Each word's token tells of its noun too, as those of a sentence encoder do, and the
        seventh of the caption tells the direction.
        """
        count = len(self.videos)
        words, nouns = _random(0, len(DIRECTIONS), 1, TOKEN_DIM), _random(count, count, 1, TOKEN_DIM)
        caption = _random(1, 1, 8, TOKEN_DIM) + 0.7 * nouns + 0.3 * words[self.directions]
        caption[:, 6:7] += 0.7 * words[self.directions]
        document, cells = _random(2, 1, 6, TOKEN_DIM) + nouns, _random(count + 1, count, 9, TOKEN_DIM)
        roles = torch.tensor([list(ROLES).index(Role.RETRIEVED)] * 15 + [CAPTION] * 8)
        return torch.cat([document, cells, caption], dim=1), roles, torch.tensor([0] * 6 + [1] * 9 + [2] * 8)


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def draw_clips(count: int, seed: int) -> Clips:
    """One clip and one document of each of `count` nouns."""
    videos, pictures, truth = [], [], []
    for number in range(count):
        random = generator(seed, number)
        concept = draw_concept(f"noun {number}", random, shapes=SHAPES, textures=tuple(TEXTURES))
        motion = draw_motion(random)
        _, ground = draw_ground(random, ("plain", "gradient"), behind=concept.look)
        videos.append(
            film(concept.look, ground, size=motion.size, places=motion.places(FRAMES), side_px=SIDE_PX)
        )
        _, behind = draw_ground(random, ("clouds",), behind=concept.look)
        size, place = draw_place(random, (0.78, 1.0))
        pictures.append(picture(concept.look, behind, size=size, place=place, side_px=SIDE_PX)[None])
        truth.append((concept.colour, concept.look.shape, motion.direction, motion.size))
    names = list(DIRECTIONS)
    return Clips(
        _tensor(videos), _tensor(pictures), torch.tensor([names.index(facts[2]) for facts in truth]), truth
    )


def _tensor(frames: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(frames)).to(DEVICE).permute(0, 1, 4, 2, 3).float() / 127.5 - 1


def learn(variant: Variant, clips: Clips, seconds: float) -> tuple[Generator, Edm, int]:
    """(the averaged generator, its process, samples seen)."""
    torch.manual_seed(0)
    size = {"num_frames": FRAMES, "height_px": SIDE_PX, "width_px": SIDE_PX}
    config = ConditionConfig(
        token_dim=TOKEN_DIM, mode="plus", num_roles=len(ROLES), reference_patch=variant.reference_patch
    )
    model = Generator(preset(variant.preset, **size, **variant.backbone), config).to(DEVICE)
    edm = edm_for(FRAMES, SIDE_PX, SIDE_PX)
    edm = replace(edm, sigma_data=0.5, log_mean=variant.log_mean, log_std=variant.log_std)
    ema = Ema(model, HalfLife(1600))
    present = torch.arange(len(clips.videos)) % 10 >= 10 * (1 - variant.documents)
    steps = train(
        model, clips.videos, clips.condition(clips.pictures, present), batch=variant.batch,
        lr=variant.lr, seconds=seconds, ema=ema, build=OPTIMIZERS[variant.optimizer], edm=edm,
    )  # fmt: skip
    model.load_state_dict(ema.weights, strict=False)
    return model, edm, len(steps) * variant.batch


@torch.no_grad()
def squared_errors(model: Generator, edm: Edm, clips: Clips) -> list[float]:
    """Of the clean clips' estimates at each of `SIGMAS`, with their own documents."""
    noise = torch.randn(clips.videos.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    condition = clips.condition(clips.pictures, torch.full((len(clips.pictures),), True))
    errors = []
    for sigma in torch.tensor(SIGMAS, device=DEVICE):
        noisy = edm.add_noise(clips.videos, noise, sigma.expand(len(noise)))
        estimate = Denoiser(model, edm, {FULL: condition})(noisy, sigma, 0)
        errors.append(float((estimate - clips.videos).square().mean()))
    return errors


def judge(model: Generator, edm: Edm, clips: Clips) -> dict[str, list[float]]:
    """Shares of right colours, shapes and directions, by whose document was given."""
    noise = torch.randn(clips.videos.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    given = {"right": (clips.pictures, True), "none": (clips.pictures, False),
             "shuffled": (clips.pictures.roll(1, 0), True)}  # fmt: skip
    found = {}
    for name, (pictures, there) in given.items():
        condition = clips.condition(pictures, torch.full((len(pictures),), there))
        videos = sample_ode(Denoiser(model, edm, {FULL: condition}), edm, noise, num_steps=24).clamp(-1, 1)
        frames = ((videos + 1) * 127.5).round().byte().permute(0, 1, 3, 4, 2).cpu().numpy()
        hits = []
        for video, (colour, shape, direction, size) in zip(frames, clips.truth, strict=True):
            seen = judge_video(video, size=size, shapes=SHAPES)
            hits.append((seen.colour == colour, seen.shape == shape, seen.direction == direction))
        found[name] = np.mean(hits, axis=0).tolist()
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=240, help="of one core, for each variant")
    parser.add_argument("--only", nargs="*", help="names of variants")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seen, unseen = draw_clips(2000, seed=1), draw_clips(96, seed=2)
    print(f"{'':<28}{'samples':>9}   squared error at sigma .3, 1, 3, 10   ", end="")
    print("colour: right, none, shuffled   shape: right, none   direction")
    for name, variant in VARIANTS.items():
        if options.only and name not in options.only:
            continue
        training, test = (replace(clips, sentences=variant.sentences) for clips in (seen, unseen))
        model, edm, samples = learn(variant, training, options.seconds)
        errors = "".join(f"{error:>8.4f}" for error in squared_errors(model, edm, test))
        found = judge(model, edm, test)
        colours = "".join(f"{found[key][0]:>9.2f}" for key in found)
        shapes = "".join(f"{found[key][1]:>10.2f}" for key in ("right", "none"))
        print(
            f"{name:<28}{samples:>9,}   {errors}   {colours}   {shapes}   {found['right'][2]:>9.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()

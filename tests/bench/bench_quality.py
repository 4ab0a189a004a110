"""What small generators learn on real clips: by heart, FIT against DiT at equal FLOPs, and at equal time.

    overfit   fit-tiny learns 8 clips (16 frames of 36 x 64) by heart; sampled with their prompts it
              must give them back (PSNR 25 dB, goal 28), and with the prompts shuffled it must not.
              It has four times the latents, half as wide (`BY_HEART`), learns with Muon, and meets more
              noise than the paper's log-normal gives: what is learnt by heart is needed where all is noise.
              sigma_data is 0.5, which these clips measure (0.506): 25.5 dB, and 22.7 with the paper's 1
              (`--sigma-data 1 --log-mean 0.7`; 1,984 and 1,815 steps)
    compare   FIT and DiT of about equal parameters spend the same FLOPs on the same clips; losses on
              held-out clips with the same noise
    laptop    backbones for the laptop preset at its size and noise, each for the same seconds; squared error
              of one denoising of clips of two labs that training never saw, by noise level

Prompts are the clips' own captions, one frozen random vector per word: it is the generator that is
measured here, not the encoder.

Training time is counted in processor seconds over threads, which is the wall clock of a quiet
machine; `--wall-minutes` bounds the real one.

    python tests/bench/bench_quality.py overfit --minutes 9.7 --wall-minutes 9.8
    python tests/bench/bench_quality.py compare --tflop 6
    python tests/bench/bench_quality.py laptop --seconds 240

Both run on a GPU where there is one.
"""

import argparse
import json
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

from model.backbones.base import BackboneConfig
from model.backbones.presets import preset
from model.condition import Condition, ConditionConfig
from model.cost import training_flops
from model.edm import Edm, edm_for
from model.ema import Ema, HalfLife
from model.generator import Generator
from model.guidance import FULL
from model.optim import OPTIMIZERS, adamw, cosine_factor
from model.sample import Denoiser, sample_ode
from model.step import accumulate, draw, losses

ASSETS = Path(__file__).resolve().parents[3] / "shared" / "assets"
FRAMES, HEIGHT, WIDTH, FPS = 16, 36, 64, 6
TOKENS, TOKEN_DIM = 24, 64
EDM = edm_for(FRAMES, HEIGHT, WIDTH)
BY_HEART = {"num_latents": 256, "latent_dim": 128, "latent_head_dim": 32, "qk_norm": True}
"""Of 20 patches a frame in each group, every one has a latent of its own and some to spare."""
CONDITION = ConditionConfig(token_dim=TOKEN_DIM)
HELD_OUT_LABS = ("bc15b34b", "5ed85189")
"""Of DROID; `laptop` and `bench_real_clips` keep them from training."""
SIGMAS = (0.3, 1.0, 3.0, 10.0)
NARROW: dict[str, Any] = {
    "dim": 64, "head_dim": 8, "condition_dim": 64, "num_blocks": 4, "qk_norm": True, "pixel_dim": 16,
}  # fmt: skip
LAPTOP: dict[str, tuple[str, dict[str, Any]]] = {
    "fit": ("fit-tiny", BY_HEART),
    "dit of 64, patches of 4 px": ("dit-tiny", NARROW),
    "dit of 64, patches of 8 px": ("dit-tiny", NARROW | {"patch_px": 8}),
    "dit of 64, patches of 8 px, two heads": ("dit-tiny", NARROW | {"patch_px": 8, "head_dim": 32}),
    "dit of 128, patches of 8 px": ("dit-tiny", NARROW | {"patch_px": 8, "dim": 128}),
}
"""Backbones of `laptop`."""
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_clips(
    count: int, folder: str = "droid", *, wanted: Callable[[dict[str, Any]], bool] = lambda row: True
) -> tuple[Tensor, list[str]]:
    """The first `count` wanted clips that are long enough: `b t c h w` in [-1, 1], and their captions."""
    videos, captions = [], []
    with (ASSETS / folder / "captions.jsonl").open() as lines:
        for line in lines:
            row = json.loads(line)
            if not wanted(row):
                continue
            video = _decode(ASSETS / folder / row["clip"])
            if len(video) >= FRAMES:
                videos.append(video[:FRAMES])
                captions.append(row["caption"])
            if len(videos) == count:
                break
    return torch.stack(videos).to(DEVICE), captions


def _decode(path: Path) -> Tensor:
    """`t c h w` in [-1, 1] at FPS frames per second."""
    frames: list[Tensor] = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        every = max(1, round(float(stream.average_rate or 30) / FPS))
        for i, frame in enumerate(container.decode(stream)):
            if i % every == 0:
                frames.append(torch.from_numpy(frame.to_ndarray(format="rgb24")))
            if len(frames) == FRAMES:
                break
    if len(frames) < FRAMES:
        return torch.empty(0)
    pixels = torch.stack(frames).permute(0, 3, 1, 2).float()
    return F.interpolate(pixels, (HEIGHT, WIDTH), mode="area") / 127.5 - 1


def encode(captions: list[str]) -> Condition:
    """One frozen random vector per word."""
    tokens = torch.zeros(len(captions), TOKENS, TOKEN_DIM)
    mask = torch.zeros(len(captions), TOKENS, dtype=torch.bool)
    for row, caption in enumerate(captions):
        for place, word in enumerate(caption.lower().split()[:TOKENS]):
            g = torch.Generator().manual_seed(zlib.crc32(f"{place} {word}".encode()))
            tokens[row, place] = torch.randn(TOKEN_DIM, generator=g)
            mask[row, place] = True
    zeros = torch.zeros_like(mask, dtype=torch.long)
    return Condition(
        tokens=tokens, mask=mask, role=zeros, segment=zeros,
        fps=torch.full((len(captions),), float(FPS)),
        original_size_px=torch.tensor([[180, 320]] * len(captions)),
    ).to(DEVICE)  # fmt: skip


def train(
    model: Generator,
    videos: Tensor,
    condition: Condition,
    *,
    batch: int,
    lr: float,
    steps: int | None = None,
    seconds: float | None = None,
    wall_seconds: float = float("inf"),
    ema: Ema | None = None,
    build: Callable[..., Optimizer] = adamw,
    edm: Edm = EDM,
) -> list[Tensor]:
    """Train for `steps`, or for `seconds` of a quiet machine or `wall_seconds` of this one.

    The learning rate follows a cosine of whichever it is.
    """
    optimizer = build(model, lr=lr, weight_decay=0.0)
    start, busy, seen, step = time.perf_counter(), quiet_seconds(), [], 0
    order, left = torch.Generator().manual_seed(0), []
    while True:
        spent, wall = quiet_seconds() - busy, time.perf_counter() - start
        progress = spent / seconds if seconds else step / (steps or 1)
        progress = max(progress, wall / wall_seconds)
        if progress >= 1:
            return seen
        warm = min(1.0, (step + 1) / 20)
        for group in optimizer.param_groups:
            group["lr"] = lr * warm * (0.02 + 0.98 * cosine_factor(int(progress * 1e6), 0, 1_000_000))
        if len(left) < batch:
            left += torch.randperm(len(videos), generator=order).tolist()
        rows, left = torch.tensor(left[:batch], device=DEVICE), left[batch:]
        indices = range(step * batch, (step + 1) * batch)
        draws = draw(
            edm, videos.shape[1:], seed=0, indices=indices, self_condition_rate=0, device=DEVICE
        )  # fmt: skip
        each = accumulate(model, edm, videos[rows], condition.select(rows), draws, divisor=batch)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if ema is not None:
            ema.update(model, step * batch)
        seen.append(each.mean())
        if step % 100 == 0:
            recent = torch.stack(seen[-100:]).mean().item()
            print(f"  step {step:>5} {spent:>5.0f} s  loss {recent:.4f}", flush=True)


def quiet_seconds() -> float:
    """Processor time over threads: the wall clock, were the machine this process's alone."""
    return time.process_time() / torch.get_num_threads()


def overfit(args: argparse.Namespace) -> None:
    """Learn 8 clips by heart, and give them back."""
    videos, captions = load_clips(8)
    condition = encode(captions)
    torch.manual_seed(0)
    model = Generator(preset("fit-tiny", **BY_HEART), CONDITION).to(DEVICE)
    ema = Ema(model, HalfLife(half_life=args.batch * 50))
    start, busy = time.perf_counter(), quiet_seconds()
    noise = {"sigma_data": args.sigma_data, "log_mean": args.log_mean, "log_std": args.log_std}
    edm = replace(edm_for(FRAMES, HEIGHT, WIDTH), **noise)
    seen = train(
        model, videos, condition, batch=args.batch, lr=args.lr, seconds=args.minutes * 60,
        wall_seconds=args.wall_minutes * 60, ema=ema, build=OPTIMIZERS[args.optimizer], edm=edm,
    )  # fmt: skip
    model.load_state_dict(ema.weights, strict=False)
    spent, wall = quiet_seconds() - busy, time.perf_counter() - start
    if args.save:
        torch.save(model.state_dict(), args.save)
    steps = f"{len(seen)} steps of {args.batch} clips"
    print(
        f"fit-tiny, {args.optimizer}: {steps} in {spent:.0f} quiet seconds ({wall:.0f} by the clock)",
        flush=True,
    )
    noise = torch.randn(videos.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    shuffled = condition.select(torch.arange(8, device=DEVICE).roll(1))
    for title, prompts in (("their prompts", condition), ("prompts shuffled", shuffled)):
        denoiser = Denoiser(model, edm, {FULL: prompts})
        got = sample_ode(denoiser, edm, noise, num_steps=args.sampling_steps).clamp(-1, 1)
        each = psnr(got, videos)
        values = " ".join(f"{v:.1f}" for v in each.tolist())
        print(f"  sampled with {title:<17} PSNR {each.mean().item():.2f} dB  ({values})")
    mean_clip = videos.mean(dim=0, keepdim=True).expand_as(videos)
    print(f"  the mean clip would give      PSNR {psnr(mean_clip, videos).mean().item():.2f} dB")


def psnr(got: Tensor, true: Tensor) -> Tensor:
    """`b` peak signal-to-noise ratios in dB of videos in [-1, 1]."""
    return 10 * (4 / (got - true).square().flatten(1).mean(dim=1)).log10()


def compare(tflop: float, lr: float) -> None:
    """Equal parameters, clips, noise and FLOPs."""
    videos, captions = load_clips(112)
    condition = encode(captions)
    held, kept = torch.arange(96, 112, device=DEVICE), torch.arange(96, device=DEVICE)
    print(f"{'':<10}{'M params':>9}{'GFLOP/sample':>14}{'samples':>9}{'s':>6}{'val. loss':>11}")
    for name in ("fit-tiny", "dit-tiny"):
        torch.manual_seed(0)
        backbone = preset(name)
        model = Generator(backbone, CONDITION).to(DEVICE)
        each = _training_cost(backbone)
        steps = max(1, int(tflop * 1e12 / (each * 4)))
        start = time.perf_counter()
        train(model, videos[kept], condition.select(kept), batch=4, lr=lr, steps=steps)
        spent = time.perf_counter() - start
        loss = validate(model, videos[held], condition.select(held))
        count = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"{name:<10}{count:>9.2f}{each / 1e9:>14.1f}{steps * 4:>9}{spent:>6.0f}{loss:>11.4f}")


def _training_cost(backbone: BackboneConfig) -> int:
    return training_flops(backbone, CONDITION, prompt_tokens=TOKENS, self_condition_rate=0.0)["total"]


@torch.no_grad()
def validate(model: Generator, videos: Tensor, condition: Condition) -> float:
    """Mean loss with noise that depends on the clip alone."""
    total = 0.0
    for at in range(0, len(videos), 4):
        rows = torch.arange(at, at + 4)
        draws = draw(
            EDM, videos.shape[1:], seed=99, indices=rows.tolist(), self_condition_rate=0, device=DEVICE
        )  # fmt: skip
        rows = rows.to(DEVICE)
        total += losses(model, EDM, videos[rows], condition.select(rows), draws).sum().item()
    return total / len(videos)


def laptop(seconds: float, frames: int, count: int, only: list[str] | None) -> None:
    """Equal seconds, clips and noise."""
    torch.set_num_threads(1)
    videos, captions = load_clips(count, wanted=lambda row: row["lab"] not in HELD_OUT_LABS)
    held, held_captions = load_clips(count, wanted=lambda row: row["lab"] in HELD_OUT_LABS)
    videos, held = (some[:, :: FRAMES // frames] for some in (videos, held))
    condition, held_condition = encode(captions), encode(held_captions)
    print(f"{len(videos)} clips of {frames} frames to learn from, {len(held)} held out")
    print(f"{'':<30}{'M params':>9}{'samples':>9}   squared error at sigma .3, 1, 3, 10")
    edm = replace(edm_for(frames, HEIGHT, WIDTH), sigma_data=0.5, log_mean=0.0, log_std=1.6)
    for name, (base, fields) in LAPTOP.items():
        if only and name not in only:
            continue
        torch.manual_seed(0)
        model = Generator(preset(base, num_frames=frames, **fields), CONDITION).to(DEVICE)
        ema, lr = Ema(model, HalfLife(640)), 5e-3 if base == "fit-tiny" else 1e-2
        steps = train(
            model, videos, condition, batch=8, lr=lr, seconds=seconds, ema=ema,
            build=OPTIMIZERS["muon"], edm=edm,
        )  # fmt: skip
        model.load_state_dict(ema.weights, strict=False)
        errors = "".join(f"{error:>8.4f}" for error in squared_errors(model, edm, held, held_condition))
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"{name:<30}{millions:>9.2f}{len(steps) * 8:>9,}   {errors}", flush=True)


@torch.no_grad()
def squared_errors(model: Generator, edm: Edm, videos: Tensor, condition: Condition) -> list[float]:
    """Of the clean clips' estimates at each of SIGMAS."""
    noise = torch.randn(videos.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    errors = []
    for sigma in torch.tensor(SIGMAS, device=DEVICE):
        found = []
        for rows in torch.arange(len(videos), device=DEVICE).split(8):
            denoise = Denoiser(model, edm, {FULL: condition.select(rows)})
            noisy = edm.add_noise(videos[rows], noise[rows], sigma.expand(len(rows)))
            found.append((denoise(noisy, sigma, 0) - videos[rows]).square().flatten(1).mean(dim=1))
        errors.append(float(torch.cat(found).mean()))
    return errors


def main() -> None:
    """Run one of the three."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["overfit", "compare", "laptop"])
    parser.add_argument("--minutes", type=float, default=9.5)
    parser.add_argument("--wall-minutes", type=float, default=60)
    parser.add_argument("--batch", type=int, default=2, help="of overfit")
    parser.add_argument("--optimizer", choices=list(OPTIMIZERS), default="muon", help="of overfit")
    parser.add_argument("--lr", type=float, default=5e-3, help="of overfit")
    parser.add_argument("--sigma-data", type=float, default=0.5, help="of overfit; the paper's is 1")
    parser.add_argument("--log-mean", type=float, default=0.4, help="of ln sigma in overfit's training")
    parser.add_argument("--log-std", type=float, default=1.4)
    parser.add_argument("--save", help="overfit's weights, averaged, to this file")
    parser.add_argument("--sampling-steps", type=int, default=32)
    parser.add_argument("--tflop", type=float, default=6)
    parser.add_argument("--seconds", type=float, default=240, help="of laptop, for each backbone")
    parser.add_argument(
        "--clips", type=int, default=1000, help="of laptop, at most, to learn from and held out"
    )
    parser.add_argument("--frames", type=int, default=FRAMES, choices=[4, 8, 16], help="of laptop")
    parser.add_argument("--only", nargs="*", choices=list(LAPTOP), help="of laptop")
    args = parser.parse_args()
    if args.what == "overfit":
        overfit(args)
    elif args.what == "laptop":
        laptop(args.seconds, args.frames, args.clips, args.only)
    else:
        compare(args.tflop, 1e-3)


if __name__ == "__main__":
    main()

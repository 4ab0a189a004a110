"""Cost of a training step: FIT against DiT, diffusers' Wan transformer and diffusers' UNet3D.

Equal videos (16 x 32 x 64 pixels, 2,048 patch tokens), about 6 M parameters each, float32, 35
condition tokens. FLOPs of forward + backward by torch's own counter (attention through the math
kernel, which it can count); wall clock of the same step, interleaved, medians of ratios.

    python tests/bench/bench_fit_cost.py [--rounds 5] [--no-clock]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.backbones.dit import DitConfig
from model.backbones.fit import FitConfig
from model.condition import Condition, ConditionConfig
from model.cost import training_flops
from model.generator import Generator

FRAMES, HEIGHT, WIDTH, TOKENS, TOKEN_DIM = 16, 32, 64, 32, 128
TARGETS = {"DiT": 0.20, "diffusers Wan": 0.25, "diffusers UNet3D": 0.09}
FIT = FitConfig(
    num_frames=FRAMES, height_px=HEIGHT, width_px=WIDTH, group_height=4, group_width=4,
    patch_dim=96, patch_head_dim=32, num_latents=256, latent_dim=232, latent_head_dim=58,
    condition_dim=128, num_blocks=3, layers_per_block=1, dropout=0.0,
)  # fmt: skip
DIT = DitConfig(
    num_frames=FRAMES, height_px=HEIGHT, width_px=WIDTH, dim=256, head_dim=64, condition_dim=128,
    num_blocks=5,
)  # fmt: skip
CONDITION = ConditionConfig(token_dim=TOKEN_DIM)
Forward = Callable[[Tensor, Tensor], Tensor]


def ours(config: FitConfig | DitConfig) -> tuple[nn.Module, Forward]:
    """One of this project's backbones behind its condition embedder."""
    model = Generator(config, CONDITION)

    def forward(x: Tensor, sigma: Tensor) -> Tensor:
        b = len(x)
        zeros = torch.zeros(b, TOKENS, dtype=torch.long)
        condition = Condition(
            tokens=torch.ones(b, TOKENS, TOKEN_DIM), mask=zeros == 0, role=zeros, segment=zeros,
            fps=torch.full((b,), 6.0), original_size_px=torch.full((b, 2), 64),
        )  # fmt: skip
        z = torch.zeros(b, *model.z_shape) if model.z_shape[0] else None
        return model(x, sigma, condition, z)[0]

    return model, forward


def wan() -> tuple[nn.Module, Forward]:
    """The transformer of Wan 2.x, made small; its patches here are those of the others."""
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    model = WanTransformer3DModel(
        patch_size=(1, 4, 4), num_attention_heads=4, attention_head_dim=64, in_channels=3,
        out_channels=3, text_dim=TOKEN_DIM, freq_dim=64, ffn_dim=1024, num_layers=5,
    )  # fmt: skip

    def forward(x: Tensor, sigma: Tensor) -> Tensor:
        text = torch.ones(len(x), TOKENS + 3, TOKEN_DIM)
        return model(x.transpose(1, 2), sigma, text, return_dict=False)[0].transpose(1, 2)

    return model, forward


def unet() -> tuple[nn.Module, Forward]:
    """The 3D U-Net of ModelScope and ZeroScope, made small."""
    from diffusers.models.unets.unet_3d_condition import UNet3DConditionModel

    model = UNet3DConditionModel(
        sample_size=WIDTH, in_channels=3, out_channels=3, block_out_channels=(32, 64, 96, 96),
        down_block_types=("CrossAttnDownBlock3D",) * 3 + ("DownBlock3D",),
        up_block_types=("UpBlock3D",) + ("CrossAttnUpBlock3D",) * 3, layers_per_block=1,
        norm_num_groups=16, cross_attention_dim=TOKEN_DIM, attention_head_dim=16,
    )  # fmt: skip

    def forward(x: Tensor, sigma: Tensor) -> Tensor:
        text = torch.ones(len(x), TOKENS + 3, TOKEN_DIM)
        return model(x.transpose(1, 2), sigma, text, return_dict=False)[0].transpose(1, 2)

    return model, forward


def step(model: nn.Module, forward: Forward) -> None:
    """Forward and backward of one sample."""
    model.zero_grad()
    x = torch.ones(1, FRAMES, 3, HEIGHT, WIDTH)
    forward(x, torch.full((1,), 0.5)).square().mean().backward()


def flops(build: Callable[[], tuple[nn.Module, Forward]]) -> int:
    """FLOPs of one step by torch's counter, on tensors without memory."""
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH):
        pair = build()
        with FlopCounterMode(display=False) as counter:
            step(*pair)
    return counter.get_total_flops()


def clock(models: dict[str, tuple[nn.Module, Forward]], rounds: int) -> dict[str, list[float]]:
    """Seconds per step, the models taking turns so that all meet the same machine."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 1):
        for name, pair in models.items():
            start = time.perf_counter()
            step(*pair)
            if turn:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-clock", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    builders = {
        "FIT": lambda: ours(FIT), "DiT": lambda: ours(DIT), "diffusers Wan": wan,
        "diffusers UNet3D": unet,
    }  # fmt: skip
    models = {name: build() for name, build in builders.items()}
    count = {n: sum(p.numel() for p in m.parameters()) for n, (m, _) in models.items()}
    work = {name: flops(build) for name, build in builders.items()}
    seconds = {} if args.no_clock else clock(models, args.rounds)
    print(f"{'':<18}{'M params':>9}{'GFLOP':>8}{'FIT is':>9}{'target':>8}{'ms':>8}{'FIT faster':>12}")
    for name in models:
        line = f"{name:<18}{count[name] / 1e6:>9.2f}{work[name] / 1e9:>8.1f}"
        line += f"{work['FIT'] / work[name]:>8.3f}x{TARGETS.get(name, 1):>8}"
        if seconds:
            ratios = [a / b for a, b in zip(seconds[name], seconds["FIT"], strict=True)]
            line += f"{statistics.median(seconds[name]) * 1e3:>8.0f}{statistics.median(ratios):>11.1f}x"
        print(line)
    whole = training_flops(FIT, CONDITION, prompt_tokens=TOKENS)["total"]
    print(f"with the first pass of self-conditioning FIT takes {whole / 1e9:.1f} GFLOP", end=": ")
    print(", ".join(f"{whole / work[name]:.3f}x {name}" for name in TARGETS))
    met = all(work["FIT"] <= bound * work[name] for name, bound in TARGETS.items())
    print(f"FLOP targets {'met' if met else 'MISSED'}; {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()

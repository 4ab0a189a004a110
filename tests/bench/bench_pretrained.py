"""A LoRA of a random Wan of about 100M parameters: FLOP/s and memory beside what `vimi-train describe` tells.

    python tests/bench/bench_pretrained.py [--layers 10] [--heads 8] [--size 9 60 104] [--batch 4] [--steps 200]
        [--no-compile] [--no-recompute]

The real class with our text, adapters of rank 32 and, on a GPU, a base in bfloat16, on the same few latents
over and over, so that the loss must fall. MFU is against the dense bf16 peak of the data sheet.
"""

import argparse
import importlib
import json
import tempfile
from typing import Any

import torch

from model.backbones.pretrained import Lora, Pretrained, PretrainedGenerator
from model.backbones.wan import Wan
from model.condition import ConditionConfig
from model.cost import activation_bytes, training_flops
from model.flow import Flow
from model.optim import adamw
from model.step import accumulate, draw
from tests.bench.bench_mfu import PEAKS, TOKEN_DIM, TOKENS, now, product_rate, prompts_of

CHANNELS, TEXT_DIM, HEAD = 16, 1024, 96


def tiny_wan(folder: str, heads: int, layers: int) -> str:
    """Saves a random transformer of Wan's class, as a pipeline's folder has it; its config as JSON."""
    diffusers: Any = importlib.import_module("diffusers")
    width = heads * HEAD
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=HEAD, num_layers=layers, ffn_dim=4 * width,
        in_channels=CHANNELS, out_channels=CHANNELS, text_dim=TEXT_DIM,
    )  # fmt: skip
    transformer.save_pretrained(f"{folder}/transformer")
    return json.dumps({**transformer.config, "_class_name": Wan.transformer}, default=list)


def main() -> None:
    args, cuda = parse(), torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    half, condition = torch.bfloat16 if cuda else None, ConditionConfig(TOKEN_DIM, "faithful")
    frames, height, width = args.size
    with tempfile.TemporaryDirectory() as folder:
        backbone = Pretrained(
            num_frames=frames, height_px=height, width_px=width, in_channels=CHANNELS, out_channels=CHANNELS,
            condition_dim=TEXT_DIM, checkpoint=args.recompute, model=folder, family=Wan.transformer,
            architecture=tiny_wan(folder, args.heads, args.layers), text="replace",
            lora=Lora(32, 32, Wan.lora_targets), half_base=cuda,
        )  # fmt: skip
        torch.manual_seed(0)
        model = PretrainedGenerator(backbone, condition).to(device)
    if args.compile:
        model.compile_blocks()
    optimizer, objective, size = adamw(model, lr=1e-3), Flow(shift=3.0), (frames, CHANNELS, height, width)
    latents = torch.randn(args.batch, *size, generator=torch.Generator().manual_seed(1)).to(device)
    prompts = prompts_of(args.batch).to(device)

    def step(number: int) -> float:
        draws = draw(objective, size, seed=0, indices=range(args.batch), device=device)
        found = accumulate(model, objective, latents, prompts, draws, divisor=args.batch, dtype=half)
        optimizer.step()
        optimizer.zero_grad()
        return float(found.mean()) if number % max(1, args.steps // 4) == 0 else 0.0

    first, before = step(0), 0
    if cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    start = now(device)
    losses = [loss for loss in map(step, range(1, args.steps + 1)) if loss]
    rate = args.steps * args.batch * training_flops(backbone, condition, prompt_tokens=TOKENS)["total"]
    rate /= now(device) - start
    parts = [
        sum(p.numel() for p in model.parameters() if p.requires_grad == wanted) for wanted in (False, True)
    ]
    where = torch.cuda.get_device_name() if cuda else "CPU"
    print(f"{parts[0] / 1e6:.0f}M frozen, {parts[1] / 1e6:.1f}M trained, {where}, batch {args.batch}")
    product = product_rate(device, half or torch.float32)
    print(f"  {rate / 1e9:,.1f} GFLOP/s, {rate / product:.0%} of a matrix product")
    peak = next((value for name, value in PEAKS.items() if name in where), None)
    if peak:
        print(f"  MFU {rate / peak:.1%}")
    print(f"  loss {first:.3f} at first, then {', '.join(f'{loss:.3f}' for loss in losses)}")
    kept = "checkpointed" if args.recompute else "stored"
    told = activation_bytes(backbone, condition, batch=args.batch, prompt_tokens=TOKENS, half=cuda)[kept]
    measured = f"{(torch.cuda.max_memory_allocated() - before) / 2**30:.2f} GiB measured, " if cuda else ""
    print(f"  activations: {measured}{told / 2**30:.2f} GiB described")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument(
        "--size", type=int, nargs=3, default=[9, 60, 104], help="latents: frames, height, width"
    )
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--recompute", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()

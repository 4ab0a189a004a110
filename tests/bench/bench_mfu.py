"""How much of the machine a training step uses: FLOP/s of the step over those of a matrix product.

On a CPU the yardstick is the machine's own float32 matrix product, on a CUDA device the dense bf16
peak of its data sheet, or the matrix product where the sheet is unknown. The FLOPs are the exact
ones of `model.cost.flops`, without credit for recomputation or for elementwise work.

    python tests/bench/bench_mfu.py [--preset fit-small] [--batch 4] [--steps 8] [--compile]
"""

import argparse
import statistics
import time

import torch

from model.condition import Condition, ConditionConfig
from model.cost.flops import sizes, training_flops
from model.edm import edm_for
from model.generator import Generator, preset
from model.optim import lamb
from model.step import accumulate, draw

PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
"""Dense bf16 FLOP/s by NVIDIA's data sheets."""
TOKENS, TOKEN_DIM = 128, 1024


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product; the best of several."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(8):
        start = _now(device)
        torch.mm(a, b)
        best = max(best, 2 * n**3 / (_now(device) - start))
    return best


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    """Time whole steps (draws, two passes, gradients, clipping, LAMB) and print the shares."""
    parser = argparse.ArgumentParser()
    cuda = torch.cuda.is_available()
    parser.add_argument("--preset", default="fit-500m" if cuda else "fit-small")
    parser.add_argument("--batch", type=int, default=64 if cuda else 8)
    parser.add_argument("--steps", type=int, default=20 if cuda else 6)
    parser.add_argument("--compile", action="store_true", default=cuda)
    parser.add_argument("--checkpoint", action="store_true")
    args = parser.parse_args()
    device = torch.device("cuda" if cuda else "cpu")
    dtype = torch.bfloat16 if cuda else torch.float32
    backbone, condition = preset(args.preset, checkpoint=args.checkpoint), ConditionConfig()
    torch.manual_seed(0)
    model = Generator(backbone, condition).to(device)
    if args.compile:
        model.compile_blocks()
    optimizer = lamb(model)
    size = (backbone.num_frames, 3, backbone.height_px, backbone.width_px)
    edm = edm_for(backbone.num_frames, backbone.height_px, backbone.width_px)
    videos = torch.rand(args.batch, *size, device=device) * 2 - 1
    prompts = _prompts(args.batch).to(device)
    work = training_flops(
        backbone, condition, sizes(backbone, condition, prompt_tokens=TOKENS), prompt_tokens=TOKENS
    )
    rates, parts = [], {"draw": [], "gradients": [], "update": []}
    products = [product_rate(device, dtype)]
    for i in range(args.steps + 2):
        marks = [_now(device)]
        indices = range(i * args.batch, (i + 1) * args.batch)
        draws = draw(edm, size, seed=0, indices=indices, device=device)
        marks.append(_now(device))
        half = torch.bfloat16 if cuda else None
        accumulate(model, edm, videos, prompts, draws, divisor=args.batch, dtype=half)
        marks.append(_now(device))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        marks.append(_now(device))
        if i >= 2:  # compiling and warming up
            rates.append(args.batch * sum(work.values()) / (marks[-1] - marks[0]))
            for (name, times), a, b in zip(parts.items(), marks[:-1], marks[1:], strict=True):
                times.append(b - a)
                del name
    products.append(product_rate(device, dtype))
    _report(args.preset, device, statistics.median(rates), max(products), parts)


def _report(
    name: str, device: torch.device, rate: float, product: float, parts: dict[str, list[float]]
) -> None:
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    peak = next((v for k, v in PEAKS.items() if k in where), None)
    total = sum(statistics.median(v) for v in parts.values())
    print(f"{name} on {where}: {rate / 1e9:,.1f} GFLOP/s")
    print(f"  matrix product {product / 1e9:,.1f} GFLOP/s: the step reaches {rate / product:.1%}")
    if peak:
        print(f"  data sheet {peak / 1e12:.0f} TFLOP/s: MFU {rate / peak:.1%}")
    for part, times in parts.items():
        share = statistics.median(times) / total
        print(f"  {part:<10}{statistics.median(times) * 1e3:>9.1f} ms {share:>7.1%}")


def _prompts(batch: int) -> Condition:
    zeros = torch.zeros(batch, TOKENS, dtype=torch.long)
    return Condition(
        tokens=torch.randn(batch, TOKENS, TOKEN_DIM), mask=zeros == 0, role=zeros, segment=zeros,
        fps=torch.full((batch,), 6.0), original_size_px=torch.full((batch, 2), 288),
    )  # fmt: skip


if __name__ == "__main__":
    main()

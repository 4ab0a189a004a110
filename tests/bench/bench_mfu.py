"""How much of the machine a training step uses: FLOP/s of the step over those of a matrix product.

On a CPU the yardstick is the machine's own float32 matrix product, on a CUDA device the dense bf16
peak of its data sheet (MFU), and its matrix product besides. The FLOPs are the exact ones of
`model.cost`, without credit for recomputation or for elementwise work. A step is the whole one:
draws, the first pass of self-conditioning, two passes, gradients, clipping, LAMB, a moving average.

    python tests/bench/bench_mfu.py [--preset fit-small] [--batch 4] [--accumulation 1] [--steps 8]
        [--no-compile] [--recompute] [--half-streams] [--no-deterministic] [--profile profile.txt]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile

from model.backbones.presets import preset
from model.condition import Condition, ConditionConfig
from model.cost import activation_bytes, training_flops
from model.edm import edm_for
from model.ema import Ema, HalfLife
from model.generator import Generator
from model.optim import lamb
from model.step import accumulate, draw
from model.training.parallel import make_deterministic

PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
"""Dense bf16 FLOP/s by NVIDIA's data sheets."""
TOKENS, TOKEN_DIM = 128, 1024


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product; the best of several."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(8):
        start = now(device)
        torch.mm(a, b)
        best = max(best, 2 * n**3 / (now(device) - start))
    return best


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@dataclass
class Trainee:
    """One generator in training on random videos, as large batches as are asked for."""

    args: argparse.Namespace
    device: torch.device
    step_number: int = 0
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        args, self.condition = self.args, ConditionConfig()
        if args.deterministic:
            make_deterministic(self.device)
        self.backbone = preset(args.preset, checkpoint=args.recompute, half_streams=args.half_streams)
        b = self.backbone
        self.size = (b.num_frames, 3, b.height_px, b.width_px)
        self.edm = edm_for(b.num_frames, b.height_px, b.width_px)
        self.half = torch.bfloat16 if self.device.type == "cuda" else None
        torch.manual_seed(0)
        with self.device:
            self.model = Generator(b, self.condition)
        if args.compile:
            self.model.compile_blocks()
        self.optimizer, self.ema = lamb(self.model), Ema(self.model, HalfLife(1e6))
        self.videos = torch.rand(args.batch, *self.size, device=self.device) * 2 - 1
        self.prompts = prompts_of(args.batch).to(self.device)

    @property
    def flops(self) -> int:
        """Of one step."""
        each = training_flops(self.backbone, self.condition, prompt_tokens=TOKENS)
        return each["total"] * self.args.batch * self.args.accumulation

    def gradients(self, number: int) -> None:
        batch = self.args.batch
        indices = range(number * batch, (number + 1) * batch)
        draws = draw(self.edm, self.size, seed=0, indices=indices, device=self.device)
        divisor = batch * self.args.accumulation
        accumulate(
            self.model, self.edm, self.videos, self.prompts, draws, divisor=divisor, dtype=self.half
        )  # fmt: skip

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(self.model, (self.step_number + 1) * self.args.batch)

    def step(self) -> None:
        for number in range(self.args.accumulation):
            self.timed("gradients", self.gradients, self.step_number * self.args.accumulation + number)
        self.timed("update", self.update)
        self.step_number += 1

    def timed(self, name: str, what: Callable[..., None], *arguments: Any) -> None:
        """Run, and note the seconds; without a name in `seconds` nothing waits for the device."""
        if name not in self.seconds:
            return what(*arguments)
        start = now(self.device)
        what(*arguments)
        self.seconds[name].append(now(self.device) - start)

    def activation_bytes(self) -> tuple[int, int]:
        """(measured, described) peak bytes of one micro-batch's activations, gradients being there already."""
        self.gradients(0)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.gradients(1)
        torch.cuda.synchronize()
        measured = torch.cuda.max_memory_allocated() - before
        self.optimizer.zero_grad()
        described = activation_bytes(
            self.backbone, self.condition, batch=self.args.batch, prompt_tokens=TOKENS, half=True
        )
        return measured, described["checkpointed" if self.args.recompute else "stored"]


def main() -> None:
    """Time whole steps and print their shares."""
    args, cuda = parse(), torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    trainee, dtype = Trainee(args, device), torch.bfloat16 if cuda else torch.float32
    for _ in range(2):  # compiling and warming up
        trainee.step()
    products = [product_rate(device, dtype)]
    start = now(device)
    for _ in range(args.steps):
        trainee.step()
    rate = args.steps * trainee.flops / (now(device) - start)
    products.append(product_rate(device, dtype))
    trainee.seconds = {"gradients": [], "update": []}
    for _ in range(max(2, args.steps // 2)):
        trainee.step()
    report(args, device, rate, max(products), trainee.seconds)
    if cuda:
        measured, described = trainee.activation_bytes()
        print(f"  activations {measured / 2**30:.2f} GiB, described as {described / 2**30:.2f}")
        print(f"  peak of the allocator {torch.cuda.max_memory_reserved() / 2**30:.1f} GiB")
    with profile() if args.profile else nullcontext() as profiler:
        if profiler is not None:
            trainee.step()
    if profiler is not None:
        table = profiler.key_averages().table(sort_by="self_cuda_time_total" if cuda else "self_cpu_time_total")
        Path(args.profile).write_text(table)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cuda = torch.cuda.is_available()
    parser.add_argument("--preset", default="fit-500m" if cuda else "fit-small")
    parser.add_argument("--batch", type=int, default=64 if cuda else 8)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--steps", type=int, default=12 if cuda else 6)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=cuda)
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--half-streams", action="store_true")
    parser.add_argument("--deterministic", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--profile", help="write torch's table of one more step to this file")
    return parser.parse_args()


def report(
    args: argparse.Namespace, device: torch.device, rate: float, product: float, seconds: dict[str, list[float]]
) -> None:
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    peak = next((v for k, v in PEAKS.items() if k in where), None)
    how = f"batch {args.batch} x {args.accumulation}, compile {args.compile}, recompute {args.recompute}, "
    how += f"half streams {args.half_streams}, deterministic {args.deterministic}"
    print(f"{args.preset} on {where}: {rate / 1e9:,.1f} GFLOP/s ({how})")
    print(f"  matrix product {product / 1e9:,.1f} GFLOP/s: the step reaches {rate / product:.1%}")
    if peak:
        print(f"  data sheet {peak / 1e12:.0f} TFLOP/s: MFU {rate / peak:.1%}")
    for part, times in seconds.items():
        print(f"  {part:<10}{statistics.median(times) * 1e3:>9.1f} ms each")


def prompts_of(batch: int) -> Condition:
    zeros = torch.zeros(batch, TOKENS, dtype=torch.long)
    return Condition(
        tokens=torch.randn(batch, TOKENS, TOKEN_DIM), mask=zeros == 0, role=zeros, segment=zeros,
        fps=torch.full((batch,), 6.0), original_size_px=torch.full((batch, 2), 288),
    )  # fmt: skip


if __name__ == "__main__":
    main()

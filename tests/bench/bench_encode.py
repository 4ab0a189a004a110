"""What encoding beforehand saves a training step: the same run with its encoders and with stored encodings.

    python tests/bench/bench_encode.py [--steps 12]

A tiny FIT over clips of 16 x 48 x 64 pixels; prompts of a caption and one document, through a random ViT-B-32
sized CLIP, and the same in the latents of a random AutoencoderKL. One process, steps of four samples, medians;
prompts are new at every step, as in a first epoch. Losses of both ways are compared.
"""

import argparse
import importlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import diffusers
import open_clip
import torch

from cli.encode import EncodeConfig
from cli.encode import run as encode
from infra.storage import list_files, size_bytes
from model.data.shards import open_shards
from model.training.config import Stage1Config
from model.training.loop import Training
from model.training.preflight import prepare_index, read_index

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))
CLIP = {
    "embed_dim": 512,
    "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
}
SIZE = {"num_frames": 16, "height_px": 48, "width_px": 64}


def make_clip(folder: Path) -> dict[str, Any]:
    """Config of a prompt encoder over random weights of ViT-B-32's size."""
    (folder / "clip.json").write_text(json.dumps(CLIP))
    torch.save({"state_dict": open_clip.CLIP(**CLIP).state_dict()}, folder / "clip.pt")
    clip = {"name": str(folder / "clip.json"), "pretrained": str(folder / "clip.pt"), "precision": "fp32"}
    return {"clip": clip, "patch_grid": 4}


def make_autoencoder(folder: Path) -> str:
    """Folder of a random AutoencoderKL of 8 pixels to a latent, 4 million parameters."""
    kind: Any = diffusers.AutoencoderKL  # pyright: ignore[reportPrivateImportUsage]
    model = kind(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 64, 64, 64),
        norm_num_groups=8,
        latent_channels=4,
    )
    model.save_pretrained(folder / "autoencoder")
    return str(folder / "autoencoder")


def train(values: dict[str, Any], steps: int) -> tuple[list[float], dict[str, float]]:
    """Losses, and medians of a step's parts in milliseconds."""
    config = Stage1Config.model_validate(values)
    prepare_index(config, open_shards(config.prompts))
    training = Training(config, read_index(config.out))
    losses, steps_s, parts = [], [], []
    for _ in range(steps):
        started_s = time.perf_counter()
        losses.append(float(training.step().loss))
        steps_s.append(time.perf_counter() - started_s)
        parts.append(training.watch.take())
    training.close()
    found = {name: statistics.median(p[name] for p in parts[2:]) * 1e3 for name in ("data_s", "encode_s")}
    return losses, found | {"step_s": statistics.median(steps_s[2:]) * 1e3}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=12)
    steps = parser.parse_args().steps
    shared: Any = importlib.import_module("conftest")
    torch.set_num_threads(1)  # as many as a worker of the job has
    print(f"{'':32} {'data':>8} {'encode':>8} {'step':>8}  ms")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [shared.prompt_row(n, num_frames=16, height=48, width=64) for n in range(4 * steps + 32)]
        shared.write_shards(folder / "prompts", rows, job="augment", group_rows=8, file_rows=64)
        base = {
            "prompts": str(folder / "prompts"), "samples": 4 * steps, "batch_size": 4, "preset": "fit-tiny",
            "encoder": make_clip(folder), "optim": {"name": "adamw", "lr": 1e-4}, **SIZE,
            "reference_size_px": [SIZE["height_px"], SIZE["width_px"]], "reference_patch_px": 8,
        }  # fmt: skip
        latent = {"autoencoder": make_autoencoder(folder), "backbone": {"patch_px": 1}}
        for what, changes in (("pixels", {}), ("latents", latent)):
            values, encoded = base | changes, folder / f"encoded-{what}"
            inputs = {k: v for k, v in values.items() if k in EncodeConfig.model_fields}
            started_s = time.perf_counter()
            encode(EncodeConfig.model_validate(inputs | {"out": str(encoded)}))
            wall_s = time.perf_counter() - started_s
            losses, fresh = train(values | {"out": str(folder / f"{what}-fresh")}, steps)
            stored_values = values | {"out": str(folder / f"{what}-stored"), "encodings": str(encoded)}
            found, stored = train(stored_values, steps)
            num_bytes = sum(size_bytes(file) for file in list_files(str(encoded), suffix=".parquet"))
            for label, parts in ((f"{what}, encoders in the step", fresh), (f"{what}, encodings", stored)):
                print(f"{label:32} {parts['data_s']:8.1f} {parts['encode_s']:8.1f} {parts['step_s']:8.1f}")
            off = max(abs(a - b) for a, b in zip(losses, found, strict=True))
            print(
                f"{'':32} step x {stored['step_s'] / fresh['step_s']:.2f}; losses differ by {off:g}; "
                f"{num_bytes / len(rows) / 1e3:,.0f} KB a row; {len(rows) / wall_s:.1f} rows/s with Ray's start"
            )


if __name__ == "__main__":
    main()

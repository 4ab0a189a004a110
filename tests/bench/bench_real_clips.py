"""What do documents tell of real clips, and does a small generator gain from them?

    python tests/bench/bench_real_clips.py --assets ../shared/assets [--seconds 0] [--only NAME ...]

The commands that a user types make the prompts (crawl, build-index, augment), of DROID's and Panda's clips and
MSR-VTT's frames, by each retriever; of 4 frames of 32 x 56 px. Kept from training: two of DROID's six labs,
every fifth Panda clip, every sixteenth frame; nothing of theirs is in the memory, and no clip gets a document
of its own lab. Then a small generator for each retriever trains for the same seconds of one core, alike in all
but its documents, which it sees as references (`plus`); words are frozen random vectors, as in `bench_world`.

First, without any training: how much of what a held-out clip looks like, at 4 x 7 px, a linear map of its
document's picture tells (ridge regression over the clips to learn from). A network may see more.

`oracle` is no retriever: of DROID's clips alone, each with the frame of another clip of the same lab and room
that looks most like it, which the guard would refuse as its sibling. It says what documents that fit are worth.
"""

import argparse
import io
import json
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from cli.steps import run_steps
from infra.validation_cells import DOCUMENTS, Cell
from model.backbones.presets import preset
from model.condition import Condition, ConditionConfig
from model.data.batch import ROLES, Role
from model.edm import Edm, edm_for
from model.ema import Ema, HalfLife
from model.generator import Generator
from model.optim import OPTIMIZERS
from model.step import Draws, losses, sample_generator
from model.training.validation.loss import CHOICES, QUANTILES, summarise
from pipeline.shards import ShardSet
from tests.bench.bench_quality import HELD_OUT_LABS, NARROW, TOKEN_DIM, encode, train
from tests.infra.tiny_clips import mini_clip

HELD_OUT_EVERY = {"panda": 5, "msrvtt": 16}
SOURCE = r"(?:droid|panda)/([^/]+)/"
"""A lab, or a film: the folder that a clip lies in."""
SIZE = {"num_frames": 4, "height_px": 32, "width_px": 56}
RETRIEVERS = ("bm25", "clip", "hybrid")
LOOK_PX = (16, 9)
"""Width and height at which the oracle compares pictures."""
PENALTIES = (1.0, 10.0, 100.0, 1000.0, 10000.0)
"""Of the ridge regression; the best for a fifth of the clips to learn from is taken."""
BATCH = 32
VALIDATION = "validation"
Row = dict[str, Any]


def read(assets: Path, name: str) -> list[Row]:
    return [json.loads(line) for line in (assets / name / "captions.jsonl").read_text().splitlines()]


def corpus(assets: Path, work: Path) -> dict[str, list[Row]]:
    """Manifest rows of clips, those kept from training with a split; each clip in its source's folder."""
    found: dict[str, list[Row]] = {"droid": [], "panda": []}
    for name, rows in found.items():
        for number, row in enumerate(read(assets, name)):
            file = assets / name / row["clip"]
            source = row["lab"] if name == "droid" else file.name[:11]
            held = source in HELD_OUT_LABS if name == "droid" else number % HELD_OUT_EVERY[name] == 0
            place, split = linked(file, work / name / source), "validation" if held else "train"
            rows.append({"uri": str(place), "caption": row["caption"], "split": split})
    return found


def linked(file: Path, folder: Path) -> Path:
    """The file's place in a folder."""
    place = folder / file.name
    folder.mkdir(parents=True, exist_ok=True)
    if not place.exists():
        place.symlink_to(file)
    return place


def write_corpus(assets: Path, work: Path) -> None:
    """`train-*` and `validation-*` manifests of clips and of frames."""
    rows = {name: by_split(some) for name, some in corpus(assets, work).items()}
    frames = pq.read_table(assets / "msrvtt" / "train.parquet")
    kept = [n % HELD_OUT_EVERY["msrvtt"] == 0 for n in range(len(frames))]
    splits = ["validation" if held else "train" for held in kept]
    frames = frames.append_column("split", pa.array(splits))
    for split in ("train", "validation"):
        clips = [row for some in rows.values() for row in some[split]]
        write_lines(work / f"{split}-clips.jsonl", clips)
        pq.write_table(
            frames.filter(pa.array([name == split for name in splits])), work / f"{split}-frames.parquet"
        )


def by_split(rows: list[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[row["split"]].append(row)
    return found


def room(row: Row) -> tuple[str, str]:
    return row["lab"], row["scene"]


def look(poster: Path) -> np.ndarray:
    with Image.open(poster) as picture:
        return np.asarray(picture.convert("RGB").resize(LOOK_PX, Image.Resampling.BOX), float) / 127.5 - 1


def write_lines(place: Path, rows: list[Row]) -> None:
    place.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def crawl(work: Path, name: str, sources: list[Row]) -> str:
    return command("vimi-data crawl", {"sources": sources, "out": str(work / name)})


def command(words: str, values: Row) -> str:
    """A command, its config given field by field."""
    return " ".join([words, *(f"--set '{name}={json.dumps(value)}'" for name, value in values.items())])


def manifest(path: Path, **more: str) -> Row:
    return {"kind": "manifest", "path": str(path), "name": path.stem, **more}


def shared_steps(work: Path, clip: Row) -> list[str]:
    """Corpus and memory of all retrievers."""
    crawls = [
        crawl(work, split, [manifest(work / f"{split}-clips.jsonl"),
                            manifest(work / f"{split}-frames.parquet", media="image")])
        for split in ("train", "validation")
    ]  # fmt: skip
    index = {"clips": [str(work / "train")], "out": str(work / "memory"), "clip": clip}
    return [*crawls, command("vimi-data build-index", index)]


def augment(work: Path, name: str) -> str:
    """Prompts of all clips by a retriever."""
    values: Row = {
        "clips": [str(work / "train"), str(work / VALIDATION)],
        "memory": str(work / "memory"),
        "retrieve": {"retriever": name, "k": 1},
        "guard": {"source_pattern": SOURCE},
        "target": SIZE,
        "out": str(work / f"prompts-{name}"),
    }
    return command("vimi-data augment", values)


@dataclass(frozen=True)
class Clips:
    """Prompts with their targets."""

    videos: Tensor
    """`b t c h w` in [-1, 1]; a picture is a video of copies."""
    pictures: Tensor
    """`b 1 c h w` in [-1, 1], of their documents; zero where there is none."""
    present: Tensor
    """`b 1` bool, which have one."""
    captions: list[str]
    media: list[str]
    names: list[str]
    """Of their files."""
    held: Tensor
    """`b` bool, which are kept from training."""

    def select(self, rows: Tensor) -> "Clips":
        some = rows.tolist()
        return Clips(
            self.videos[rows], self.pictures[rows], self.present[rows],
            [self.captions[n] for n in some], [self.media[n] for n in some],
            [self.names[n] for n in some], self.held[rows],
        )  # fmt: skip

    def condition(self, pictures: Tensor, present: Tensor) -> Condition:
        """Of all, with these documents."""
        words, count = encode(self.captions), len(self.captions)
        one = torch.ones(count, 1, dtype=torch.long)
        return replace(
            words,
            role=torch.full_like(words.role, number(Role.CAPTION)),
            references=pictures,
            reference_mask=present,
            reference_role=one * number(Role.RETRIEVED),
            reference_place=one,
        )


def number(role: Role) -> int:
    return list(ROLES).index(role)


def read_clips(prompts: Path) -> Clips:
    """All rows of augment's shards."""
    shards, rows = ShardSet(str(prompts)), []
    for group in range(len(shards)):
        rows += shards.read_row_group(group).to_pylist()
    images = [[s["image"] for s in row["segments"] if s["type"] == "image"] for row in rows]
    return Clips(
        torch.stack([target(row["target"]) for row in rows]),
        torch.stack([picture(io.BytesIO(found[0])) if found else blank() for found in images])[:, None],
        torch.tensor([[bool(found)] for found in images]),
        [row["caption"] for row in rows],
        [row["media"] for row in rows],
        [row["source_uri"].rpartition("/")[2] for row in rows],
        torch.tensor([row["split"] == VALIDATION for row in rows]),
    )


def target(stored: Row) -> Tensor:
    shape = (stored["num_frames"], stored["height_px"], stored["width_px"], 3)
    frames = torch.from_numpy(np.frombuffer(stored["data"], np.uint8).reshape(shape).copy())
    return (frames.permute(0, 3, 1, 2).float() / 127.5 - 1).expand(SIZE["num_frames"], -1, -1, -1)


def picture(file: Any) -> Tensor:
    """`c h w` in [-1, 1]."""
    with Image.open(file) as opened:
        scaled = opened.convert("RGB").resize((SIZE["width_px"], SIZE["height_px"]), Image.Resampling.BOX)
    return torch.from_numpy(np.array(scaled)).permute(2, 0, 1).float() / 127.5 - 1


def blank() -> Tensor:
    return torch.zeros(3, SIZE["height_px"], SIZE["width_px"])


def with_oracle(clips: Clips, assets: Path) -> Clips:
    """DROID's clips with the frames of their likes."""
    rows = {Path(row["clip"]).name: row for row in read(assets, "droid")}
    looks = {name: look(assets / "droid" / row["poster"]) for name, row in rows.items()}
    best = {}
    for name, row in rows.items():
        kin = [other for other, r in rows.items() if room(r) == room(row) and other != name]
        if kin:
            best[name] = min(kin, key=lambda other: float(np.square(looks[other] - looks[name]).sum()))
    clips = clips.select(torch.tensor([n for n, name in enumerate(clips.names) if name in best]))
    posters = [assets / "droid" / rows[best[name]]["poster"] for name in clips.names]
    pictures = torch.stack([picture(poster) for poster in posters])[:, None]
    return replace(clips, pictures=pictures, present=torch.ones(len(pictures), 1, dtype=torch.bool))


def explained(clips: Clips, of: str) -> str:
    """Share of the variance of held-out clips' looks that their documents explain, and others' documents."""
    looks = coarse(clips.videos.mean(dim=1))
    pictures = coarse(clips.pictures[:, 0])
    kept = clips.present[:, 0] & ~clips.held
    fold = kept & (torch.arange(len(looks)) % 5 == 0)
    penalty = min(PENALTIES, key=lambda value: float(
        missed(looks, pictures, kept & ~fold, fold, value).mean()
    ))  # fmt: skip
    rows = clips.present[:, 0] & clips.held & torch.tensor([medium == of for medium in clips.media])
    none = (looks[rows] - looks[kept].mean(dim=0)).square().mean(dim=1)
    shares = []
    for shown in (pictures, pictures.index_copy(0, torch.where(rows)[0], pictures[rows].roll(1, 0))):
        gain = (none - missed(looks, shown, kept, rows, penalty)) / none.mean()
        shares.append(f"{gain.mean():+.3f} ± {gain.std() / len(gain) ** 0.5:.3f}")
    return f"own {shares[0]}, another's {shares[1]} ({int(rows.sum())} of {of})"


def missed(looks: Tensor, pictures: Tensor, kept: Tensor, rows: Tensor, penalty: float) -> Tensor:
    """Squared errors of `rows` by a ridge regression over `kept`."""
    middle, offset = pictures[kept].mean(dim=0), looks[kept].mean(dim=0)
    x = pictures[kept] - middle
    ridge = penalty * torch.eye(x.shape[1])
    weights = torch.linalg.solve(x.T @ x + ridge, x.T @ (looks[kept] - offset))
    return (looks[rows] - offset - (pictures[rows] - middle) @ weights).square().mean(dim=1)


def coarse(frames: Tensor) -> Tensor:
    """`b c h w` -> `b (c 4 7)`."""
    return F.interpolate(frames, (4, 7), mode="area").flatten(1)


def learn(clips: Clips, seconds: float) -> tuple[Generator, Edm, int]:
    """(the averaged generator, its process, samples seen); every tenth clip has no document."""
    torch.manual_seed(0)
    config = ConditionConfig(token_dim=TOKEN_DIM, mode="plus", num_roles=len(ROLES))
    model = Generator(preset("dit-tiny", **SIZE, **NARROW | {"patch_px": 8}), config)
    edm = replace(edm_for(*SIZE.values()), sigma_data=0.5, log_mean=0.5, log_std=1.6)
    ema, present = (
        Ema(model, HalfLife(1600)),
        clips.present & (torch.arange(len(clips.videos)) % 10 > 0)[:, None],
    )
    steps = train(
        model, clips.videos, clips.condition(clips.pictures, present), batch=BATCH, lr=1e-2,
        seconds=seconds, ema=ema, build=OPTIMIZERS["muon"], edm=edm,
    )  # fmt: skip
    model.load_state_dict(ema.weights, strict=False)
    return model, edm, len(steps) * BATCH


@torch.no_grad()
def validate(model: Generator, edm: Edm, clips: Clips) -> dict[str, float]:
    """Stage 1's validation: losses of one medium by documents and noise level, and paired differences."""
    model.eval()
    count, there = len(clips.videos), clips.present
    given = {
        "none": (clips.pictures, torch.zeros_like(there)),
        "right": (clips.pictures, there),
        "shuffled": (clips.pictures.roll(1, 0), there.roll(1, 0) & there),
    }
    noise = torch.stack([
        torch.randn(clips.videos.shape[1:], generator=sample_generator(0, n, VALIDATION)) for n in range(count)
    ])  # fmt: skip
    table = torch.zeros(count, len(CHOICES), len(QUANTILES), dtype=torch.float64)
    has = torch.zeros(count, len(CHOICES), dtype=torch.bool)
    for name, (pictures, present) in given.items():
        condition, choice = clips.condition(pictures, present), CHOICES.index(name)
        has[:, choice] = True if name == "none" else present[:, 0]
        for place, quantile in enumerate(QUANTILES):
            sigma = edm.training_sigma(torch.tensor([NormalDist().inv_cdf(quantile)]))
            for rows in torch.arange(count).split(BATCH):
                draws = Draws(noise[rows], sigma.expand(len(rows)), None, rows)
                each = losses(model, edm, clips.videos[rows], condition.select(rows), draws, dropout=False)
                table[rows, choice, place] = each.double()
    return summarise(clips.media[0], table, has)


def report(name: str, of: str, record: dict[str, float]) -> None:
    """A line a noise level."""
    for quantile in (None, *QUANTILES):
        numbers = "".join(f"{record[Cell(of, given, quantile).name]:>9.4f}" for given in DOCUMENTS[:1])
        for given in ("none", "shuffled"):
            gain, error = (
                record[Cell(of, given, quantile, is_gain=True, is_error=e).name] for e in (False, True)
            )
            numbers += f"   {gain:+.4f} ± {error:.4f}"
        print(f"{name:<8}{of:<6}{quantile or 'mean':>6}{numbers}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--assets", type=Path, default=Path("../shared/assets"))
    parser.add_argument("--work", type=Path, default=Path("/tmp/vimi-real-clips"))
    parser.add_argument("--seconds", type=float, default=300, help="of one core, for each training; 0 = none")
    parser.add_argument("--only", nargs="*", choices=[*RETRIEVERS, "oracle"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    assets, work = options.assets.resolve(), options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    names = options.only or [*RETRIEVERS, "oracle"]
    clip = mini_clip(assets / "weights", work, context_length=64).model_dump(mode="json", exclude_unset=True)
    write_corpus(assets, work)
    found = [name if name in RETRIEVERS else "bm25" for name in names]
    steps = [*shared_steps(work, clip), *(augment(work, name) for name in dict.fromkeys(found))]
    run_steps([(work, step) for step in steps], name="bench")
    for name, retriever in zip(names, found, strict=True):
        clips = read_clips(work / f"prompts-{retriever}")
        clips = with_oracle(clips, assets) if name == "oracle" else clips
        for of in dict.fromkeys(clips.media):
            print(f"{name}: share of the looks that documents explain: {explained(clips, of)}", flush=True)
        if not options.seconds:
            continue
        model, edm, samples = learn(clips.select(torch.where(~clips.held)[0]), options.seconds)
        print(f"{name}: {samples:,} samples; loss right, none - right, shuffled - right by noise quantile")
        for of in ("video", "image"):
            rows = [n for n, medium in enumerate(clips.media) if medium == of and clips.held[n]]
            if rows:
                print(f"{len(rows)} of {of}, {int(clips.present[rows].sum())} with a document")
                report(name, of, validate(model, edm, clips.select(torch.tensor(rows))))


if __name__ == "__main__":
    main()

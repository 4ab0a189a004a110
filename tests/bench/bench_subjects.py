"""How often the offline finder is right: its cut-outs against labels that were made by looking.

`tests/assets/subjects.csv` says, for every cut-out that saliency gives at its loosest (727 of 432 clips and
frames), which of the caption's words it shows; none where it shows another thing, several, or a fragment.

    precision   pairs whose word is the labelled one, of all pairs kept
    yield       clips that keep a pair, of all clips

    python tests/bench/bench_subjects.py [--clips 100] [--show]
"""

import argparse
import csv
import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from pipeline.media.clip import read_frames
from pipeline.media.frames import probe
from pipeline.prompts.subjects.finder import FRAME_FRACS, SubjectConfig, SubjectFinder, best_frame
from pipeline.prompts.subjects.verdict import Found, Phrases

ROOT = Path(__file__).resolve().parents[2]
LABELS = ROOT / "tests" / "assets" / "subjects.csv"
ASSETS = ROOT.parent / "shared" / "assets"
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Labelled:
    """A clip (or a single frame) with the labels of its cut-outs: (frac, box) -> the word that it shows."""

    source: str
    clip: str
    cuts: dict[tuple[float, Box], str]

    def shows(self, frac: float, box: Box) -> str | None:
        """The label of the cut-out in this box; None = nobody has looked at it."""
        known = [(overlap(box, b), word) for (f, b), word in self.cuts.items() if f == frac]
        best = max(known, default=(0.0, ""))
        return best[1] if best[0] > 0.7 else None


def overlap(one: Box, other: Box) -> float:
    """Intersection over union."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    area = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return area / (sum(areas) - area)


def read_labels() -> list[Labelled]:
    clips: dict[tuple[str, str], Labelled] = {}
    with LABELS.open(newline="") as file:
        for row in csv.DictReader(file):
            one = clips.setdefault((row["source"], row["clip"]), Labelled(row["source"], row["clip"], {}))
            left, top, right, bottom = (int(row[side]) for side in ("left", "top", "right", "bottom"))
            one.cuts[float(row["frac"]), (left, top, right, bottom)] = row["shows"]
    return list(clips.values())


def captions(assets: Path) -> dict[tuple[str, str], str]:
    import json

    found = {}
    for source in ("panda", "droid"):
        for line in (assets / source / "captions.jsonl").read_text().splitlines():
            row = json.loads(line)
            found[source, row["clip"].removeprefix("clips/")] = row["caption"]
    table = pq.read_table(assets / "msrvtt" / "train.parquet", columns=["id", "caption"])
    return found | {("msrvtt", str(row["id"])): row["caption"] for row in table.to_pylist()}


def frames_of(
    clip: Labelled, assets: Path, pictures: dict[str, bytes]
) -> tuple[tuple[float, ...], list[np.ndarray]]:
    if clip.source == "msrvtt":
        return (0.5,), [np.asarray(Image.open(io.BytesIO(pictures[clip.clip])).convert("RGB"))]
    uri = str(assets / clip.source / "clips" / clip.clip)
    row = {"media": "video", "source_uri": uri, "source_sha256": None, "start_s": 0.0, "target": None}
    return FRAME_FRACS, list(read_frames({**row, "end_s": probe(uri).duration_s}, FRAME_FRACS).frames)


@dataclass(frozen=True)
class Outcome:
    clip: Labelled
    caption: str
    word: str | None
    """Head of the phrase that got a picture; None = the clip gives none."""
    shows: str | None
    reason: str = ""


def judge(clips: list[Labelled], config: SubjectConfig, assets: Path = ASSETS) -> Iterator[Outcome]:
    """What the finder makes of each clip, and what its cut-out really shows."""
    words = captions(assets)
    table = pq.read_table(assets / "msrvtt" / "train.parquet", columns=["id", "image"])
    wanted = {clip.clip for clip in clips if clip.source == "msrvtt"}
    pictures = {}
    for key, image in zip(table["id"], table["image"], strict=True):
        if str(key) in wanted:
            value = image.as_py()
            pictures[str(key)] = value["bytes"] if isinstance(value, dict) else value
    finder = SubjectFinder(config).finder
    for clip in clips:
        caption = words[clip.source, clip.clip]
        phrases = Phrases.of(caption)
        if not phrases.subjects:
            yield Outcome(clip, caption, None, None, "the caption names no single subject")
            continue
        fracs, frames = frames_of(clip, assets, pictures)
        verdicts = finder.find(frames, phrases)
        found = best_frame(verdicts)
        if not found:
            reasons = Counter(str(v.reason) for v in verdicts if not isinstance(v, Found))
            yield Outcome(clip, caption, None, None, reasons.most_common(1)[0][0])
        for one in found:
            shows = clip.shows(fracs[one.frame], one.mask.box)
            yield Outcome(clip, caption, one.entity.head, shows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=10_000, help="the first so many")
    parser.add_argument("--show", action="store_true", help="every pair")
    options = parser.parse_args()
    clips = read_labels()[: options.clips]
    outcomes = []
    for outcome in judge(clips, SubjectConfig()):
        outcomes.append(outcome)
        if options.show:
            mark = "" if outcome.word is None else "right" if outcome.word == outcome.shows else "WRONG"
            print(
                f"{mark:6}{outcome.word or '-'} / {outcome.shows} | {outcome.caption} | {outcome.reason}",
                flush=True,
            )
    print("source    clips  pairs  right  precision  yield")
    for source in ("panda", "msrvtt", "droid", "all"):
        ours = [o for o in outcomes if source in ("all", o.clip.source)]
        kept = [o for o in ours if o.word is not None]
        right = sum(o.word == o.shows for o in kept)
        number = len({o.clip.clip for o in ours})
        share = f"{right / len(kept):.2f}" if kept else "-"
        print(f"{source:8}{number:7}{len(kept):7}{right:7}{share:>11}{len(kept) / max(number, 1):7.1%}")
    for reason, count in Counter(o.reason for o in outcomes if o.reason).most_common():
        print(f"{count:6} {reason}")


if __name__ == "__main__":
    main()

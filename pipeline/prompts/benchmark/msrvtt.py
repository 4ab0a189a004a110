"""MSR-VTT, test split: 2,990 clips with 20 captions each, a video for each caption."""

import json
from typing import Any

from infra.errors import ConfigError
from infra.storage import list_files, read_bytes
from pipeline.prompts.benchmark.item import Exam, Item

LAYOUT = (
    "a JSON file with `videos` [{video_id, split}] and `sentences` [{video_id, caption}] (MSRVTT_data.json, "
    "test_videodatainfo.json), and video7010.mp4 ... anywhere below the folder"
)
WHOLE = (2990, 59800)
"""Clips and captions of the test split."""
ENDINGS = (".mp4", ".webm", ".avi", ".mkv")


def read_msrvtt(source: str, *, split: str, captions_per_video: int | None) -> Exam:
    """A prompt for each caption of the split, or for the first ones of each clip.

    Raises:
        ConfigError: another layout, or a clip of the split whose video is missing.
    """
    values = read_annotations(source)
    videos = {str(v["video_id"]): v for v in values["videos"] if v.get("split") == split}
    files = {file.rpartition("/")[2].rpartition(".")[0]: file for file in list_files(source) if is_video(file)}
    missing = sorted(set(videos) - set(files))
    if missing or not videos:
        fault = f"no video of {missing[0]} and {len(missing) - 1:,} more" if missing else f"no split {split!r}"
        splits = ", ".join(sorted({str(v.get("split")) for v in values["videos"]}))
        raise ConfigError(f"{source} is no copy of MSR-VTT: {fault}; splits there: {splits}", legal=LAYOUT)
    found, seen = [], dict.fromkeys(videos, 0)
    for sentence in sorted(values["sentences"], key=lambda s: (str(s["video_id"]), _place(s))):
        name = str(sentence["video_id"])
        if name not in videos or seen[name] == captions_per_video:
            continue
        if not isinstance(sentence.get("caption"), str):
            raise ConfigError(f"{source}: a sentence of {name} without a caption: {sentence}", legal=LAYOUT)
        seen[name] += 1
        key = f"{name}/{sentence.get('sen_id', seen[name])}"
        item = Item(key=key, caption=sentence["caption"].strip(), video=files[name], split=split)
        found.append((seen[name], name, item))
    # First captions first, so that the first rows are of as many clips as there can be.
    items = [item for *_, item in sorted(found, key=lambda each: each[:2])]
    listed = [
        {"source_uri": files[name], **({"url": str(video["url"])} if video.get("url") else {})}
        for name, video in sorted(videos.items())
    ]
    facts: dict[str, Any] = {"clips": len(videos), "captions": len(items)}
    if captions_per_video is None and split == "test" and (len(videos), len(items)) != WHOLE:
        facts["remarks"] = [f"{len(videos):,} clips and {len(items):,} captions; MSR-VTT's test split has "
                            f"{WHOLE[0]:,} and {WHOLE[1]:,}"]  # fmt: skip
    return Exam(items, listed, facts)


def _place(sentence: dict[str, Any]) -> tuple[int, int, str]:
    """Of a sentence among those of its clip: by number, whether it is written as one or as text."""
    number = str(sentence.get("sen_id", 0))
    return (0, int(number), "") if number.isdecimal() else (1, 0, number)


def is_video(file: str) -> bool:
    return file.lower().endswith(ENDINGS)


def read_annotations(source: str) -> dict[str, Any]:
    """The JSON files of the folder that have videos and sentences, joined.

    Raises:
        ConfigError: there is none.
    """
    found: dict[str, list[Any]] = {"videos": [], "sentences": []}
    for file in list_files(source, suffix=".json"):
        try:
            values = json.loads(read_bytes(file))
        except ValueError:
            continue
        if isinstance(values, dict) and all(isinstance(values.get(key), list) for key in found):
            for key in found:
                found[key] += [item for item in values[key] if isinstance(item, dict) and "video_id" in item]
    if not found["videos"] or not found["sentences"]:
        raise ConfigError(f"{source} is no copy of MSR-VTT: no annotations", legal=LAYOUT)
    sentences = {(str(s["video_id"]), str(s.get("caption")), s.get("sen_id")): s for s in found["sentences"]}
    videos = {str(v["video_id"]): v for v in found["videos"]}
    return {"videos": list(videos.values()), "sentences": list(sentences.values())}

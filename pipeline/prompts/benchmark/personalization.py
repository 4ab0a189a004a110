"""MSRVTT-Personalization (Video Alchemist, 2501.06187): a caption, pictures of its subject, its background.

Read from the folder that the benchmark's own `prepare_msrvtt_personalization_data.py` makes, by its own rules:
videos with exactly one subject (or one face), the middle of its pictures or all of them.
"""

import json
import re
from typing import Any, Literal

from infra.errors import ConfigError
from infra.storage import exists, join, list_files, read_bytes
from pipeline.prompts.benchmark.item import Exam, Item
from pipeline.prompts.tasks import image, text
from pipeline.schema import Role, Task

LAYOUT = (
    "msrvtt_personalization_data/<video>/{word_tags.json, summary_text.txt, video.mp4, background.jpg, "
    "<subject>.frame1.png, <subject>.face.frame1.png}"
)
TAGS = {"subject": ("subject", ""), "face": ("subject_with_face", ".face")}
Pictures = Literal["single", "multi", "multi_background"]


def read_personalization(source: str, *, mode: str, pictures: Pictures) -> Exam:
    """The prompts of one mode.

    Raises:
        ConfigError: another layout.
    """
    folders = sorted(
        {file.rpartition("/")[0] for file in list_files(source) if file.endswith("/word_tags.json")}
    )
    if not folders:
        raise ConfigError(f"{source} is no copy of MSRVTT-Personalization: no word_tags.json", legal=LAYOUT)
    found = [_item(folder, mode, pictures) for folder in folders]
    items = [item for item in found if item is not None]
    listed = [{"source_uri": join(folder, "video.mp4")} for folder in folders]
    listed += [{"video_id": folder.rpartition("/")[2]} for folder in folders]
    return Exam(items, listed, {"mode": mode, "pictures": pictures, "clips": len(folders)})


def _item(folder: str, mode: str, pictures: Pictures) -> Item | None:
    """One video's prompt; None where the mode leaves it out: none or several subjects."""
    key, suffix = TAGS[mode]
    name = folder.rpartition("/")[2]
    background = ("background.jpg",) if pictures == "multi_background" else ()
    for part in ("summary_text.txt", "video.mp4", *background):
        if not exists(join(folder, part)):
            raise ConfigError(f"{folder} has no {part}", legal=LAYOUT)
    try:
        words: Any = json.loads(read_bytes(join(folder, "word_tags.json")))[key]
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{folder}/word_tags.json names no {key}", legal=LAYOUT) from None
    if not isinstance(words, list) or not all(isinstance(word, str) and word for word in words):
        raise ConfigError(f"{folder}/word_tags.json: {key} is {words!r:.80}, no list of words", legal=LAYOUT)
    if len(words) != 1:
        return None
    stem = words[0].replace(" ", "_").replace("/", "_") + f"{suffix}.frame"
    shown = sorted(
        file for file in list_files(folder, suffix=".png") if file.rpartition("/")[2].startswith(stem)
    )
    if not shown:
        raise ConfigError(f"{folder} has no picture {stem}*.png", legal=LAYOUT)
    shown = [shown[len(shown) // 2]] if pictures == "single" else shown
    caption = read_bytes(join(folder, "summary_text.txt")).decode("utf-8", "replace").strip()
    subject = [image(read_bytes(file), Role.SUBJECT, words[0]) for file in shown]
    segments = around(caption, words[0], subject)
    if pictures == "multi_background":
        segments.append(image(read_bytes(join(folder, "background.jpg")), Role.BACKGROUND))
    return Item(
        key=f"{mode}/{name}",
        caption=caption,
        video=join(folder, "video.mp4"),
        segments=tuple(segments),
        task=Task.SUBJECT_DRIVEN,
    )


def around(caption: str, word: str, pictures: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The caption with the pictures in the place of the word; in front where the word is not in it."""
    match = re.search(rf"\b{re.escape(word)}\b", caption, re.IGNORECASE)
    before, after = (caption[: match.start()], caption[match.end() :]) if match else ("", caption)
    parts = [text(before.strip(), Role.CAPTION), *pictures, text(after.strip(), Role.CAPTION)]
    return [part for part in parts if part["type"] == "image" or part["text"]]

"""UCF101, zero-shot: videos by the dataset's distribution of classes, one prompt a class (Snap Video, C.6).

The 101 hand-written prompts are printed in that paper alone: give them as a file, or the class names are taken,
and called so.
"""

import json
import re
from collections import Counter
from typing import Any

import yaml

from infra.errors import ConfigError, first_line
from infra.storage import exists, join, list_files, read_bytes
from pipeline.prompts.benchmark.item import Exam, Item

LAYOUT = "UCF-101/<Class>/v_<Class>_g01_c01.avi beside ucfTrainTestlist/{classInd,trainlist01,testlist01}.txt"
LISTS = {"train": ("trainlist",), "test": ("testlist",), "all": ("trainlist", "testlist")}


def read_ucf101(source: str, *, subset: str, fold: int, count: int, class_prompts: str | None) -> Exam:
    """The prompts of `count` videos.

    Args:
        source: folder that holds LAYOUT.
        subset: whose videos give the distribution and are the real ones: train, test or all.
        fold: 1 to 3, of the dataset's own lists.
        count: videos to ask for.
        class_prompts: JSON or YAML file, class -> prompt; None = the class names.

    Raises:
        ConfigError: another layout, a listed video that is missing, or a class without a prompt.
    """
    videos = listed_videos(source, subset, fold)
    classes = Counter(video.partition("/")[0] for video in videos)
    prompts = read_class_prompts(class_prompts, sorted(classes))
    by_class = {name: [v for v in videos if v.startswith(f"{name}/")] for name in classes}
    # By the part of each class that is done, so that the first rows are of all classes, by their sizes.
    order = sorted(
        (number / share, name, number)
        for name, share in shares(classes, count).items()
        for number in range(share)
    )
    items = [
        Item(
            key=f"{subset}{fold}/{name}/{number}",
            caption=prompts[name],
            video=join(source, "UCF-101", by_class[name][number % len(by_class[name])]),
            split=subset,
        )
        for _, name, number in order
    ]
    everything = list_files(join(source, "UCF-101"), suffix=".avi")
    called = "class-names" if class_prompts is None else class_prompts.rpartition("/")[2]
    real = len({item.video for item in items})
    facts = {"classes": len(classes), "prompts": called, "subset": f"{subset}list0{fold}", "real": real}
    return Exam(items, [{"source_uri": place} for place in everything], facts)


def listed_videos(source: str, subset: str, fold: int) -> list[str]:
    """`Class/file.avi` of the lists, each of which is there.

    Raises:
        ConfigError: says what was expected.
    """
    index = join(source, "ucfTrainTestlist", "classInd.txt")
    files = [join(source, "ucfTrainTestlist", f"{name}0{fold}.txt") for name in LISTS[subset]]
    for file in (index, *files):
        if not exists(file):
            raise ConfigError(f"{source} is no copy of UCF101: no {file[len(source) + 1 :]}", legal=LAYOUT)
    names = {line.split()[-1] for line in _lines(index)}
    videos = sorted(line.split()[0] for file in files for line in _lines(file))
    there = {place[len(join(source, "UCF-101")) + 1 :] for place in list_files(join(source, "UCF-101"))}
    missing = [video for video in videos if video not in there]
    strange = [video for video in videos if video.partition("/")[0] not in names]
    if missing or strange:
        fault = f"no UCF-101/{missing[0]}" if missing else f"{strange[0]} is of no class of classInd.txt"
        more = f" ({len(missing):,} of {len(videos):,} listed videos are missing)" if missing else ""
        raise ConfigError(f"{source} is no copy of UCF101: {fault}{more}", legal=LAYOUT)
    return videos


def _lines(file: str) -> list[str]:
    return [line for line in read_bytes(file).decode("utf-8", "replace").splitlines() if line.strip()]


def shares(classes: Counter[str], count: int) -> dict[str, int]:
    """Videos of each class: by the classes' sizes, the rest to the largest remainders."""
    total = classes.total()
    exact = {name: count * size / total for name, size in sorted(classes.items())}
    found = {name: int(share) for name, share in exact.items()}
    lacking = count - sum(found.values())
    for name in sorted(exact, key=lambda name: (found[name] - exact[name], name))[:lacking]:
        found[name] += 1
    return found


def read_class_prompts(file: str | None, classes: list[str]) -> dict[str, str]:
    """Class -> prompt.

    Raises:
        ConfigError: no mapping, or a class without a prompt.
    """
    if file is None:
        return {name: plain_name(name) for name in classes}
    try:
        text = read_bytes(file).decode("utf-8")
        values: Any = json.loads(text) if file.endswith(".json") else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"can't read class prompts {file}: {first_line(error)}") from None
    if not isinstance(values, dict) or not all(isinstance(values.get(name), str) for name in classes):
        missing = [n for n in classes if not isinstance(values, dict) or not isinstance(values.get(n), str)]
        raise ConfigError(
            f"{file} has no prompt for {missing[0]} and {len(missing) - 1} more classes",
            legal="a JSON or YAML mapping of each class's name to its prompt",
        )
    return {name: values[name] for name in classes}


def plain_name(name: str) -> str:
    """ApplyEyeMakeup -> apply eye makeup; YoYo, TaiChi and the like come apart too."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()

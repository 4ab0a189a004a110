"""The training that a command proposes: the small recipe of infra/configs/laptop at the shards' own size."""

import itertools
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cli.common import shorten
from infra.cluster import CHECKOUT, is_cluster
from infra.errors import ConfigError

MANY_EPOCHS = 10_000
"""More passes over the prompts than anybody means: the paper's length on a small corpus."""

SIZES = {"num_frames": 16, "height_px": 36, "width_px": 64}
"""Of a training clip, as the configs have them by default."""


def recipe(stage: str) -> str:
    """The small recipe's file."""
    return str(CHECKOUT / "infra" / "configs" / "laptop" / f"{stage}.yaml")


def options(values: Mapping[str, Any]) -> str:
    """`--set` for each value, quoted for the shell and for a `Job.then`."""
    words = [f" --set {shlex.quote(f'{name}={json.dumps(value)}')}" for name, value in values.items()]
    return "".join(words).replace("{", "{{").replace("}", "}}")


def train_command(stage: str, prompts: str) -> str:
    """`--config` and `--set` that fit these prompts: the small recipe at the size of their targets."""
    from pipeline.shards import ShardSet

    shards, sizes = ShardSet(prompts), {}
    columns = ["media", *(f"target.{name}" for name in ("kind", *SIZES))]
    rows = shards.read_row_group(0, columns).to_pylist() if len(shards) else []
    stored = [row["target"] for row in rows if row["target"]["kind"] == "frames"]
    if stored:
        longest = max(stored, key=lambda target: target["num_frames"])
        sizes = {name: longest[name] for name in SIZES if longest[name] > 1}  # a picture has one frame
    values: dict[str, Any] = {name: size for name, size in sizes.items() if size != SIZES[name]}
    if rows and all(row["media"] == "image" for row in rows):
        values["buckets"] = [{"media": "image", "num_frames": values.get("num_frames", 16)}]
    return f"--config {shlex.quote(shorten(recipe(stage)))}{options(values)}"


def unused(folder: str) -> str:
    """The name, or one like it that nothing has yet: no command adds to another's output."""
    numbers = itertools.count(2)
    name = folder
    while Path(name).exists():
        name = f"{folder}-{next(numbers)}"
    return name


def clip_option() -> str:
    """` --clip offline` where the default CLIP is neither in the cache nor to be fetched."""
    from infra.clip import ClipConfig, check_clip

    for config, option in ((ClipConfig(), ""), (ClipConfig(name="offline"), " --clip offline")):
        try:
            check_clip(config)
        except ConfigError:
            continue
        return option
    return ""


def refuse_bare(stage: str, config: Any, plan: str) -> None:
    """Refuse the paper's size and length where nobody means them: no config, and few prompts or no GPU.

    Raises:
        ConfigError: what it would cost, and the small recipe that fits these prompts.
    """
    import torch

    from pipeline.shards import ShardSet

    rows = ShardSet(config.prompts).num_rows
    is_here = not is_cluster(config.ray)
    no_gpu = is_here and not torch.cuda.is_available()
    if "samples" in config.model_fields_set or (config.samples <= MANY_EPOCHS * rows and not no_gpu):
        return
    why = f"{rows:,} prompts" + (" and no GPU" if no_gpu else "")
    small = train_command(stage, config.prompts).replace("{{", "{").replace("}}", "}")
    raise ConfigError(
        f"without a config {stage} has the paper's size and length ({'; '.join(plan.splitlines())}), for {why}",
        cure=f"the small recipe: add {small}; or --set samples={config.samples} if you mean it",
    )

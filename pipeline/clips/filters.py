"""Filters clips: too short, too small, static, no caption, ..."""

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import Any

import numpy as np
from pydantic import Field

from infra.config import Config
from infra.errors import ConfigError
from pipeline.clips.quality import QualityConfig
from pipeline.schema import Status

FRAMES_PER_CLIP = 3
"""Frames looked at (and handed to plug-ins), evenly spaced; odd, so that one is the middle. Ours."""
Plugin = Callable[[np.ndarray, dict[str, Any]], str | None]


class FilterConfig(Config):
    """Bounds of a usable clip; None switches a filter off. All numbers are ours."""

    require_caption: bool = True
    """Leave out clips without a caption."""
    min_s: float | None = Field(default=0.5, ge=0)
    """Shortest clip, seconds."""
    max_s: float | None = Field(default=None, gt=0)
    """Longest clip, seconds."""
    min_side_px: int | None = Field(default=64, ge=1, le=65536)
    """Smallest width or height."""
    static_below: float | None = Field(default=1.0, ge=0, le=255)
    """A clip is static if no 8x8 block of its 64x64 grey frames changes by more than this many of
    the 256 levels between any two of the frames that were looked at: a frozen picture."""
    near_duplicate_bits: int | None = Field(default=None, ge=0, le=8)
    """Leave out a clip whose middle frame differs from an earlier parent's clip of the same length
    in at most so many of the 64 bits of the perceptual hash. Off by default: a fixed camera sees
    many different clips with the same middle frame."""
    quality: QualityConfig = QualityConfig()
    """Motion and picture quality."""
    plugins: tuple[str, ...] = ()
    """Further filters as `package.module:function`: (frames `n 64 64 3` uint8, row) -> a reason to
    leave the clip out, or None. For NSFW, text overlays, ..."""


@lru_cache(maxsize=4)
def load_plugins(names: tuple[str, ...]) -> list[tuple[str, Plugin]]:
    """The functions behind `package.module:function` names.

    Raises:
        ConfigError: no such module or function.
    """
    found = []
    for name in names:
        module, _, function = name.partition(":")
        try:
            found.append((name, getattr(import_module(module), function)))
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(
                f"filter plug-in {name!r}: {error}", legal="package.module:function on PYTHONPATH"
            ) from None
    return found


def judge_by_facts(row: dict[str, Any], config: FilterConfig) -> tuple[Status, str] | None:
    """The first filter that the row's numbers fail, before any frame is decoded."""
    length_s = row["end_s"] - row["start_s"]
    side_px = min(row["width_px"], row["height_px"])
    if config.require_caption and not row.get("caption"):
        return Status.FILTERED_NO_CAPTION, "no caption"
    if row["media"] == "video" and config.min_s is not None and length_s < config.min_s:
        return Status.FILTERED_TOO_SHORT, f"{length_s:.3f} s < {config.min_s:g} s"
    if row["media"] == "video" and config.max_s is not None and length_s > config.max_s:
        return Status.FILTERED_TOO_LONG, f"{length_s:.3f} s > {config.max_s:g} s"
    if config.min_side_px is not None and side_px < config.min_side_px:
        return Status.FILTERED_TOO_SMALL, f"{side_px} px < {config.min_side_px} px"
    return None


def judge_by_frames(
    row: dict[str, Any],
    frames: np.ndarray,
    config: FilterConfig,
) -> tuple[Status, str] | None:
    """The first filter that the frames (uint8 `n 64 64 3`) fail."""
    if config.static_below is not None and len(frames) > 1:
        change = largest_change(frames)
        if change <= config.static_below:
            return Status.FILTERED_STATIC, f"largest change {change:.2f} of 255"
    for name, plugin in load_plugins(config.plugins):
        reason = plugin(frames, row)
        if reason:
            return Status.FILTERED_PLUGIN, f"{name}: {reason}"
    return None


def largest_change(frames: np.ndarray) -> float:
    """How much the most changing 8x8 block of `n h w 3` changes, in grey levels (0-255)."""
    grey = frames.astype(np.float32).mean(axis=3)
    n, height, width = grey.shape
    blocks = grey[:, : height // 8 * 8, : width // 8 * 8]
    means = blocks.reshape(n, height // 8, 8, width // 8, 8).mean(axis=(2, 4))
    return float((means.max(axis=0) - means.min(axis=0)).max())

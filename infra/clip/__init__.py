"""CLIP: one joint text-image encoder for the memory, the guard, the metrics and the prompt encoder.

Nothing heavy is imported here; torch and open_clip come with the first `load_clip`.
"""

from infra.clip.load import (
    OFFLINE,
    OFFLINE_TOKENS,
    ClipConfig,
    check_clip,
    clip_dim,
    load_clip,
    stored_version,
)
from infra.clip.model import Clip

__all__ = [
    "OFFLINE",
    "OFFLINE_TOKENS",
    "Clip",
    "ClipConfig",
    "check_clip",
    "clip_dim",
    "load_clip",
    "stored_version",
]

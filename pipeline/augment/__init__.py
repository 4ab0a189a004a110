"""Captions x memory -> multimodal prompts. Import names from here, not from the files."""

from pipeline.augment.config import AugmentConfig
from pipeline.augment.door import check
from pipeline.augment.job import run
from pipeline.augment.target import TargetConfig, TargetError, make_target

__all__ = ["AugmentConfig", "TargetConfig", "TargetError", "check", "make_target", "run"]

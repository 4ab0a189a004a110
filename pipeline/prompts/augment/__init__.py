"""Captions x memory -> multimodal prompts. Import names from here, not from the files."""

from pipeline.prompts.augment.config import AugmentConfig
from pipeline.prompts.augment.job import run
from pipeline.prompts.augment.preflight import check
from pipeline.prompts.augment.target import TargetConfig, make_target

__all__ = ["AugmentConfig", "TargetConfig", "check", "make_target", "run"]

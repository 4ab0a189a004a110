"""Captions x memory -> multimodal prompts. Import names from here, not from the files."""

from pipeline.prompts.augment.config import AugmentConfig
from pipeline.prompts.augment.job import check, run

__all__ = ["AugmentConfig", "check", "run"]

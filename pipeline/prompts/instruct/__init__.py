"""Stage-2 instructions: subject-driven, video prediction, text-to-video."""

from pipeline.prompts.instruct.config import InstructConfig
from pipeline.prompts.instruct.job import check, run

__all__ = ["InstructConfig", "check", "run"]

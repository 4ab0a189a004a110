"""Stage-2 instructions: subject-driven, video prediction, text-to-video."""

from pipeline.instruct.config import InstructConfig
from pipeline.instruct.job import check, run

__all__ = ["InstructConfig", "check", "run"]

"""Prompts -> encodings, by an encoder that the caller brings: this floor knows no model."""

from pipeline.prompts.encode.config import EncodeJobConfig
from pipeline.prompts.encode.job import Encoder, check, run

__all__ = ["EncodeJobConfig", "Encoder", "check", "run"]

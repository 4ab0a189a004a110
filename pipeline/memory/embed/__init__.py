"""Clips tables in, staged documents with CLIP vectors out."""

from pipeline.memory.embed.pictures import EmbedConfig, Picture, read_picture
from pipeline.memory.embed.streams import Streams
from pipeline.memory.embed.units import clip_units, read_slice
from pipeline.memory.embed.vectors import document_vector, frame_mean, unit_rows
from pipeline.memory.embed.worker import Embedder

__all__ = [
    "EmbedConfig",
    "Embedder",
    "Picture",
    "Streams",
    "clip_units",
    "document_vector",
    "frame_mean",
    "read_picture",
    "read_slice",
    "unit_rows",
]

"""Clips tables in, staged documents with CLIP vectors out."""

from pipeline.embed.pictures import EmbedConfig, Picture, PictureError, read_picture
from pipeline.embed.units import clip_units, read_slice
from pipeline.embed.worker import Embedder, document_vector, unit_rows

__all__ = [
    "EmbedConfig",
    "Embedder",
    "Picture",
    "PictureError",
    "clip_units",
    "document_vector",
    "read_picture",
    "read_slice",
    "unit_rows",
]

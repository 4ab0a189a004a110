"""Prompts -> condition tokens, by a frozen encoder.

select.py        documents, condition dropout, the limit on tokens
pictures.py      bytes -> pictures, reference tensors
encoder.py       what every encoder gives
mllm_encoder.py  any transformers image-text-to-text model, as VIMI
clip_encoder.py  open_clip text and patch tokens
cache.py         encoded prompts, by content
"""

from model.prompt.config import CacheConfig, PromptEncoderConfig
from model.prompt.encoder import EncodedBatch, EncodedPrompt, PromptEncoder
from model.prompt.load import load_prompt_encoder
from model.prompt.pictures import PictureError, decode_picture, reference_tensors
from model.prompt.select import select

__all__ = [
    "CacheConfig",
    "EncodedBatch",
    "EncodedPrompt",
    "PictureError",
    "PromptEncoder",
    "PromptEncoderConfig",
    "decode_picture",
    "load_prompt_encoder",
    "reference_tensors",
    "select",
]

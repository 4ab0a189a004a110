"""Config of the prompt encoder: a frozen multimodal language model, as VIMI, or a CLIP."""

from typing import Literal

from pydantic import Field

from infra.clip import ClipConfig
from infra.config import Config, Incidental, NameOrFolder


class PromptEncoderConfig(Config):
    """Names a frozen encoder. VIMI draws an MLLM (paper, both figures); which one, it does not say.

    Computed, not measured: weights = parameters (as the model cards state them) x 2 bytes (bf16), without
    activations; tokens of one square picture of 448 pixels a side, unsplit; TFLOP of the forward of
    a prompt of 100 words' tokens and two pictures = 2 x parameters x tokens. LLaVA-1.5 resizes to 336.

    | family | `model` | parameters | weights | tokens a picture | TFLOP a prompt |
    |---|---|---|---|---|---|
    | SmolVLM | `HuggingFaceTB/SmolVLM-256M-Instruct` | 0.26 B | 0.5 GB | 64 + 3 | 0.1 |
    | SmolVLM | `HuggingFaceTB/SmolVLM-500M-Instruct` | 0.51 B | 1.0 GB | 64 + 3 | 0.2 |
    | SmolVLM | `HuggingFaceTB/SmolVLM-Instruct` | 2.2 B | 4.5 GB | 81 + 3 | 1.2 |
    | Qwen-VL | `Qwen/Qwen2.5-VL-3B-Instruct` | 3.8 B | 7.5 GB | 256 + 2 | 4.6 |
    | Qwen-VL | `Qwen/Qwen2.5-VL-7B-Instruct` | 8.3 B | 17 GB | 256 + 2 | 10 |
    | LLaVA | `llava-hf/llava-1.5-7b-hf` | 7.1 B | 14 GB | 576 | 18 |
    | LLaVA | `llava-hf/llava-1.5-13b-hf` | 13 B | 27 GB | 576 | 33 |
    | CLIP | `clip.name: ViT-B-32` | 0.15 B | 0.6 GB (fp32) | 49, or `patch_grid`^2 | 0.02 |
    | CLIP | `clip.name: offline` | 0.03 B | 0.1 GB (fp32) | 49, or `patch_grid`^2 | 0.005 |
    """

    model: NameOrFolder = "HuggingFaceTB/SmolVLM-256M-Instruct"
    """Language model that sees text and pictures (an mllm), whose hidden states are the tokens: id on the model
    hub, or a folder with config, weights, tokenizer and processor."""
    clip: ClipConfig | None = None
    """A CLIP in its place, whose text and patch states are the tokens; null = `model`."""
    layer: Literal["last", "penultimate"] | int = "penultimate"
    """mllm: hidden states after the final norm (last), before the last layer (penultimate), or at an index:
    0 = embeddings, n = after layer n, negative = from the end. VIMI does not say; penultimate is usual."""
    max_tokens: int = Field(default=2048, ge=8)
    """Most tokens of a prompt; longer ones are cut as `model.prompt.select.fit` says."""
    patch_grid: int | None = Field(default=None, ge=1)
    """clip: average the patches of a picture to at most n x n tokens; None = all patches."""
    batch_size: Incidental[int] = Field(default=1, ge=1)
    """Prompts (clip: texts or pictures) per forward. 1 makes the tokens of a prompt the same to the last bit
    whatever it is batched with, which exact resume needs; more is faster on a GPU."""

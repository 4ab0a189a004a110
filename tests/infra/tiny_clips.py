"""Random CLIPs of each kind that open_clip builds, as files that a user would have."""

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip import CoCa, CustomTextCLIP

from infra.clip import ClipConfig
from infra.clip.offline import minilm_folder

VIT = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 2, "head_width": 32}
TEXT = {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
HF_TEXT = {"hf_model_name": "MINILM_DIR", "hf_tokenizer_name": "MINILM_DIR", "context_length": 24}
COCA_TEXT = {**TEXT, "embed_cls": True, "output_tokens": True}
COCA_VIT = {**VIT, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
TIMM = {"image_size": 64, "timm_model_name": "tf_efficientnet_lite0", "timm_proj": "linear"}
MODELS: dict[str, dict[str, Any]] = {
    "vit": {"embed_dim": 24, "vision_cfg": VIT, "text_cfg": TEXT},
    "resnet": {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32},
        "text_cfg": TEXT,
    },
    "custom text": {"embed_dim": 24, "vision_cfg": VIT, "text_cfg": TEXT, "custom_text": True},
    "pads attended": {
        "embed_dim": 24,
        "vision_cfg": {**VIT, "pool_type": "avg", "final_ln_after_pool": True},
        "text_cfg": {**TEXT, "no_causal_mask": True, "pool_type": "last"},
        "custom_text": True,
    },
    "hugging face text": {
        "embed_dim": 24,
        "vision_cfg": {**TIMM, "timm_pool": ""},
        "text_cfg": {**HF_TEXT, "hf_proj_type": "linear", "hf_pooler_type": "mean_pooler"},
    },
    "timm vit": {
        "embed_dim": 24,
        "vision_cfg": {
            "image_size": 224,
            "timm_model_name": "vit_tiny_patch16_224",
            "timm_pool": "token",
            "timm_proj": "linear",
        },
        "text_cfg": TEXT,
    },
    "coca": {
        "custom_text": True,
        "embed_dim": 24,
        "vision_cfg": COCA_VIT,
        "text_cfg": COCA_TEXT,
        "multimodal_cfg": {"context_length": 20, "width": 32, "heads": 2, "layers": 1},
    },
}


def save_tiny(folder: Path, cfg: dict[str, Any], *, seed: int = 0) -> tuple[str, str]:
    """Write a model config and random weights of it, as a user would have them."""
    (folder / "tiny.json").write_text(json.dumps(cfg))
    torch.manual_seed(seed)
    built = json.loads(json.dumps(cfg).replace("MINILM_DIR", str(minilm_folder())))
    built["vision_cfg"].pop("timm_model_pretrained", None)
    is_hf = "hf_model_name" in built["text_cfg"]
    is_custom = built.pop("custom_text", False) or is_hf
    if is_hf:
        built["text_cfg"]["hf_model_pretrained"] = False
    kind: Any = CoCa if "multimodal_cfg" in built else CustomTextCLIP if is_custom else open_clip.CLIP
    torch.save({"state_dict": kind(**built).state_dict()}, folder / "tiny.pt")
    return str(folder / "tiny.json"), str(folder / "tiny.pt")


def mini_clip(weights: Path, folder: Path, **text: Any) -> ClipConfig:
    """The small CLIP of the assets: its config with the preprocessing that it was trained with."""
    model = json.loads((weights / "lite0-minilm.json").read_text())
    model["text_cfg"] |= text
    half = [0.5, 0.5, 0.5]
    values = {"model_cfg": model, "preprocess_cfg": {"mean": half, "std": half}}
    (folder / "lite0-minilm.json").write_text(json.dumps(values))
    return ClipConfig(name=str(folder / "lite0-minilm.json"), pretrained=str(weights / "lite0-minilm-fp16.pt"))

"""Real detectors and mask generators of transformers, tiny and random: `save(family, folder)`."""

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers as installed

transformers: Any = installed
"""Its classes take more keywords than its types admit."""
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", "a", "dog", "cat", "red", "square"]
SIDE_PX = 64
SWIN = {
    "image_size": SIDE_PX,
    "embed_dim": 8,
    "depths": [1] * 4,
    "num_heads": [1] * 4,
    "window_size": 4,
    "out_features": ["stage2", "stage3", "stage4"],
}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def bert_tokenizer() -> Any:
    return transformers.BertTokenizer(vocab={word: n for n, word in enumerate(WORDS)})


def clip_tokenizer(context: int) -> Any:
    """CLIP's: letters, and letters that end a word."""
    vocab = [*string.ascii_lowercase, *(f"{c}</w>" for c in string.ascii_lowercase), "<start>", "<end>"]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={w: n for n, w in enumerate(vocab)}, merges=[], unk_token="<end>", end_of_word_suffix="</w>"
        )
    )
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()  # type: ignore[assignment]
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(  # type: ignore[assignment]
        single="<start> $A <end>", special_tokens=[("<start>", 52), ("<end>", 53)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<start>",
        eos_token="<end>",
        pad_token="<end>",
        unk_token="<end>",
        model_max_length=context,
        truncation_side="right",
    )


def clip_text(context: int) -> dict[str, Any]:
    ids = {"vocab_size": 54, "bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
    return {**TEXT, **ids, "max_position_embeddings": context}


def dino(family: str) -> tuple[Any, Any]:
    bert = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=64, **TEXT)
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "num_queries": 10, "max_text_len": 32}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_ffn_dim": 16, f"{part}_attention_heads": 2}
    config = getattr(transformers, f"{family}Config")(
        backbone_config=transformers.SwinConfig(**SWIN), text_config=bert, **sizes
    )
    pictures = transformers.GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    model = getattr(transformers, f"{family}ForObjectDetection")(config)
    return model, transformers.GroundingDinoProcessor(pictures, bert_tokenizer())


def owlv2() -> tuple[Any, Any]:
    vision = {**TEXT, "image_size": SIDE_PX, "patch_size": 16}
    config = transformers.Owlv2Config(text_config=clip_text(16), vision_config=vision, projection_dim=16)
    pictures = transformers.Owlv2ImageProcessor(size={"height": SIDE_PX, "width": SIDE_PX})
    return transformers.Owlv2ForObjectDetection(config), transformers.Owlv2Processor(
        pictures, clip_tokenizer(16)
    )


def omdet() -> tuple[Any, Any]:
    config = transformers.OmDetTurboConfig(
        backbone_config=transformers.SwinConfig(**SWIN),
        text_config=transformers.CLIPTextConfig(**clip_text(77), projection_dim=16),
        apply_layernorm_after_vision_backbone=False,
        image_size=SIDE_PX,
        text_projection_in_dim=16,
        text_projection_out_dim=16,
        class_embed_dim=16,
        task_encoder_hidden_dim=24,
        num_queries=10,
        encoder_hidden_dim=32,
        vision_features_channels=[32, 32, 32],
        encoder_in_channels=[16, 32, 64],
        encoder_attention_heads=2,
        encoder_dim_feedforward=16,
        decoder_hidden_dim=32,
        decoder_num_heads=2,
        decoder_num_layers=1,
        decoder_dim_feedforward=16,
        decoder_num_points=1,
    )
    pictures = transformers.DetrImageProcessor(
        size={"height": SIDE_PX, "width": SIDE_PX}, do_pad=False, format="coco_detection"
    )
    return (
        transformers.OmDetTurboForObjectDetection(config),
        transformers.OmDetTurboProcessor(pictures, clip_tokenizer(77)),
    )


SAM_PROMPTS = {"hidden_size": 16, "image_size": SIDE_PX, "mask_input_channels": 4}
SAM_DECODER = {"hidden_size": 16, "mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 16}


def sam(family: str) -> tuple[Any, Any]:
    """A random SAM, sure of whatever it cuts out."""
    vision: dict[str, Any] = {
        "hidden_size": 16,
        "output_channels": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    vision |= {"image_size": SIDE_PX, "mlp_dim": 16, "num_pos_feats": 8, "window_size": 2}
    more = {}
    if family == "SamHQ":
        vision["global_attn_indexes"], more = [0], {"vit_dim": 16}
    config = getattr(transformers, f"{family}Config")(
        vision_config=vision, prompt_encoder_config=SAM_PROMPTS, mask_decoder_config=SAM_DECODER | more
    )
    model = getattr(transformers, f"{family}Model")(config)
    small, smaller = {"height": SIDE_PX, "width": SIDE_PX}, {"height": 16, "width": 16}
    pictures = transformers.SamImageProcessor(
        size={"longest_edge": SIDE_PX}, pad_size=small, mask_size={"longest_edge": 16}, mask_pad_size=smaller
    )
    return sure(model, 0.95), getattr(transformers, f"{family}Processor")(pictures)


def sure(model: Any, by: float = 3.0) -> Any:
    model.mask_decoder.iou_prediction_head.proj_out.bias.data += by
    return model


def sam2() -> tuple[Any, Any]:
    hiera = {
        "hidden_size": 8,
        "num_attention_heads": 1,
        "image_size": [SIDE_PX, SIDE_PX],
        "blocks_per_stage": [1, 1, 2, 1],
        "embed_dim_per_stage": [8, 16, 32, 64],
        "num_attention_heads_per_stage": [1, 2, 4, 8],
        "window_size_per_stage": [4, 2, 2, 2],
        "global_attention_blocks": [3],
        "window_positional_embedding_background_size": [4, 4],
    }
    vision = {
        "backbone_config": transformers.Sam2HieraDetConfig(**hiera),
        "backbone_channel_list": [64, 32, 16, 8],
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        "fpn_hidden_size": 16,
    }
    config = transformers.Sam2Config(
        vision_config=transformers.Sam2VisionConfig(**vision),
        prompt_encoder_config=SAM_PROMPTS,
        mask_decoder_config=SAM_DECODER,
    )
    return sure(transformers.Sam2Model(config)), sam2_processor()


def sam2_processor() -> Any:
    size = {"height": SIDE_PX, "width": SIDE_PX}
    return transformers.Sam2Processor(
        transformers.Sam2ImageProcessor(size=size, mask_size={"height": 16, "width": 16})
    )


def edgetam() -> tuple[Any, Any]:
    vision = {
        "backbone_config": transformers.TimmWrapperConfig(
            architecture="repvit_m0_9",
            model_args={"in_chans": 3, "features_only": True, "out_indices": [0, 1, 2, 3]},
        ),
        "backbone_channel_list": [384, 192, 96, 48],
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        "fpn_hidden_size": 16,
    }
    config = transformers.EdgeTamConfig(
        vision_config=transformers.EdgeTamVisionConfig(**vision),
        prompt_encoder_config=SAM_PROMPTS,
        mask_decoder_config=SAM_DECODER,
    )
    return sure(transformers.EdgeTamModel(config)), sam2_processor()


def sam3() -> tuple[Any, Any]:
    side = 56
    layer = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    vit: dict[str, Any] = {
        **layer,
        "num_hidden_layers": 1,
        "image_size": side,
        "pretrain_image_size": side,
        "patch_size": 14,
    }
    vit |= {"window_size": 2, "global_attn_indexes": [0], "model_type": "sam3_vit_model"}
    config = transformers.Sam3Config(
        vision_config={
            "backbone_config": {
                **vit,
                "window_size": 2,
                "global_attn_indexes": [0],
                "model_type": "sam3_vit_model",
            },
            "fpn_hidden_size": 16,
            "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        },
        text_config=clip_text(32) | {"projection_dim": 16},
        geometry_encoder_config=layer | {"num_layers": 1},
        detr_encoder_config=layer | {"num_layers": 1},
        detr_decoder_config=layer | {"num_layers": 1, "num_queries": 6},
        mask_decoder_config={"hidden_size": 16, "num_attention_heads": 2},
    )
    pictures = transformers.Sam3ImageProcessor(
        size={"height": side, "width": side}, mask_size={"height": 16, "width": 16}
    )
    return transformers.Sam3Model(config), transformers.Sam3Processor(pictures, clip_tokenizer(32))


DETECTORS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "grounding_dino": lambda: dino("GroundingDino"),
    "mm_grounding_dino": lambda: dino("MMGroundingDino"),
    "owlv2": owlv2,
    "omdet_turbo": omdet,
    "sam3": sam3,
}
SEGMENTERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "sam": lambda: sam("Sam"),
    "sam_hq": lambda: sam("SamHQ"),
    "sam2": sam2,
    "edgetam": edgetam,
}


def save(family: str, folder: Path) -> str:
    """Write a model and its processor; the same weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, processor = (DETECTORS | SEGMENTERS)[family]()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)

"""The two towers of any open_clip model: pooled vectors, and states of tokens and patches.

open_clip has four kinds of image tower and three of text tower; this file is the only place that tells
them apart (hence `Any`: what they share is not in their types). States are projected into the joint
space where the tower has a projection, so that tokens and patches share one width.
"""

from typing import Any, cast

import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.model import CLIP
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer, text_global_pool
from torch import Tensor, nn

from infra.clip.offline import ConSE, orthonormal


def joint_dim(model: Any) -> int:
    """Width d of the joint space, from the text tower's projection."""
    text = getattr(model, "text", model)
    if _is_hugging_face(text):
        return text.output_dim
    projection = text.text_projection
    if projection is None:
        return int(text.ln_final.weight.shape[0])
    if isinstance(projection, nn.Linear):
        return projection.out_features
    return int(projection.shape[1])


def text_lengths(model: Any, ids: Tensor) -> Tensor:
    """Tokens of each row that carry the text, [n]: up to the end token, or to the last non-pad."""
    text = getattr(model, "text", model)
    if _is_hugging_face(text):
        return _last_true(ids != text.config.pad_token_id)
    kind = getattr(text, "text_pool_type", None) or text.pool_type
    if kind == "argmax":
        return ids.argmax(-1) + 1
    if kind == "eos":
        ends = ids == _eos_id(text)
        return torch.where(ends.any(-1), ends.int().argmax(-1) + 1, ids.shape[1])
    return _last_true(ids != getattr(text, "pad_id", 0))


def can_trim(model: Any) -> bool:
    """Whether columns after the longest text can be cut without changing any vector.

    True for Hugging Face towers (pads are masked) and for causal ones that read the end token; false for
    towers that attend to pads (SigLIP) or append a class token (CoCa).
    """
    text = getattr(model, "text", model)
    if _is_hugging_face(text):
        return True
    kind = getattr(text, "text_pool_type", None) or getattr(text, "pool_type", None)
    causal = getattr(text, "attn_mask", None) is not None
    return causal and kind in ("argmax", "eos") and getattr(text, "cls_emb", None) is None


def text_states(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids [n, l] -> pooled vectors [n, d] and token states [n, l, d], neither normalised."""
    text = getattr(model, "text", model)
    if _is_hugging_face(text):
        mask = (ids != text.config.pad_token_id).long()
        out = text.transformer(input_ids=ids, attention_mask=mask)
        return text.proj(text.pooler(out, mask)), text.proj(out.last_hidden_state)
    if getattr(text, "cls_emb", None) is not None:
        return _coca_text(text, ids)
    x, mask = _embed_text(text, ids)
    x = text.ln_final(text.transformer(x, attn_mask=mask))
    kind = getattr(text, "text_pool_type", None) or text.pool_type
    pooled = text_global_pool(x, ids, kind, eos_token_id=_eos_id(text))
    return _project(text.text_projection, pooled), _project(text.text_projection, x)


def _embed_text(text: Any, ids: Tensor) -> tuple[Tensor, Tensor | None]:
    """Embeddings and attention mask for a row length at most the context length."""
    is_plain = isinstance(text, CLIP)
    text = cast(Any, text)
    if not is_plain:
        x, mask = text._embeds(ids)
    else:
        x = text.token_embedding(ids) + text.positional_embedding[: ids.shape[1]]
        mask = text.attn_mask
    if mask is not None:
        mask = mask[..., : x.shape[1], : x.shape[1]]
    return x, mask


def _coca_text(text: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    x, mask = text._embeds(ids)
    x = text.ln_final(text.transformer(x, attn_mask=mask))
    states = _project(text.text_projection, x)
    return states[:, -1], states[:, :-1]


def image_vectors(model: Any, images: Tensor) -> Tensor:
    """Images [n, 3, h, w] -> pooled vectors [n, d], not normalised."""
    out = model.visual(images)
    return out[0] if isinstance(out, tuple) else out  # CoCa's gives tokens too


def image_states(model: Any, images: Tensor, width: int) -> Tensor:
    """Images [n, 3, h, w] -> patch states [n, p, width], row by row, class token left out."""
    visual = model.visual
    if isinstance(visual, ConSE):
        states = visual.cells(images)
    elif isinstance(visual, VisionTransformer):
        states = _vit_patches(visual, images)
    elif isinstance(visual, ModifiedResNet):
        states = _resnet_cells(visual, images)
    elif isinstance(visual, TimmModel):
        states = _timm_patches(visual, images)
    else:
        states = visual(images).unsqueeze(1)  # an unknown tower: one token
    return _fit_width(states, width)


def _vit_patches(visual: Any, images: Tensor) -> Tensor:
    _, tokens = visual._pool(visual.transformer(visual._embeds(images)))
    if visual.final_ln_after_pool:
        tokens = visual.ln_post(tokens)
    if visual.proj is not None and tokens.shape[-1] == visual.proj.shape[0]:
        tokens = tokens @ visual.proj
    return tokens


def _resnet_cells(visual: Any, images: Tensor) -> Tensor:
    """Value and output projection of the attention pool on each cell (MaskCLIP, arXiv 2112.01071)."""
    x = visual.stem(images)
    for layer in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
        x = layer(x)
    pool = visual.attnpool
    return pool.c_proj(pool.v_proj(x.flatten(2).transpose(1, 2)))


def _timm_patches(visual: Any, images: Tensor) -> Tensor:
    x = visual.trunk.forward_features(images)
    if x.ndim == 4:
        is_nchw = x.shape[1] == visual.trunk.num_features
        x = x.flatten(2).transpose(1, 2) if is_nchw else x.flatten(1, 2)
    else:
        x = x[:, getattr(visual.trunk, "num_prefix_tokens", 0) :]
    head = dict(visual.head.named_children())
    if "proj" in head and head["proj"].in_features == x.shape[-1]:
        x = head["proj"](x)
    elif "mlp" in head and head["mlp"].fc1.in_features == x.shape[-1]:
        x = head["mlp"](x)
    return x


def _fit_width(states: Tensor, width: int) -> Tensor:
    """Towers whose patches have no projection: a fixed orthonormal map keeps their geometry."""
    found = states.shape[-1]
    if found == width:
        return states
    basis = orthonormal(min(found, width), max(found, width)).to(states)
    return states @ (basis.T if found >= width else basis)


def _is_hugging_face(text: Any) -> bool:
    return isinstance(text, HFTextEncoder)


def _project(projection: nn.Module | Tensor | None, x: Tensor) -> Tensor:
    if projection is None:
        return x
    return projection(x) if isinstance(projection, nn.Module) else x @ projection


def _eos_id(text: Any) -> int | None:
    return getattr(text, "text_eos_id", None) or getattr(text, "eos_id", None)


def _last_true(mask: Tensor) -> Tensor:
    """Position after the last True of each row; at least 1."""
    positions = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return (mask * positions).amax(-1).clamp(min=1)

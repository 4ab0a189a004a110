"""MLLM prompt encoder: hidden states of a frozen image-text-to-text model of transformers.

    prompt -> its chat template (layout.py) -> the processor -> the language model -> states of one layer

Each prompt goes through the processor by itself, so its length is known before it is batched; batches
are of similar length, and of prompts with pictures or without. Template tokens (system prompt, turn
marks) are attended to but not handed on; marks around a picture belong to the picture.
"""

import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from infra.clip.model import hash_weights
from infra.errors import ConfigError
from infra.hub import hub_file, require_hub_file
from infra.pretrained import hash_stored_weights, or_refused
from model.condition import EncodedPrompt, Prompt, Segment
from model.data.batch import Role, role_number
from model.prompt.encoder import PromptEncoder, PromptEncoderConfig, config_text
from model.prompt.layout import Layout, Template, owners
from model.prompt.pictures import MAX_PICTURE_PX, Pictures, decode_all
from model.prompt.select import drop_empty, fit

CONFIG_FILE = "config.json"
LAYOUT_VERSION = 1
"""Raise when `layout.py` lays prompts out differently: old cache entries then no longer match."""
CURE = "give a local folder as model, or use a CLIP (clip: {name: offline})"
PICTURE_SIDE_PX = 448
"""Pictures are shrunk to this longest side before the processor sees them; bounds the tokens of families that
take pictures at their own size (Qwen-VL). Ours; smaller pictures stay as they are."""
SPLIT_PICTURES = False
"""Whether a processor that can (SmolVLM, Idefics3) cuts a picture into tiles besides the whole: finer, but up
to 17 times the tokens."""


@dataclass(frozen=True)
class Processed:
    """One prompt, ready for the model."""

    inputs: dict[str, Tensor]
    """As the processor gives them, batch of one."""
    kept: Tensor
    """Positions of the tokens that belong to segments, `l`."""
    role: Tensor
    segment: Tensor

    @property
    def length(self) -> int:
        return self.inputs["input_ids"].shape[1]

    @property
    def has_pictures(self) -> bool:
        return "pixel_values" in self.inputs


class MllmPromptEncoder(PromptEncoder):
    """Prompt encoder over any `AutoModelForImageTextToText` and its processor."""

    def __init__(
        self,
        config: PromptEncoderConfig,
        model: Any,
        processor: Any,
        device: str | torch.device = "cpu",
        weight_hash: str | None = None,
    ) -> None:
        """`model` and `processor`: of transformers, of the same family; weights in the wanted dtype.

        `weight_hash`: of the files that they came from; None = of themselves, rounded.
        """
        self.config, self.weight_hash = config, weight_hash
        self.device = torch.device(device)
        self.model = model.eval().requires_grad_(False).to(self.device)
        # Without the language head: logits over the vocabulary would cost more than the last layers.
        self.backbone = getattr(self.model, "model", self.model)
        self.processor = processor
        self.processor.tokenizer.padding_side = "right"
        self.template = Template(processor)
        self.dtype = next(self.model.parameters()).dtype
        self.dim = int(self.model.config.get_text_config().hidden_size)
        self.layer_index = _layer_index(config.layer, _num_layers(self.model))
        self._accepted = set(inspect.signature(self.backbone.forward).parameters)
        self._can_split = hasattr(processor.image_processor, "do_image_splitting")
        self._check_limit()

    def _check_limit(self) -> None:
        """Refuse a limit that the template alone uses up: nothing of any prompt would be left."""
        least = self._process((Segment("text", Role.CAPTION, text="a"),), {}).length + 7
        if self.config.max_tokens < least:
            raise ConfigError(
                f"max_tokens = {self.config.max_tokens}", legal=f"at least {least} with this chat template"
            )

    @property
    def identity(self) -> dict[str, Any]:
        """Weights by content: the same name with other weights is another encoder."""
        processor = self.processor
        parts = {
            "config": config_text(self.model),
            "tokenizer": processor.tokenizer.backend_tokenizer.to_str(),
            "image_processor": json.dumps(processor.image_processor.to_dict(), sort_keys=True, default=str),
            "chat_template": str(getattr(processor, "chat_template", None)),
        }
        return {
            "kind": "mllm",
            "class": type(self.model).__name__,
            "weights": self.weight_hash or hash_weights(self.model, torch.bfloat16),
            **{name: sha256(text.encode()).hexdigest() for name, text in parts.items()},
            "layer": self.layer_index,
            "layout": LAYOUT_VERSION,
            "max_tokens": self.config.max_tokens,
            "picture_side_px": PICTURE_SIDE_PX,
            "split_pictures": SPLIT_PICTURES,
            "bad_pictures": "refuse",
            "max_picture_px": MAX_PICTURE_PX,
        }

    @property
    def arithmetic(self) -> dict[str, Any]:
        weights = hash_weights(self.model)
        return {"weights": weights, "dtype": str(self.dtype), "device": self.device.type}

    def encode_each(self, prompts: Sequence[Prompt]) -> list[EncodedPrompt]:
        ready = [self.process(prompt) for prompt in prompts]
        out: list[EncodedPrompt | None] = [None] * len(ready)
        for rows in batches_of(ready, self.config.batch_size):
            states = self._states([ready[row] for row in rows])
            for row, state in zip(rows, states, strict=True):
                one = ready[row]
                out[row] = EncodedPrompt(state[one.kept].cpu(), one.role, one.segment)
        return [encoded for encoded in out if encoded is not None]

    def process(self, prompt: Prompt) -> Processed:
        """Clean, cut to `max_tokens`, lay out and tokenise one prompt."""
        decoded: Pictures = {}
        decode_all(prompt, decoded)
        made: dict[Prompt, Processed] = {}

        def count(candidate: Prompt) -> int:
            made.clear()
            made[candidate] = self._process(candidate, decoded)
            return made[candidate].length if drop_empty(candidate) else 0

        prompt = fit(prompt, self.config.max_tokens, count)
        return made[prompt] if prompt in made else self._process(prompt, decoded)

    def _process(self, prompt: Prompt, decoded: Pictures) -> Processed:
        if not drop_empty(prompt):
            nothing = torch.zeros(0, dtype=torch.long)
            return Processed({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, nothing, nothing, nothing)
        layout = self.template.render(prompt)
        batch = self._run_processor(layout, decoded)
        offsets = [(int(start), int(end)) for start, end in batch.pop("offset_mapping")[0]]
        replaced = batch.pop("text_replacement_offsets", None) or [[]]
        owner = owners(offsets, layout, replaced[0])
        kept = [(n, layout.spans[o]) for n, o in enumerate(owner) if o is not None]
        return Processed(
            inputs={name: value for name, value in batch.items() if isinstance(value, Tensor)},
            kept=torch.tensor([n for n, _ in kept], dtype=torch.long),
            role=torch.tensor([role_number(span.role) for _, span in kept], dtype=torch.long),
            segment=torch.tensor([span.place for _, span in kept], dtype=torch.long),
        )

    def _run_processor(self, layout: Layout, decoded: Pictures) -> dict[str, Any]:
        bos = self.processor.tokenizer.bos_token
        images = [_shrunk(decoded[data], PICTURE_SIDE_PX) for data in layout.pictures]
        options = {"do_image_splitting": SPLIT_PICTURES} if images and self._can_split else {}
        batch = self.processor(
            text=[layout.text],
            images=images or None,
            add_special_tokens=not (bos and layout.text.startswith(bos)),
            return_offsets_mapping=True,
            return_text_replacement_offsets=True,
            return_tensors="pt",
            **options,
        )
        if images and not batch.get("text_replacement_offsets"):
            raise ConfigError(
                f"{type(self.processor).__name__} does not say where its pictures went",
                cure="use a model family with the common processor, such as SmolVLM, Qwen-VL or LLaVA",
            )
        return dict(batch)

    @torch.inference_mode()
    def _states(self, batch: list[Processed]) -> list[Tensor]:
        """States `l e` of the chosen layer for each prompt of a batch, template tokens included."""
        if batch[0].length == 0:
            return [torch.zeros(0, self.dim, dtype=self.dtype) for _ in batch]
        inputs = {
            name: value.to(self.device, self.dtype if value.is_floating_point() else None)
            for name, value in collate(batch, self.processor.tokenizer.pad_token_id or 0).items()
            if name in self._accepted or "kwargs" in self._accepted
        }
        out = self.backbone(**inputs, output_hidden_states=True, use_cache=False)
        is_last = self.layer_index == _num_layers(self.model)
        states = out.last_hidden_state if is_last else out.hidden_states[self.layer_index]
        return [state[: one.length] for state, one in zip(states, batch, strict=True)]


def collate(batch: list[Processed], pad_id: int) -> dict[str, Tensor]:
    """Processor outputs of single prompts -> one batch, as the processor itself would make it.

    Token tensors are right padded. Picture tensors are concatenated along the first dimension, which is
    pictures (LLaVA), patches (Qwen-VL) or prompts (SmolVLM); other dimensions are zero padded.
    """
    longest = max(one.length for one in batch)
    out = {}
    for name in batch[0].inputs:
        values = [one.inputs[name] for one in batch]
        if values[0].shape[:2] == (1, batch[0].length):
            fill = pad_id if name == "input_ids" else 0
            values = [torch.nn.functional.pad(v, (0, longest - v.shape[1]), value=fill) for v in values]
        else:
            values = _pad_alike(values)
        out[name] = torch.cat(values)
    return out


def _pad_alike(values: list[Tensor]) -> list[Tensor]:
    """Zero pad all dimensions but the first to the largest."""
    shape = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    padded = []
    for value in values:
        missing = [have - got for have, got in zip(shape, value.shape[1:], strict=True)]
        sides = [side for gap in reversed(missing) for side in (0, gap)]
        padded.append(torch.nn.functional.pad(value, sides))
    return padded


def batches_of(ready: list[Processed], size: int) -> list[list[int]]:
    """Rows in batches of like length; prompts with and without pictures apart, empty ones too."""
    order = sorted(range(len(ready)), key=lambda n: (ready[n].has_pictures, ready[n].length, n))
    batches: list[list[int]] = []
    for row in order:
        kind = (ready[row].has_pictures, ready[row].length > 0)
        last = batches[-1] if batches else None
        if last and len(last) < size and kind == (ready[last[0]].has_pictures, ready[last[0]].length > 0):
            last.append(row)
        else:
            batches.append([row])
    return batches


def _shrunk(image: Image.Image, side_px: int) -> Image.Image:
    """A picture whose longest side is at most `side_px`."""
    if max(image.size) <= side_px:
        return image
    scale = side_px / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BICUBIC)


def load_mllm_encoder(config: PromptEncoderConfig, device: str | torch.device = "cpu") -> MllmPromptEncoder:
    """Load model and processor from a folder or the hub.

    Raises:
        ConfigError: no such model, not an image-text-to-text model, or a hub that can't be reached.
    """
    place = Path(config.model).expanduser()
    folder = place
    if not place.is_dir():
        folder = Path(hub_file(config.model, [CONFIG_FILE], wanted=config.model, cure=CURE)).parent
    name = str(place) if place.is_dir() else config.model
    device = torch.device(device)
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import logging

    logging.disable_progress_bar()
    legal = "a transformers model of the SmolVLM, Qwen-VL or LLaVA kind, with its processor"
    with or_refused(f"can't load {config.model!r} as an image-text-to-text model", legal=legal, cure=CURE):
        model = AutoModelForImageTextToText.from_pretrained(
            name, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32
        )
        processor = AutoProcessor.from_pretrained(name)
        weight_hash = hash_stored_weights(folder)
    return MllmPromptEncoder(config, model, processor, device, weight_hash)


def check_mllm(config: PromptEncoderConfig, *, reach: bool = True) -> None:
    """Refuse a model that is neither a folder nor fetched before, where no hub answers.

    Raises:
        ConfigError: as `load_mllm_encoder`.
    """
    if reach and not Path(config.model).expanduser().is_dir():
        require_hub_file(config.model, [CONFIG_FILE], wanted=config.model, cure=CURE)


def _num_layers(model: Any) -> int:
    return int(model.config.get_text_config().num_hidden_layers)


def _layer_index(layer: str | int, num_layers: int) -> int:
    """Index in transformers' `hidden_states`: 0 = embeddings, n = after layer n; n = last is normed."""
    index = {"last": num_layers, "penultimate": num_layers - 1}.get(str(layer), layer)
    index = int(index)
    found = index if index >= 0 else num_layers + 1 + index
    if not 0 <= found <= num_layers:
        raise ConfigError(f"layer = {layer}", legal=f"last, penultimate, or {-num_layers - 1} to {num_layers}")
    return found

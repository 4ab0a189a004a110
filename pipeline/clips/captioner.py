"""Asks an image-text-to-text model of transformers about pictures: frames and a question in, words out."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from infra.errors import ConfigError
from infra.pretrained import load_pretrained, read_model_type
from pipeline.schema import MAX_CAPTION_CHARS


def check_captioner(place: str, *, field: str) -> None:
    """Refuse what is no image-text-to-text model, without loading it.

    Raises:
        ConfigError: not there, or of another kind.
    """
    family = read_model_type(place, "captioner", field=field)
    if family not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise ConfigError(
            f"{field} = {place} is a {family}",
            legal="an image-text-to-text model of transformers, such as SmolVLM, Qwen-VL or LLaVA",
        )


class Captioner:
    """A frozen model with its processor; answers greedily, so the same pictures have the same words."""

    def __init__(self, place: str, device: str = "cpu", *, field: str = "model") -> None:
        check_captioner(place, field=field)
        self.device = torch.device(device)
        self.processor, model = load_pretrained(
            place, "captioner", processor=AutoProcessor, model=AutoModelForImageTextToText, device="cpu"
        )
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.model: Any = model.to(self.device, self.dtype)
        self.processor.tokenizer.padding_side = "left"  # answers follow the prompt
        if self.processor.tokenizer.pad_token is None:
            self.processor.tokenizer.pad_token = self.processor.tokenizer.eos_token
        if not getattr(self.processor, "chat_template", None):
            raise ConfigError(f"{field} = {place} has no chat template", legal="a model that can be asked")

    def answer(
        self, pictures: Sequence[Sequence[np.ndarray]], questions: Sequence[str], *, max_tokens: int
    ) -> list[str]:
        """An answer to each question about its pictures (uint8 `h w 3`); "" = the model says nothing."""
        if not questions:
            return []
        inputs = self._inputs(pictures, questions)
        with torch.inference_mode():
            made = self.model.generate(
                **inputs,
                max_new_tokens=max_tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=self.processor.tokenizer.pad_token_id,
            )
        answers = made[:, inputs["input_ids"].shape[1] :]
        return [clean(text) for text in self.processor.batch_decode(answers, skip_special_tokens=True)]

    def _inputs(self, pictures: Sequence[Sequence[np.ndarray]], questions: Sequence[str]) -> dict[str, Any]:
        images = [[Image.fromarray(picture) for picture in some] for some in pictures]
        texts = [
            self.processor.apply_chat_template(conversation(len(some), question), add_generation_prompt=True)
            for some, question in zip(images, questions, strict=True)
        ]
        bos = self.processor.tokenizer.bos_token
        # Idefics3 and SmolVLM would cut each frame into tiles besides the whole: up to 17 times the tokens.
        can_split = hasattr(self.processor.image_processor, "do_image_splitting")
        batch = self.processor(
            text=texts,
            images=images,
            padding=True,
            return_tensors="pt",
            add_special_tokens=not (bos and texts[0].startswith(bos)),
            **({"do_image_splitting": False} if can_split else {}),
        )
        return {
            name: value.to(self.device, self.dtype if value.is_floating_point() else None)
            for name, value in batch.items()
            if isinstance(value, torch.Tensor)
        }


def conversation(num_pictures: int, question: str) -> list[dict[str, Any]]:
    """One turn: the pictures, then the question."""
    content: list[dict[str, str]] = [{"type": "image"}] * num_pictures
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


def clean(text: str) -> str:
    """One line of printable characters, no longer than a caption may be."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line[:MAX_CAPTION_CHARS].strip()

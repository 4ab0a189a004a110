"""A pretrained transformer of diffusers as the generator: text, clean frames, adapters, one protocol.

    tokens of the prompt encoder --projection--> text states --+
    noisy latents, first frame, references, times -------------+--> frozen transformer + LoRA --> velocity

References and the first frame of the video are latent frames of their own with time 0: references behind the
last frame, the first frame in its place. So a first frame is reproduced, where one that goes through an encoder
alone is only resembled.
"""

import importlib
import json
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from model.backbones.base import BackboneConfig
from model.backbones.families import FAMILIES
from model.backbones.family import Family, Scale
from model.backbones.pretrained_inputs import OwnText, ReferenceMarks, TextStates
from model.condition import Condition, ConditionConfig
from model.generator import Generator, SmallVideo

ADAPTER = "default"
"""Name of the LoRA in peft."""


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters of the layers whose names end in `targets`; their answer counts alpha / rank."""

    rank: int
    alpha: float
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Pretrained(BackboneConfig):
    """A transformer in diffusers' format.

    Attributes:
        model: folder or hub id of its pipeline.
        family: name of its class.
        architecture: its config.json, as text.
        text: who says what the text states are: our tokens (replace), the model's own encoder (native), or
            both (append).
        lora: adapters on a frozen base; None trains all of it.
        half_base: a frozen base is kept in bfloat16.
        scale: what a latent stands for.
        first_frame: number of the role whose picture is the video's first frame.
        one_by_one: videos that may have references go alone, so that sharded ranks call the model as often.
    """

    model: str = ""
    family: str = ""
    architecture: str = "{}"
    text: Literal["replace", "append", "native"] = "append"
    lora: Lora | None = None
    half_base: bool = False
    scale: Scale = field(default_factory=Scale)
    first_frame: int = -1
    one_by_one: bool = False

    @property
    def kind(self) -> Family:
        return FAMILIES[self.family]

    def own_generator(self, condition: ConditionConfig) -> "PretrainedGenerator":
        return PretrainedGenerator(self, condition)

    def build(self) -> Any:
        """The transformer with its adapters; on the meta device its shapes alone."""
        base = self._base()
        if self.lora is None:
            base.requires_grad_(True).float()
        else:
            base.requires_grad_(False)
            add_adapters(base, self.lora)
        if self.checkpoint:
            base.enable_gradient_checkpointing()
        return base

    def _base(self) -> Any:
        """The transformer as it is in its folder.

        Raises:
            ValueError: the folder lacks some of its weights.
        """
        cls = getattr(importlib.import_module("diffusers"), self.family)
        if torch.get_default_device().type == "meta":
            return cls.from_config(json.loads(self.architecture))  # in float32: types don't count there
        dtype = torch.bfloat16 if self.half_base else torch.float32
        with torch.random.fork_rng(devices=[]):  # what is drawn beside it doesn't hang on how it is loaded
            base, found = cls.from_pretrained(
                self.model, subfolder="transformer", torch_dtype=dtype, output_loading_info=True
            )
        if found["missing_keys"]:  # diffusers draws them at random, and warns
            raise ValueError(f"{self.model} holds no weights of {sorted(found['missing_keys'])[0]}")
        return base

    def tokens(self) -> dict[str, int]:
        """Tokens of the video, and of its text."""
        t, h, w = self.kind.sizes(json.loads(self.architecture)).patch
        video = (self.num_frames // t) * (self.height_px // h) * (self.width_px // w)
        return {"video": video, "text": self.kind.text_tokens}


def add_adapters(base: Any, lora: Lora) -> None:
    """Put a LoRA on a transformer, in float32 whatever the base is kept in; its answer is 0 at first.

    Raises:
        ValueError: no layer of such a name.
    """
    peft = importlib.import_module("peft")
    config = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets), init_lora_weights=True
    )
    base.add_adapter(config, ADAPTER)
    for p in base.parameters():
        if p.requires_grad:
            p.data = p.data.float()


def _text_states(backbone: Pretrained, condition: ConditionConfig) -> OwnText | TextStates:
    length, gated = backbone.kind.text_tokens, backbone.text == "append"
    if backbone.text == "native":
        return OwnText(length)
    return TextStates(condition, length=length, dim=backbone.condition_dim, gated=gated)


class PretrainedGenerator(Generator):
    """A `Generator` whose backbone is a transformer of diffusers; its answer is a velocity."""

    backbone_config: Pretrained

    def __init__(self, backbone: Pretrained, condition: ConditionConfig) -> None:
        nn.Module.__init__(self)
        self.backbone_config, self.condition_config, self.level = backbone, condition, None
        self.embedder = _text_states(backbone, condition)  # pyright: ignore
        plus = condition.mode == "plus"
        self.marks = ReferenceMarks(condition, backbone.in_channels) if plus else None
        self.backbone = backbone.build()

    @property
    def blocks(self) -> nn.ModuleList:
        return getattr(self.backbone, self.backbone_config.kind.blocks)

    @property
    def z_shape(self) -> tuple[int, int]:
        return 0, 0

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        condition: Condition,
        z_prev: Tensor | None = None,
        *,
        small: SmallVideo | None = None,
        keys: Tensor | None = None,
        latents_only: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """As `Generator.forward`; `condition.references` are latents of the size of `x`.

        Of videos that may have references those with as many go together: attention here knows no mask, so that
        a video with fewer of them than its neighbour would see what pads them.
        """
        text, mask = self.embedder(condition)
        if self.marks is None:
            answer = self._velocity(x, sigma, text, mask, condition.fps)
        else:
            condition = replace(condition, references=self.marks(condition))
            answer = self._with_frames(x, sigma, text, mask, condition) + self.marks.nothing()
        return answer, x.new_zeros(len(x), 0, 0)

    def _velocity(self, x: Tensor, times: Tensor, text: Tensor, mask: Tensor, fps: Tensor) -> Tensor:
        family, scale = self.backbone_config.kind, self.backbone_config.scale
        return family.velocity(self.backbone, x, times, text, mask, fps=fps, scale=scale)

    def _with_frames(
        self, x: Tensor, sigma: Tensor, text: Tensor, mask: Tensor, condition: Condition
    ) -> Tensor:
        """Answers for videos with clean frames, those of one shape together."""
        given = [self._has_first_frame(x, condition, row) for row in range(len(x))]
        seen = [self._references(x, condition, row, given[row]) for row in range(len(x))]
        groups: dict[tuple[bool, int, int], list[int]] = {}
        for row in range(len(x)):
            alone = row if self.backbone_config.one_by_one else 0
            groups.setdefault((given[row], len(seen[row]), alone), []).append(row)
        answers = []
        for (is_given, _, _), rows in groups.items():
            references = torch.stack([seen[row] for row in rows]).to(x.dtype)
            some = (x[rows], sigma[rows], references, text[rows], mask[rows], condition.fps[rows])
            answers.append(self._of_one_shape(*some, is_given=is_given))
        order = torch.tensor([row for rows in groups.values() for row in rows], device=x.device)
        return torch.cat(answers)[order.argsort()]

    def _of_one_shape(
        self,
        x: Tensor,
        sigma: Tensor,
        references: Tensor,
        text: Tensor,
        mask: Tensor,
        fps: Tensor,
        *,
        is_given: bool,
    ) -> Tensor:
        """Times are 0 for the `b n c h w` references, and for the first frame where it is given."""
        count = references.shape[1]
        if not is_given and not count:
            return self._velocity(x, sigma, text, mask, fps)
        times = torch.cat([sigma[:, None].expand(-1, x.shape[1]), sigma.new_zeros(len(x), count)], dim=1)
        if is_given:
            times[:, 0] = 0
        video = torch.cat([x, references], dim=1)
        return self._velocity(video, times, text, mask, fps)[:, : x.shape[1]]

    def _has_first_frame(self, x: Tensor, condition: Condition, row: int) -> bool:
        given = condition.has_first_frame
        return given is not None and x.shape[1] > 1 and bool(given[row])

    def _references(self, x: Tensor, condition: Condition, row: int, is_given: bool) -> Tensor:
        """`n c h w` latents of a row's references, without the first frame where that stands in the video."""
        frames, present, role = condition.references, condition.reference_mask, condition.reference_role
        if frames is None or present is None or role is None:
            return x.new_zeros(0, *x.shape[2:])
        if frames.is_meta or isinstance(frames, FakeTensor):  # counting: all are there
            return frames[row]
        kept = present[row] & ~((role[row] == self.backbone_config.first_frame) & is_given)
        return frames[row][kept]

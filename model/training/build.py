"""What a run is made of, from its config: the network, the prompts' way into it, the order of samples."""

import pyarrow as pa
import torch
from torch import Tensor

from model.condition import Condition, ConditionConfig, Prompt
from model.data.plan import Plan
from model.generator import Generator, preset
from model.prompt import PromptEncoder, reference_tensors, select
from model.step import draw_dropped, draw_num_documents
from model.training.stages import StageConfig


def make_generator(config: StageConfig, token_dim: int) -> Generator:
    """The network of this config, freshly drawn from its seed: the same on every rank."""
    torch.manual_seed(config.seed)
    backbone = preset(
        config.preset,
        num_frames=config.num_frames,
        height_px=config.height_px,
        width_px=config.width_px,
        checkpoint=config.parallel.recompute,
        **config.backbone,
    )
    return Generator(backbone, ConditionConfig(token_dim=token_dim, mode=config.references))


class Conditioner:
    """Prompts of a batch -> the generator's condition, by the frozen encoder."""

    def __init__(self, config: StageConfig, encoder: PromptEncoder, device: torch.device) -> None:
        self.config, self.encoder, self.device = config, encoder, device

    def __call__(self, prompts: list[Prompt], fps: Tensor, original_size_px: Tensor) -> Condition:
        references = None
        if self.config.references == "plus":
            size = (self.config.height_px // 8 * 8, self.config.width_px // 8 * 8)
            references = reference_tensors(prompts, size_px=size)
        with torch.no_grad():
            condition = self.encoder.condition(
                prompts, fps=fps, original_size_px=original_size_px, references=references
            )
        return condition.to(self.device)

    def choose(self, prompt: Prompt, position: int) -> Prompt:
        """K documents and condition dropout, drawn for the sample at this position."""
        seed = self.config.seed
        number = draw_num_documents(self.config.documents, seed=seed, index=position)
        return select(prompt, number, draw_dropped(self.config.dropout, seed=seed, index=position))


def make_plan(config: StageConfig, index: pa.Table, num_groups: int) -> Plan:
    """The order of samples of this run."""
    return Plan(
        index,
        num_groups,
        seed=config.seed,
        micro_batch=config.micro_batch,
        order=config.order,
        bucket_weights={n: b.weight for n, b in enumerate(config.buckets)},
        task_weights=config.task_weights,
    )

"""One rank's training, without Ray: open (fresh, finetuned or resumed), step, save.

`model/training/train.py` reads it aloud under Ray Train; the benchmarks run the same class under plain
torch.distributed.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from model.condition import Condition
from model.data.batch import Batch
from model.data.loader import Loader, RowGroups
from model.data.shards import open_shards
from model.ema import Ema
from model.encodings.store import open_encoder, open_encodings
from model.generator import Generator
from model.step import accumulate
from model.training.build import Conditioner, make_generator, make_plan
from model.training.checkpoint import CheckpointWriter, latest_checkpoint
from model.training.finite import blame
from model.training.parallel import Replica, make_deterministic, pick_device
from model.training.rehearse import heaviest
from model.training.restore import restore
from model.training.stages import StageConfig
from model.training.state import (
    hash_tensors,
    make_emas,
    make_optimizer,
    set_learning_rate,
    state_of,
    weights_of,
)
from model.training.stopwatch import Stopwatch
from model.training.targets import Targets
from model.training.upsampler import start_from_base
from model.training.validate import Observed


@dataclass(frozen=True)
class Outcome:
    """What a step came to; `loss` is a tensor, so that nothing waits for it, and its mean over the ranks is
    the mean over the step's samples, however they are shared out.
    """

    loss: Tensor
    grad_norm: float
    lr: float


class Training:
    """A run on one rank. Attributes are its state; `position` counts samples of all ranks."""

    def __init__(
        self, config: StageConfig, index: pa.Table, *, held: Callable[[], Collection[int]] = tuple
    ) -> None:
        """`held`: positions of checkpoints that may not be deleted yet."""
        self.config, self.device = config, pick_device()
        if config.parallel.deterministic:
            make_deterministic(self.device)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.encodings = open_encodings(config.encodings)
        self.encoder = open_encoder(config.encoder, self.encodings, self.device)
        self.condition = Conditioner(config, self.encoder, self.device)
        self.targets = Targets(config, self.device, self.encodings)
        self.replica = Replica(self._generator(), config.parallel, self.device)
        self.optimizer: Optimizer = make_optimizer(self.model, config)
        self.emas: dict[str, Ema] = make_emas(self.model, config)
        self.writer = CheckpointWriter(
            config.out,
            num_to_keep=config.checkpoint.num_to_keep,
            in_background=config.checkpoint.in_background,
            held=held,
        )
        self.watch = Stopwatch(self.device)
        self.prompt_tokens = 0
        self.seen: Counter[tuple[int, int, int]] = Counter()
        """Samples of each shape (t, h, w) since the last record: what their cost is reckoned from."""
        self.position = restore(self)
        self.loader = self._loader(index)
        self.batches: Iterator[Batch] = iter(self.loader)

    @property
    def model(self) -> Generator:
        return self.replica.model

    @property
    def observed(self) -> Observed:
        """The live model, for validation and previews in the loop."""
        return Observed(
            self.config,
            self.model,
            self.encoder,
            self.targets,
            self.loader.row_groups,
            self.replica.autocast_dtype,
            self.device,
            self.rank,
            self.world_size,
        )

    def _generator(self) -> Generator:
        """The network, freshly drawn; a new upsampler starts with its base model's weights."""
        generator = make_generator(self.config, self.encoder.dim, self.targets.space)
        if self.config.upsampler is not None and latest_checkpoint(self.config.out) is None:
            start_from_base(generator, self.config.upsampler)
        return generator

    def _loader(self, index: pa.Table) -> Loader:
        config, shards = self.config, open_shards(self.config.prompts)
        held_out = config.validation.held_out_frac
        return Loader(
            make_plan(config, index, len(shards.groups)),
            RowGroups(
                shards,
                config.shapes,
                held_out_frac=held_out,
                encodings=self.encodings,
            ),
            select=self.condition.choose,
            rank=self.rank,
            world_size=self.world_size,
            position=self.position,
            num_threads=config.loader_threads,
            pin_memory=self.device.type == "cuda",
        )

    def step(self) -> Outcome:
        """One optimizer step: micro-batches, gradients over all ranks, update, averages."""
        rate = set_learning_rate(self.optimizer, self.config, self.position)
        each: list[Tensor] = []
        positions: list[int] = []
        for number in range(self.config.accumulation):
            with self.watch.part("data"):
                batch = next(self.batches)
            with self.watch.part("encode"):
                condition = self.condition(batch.prompts, batch.fps, batch.original_size_px, batch.encoded)
                self.prompt_tokens = condition.tokens.shape[1]
            with self.replica.accumulating(last=number == self.config.accumulation - 1):
                each.append(self._accumulate(batch, condition))
            positions += batch.positions
        with self.watch.part("checkpoint"):
            self.writer.settle()  # the copy of a checkpoint ran beside the passes; now the weights move
        with self.watch.part("optimizer"):
            norm = self.replica.clip(self.config.optim.clip_norm)
            values = torch.cat(each)
            if not math.isfinite(norm):  # on all ranks alike, so that all of them stop
                raise blame(self.loader, norm, values, positions, at=self.position)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.position += self.config.batch_size
            for ema in self.emas.values():
                ema.update(self.model, self.position)
        self.watch.num_steps += 1
        return Outcome(values.sum() * (self.world_size / self.config.batch_size), norm, rate)

    def _accumulate(self, batch: Batch, condition: Condition) -> Tensor:
        """Losses of a micro-batch; its gradients are added to the model's."""
        with self.watch.part("encode"):
            x = self.targets(batch)
        self.seen[x.shape[1], x.shape[3], x.shape[4]] += self.config.micro_batch
        return accumulate(
            self.replica.forward,
            self.targets.edm(x),
            x,
            condition,
            self.targets.draw(x, batch.positions),
            divisor=self.config.batch_size / self.world_size,  # ranks' gradients are averaged
            dtype=self.replica.autocast_dtype,
            small_size=self.targets.small_size,
            timed=self.watch.part,
        )

    def rehearse(self) -> int:
        """Try the largest bucket with the longest prompts, and make room for checkpoints, so that memory runs
        out now or never.

        Returns:
            Peak memory of the device, bytes; 0 on a CPU. Nothing of the run's state is changed.
        """
        batch, condition = heaviest(
            self.config,
            -(-self.config.micro_batch // self.world_size),
            encoder=self.encoder,
            targets=self.targets,
            condition=self.condition,
            stored=self.loader.row_groups.has_latents,
        )
        with self.replica.accumulating(last=True):
            self._accumulate(batch, condition.to(self.device))
        self.optimizer.zero_grad(set_to_none=True)
        self.writer.staging.prepare(state_of(self.model, self.optimizer, self.emas))
        self.watch.take()
        self.seen.clear()
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0

    def save(self, record: dict[str, Any]) -> None:
        """Checkpoint this moment; writing goes on in the background."""
        facts = {
            "position": self.position,
            "stage": self.config.stage,
            "config": self.config.model_dump(mode="json"),
            "encoder": self.encoder.identity_hash,
            "token_dim": self.encoder.dim,
            "space": vars(self.targets.space),
            "emas": {name: vars(ema.profile) for name, ema in self.emas.items()},
            "torch": torch.__version__,
            "world_size": self.world_size,
            "metrics": record,
        }
        with self.watch.part("checkpoint"):
            self.writer.save(state_of(self.model, self.optimizer, self.emas), facts)

    def agree(self, told: bool) -> bool:
        """Whether any rank was told; all ranks ask alike."""
        if self.world_size == 1:
            return told
        flag = torch.tensor(float(told), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def weights_sha256(self) -> str:
        return hash_tensors(weights_of(self.model))

    def close(self) -> None:
        self.loader.close()
        self.writer.close()

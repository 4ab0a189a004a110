"""One rank's training, without Ray: open (fresh, finetuned or resumed), step, save.

`model/training/driver.py` reads it aloud under Ray Train; the benchmarks run the same class under plain
torch.distributed.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor

from infra.allocator import keep_freed_memory
from infra.errors import TrainingError
from infra.run_folder import RunFolder
from model.backbones.folder import base_sha256
from model.condition import Condition
from model.cost import NO_REFERENCES, References
from model.data.batch import Batch
from model.data.loader import Loader, RowGroups
from model.data.shards import open_shards
from model.ema import Ema
from model.encodings.store import open_encoder, open_encodings
from model.generator import Generator
from model.optim import make_optimizer, set_learning_rate
from model.step import accumulate
from model.training.build import Conditioner, Targets, heaviest_batch, make_generator, make_plan
from model.training.checkpoint import CheckpointWriter, find_checkpoint, load_state
from model.training.config import Stage2Config, StageConfig
from model.training.metrics import Stopwatch
from model.training.parallel import Replica, make_deterministic, pick_device
from model.training.state import facts_for, from_average, hash_tensors, start_from_base, state_of, weights_of

CLIP_NORM = 1.0
"""Largest norm of the gradient; Snap Video clips and doesn't print its value, so this is ours."""
MOST_NAMES = 8
"""Samples that a non-finite loss is blamed on, at most, in its message."""


class NonFiniteError(TrainingError):
    """A non-finite gradient: known on all ranks at the same step, and the same on every further try."""


@dataclass(frozen=True)
class StepResult:
    """What a step came to; `loss` is a tensor, so that nothing waits for it, and its mean over the ranks is
    the mean over the step's samples, however they are shared out.
    """

    loss: Tensor
    grad_norm: float
    lr: float


class Training:
    """A run on one rank.

    Attributes:
        position: samples that all ranks have seen.
        base: hash of the pretrained model's weights; None without one.
        saved_at: the position of the last checkpoint that was begun.
        seen: samples of each shape (t, h, w) since the last record: what their cost is reckoned from.
        prompt_tokens: length of the last batch's prompts.
        references: (n, h, w) of the pictures that the generator saw itself in the last batch.
    """

    def __init__(self, config: StageConfig, index: pa.Table) -> None:
        self.config, self.run, self.device = config, RunFolder(config.out), pick_device()
        make_deterministic(self.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.base = None if config.pretrained is None else base_sha256(config.pretrained.model)
        encodings = open_encodings(config.encodings)
        self.encoder = open_encoder(config.encoder, encodings, self.device)
        self.targets = Targets(config, self.device, encodings)
        self.condition = Conditioner(
            config, self.encoder, self.device, self.targets.space, lambda: self.targets.latents
        )
        how = config.parallel
        self.replica = Replica(
            self._generator(),
            self.device,
            mode=how.mode,
            dtype=how.dtype,
            compiled=how.compile,
        )
        optim = config.optim
        self.optimizer = make_optimizer(optim.name, self.model, lr=optim.lr, weight_decay=optim.weight_decay)
        self.writer = CheckpointWriter(self.run, num_to_keep=config.checkpoint.num_to_keep)
        self.watch = Stopwatch(self.device)
        self.prompt_tokens, self.references = 0, NO_REFERENCES
        self.seen: Counter[tuple[int, int, int]] = Counter()
        self.usual: dict[str, Any] | None = None
        self.position = self.saved_at = self._restore()
        shards = open_shards(config.prompts)
        row_groups = RowGroups(
            shards,
            config.shapes,
            held_out_frac=config.validation.held_out_frac,
            encodings=encodings,
        )
        self.loader = Loader(
            make_plan(config, index, len(shards.groups)),
            row_groups,
            select=self.condition.choose,
            references=lambda prompt, stored: self.condition.references(prompt, stored=stored),
            rank=self.rank,
            world_size=self.world_size,
            position=self.position,
            num_threads=config.loader_threads,
            pin_memory=self.device.type == "cuda",
        )
        self.batches: Iterator[Batch] = iter(self.loader)

    @property
    def model(self) -> Generator:
        return self.replica.model

    def _generator(self) -> Generator:
        """The network, freshly drawn; a new upsampler starts with its base model's weights."""
        config = self.config
        generator = make_generator(config, self.encoder.dim, self.targets.space)
        base = config.upsampler.start_from if config.upsampler else None
        if base is not None and self.run.latest_checkpoint() is None:
            start_from_base(generator, config, base)
        return generator

    def _restore(self) -> int:
        """Continue from the run's last checkpoint, or start stage 2 from stage 1's; the position."""
        self.writer.clean()
        if dist.is_initialized():
            dist.barrier()
        config, found = self.config, self.run.latest_checkpoint()
        if found is None and isinstance(config, Stage2Config):
            start = find_checkpoint(config.start_from)
            facts_for(start, self.encoder.identity_hash, self.targets.space, base=self.base)
            load_state(start, from_average(self.model, config.start_ema))
        self.emas = {name: Ema(self.model, profile) for name, profile in config.ema_profiles.items()}
        if found is None:
            return 0
        facts = facts_for(found, self.encoder.identity_hash, self.targets.space, base=self.base)
        state = state_of(self.model, self.optimizer, self.emas)
        load_state(found, state)
        torch.set_rng_state(state["rng"])
        for ema in self.emas.values():
            ema.samples = facts["position"]
        self.usual = facts.get("usual")
        return facts["position"]

    def step(self) -> StepResult:
        """One optimizer step: micro-batches, gradients over all ranks, update, averages."""
        config = self.config
        rate = set_learning_rate(
            self.optimizer,
            config.optim.lr,
            step=self.position // config.batch_size,
            num_steps=config.num_steps,
            warmup_steps=min(config.optim.warmup_samples, config.total_samples // 10) // config.batch_size,
        )
        each: list[Tensor] = []
        positions: list[int] = []
        for number in range(config.accumulation):
            with self.watch.part("data"):
                batch = next(self.batches)
            self.usual = batch.usual or self.usual
            with self.watch.part("encode"):
                condition = self.condition(
                    batch.prompts, batch.fps, batch.original_size_px, batch.encoded, batch.references
                )
                self.prompt_tokens = condition.tokens.shape[1]
                self.references = shape_of_references(condition)
            with self.replica.accumulating(last=number == config.accumulation - 1):
                each.append(self.accumulate(batch, condition))
            positions += batch.positions
        with self.watch.part("checkpoint"):
            self.writer.settle()  # the copy of a checkpoint ran beside the passes; now the weights move
        with self.watch.part("optimizer"):
            norm = self.replica.clip(CLIP_NORM)
            values = torch.cat(each)
            if not math.isfinite(norm):  # on all ranks alike, so that all of them stop
                raise blame(self.loader, norm, values, positions, at=self.position)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.position += config.batch_size
            for ema in self.emas.values():
                ema.update(self.model, self.position)
        self.watch.num_steps += 1
        return StepResult(values.sum() * (self.world_size / config.batch_size), norm, rate)

    def accumulate(self, batch: Batch, condition: Condition) -> Tensor:
        """Losses of a micro-batch; its gradients are added to the model's."""
        with self.watch.part("encode"):
            x = self.targets(batch)
        self.seen[x.shape[1], x.shape[3], x.shape[4]] += self.config.micro_batch
        return accumulate(
            self.replica.forward,
            self.targets.objective(x),
            x,
            condition,
            self.targets.draw(x, batch.positions),
            divisor=self.config.batch_size / self.world_size,  # ranks' gradients are averaged
            dtype=self.replica.dtype,
            small_size=self.targets.small_size,
            timed=self.watch.part,
        )

    def rehearse(self) -> int:
        """Try the heaviest micro-batch, and make room for checkpoints, so that memory runs out now or never.

        Returns:
            Peak memory of the device, bytes; 0 on a CPU. Nothing of the run's state is changed.
        """
        batch, condition = heaviest_batch(
            self.config,
            -(-self.config.micro_batch // self.world_size),
            encoder=self.encoder,
            space=self.targets.space,
            has_latents=self.loader.row_groups.has_latents,
        )
        with self.replica.accumulating(last=True):
            self.accumulate(batch, condition.to(self.device))
        self.optimizer.zero_grad(set_to_none=True)
        self.writer.staging.prepare(state_of(self.model, self.optimizer, self.emas))
        self.watch.take()
        self.seen.clear()
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0

    def save(self, record: dict[str, Any]) -> None:
        """Checkpoint this moment, with the latest record; writing goes on in the background."""
        facts = {
            "position": self.position,
            "stage": self.config.stage,
            "config": self.config.model_dump(mode="json"),
            "encoder": self.encoder.identity_hash,
            "token_dim": self.encoder.dim,
            "space": vars(self.targets.space),
            "base": self.base,
            "usual": self.usual,
            "emas": {name: vars(ema.profile) for name, ema in self.emas.items()},
            "torch": torch.__version__,
            "world_size": self.world_size,
            "metrics": record,
        }
        self.saved_at = self.position
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


def shape_of_references(condition: Condition) -> References:
    """(n, h, w) of what the generator sees itself."""
    shape = () if condition.references is None else condition.references.shape
    return (shape[1], shape[3], shape[4]) if shape and shape[1] else NO_REFERENCES


def blame(loader: Loader, norm: float, each: Tensor, positions: list[int], *, at: int) -> NonFiniteError:
    """The error of a step with a non-finite gradient, naming its samples; all ranks call this alike.

    `each` are the losses of this rank's samples, at `positions`; `at` so many were seen before this step.
    """
    found = [[p for p, ok in zip(positions, each.isfinite().tolist(), strict=True) if not ok]]
    if dist.is_initialized() and dist.get_world_size() > 1:
        mine, found = found[0], [[]] * dist.get_world_size()
        dist.all_gather_object(found, mine)
    places = sorted(p for part in found for p in part)[:MOST_NAMES]
    names = [loader.read(p).prompt_id for p in places]
    return NonFiniteError(
        f"step at {at:,} samples: gradient norm is {norm}; "
        f"samples with a non-finite loss: {', '.join(names) or 'none'}"
    )

"""One optimiser step: count the whole global batch, sum the losses, divide once."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import reduce
from torch import Tensor, nn

from llavakd.config import StageConfig
from llavakd.data.chat import Segment
from llavakd.data.collate import Batch
from llavakd.errors import UserError
from llavakd.losses import Counts, Objective, count, objective
from llavakd.models.alignment import Pair
from llavakd.models.student import VisionLanguageModel, final_hidden, vision_features


class NonFiniteError(UserError):
    """The gradient is not finite; names the step and its rows."""


class StudentModule(nn.Module):
    """The student and its loss in one forward, so that sharded and replicated wrappers see every use of a parameter."""

    def __init__(self, student: VisionLanguageModel, stage: StageConfig, vocab_size: int | None) -> None:
        super().__init__()
        self.model = student.model
        self.stage = stage
        self.vocab_size = vocab_size

    def forward(
        self, batch: Batch, features: Tensor | None, taught: Tensor | None, teacher_head: Tensor | None, counts: Counts
    ) -> Objective:
        """This micro-batch's share of the loss; `features` None with pictures: the tower learns and runs here."""
        visual = batch.segments == Segment.VISUAL
        if features is None and batch.pixel_values is not None:
            features = vision_features(self.model, batch.pixel_values)
        hidden = final_hidden(self.model, batch.input_ids, batch.attention_mask, visual, features)
        result = objective(
            hidden,
            self.model.lm_head.weight,
            taught,
            teacher_head,
            labels=batch.labels,
            visual=visual,
            image_rows=batch.image_rows,
            losses=self.stage.losses,
            reduction=self.stage.reduction,
            counts=counts,
            vocab_size=self.vocab_size,
        )
        if features is None:  # text-only micro-batch: picture parts get a gradient of zero, the same on every rank
            idle = [
                p
                for part in (self.model.model.multi_modal_projector, self.model.model.vision_tower)
                for p in part.parameters()
                if p.requires_grad
            ]
            result = result._replace(total=result.total + sum(0.0 * p.sum() for p in idle))
        return result


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """What a step works on; `module` and `optimizer` are prepared by `accelerator`."""

    accelerator: Accelerator
    module: nn.Module
    optimizer: torch.optim.Optimizer
    student: VisionLanguageModel
    teacher: VisionLanguageModel | None
    pair: Pair | None
    stage: StageConfig


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Of one step, already global: detached scalars, and numbers of live tokens, truncated and left-out rows."""

    loss: Tensor
    parts: dict[str, Tensor]
    grad_norm: Tensor
    counted: dict[str, int]


def train_step(state: TrainState, micro_batches: Sequence[Batch], *, step: int) -> StepResult:
    """Forward and backward over this rank's micro-batches, clip, update; NonFiniteError before anything is updated."""
    accelerator = state.accelerator
    counts, counted = _count(accelerator, micro_batches)
    outputs = []
    for index, batch in enumerate(micro_batches):
        last = index == len(micro_batches) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(state.module):
            result = _forward(state, batch.to(accelerator.device), counts)
            # Wrappers average gradients over processes; the division is already global, so undo it here, once.
            accelerator.backward(result.total * accelerator.num_processes)
        outputs.append({"loss": result.total.detach(), **result.parts})
    sums = {
        name: sum((output[name] for output in outputs), torch.zeros((), device=accelerator.device))
        for name in outputs[0]
    }
    sums = reduce(sums, "sum") if accelerator.num_processes > 1 else sums
    grad_norm = accelerator.clip_grad_norm_(state.module.parameters(), state.stage.max_grad_norm)
    if not torch.isfinite(grad_norm):
        rows = ", ".join(name for batch in micro_batches for name in batch.sample_ids[:4])
        raise NonFiniteError(
            f"stage {state.stage.name}, step {step}: gradient norm is {float(grad_norm)}, parts "
            f"{ {name: float(value) for name, value in sums.items()} }, rows {rows}, ...; lower learning_rate "
            "or use precision: fp32"
        )
    state.optimizer.step()
    state.optimizer.zero_grad()
    return StepResult(loss=sums.pop("loss"), parts=sums, grad_norm=grad_norm, counted=counted)


def _forward(state: TrainState, batch: Batch, counts: Counts) -> Objective:
    features = batch.features
    tower_learns = "vision_tower" in state.stage.train
    if features is None and batch.pixel_values is not None and not tower_learns:
        with torch.no_grad(), state.accelerator.autocast():
            features = vision_features(state.student.model, batch.pixel_values)
    taught = head = None
    if state.teacher is not None and state.pair is not None:
        head = state.teacher.head
        teacher_features = features
        if batch.pixel_values is not None and (tower_learns or not state.pair.shared_tower):
            pixels = batch.pixel_values if state.pair.shared_pixels else batch.teacher_pixel_values
            assert pixels is not None, "the teacher has another image processor, but the batch lacks its pixels"
            with torch.no_grad():
                teacher_features = vision_features(state.teacher.model, pixels.to(state.teacher.model.dtype))
        visual = batch.segments == Segment.VISUAL
        taught = final_hidden(state.teacher.model, batch.input_ids, batch.attention_mask, visual, teacher_features)
    return state.module(batch, features, taught, head, counts)


def _count(accelerator: Accelerator, micro_batches: Sequence[Batch]) -> tuple[Counts, dict[str, int]]:
    """Counts of the global batch, and those of StepResult, over all micro-batches and ranks."""
    local = [
        (
            *count(batch.labels, batch.segments == Segment.VISUAL, batch.image_rows),
            int(batch.attention_mask.sum()) - len(batch.mistakes),
            batch.truncated,
            len(batch.mistakes),
        )
        for batch in micro_batches
    ]
    totals = torch.tensor(local, device=accelerator.device).sum(0)
    if accelerator.num_processes > 1:
        totals = reduce(totals, "sum")
    samples, *counts, tokens, truncated, left_out = totals.tolist()
    return Counts(samples - left_out, *counts), {"tokens": tokens, "truncated": truncated, "left_out": left_out}

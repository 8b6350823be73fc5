"""One optimiser step: count the whole global batch, sum the losses, divide once, move at the rate of the step."""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llavakd.config import StageConfig
from llavakd.data.chat import Segment
from llavakd.data.collate import Batch
from llavakd.errors import UserError
from llavakd.losses.objective import Counts, Objective, count, objective
from llavakd.models.alignment import Pair
from llavakd.models.student import VisionLanguageModel, final_hidden, vision_features
from llavakd.train.zero import ZeroAdamW
from llavakd.transfer import sent


class NonFiniteError(UserError):
    """The gradient is not finite; names the step and its rows."""


class StudentModule(nn.Module):
    """The student and its loss in one forward, so that sharded and replicated wrappers see every use of a parameter."""

    def __init__(self, student: VisionLanguageModel, stage: StageConfig, vocab_size: int | None) -> None:
        super().__init__()
        self.model = student.model
        vision, self.sees = self.model.config.vision_config, "vision_tower" in stage.train
        features = student.features_per_image, vision.hidden_size
        self.picture = (3, vision.image_size, vision.image_size) if self.sees else features
        self.aims: dict[str, Any] = {"losses": stage.losses, "reduction": stage.reduction, "vocab_size": vocab_size}

    def forward(
        self, batch: Batch, features: Tensor | None, taught: Tensor | None, teacher_head: Tensor | None, counts: Counts
    ) -> Objective:
        """This micro-batch's share of the loss, given on the CPU; `features` None with pictures: the tower runs here."""
        visual = batch.segments == Segment.VISUAL
        if features is None:  # without a picture a blank one that no position takes: all processes run the same
            pixels, device = batch.pixel_values, self.model.lm_head.weight.device
            given = torch.zeros(1, *self.picture, device=device) if pixels is None else sent(pixels, device)
            features = vision_features(self.model, given) if self.sees else given
        hidden = final_hidden(self.model, batch.input_ids, batch.attention_mask, visual, features, batch.position_ids)
        what: dict[str, Any] = {"labels": batch.labels, "visual": batch.visual, "image_rows": batch.image_rows}
        what |= {"position_ids": batch.position_ids, "counts": counts, "taught": batch.taught}
        result = objective(hidden, self.model.lm_head.weight, taught, teacher_head, **what, **self.aims)
        # All of a tower that learns gets a gradient, of zero past the selected layer; what ZeRO-3 let go of is empty by now.
        tower = [weight for weight in self.model.model.vision_tower.parameters() if weight.requires_grad]
        return result._replace(total=result.total + sum(0.0 * weight.sum() for weight in tower if weight.numel()))


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
    stored: Any = None  # a TaughtStore in a teacher's place


class StepResult(NamedTuple):
    """Of one step, already global: detached scalars, numbers of live tokens, truncated and left-out rows; some row ids."""

    step: int
    loss: Tensor
    parts: dict[str, Tensor]
    grad_norm: Tensor
    counted: dict[str, int]
    rows: list[str]


def train_step(state: TrainState, micro_batches: Sequence[Batch], *, step: int) -> StepResult:
    """Forward and backward over this rank's micro-batches, which lie on the CPU, clip, update; no wait for the device."""
    accelerator, zero = state.accelerator, state.optimizer.engine if isinstance(state.optimizer, ZeroAdamW) else None
    counts, counted, passes = _count(accelerator, micro_batches)
    sums: dict[str, Any] = {}
    for number in range(1, passes + 1):  # as many on every process; those beyond its own micro-batches weigh nothing
        batch, share = micro_batches[min(number, len(micro_batches)) - 1], int(number <= len(micro_batches))
        with contextlib.nullcontext() if zero or number == passes else accelerator.no_sync(state.module):
            result = state.module(batch, *look(state, batch), counts)
            # Wrappers average gradients over processes; the division is already global, so undo it here, once.
            (zero or accelerator).backward(result.total * (share * accelerator.num_processes))
        for name, value in {"loss": result.total.detach(), **result.parts}.items():
            sums[name] = sums.get(name, 0) + value * share
    sums = accelerator.reduce(sums)
    grad_norm = accelerator.clip_grad_norm_(state.module.parameters(), state.stage.max_grad_norm)
    grad_norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm
    state.optimizer.step()
    state.optimizer.zero_grad()
    if zero:  # which clips by itself, and tells inf where the gradient is not finite
        grad_norm = torch.as_tensor(zero.get_global_grad_norm(), dtype=torch.float32, device=accelerator.device)
    rows = [name for batch in micro_batches for name in batch.sample_ids[:4]]
    return StepResult(step, sums.pop("loss"), sums, grad_norm, counted, rows)


def check_finite(results: Sequence[StepResult], stage: StageConfig) -> None:
    """Wait for these steps; raises NonFiniteError for the first whose gradient is not finite: weights are lost since."""
    for result, norm in zip(results, torch.stack([result.grad_norm for result in results]).tolist(), strict=True):
        if not math.isfinite(norm):
            parts = {name: float(value) for name, value in result.parts.items()}
            told = f"stage {stage.name}, step {result.step}: gradient norm is {norm}, parts {parts}"
            hint = "lower learning_rate or use precision: fp32"
            raise NonFiniteError(f"{told}, rows {', '.join(result.rows)}, ...; {hint}")


@torch.no_grad()
def look(state: TrainState, batch: Batch) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Features of a frozen tower [P, N, D_v], if there are pictures; the teacher's final hidden states [B, T, D], and head."""
    device, teacher, pixels = state.accelerator.device, state.teacher, batch.pixel_values
    features = None if batch.features is None else sent(batch.features, device)
    tower_learns = "vision_tower" in state.stage.train
    if features is None and pixels is not None and not tower_learns:
        model = _tower(state)
        with state.accelerator.autocast() if model is state.student.model else contextlib.nullcontext():
            features = vision_features(model, sent(pixels, device).to(model.dtype))
    if not teacher or not state.pair:
        return features, None, None
    seen, visual = features, batch.segments == Segment.VISUAL
    if pixels is not None and (tower_learns or not state.pair.shared_tower):
        own = pixels if state.pair.shared_pixels else batch.teacher_pixel_values
        assert own is not None, "the teacher has another image processor, but the batch lacks its pixels"
        seen = vision_features(teacher.model, sent(own, device).to(teacher.model.dtype))
    given = batch.input_ids, batch.attention_mask, visual, seen, batch.position_ids
    return features, final_hidden(teacher.model, *given), teacher.head


def _tower(state: TrainState) -> Any:
    """Whose frozen tower runs: the teacher's, if it is the same and held in what autocast would compute in."""
    teacher, pair, bf16 = state.teacher, state.pair, state.accelerator.mixed_precision == "bf16"
    narrow = pair and pair.shared_tower and bf16 and teacher and teacher.model.dtype == torch.bfloat16
    return (teacher if teacher and narrow else state.student).model


def park_tower(state: TrainState) -> None:
    """Where the teacher's tower runs for both, put the student's weights of it into the host's memory."""
    if _tower(state) is not state.student.model and "vision_tower" not in state.stage.train:
        for weight in state.student.parts()["vision_tower"].parameters():
            weight.data = weight.cpu()


def _count(accelerator: Accelerator, micro_batches: Sequence[Batch]) -> tuple[Counts, dict[str, int], int]:
    """Counts of the global batch, and those of StepResult, over micro-batches and ranks, on the CPU; the most micro-batches."""
    counts = [count(b.labels, b.visual, b.image_rows, b.position_ids) for b in micro_batches]
    own = [int(rank == accelerator.process_index) for rank in range(accelerator.num_processes)]
    rows = [(int(batch.attention_mask.sum()), batch.truncated, len(batch.mistakes), *own) for batch in micro_batches]
    local = torch.cat([torch.tensor(counts), torch.tensor(rows)], dim=1).sum(0)
    samples, response, visual, images, tokens, truncated, left_out, *passes = accelerator.reduce(local).tolist()
    counted = {"tokens": tokens - left_out, "truncated": truncated, "left_out": left_out}
    return Counts(samples - left_out, response, visual, images), counted, max(passes)


def build_optimizer(module: nn.Module, stage: StageConfig) -> torch.optim.AdamW:
    """AdamW over what learns; norms and biases (vectors) are not decayed."""
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    matrices, vectors = ([p for p in learning if (p.ndim > 1) == decays] for decays in (True, False))
    groups = ({"params": matrices, "weight_decay": stage.weight_decay}, {"params": vectors, "weight_decay": 0.0})
    used = [group for group in groups if group["params"]]
    return torch.optim.AdamW(used, lr=stage.learning_rate, betas=stage.betas, fused=True)


def learning_rate(step: int, *, steps: int, stage: StageConfig) -> float:
    """Rate of optimiser step `step` (from 0): linear warm-up, then cosine to zero."""
    warmup = math.ceil(stage.warmup_ratio * steps)
    if step < warmup:
        return stage.learning_rate * step / warmup
    return stage.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group this rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate

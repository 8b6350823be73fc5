"""AdamW groups and the learning-rate curve."""

import math

import torch
from torch import nn

from llavakd.config import StageConfig


def build_optimizer(module: nn.Module, stage: StageConfig) -> torch.optim.AdamW:
    """AdamW over what learns; norms and biases (vectors) are not decayed."""
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in learning if p.ndim > 1], "weight_decay": stage.weight_decay},
        {"params": [p for p in learning if p.ndim <= 1], "weight_decay": 0.0},
    ]
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

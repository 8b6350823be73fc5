"""Divergences between two distributions per row, as plain functions of log-probabilities. All in nats, float32."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Divergence = Callable[[Tensor, Tensor, float], Tensor]


def forward_kl(student_logp: Tensor, teacher_logp: Tensor, beta: float) -> Tensor:
    """KL(P || Q) = sum_v P_v (log P_v - log Q_v), P teacher, Q student (LLaVA-KD, MDist).

    Args:
        student_logp: log Q, float [N, V].
        teacher_logp: log P, float [N, V].
        beta: not used.

    Returns:
        [N], >= 0, neither masked nor averaged.
    """
    return (teacher_logp.exp() * (teacher_logp - student_logp)).sum(-1)


def reverse_kl(student_logp: Tensor, teacher_logp: Tensor, beta: float) -> Tensor:
    """KL(Q || P); arguments as `forward_kl`."""
    return forward_kl(teacher_logp, student_logp, beta)


def jsd(student_logp: Tensor, teacher_logp: Tensor, beta: float) -> Tensor:
    """Generalised Jensen-Shannon divergence (arXiv 2306.13649, eq. 1).

    beta KL(P || M) + (1 - beta) KL(Q || M) with M = beta P + (1 - beta) Q; the limits are beta 0: KL(P || Q) and
    beta 1: KL(Q || P), to which the function then equals. Arguments as `forward_kl`.
    """
    if beta == 0:
        return forward_kl(student_logp, teacher_logp, beta)
    if beta == 1:
        return reverse_kl(student_logp, teacher_logp, beta)
    mixture = torch.logaddexp(teacher_logp + math.log(beta), student_logp + math.log1p(-beta))
    return beta * forward_kl(mixture, teacher_logp, beta) + (1 - beta) * forward_kl(mixture, student_logp, beta)


DIVERGENCES: dict[str, Divergence] = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd}

"""Divergences of rows in nats: a term for each vocabulary entry, from log-probabilities [N, V] of P, the teacher, and Q."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def _forward_kl(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """KL(P || Q) (LLaVA-KD, MDist)."""
    return teacher.exp() * (teacher - student)


def _reverse_kl(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """KL(Q || P)."""
    return student.exp() * (student - teacher)


def _jsd(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Jensen-Shannon: beta KL(P || M) + (1 - beta) KL(Q || M), M = beta P + (1 - beta) Q (arXiv 2306.13649, eq. 1)."""
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * teacher.exp() * (teacher - mixture) + (1 - beta) * student.exp() * (student - mixture)


def _skewed_kl(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """KL(P || beta P + (1 - beta) Q) (arXiv 2402.03898, eq. 4, skew beta), 0 < beta < 1."""
    return teacher.exp() * (teacher - torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta)))


def _total_variation(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """sum_v |P_v - Q_v| / 2."""
    return (student.exp() - teacher.exp()).abs() / 2


# name -> (log Q, log P, beta) -> terms [N, V]
DIVERGENCES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "skewed_kl": _skewed_kl,
    "total_variation": _total_variation,
}
# What the mixtures become at the ends of beta.
_LIMITS = {("jsd", 0.0): "forward_kl", ("jsd", 1.0): "reverse_kl", ("skewed_kl", 0.0): "forward_kl"}


def resolve(name: str, beta: float) -> str:
    """The key of DIVERGENCES that `name` stands for at this beta; raises ValueError for a wrong name or beta."""
    if name not in DIVERGENCES:
        raise ValueError(f"divergence {name!r} is not known; known: {', '.join(DIVERGENCES)}")
    if name in ("jsd", "skewed_kl") and not (0 <= beta < 1 or (beta == 1 and name == "jsd")):
        raise ValueError(f"beta {beta} of {name} must lie between 0 and 1{', 1 not allowed' * (name != 'jsd')}")
    return _LIMITS.get((name, float(beta)), name)

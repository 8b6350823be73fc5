"""Divergences between two distributions per row: one term per vocabulary entry for the value, one for the gradient.

P is the teacher's distribution, Q the student's; everything is in nats and works on log-probabilities [N, V].
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Divergence(NamedTuple):
    """D = sum_v d_v with gradient w_v - Q_v sum_u w_u on the student's (softened) logits.

    terms: (log Q, log P, beta) -> (d, w), both [N, V], with w_v = Q_v dD/dQ_v; a constant added to dD/dQ drops out.
    total: sum_u w_u where it does not depend on Q, so that it need not be summed; else None.
    """

    terms: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
    total: float | None = None


def _forward_kl(student: Tensor, teacher: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """KL(P || Q) (LLaVA-KD, MDist)."""
    p = teacher.exp()
    return p * (teacher - student), -p


def _reverse_kl(student: Tensor, teacher: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """KL(Q || P)."""
    terms = student.exp() * (student - teacher)
    return terms, terms


def _jsd(student: Tensor, teacher: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Jensen-Shannon: beta KL(P || M) + (1 - beta) KL(Q || M), M = beta P + (1 - beta) Q (arXiv 2306.13649, eq. 1)."""
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    own = (1 - beta) * student.exp() * (student - mixture)
    return beta * teacher.exp() * (teacher - mixture) + own, own


def _skewed_kl(student: Tensor, teacher: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """KL(P || beta P + (1 - beta) Q) (arXiv 2402.03898, eq. 4, skew beta), 0 < beta < 1."""
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return teacher.exp() * (teacher - mixture), -(1 - beta) * (student + teacher - mixture).exp()


def _total_variation(student: Tensor, teacher: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """sum_v |P_v - Q_v| / 2."""
    q = student.exp()
    gap = q - teacher.exp()
    return gap.abs() / 2, q * gap.sign() / 2


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": Divergence(_forward_kl, total=-1.0),
    "reverse_kl": Divergence(_reverse_kl),
    "jsd": Divergence(_jsd),
    "skewed_kl": Divergence(_skewed_kl),
    "total_variation": Divergence(_total_variation),
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

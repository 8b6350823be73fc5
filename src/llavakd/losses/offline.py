"""The loss of `distill_rows` against a teacher that is no longer there: its k likeliest ids per row, stored."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llavakd.losses.products import exact_dtype
from llavakd.losses.rows import IGNORE_INDEX, RowLosses, Sweep, shared_width


class Taught(NamedTuple):
    """Of M positions what a teacher gave the next id: its k likeliest ids, as to `distill_rows_topk`."""

    places: Tensor  # int64 [M], flat positions of a batch [B, T], ascending
    ids: Tensor  # int64 [M, k]
    logp: Tensor  # float32 [M, k]
    tail: Tensor  # float32 [M]


def distill_rows_topk(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_ids: Tensor,
    teacher_logp: Tensor,
    labels: Tensor,
    *,
    ce_weight: Tensor,
    kl_weight: Tensor,
    teacher_tail: Tensor | None = None,
    tail: Literal["bucket", "renormalize"] = "bucket",
    vocab_size: int | None = None,
    chunk_rows: int | None = None,
) -> RowLosses:
    """Weighted sums of cross-entropy and forward KL, at temperature 1, against stored teacher probabilities.

    `tail` names two conventions for the mass P_tail = 1 - sum_k P_k that was not stored; both are the full KL at k = V:
    "bucket": all other ids are one outcome, sum_k P_k (log P_k - log Q_k) + P_tail (log P_tail - log Q_tail) with
        Q_tail the student's mass outside the k: a lower bound of the full KL (data processing inequality), with no
        opinion on how the rest is shared out.
    "renormalize": the stored ones are scaled to sum to one and the rest is taken for zero: sum_k P'_k (log P'_k -
        log Q_k); pushes the student's mass outside the k to zero.

    Arguments as of `distill_rows`, and:
        teacher_ids: int64 [N, k], distinct within a row, below `vocab_size`.
        teacher_logp: [N, k] natural log-probabilities of the teacher's whole softmax over the shared vocabulary.
        teacher_tail: [N], P_tail as it was measured; default 1 - sum_k P_k, which half-precision storage blurs.

    Raises ValueError: an unknown tail, an id outside the vocabulary, or probabilities of a row that sum to more than one.
    """
    vocab_size = shared_width(student_head, None, vocab_size)
    if tail not in ("bucket", "renormalize"):
        raise ValueError(f"tail {tail!r} is not known; use 'bucket' or 'renormalize'")
    distilled = kl_weight != 0
    if not bool(((teacher_ids >= 0) & (teacher_ids < vocab_size) | ~distilled[:, None]).all()):
        raise ValueError(f"teacher_ids must lie in [0, {vocab_size}); the teacher was stored with another vocabulary")
    p = teacher_logp.detach().to(exact_dtype(student_hidden)).exp().where(distilled[:, None], 0)
    mass = p.sum(-1)
    if bool((mass > 1 + 1e-3).any()):
        row, total = int(mass.argmax()), float(mass.max())
        raise ValueError(f"probabilities of row {row} sum to {total:.4f}; give natural logarithms of one softmax")
    if tail == "renormalize":
        p, rest = p / mass.where(distilled, 1)[:, None], torch.zeros_like(mass)
    else:
        rest = 1 - mass if teacher_tail is None else teacher_tail.detach().to(p.dtype)
        rest = rest.clamp_min(0).where(distilled, 0)
    sweep = Sweep(_score, vocab_size, chunk_rows, [labels, teacher_ids, p, rest])
    return sweep.losses(student_hidden, student_head, ce_weight, kl_weight)


def _score(
    logits: Tensor, out: Tensor, ce_weight: Tensor, kl_weight: Tensor, labels: Tensor, *stored: Tensor
) -> tuple[Tensor, Tensor]:
    """CE and sum_k P_k (log P_k - log Q_k) + rest (log rest - log Q_rest); the gradient to `logits` is written to `out`."""
    ids, p, rest = stored
    ids = ids.where(kl_weight[:, None] != 0, 0)  # rows that are not distilled may hold anything
    logits = logits.detach().requires_grad_()
    with torch.enable_grad():
        student = F.log_softmax(logits, dim=-1)
        ce = F.nll_loss(student, labels.where(ce_weight != 0, IGNORE_INDEX), reduction="none")
        kl = torch.xlogy(p, p).sum(-1) - (p * student.gather(1, ids)).sum(-1)
        log_rest = student.scatter(1, ids, -torch.inf).logsumexp(-1)  # -inf where k is the whole vocabulary
        kl = kl + (torch.xlogy(rest, rest) - rest * log_rest).where((rest > 0) & (log_rest > -torch.inf), 0)
        out.copy_(torch.autograd.grad((ce, kl), logits, (ce_weight, kl_weight))[0])
    return ce.detach(), kl.detach()

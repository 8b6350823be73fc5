"""Cross-entropy and divergence of selected rows, from hidden states and heads, a chunk of logits at a time."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llavakd.losses.divergence import DIVERGENCES

IGNORE_INDEX = -100
_CHUNK_LOGITS = 2**26  # student logits of one chunk: 256 MiB in float32


class RowLosses(NamedTuple):
    """`ce` and `kl` are differentiable float32 scalars; the per-row values are detached float32 [N], for reports."""

    ce: Tensor
    kl: Tensor
    ce_rows: Tensor
    kl_rows: Tensor


def distill_rows(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
    labels: Tensor,
    *,
    ce_weight: Tensor,
    kl_weight: Tensor,
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    chunk_rows: int | None = None,
    backend: Literal["auto", "torch"] = "auto",
) -> RowLosses:
    """Weighted sums of next-token cross-entropy and teacher-student divergence over N rows.

    ce = sum_i ce_weight_i CE_i at temperature 1; kl = sum_i kl_weight_i D_i with both sides softened by `temperature`
    (no T^2 factor: put it into the weights). Softmax and divergence are float32 whatever the inputs are. Gradients
    reach student_hidden and, when it requires one, student_head; never the teacher.

    Args:
        student_hidden: [N, D_s]; row i is the position that predicts labels[i].
        student_head: [V_s, D_s].
        teacher_hidden: [N, D_t], or None when nothing is distilled.
        teacher_head: [V_t, D_t], or None.
        labels: int64 [N]; -100: no cross-entropy in that row.
        ce_weight: float32 [N].
        kl_weight: float32 [N].
        divergence: key of DIVERGENCES (LLaVA-KD uses forward_kl).
        beta: mixture of `jsd`.
        temperature: > 0.
        vocab_size: ids that both models share; columns beyond take no part on either side. Default: the student's head
            rows, which the teacher's must equal.
        chunk_rows: rows whose logits are alive at once; default bounds them to 256 MiB.
        backend: "torch" is the only one so far.

    Raises:
        ValueError: heads of unequal width without `vocab_size`, a label outside it, a divergence without a teacher, or an
            unknown divergence or backend.
    """
    if backend not in ("auto", "torch"):
        raise ValueError(f"backend {backend!r} is not known; use 'auto' or 'torch'")
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence {divergence!r} is not known; known: {', '.join(DIVERGENCES)}")
    vocab_size = shared_width(student_head, teacher_head, vocab_size)
    if teacher_hidden is None and bool((kl_weight != 0).any()):
        raise ValueError("kl_weight asks for a divergence, but teacher_hidden is None; give a teacher or zero weights")
    live = (ce_weight != 0) & (labels != IGNORE_INDEX) | (kl_weight != 0)
    chunk_rows = chunk_rows or max(1, _CHUNK_LOGITS // vocab_size)
    index = live.nonzero().squeeze(1)
    _check_labels(labels[index], vocab_size)
    ce_rows = torch.zeros(len(labels), device=labels.device)
    kl_rows = torch.zeros(len(labels), device=labels.device)
    # The anchor gives an input without live rows a gradient of zeros.
    ce = kl = (student_hidden[:0].sum() + student_head[:0].sum()).float()
    several = len(index) > chunk_rows
    for rows in index.split(chunk_rows):
        arguments = (
            student_hidden[rows],
            student_head,
            # Zeros where nothing is distilled: a zero weight alone would turn an overflowed teacher into NaN gradients.
            None if teacher_hidden is None else teacher_hidden[rows].detach().where(kl_weight[rows, None] != 0, 0),
            None if teacher_head is None else teacher_head.detach(),
            labels[rows],
            divergence,
            beta,
            temperature,
            vocab_size,
        )
        # Recomputed in backward, so that no chunk's logits outlive it.
        ce_part, kl_part = (
            checkpoint(_chunk, *arguments, use_reentrant=False, preserve_rng_state=False)
            if several
            else _chunk(*arguments)
        )
        ce_part, kl_part = _zero_dead(ce_part, ce_weight[rows]), _zero_dead(kl_part, kl_weight[rows])
        ce, kl = ce + (ce_part * ce_weight[rows]).sum(), kl + (kl_part * kl_weight[rows]).sum()
        ce_rows[rows], kl_rows[rows] = ce_part.detach(), kl_part.detach()
    return RowLosses(ce, kl, ce_rows, kl_rows)


def _chunk(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
    labels: Tensor,
    divergence: str,
    beta: float,
    temperature: float,
    vocab_size: int,
) -> tuple[Tensor, Tensor]:
    """Per-row cross-entropy and divergence, float32 [n] each."""
    with torch.autocast(student_hidden.device.type, enabled=False):
        logits = student_hidden.float() @ student_head[:vocab_size].float().T
        ce = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none")
        if teacher_hidden is None or teacher_head is None:
            return ce, torch.zeros_like(ce)
        with torch.no_grad():
            teacher_logits = teacher_hidden.float() @ teacher_head[:vocab_size].float().T
            teacher_logp = F.log_softmax(teacher_logits / temperature, dim=-1)
        student_logp = F.log_softmax(logits / temperature, dim=-1)
        return ce, DIVERGENCES[divergence](student_logp, teacher_logp, beta)


def _zero_dead(values: Tensor, weight: Tensor) -> Tensor:
    """Values of rows without weight are zero, not 0 * inf."""
    return torch.where(weight != 0, values, torch.zeros_like(values))


def _check_labels(labels: Tensor, vocab_size: int) -> None:
    wrong = labels[(labels != IGNORE_INDEX) & ((labels < 0) | (labels >= vocab_size))]
    if len(wrong):
        raise ValueError(
            f"label {int(wrong[0])} lies outside the {vocab_size} ids that count; give ids below them or -100"
        )


def shared_width(student_head: Tensor, teacher_head: Tensor | None, vocab_size: int | None) -> int:
    """How many leading head rows take part; raises ValueError where the two heads leave it open."""
    student_rows = len(student_head)
    teacher_rows = student_rows if teacher_head is None else len(teacher_head)
    if vocab_size is None:
        if student_rows != teacher_rows:
            raise ValueError(
                f"heads have {student_rows} and {teacher_rows} rows; give vocab_size, the number of ids that both "
                "tokenizers share"
            )
        return student_rows
    if not 0 < vocab_size <= min(student_rows, teacher_rows):
        raise ValueError(
            f"vocab_size {vocab_size} must lie between 1 and the narrower head, {min(student_rows, teacher_rows)}"
        )
    return vocab_size

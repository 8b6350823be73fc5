"""Log-sum-exps of student and teacher, CE, divergence and the gradient to the logits, each logit read once from memory.

A program holds one tile of one row; the programs of a row publish their sums, wait for each other on a counter and go on
with the logits still in registers. The same results as `losses.rows.score_torch`, which is the reference. Numbers that
only a trace knows (block, warps) stand here; `TRITON_INTERPRET=1` runs the kernel on a CPU, in float32 and float16, one
step a launch, since programs cannot wait for each other there.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_KINDS = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2, "skewed_kl": 3, "total_variation": 4}
_BLOCK = 8192  # these two: benchmarks/results/losses_tuning.json
_WARPS = 16
_FIELDS = 8


@triton.jit
def _form(raw, scale, cap, CAP: tl.constexpr):
    if CAP:
        return cap * (2 * tl.sigmoid(2 * raw * scale / cap) - 1)  # tanh
    else:
        return raw * scale


@triton.jit
def _terms(lq, lp, beta, log_beta, log_rest, KIND: tl.constexpr):
    """(d_v, w_v) of losses.divergence."""
    q, p = tl.exp(lq), tl.exp(lp)
    if KIND == 0:
        return p * (lp - lq), -p
    elif KIND == 1:
        d = q * (lq - lp)
        return d, d
    elif KIND == 4:
        gap = q - p
        return tl.abs(gap) / 2, q * tl.where(gap > 0, 0.5, tl.where(gap < 0, -0.5, 0.0))
    else:
        one, other = lp + log_beta, lq + log_rest
        mixture = tl.maximum(one, other) + tl.log(1 + tl.exp(-tl.abs(one - other)))
        if KIND == 2:
            own = (1 - beta) * q * (lq - mixture)
            return beta * p * (lp - mixture) + own, own
        else:
            return p * (lp - mixture), -(1 - beta) * tl.exp(lq + lp - mixture)


@triton.jit
def _publish(place, values, keep):
    """Maximum and sum of exponentials of this tile."""
    values = tl.where(keep, values, -float("inf"))
    top = tl.max(values, 0)
    tl.store(place, top)
    tl.store(place + 1, tl.sum(tl.exp(values - top), 0))


@triton.jit
def _log_sum(sums, PARTS: tl.constexpr, FIELDS: tl.constexpr):
    """Log-sum-exp of a row from what its programs published; past the first-level cache, which may be stale."""
    lanes = tl.arange(0, triton.next_power_of_2(PARTS))
    tops = tl.load(sums + lanes * FIELDS, mask=lanes < PARTS, other=-float("inf"), cache_modifier=".cg")
    totals = tl.load(sums + lanes * FIELDS + 1, mask=lanes < PARTS, other=0.0, cache_modifier=".cg")
    top = tl.max(tops, 0)
    return top + tl.log(tl.sum(totals * tl.exp(tops - top), 0))


@triton.jit
def _meet(arrived, programs):
    """Wait until so many programs of this row have come here."""
    tl.debug_barrier()
    tl.atomic_add(arrived, 1)
    while tl.atomic_add(arrived, 0) < programs:
        pass


@triton.jit
def _rows_kernel(
    logits, taught, grad, labels, ce_weight, kl_weight, ce_out, sums, turns, stride, taught_stride, grad_stride,
    scale, cap, taught_scale, taught_cap, sharpness, beta, log_beta, log_rest,
    VOCAB: tl.constexpr, KIND: tl.constexpr, TAUGHT: tl.constexpr, SOFT: tl.constexpr, CAP: tl.constexpr,
    TAUGHT_CAP: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, FIELDS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """STEP 0: sums of the tiles; 1: sum w; 2: the gradient; -1: all, waiting between them.

    `sums` [rows, PARTS, FIELDS]: maximum and sum of the student's logits, of its softened ones, of the teacher's; sum w;
    sum d. `turns` [1 + rows]: programs started, then programs that have arrived in each row.
    """
    # By order of start, so that the programs waited for are running or next.
    program = tl.atomic_add(turns, 1) if STEP < 0 else tl.program_id(0)
    row, part = (program // PARTS).to(tl.int64), program % PARTS
    ids = part * BLOCK + tl.arange(0, BLOCK)
    keep = ids < VOCAB
    x = _form(tl.load(logits + row * stride + ids, mask=keep, other=0.0), scale, cap, CAP)
    y = x
    if TAUGHT:
        y = sharpness * _form(
            tl.load(taught + row * taught_stride + ids, mask=keep, other=0.0), taught_scale, taught_cap, TAUGHT_CAP
        )
    sums += row * PARTS * FIELDS
    if STEP <= 0:
        _publish(sums + part * FIELDS, x, keep)
        if SOFT:
            _publish(sums + part * FIELDS + 2, sharpness * x, keep)
        if TAUGHT:
            _publish(sums + part * FIELDS + 4, y, keep)
    if STEP < 0:
        _meet(turns + 1 + row, PARTS)
    if STEP != 0:
        lse = _log_sum(sums, PARTS, FIELDS)
        d, w, q = x, x, x
        if TAUGHT:
            lq = sharpness * x - (_log_sum(sums + 2, PARTS, FIELDS) if SOFT else lse)
            q = tl.exp(lq)
            d, w = _terms(lq, y - _log_sum(sums + 4, PARTS, FIELDS), beta, log_beta, log_rest, KIND)
        slope = -1.0  # forward KL: the teacher's probabilities sum to one
        if TAUGHT and KIND != 0:
            if STEP < 2:
                tl.store(sums + part * FIELDS + 6, tl.sum(tl.where(keep, w, 0.0), 0))
            if STEP < 0:
                _meet(turns + 1 + row, 2 * PARTS)
            lanes = tl.arange(0, triton.next_power_of_2(PARTS))
            slope = tl.sum(tl.load(sums + lanes * FIELDS + 6, mask=lanes < PARTS, other=0.0, cache_modifier=".cg"), 0)
        if STEP != 1:
            label, ce_w = tl.load(labels + row), tl.load(ce_weight + row)
            counts = (label >= 0) & (ce_w != 0)
            own = ids == label
            if part == tl.where(counts, label // BLOCK, 0):
                tl.store(ce_out + row, tl.where(counts, lse - tl.sum(tl.where(own, x, 0.0), 0), 0.0))
            g = tl.where(counts, ce_w, 0.0) * (tl.exp(x - lse) - tl.where(own, 1.0, 0.0))
            if TAUGHT:
                tl.store(sums + part * FIELDS + 7, tl.sum(tl.where(keep, d, 0.0), 0))
                g += tl.load(kl_weight + row) * sharpness * (w - q * slope)
            g *= scale
            if CAP:
                g *= 1 - (x / cap) * (x / cap)
            tl.store(grad + row * grad_stride + ids, g.to(grad.dtype.element_ty), mask=keep)


def score_triton(
    logits: Tensor,
    taught: Tensor | None,
    labels: Tensor,
    ce_weight: Tensor,
    kl_weight: Tensor,
    how: Any,
    grad: Tensor,
) -> tuple[Tensor, Tensor]:
    """As `losses.rows.score_torch`, from float32 logits."""
    assert logits.dtype == torch.float32, "the kernel reads float32 logits"
    assert logits.stride(1) == 1, "the kernel reads whole rows"
    assert taught is None or (taught.dtype == torch.float32 and taught.stride(1) == 1), "teacher logits must be float32"
    divergence, beta, temperature, (student, teacher) = how
    rows, vocab = logits.shape
    block = min(_BLOCK, triton.next_power_of_2(vocab))
    parts = triton.cdiv(vocab, block)
    sums = logits.new_zeros(rows, parts, _FIELDS)
    turns = torch.zeros(1 + rows, dtype=torch.int32, device=logits.device)
    ce = torch.empty_like(ce_weight)
    mix = (beta, math.log(beta), math.log1p(-beta)) if divergence in ("jsd", "skewed_kl") else (0.0, 0.0, 0.0)
    with torch.cuda.device_of(logits):
        for step in (-1,) if logits.is_cuda else (0, 1, 2):
            _rows_kernel[(rows * parts,)](
                logits, logits if taught is None else taught, grad, labels, ce_weight, kl_weight, ce, sums, turns,
                logits.stride(0), 0 if taught is None else taught.stride(0), grad.stride(0),
                *map(float, (*student, *teacher)), 1 / temperature, *mix,
                VOCAB=vocab, KIND=_KINDS[divergence], TAUGHT=taught is not None, SOFT=temperature != 1,
                CAP=bool(student.cap), TAUGHT_CAP=bool(teacher.cap),
                BLOCK=block, PARTS=parts, FIELDS=_FIELDS, STEP=step, num_warps=_WARPS,
            )  # fmt: skip
    return ce, sums[..., 7].sum(1).where(kl_weight != 0, 0)

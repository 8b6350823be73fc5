"""Log-sum-exps of student and teacher, CE, divergence and the gradient to the logits, in one launch.

A program does one stage of one tile of one row: publish the tile's sums, then (from all tiles' sums) its gradient. Rows
go through the stages group by group, a later stage some groups behind, so that what it waits for has been done as a
rule and its logits still lie in the second-level cache. Blocks start in order (CUB's scans rely on it, too), so it comes.
The reference is `losses.rows.score_torch`; `TRITON_INTERPRET=1` runs the kernel on a CPU, in float32 and float16.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

_KINDS = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2, "skewed_kl": 3, "total_variation": 4}
_BLOCK, _WARPS, _GROUP, _LAG = 1024, 1, 8, 1  # benchmarks/results/losses_tuning.json
_FIELDS = constexpr(8)  # numbers that a tile publishes
_UNSET = constexpr(-3e38)  # no log-sum-exp
_NOTHING = constexpr(-1e30)  # a logit whose exponential is zero, and finite so that zero times it is zero


@triton.jit
def _form(raw, scale, cap, CAP: constexpr, SCALED: constexpr):
    if CAP:
        return cap * (2 * tl.sigmoid(2 * raw * scale / cap) - 1)  # tanh
    else:
        return raw * scale if SCALED else raw


@triton.jit
def _terms(lq, q, lp, beta, log_beta, log_rest, KIND: constexpr):
    """(d_v, w_v) of losses.divergence; q is exp(lq)."""
    p = tl.exp(lp)
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
def _publish(place, values):
    """Maximum and sum of exponentials of this tile."""
    top = tl.max(values, 0)
    tl.store(place, top)
    tl.store(place + 1, tl.sum(tl.exp(values - top), 0))


@triton.jit
def _log_sum(sums, PARTS: constexpr):
    """Log-sum-exp of a row from what its tiles published; past the first-level cache, which may be stale."""
    lanes = tl.arange(0, triton.next_power_of_2(PARTS))
    tops = tl.load(sums + lanes * _FIELDS, mask=lanes < PARTS, other=-float("inf"), cache_modifier=".cg")
    totals = tl.load(sums + lanes * _FIELDS + 1, mask=lanes < PARTS, other=0.0, cache_modifier=".cg")
    top = tl.max(tops, 0)
    return top + tl.log(tl.sum(totals * tl.exp(tops - top), 0))


@triton.jit
def _arrive(arrived):
    """Count this program in, after all that it stored; how many were there before it."""
    tl.debug_barrier()
    return tl.atomic_add(arrived, 1)


@triton.jit
def _await(place):
    """The number that another program puts here; past the first-level cache, which may be stale."""
    value = tl.load(place, volatile=True)
    while value == _UNSET:
        value = tl.load(place, volatile=True)
    return value


@triton.jit
def _add_up(x, y, sums, part, row_sums, arrived, sharpness, TAUGHT: constexpr, SOFT: constexpr, PARTS: constexpr):
    """Publish a tile's sums; the last program of the row makes its log-sum-exps."""
    mine = sums + part * _FIELDS
    _publish(mine, x)
    if SOFT:
        _publish(mine + 2, sharpness * x)
    if TAUGHT:
        _publish(mine + 4, y)
    if _arrive(arrived) == PARTS - 1:
        tl.store(row_sums, _log_sum(sums, PARTS))
        if SOFT:
            tl.store(row_sums + 1, _log_sum(sums + 2, PARTS))
        if TAUGHT:
            tl.store(row_sums + 2, _log_sum(sums + 4, PARTS))


@triton.jit
def _compare(x, y, row_sums, sharpness, beta, log_beta, log_rest, KIND: constexpr, TAUGHT: constexpr, SOFT: constexpr):
    """(log-softmax of the student's logits, its exponential, d, w, softened q) of one tile."""
    hard = x - _await(row_sums)
    q_hard = tl.exp(hard)
    d, w, q = hard, hard, q_hard
    if TAUGHT:
        lq = hard
        if SOFT:
            lq = sharpness * x - _await(row_sums + 1)
            q = tl.exp(lq)
        d, w = _terms(lq, q, y - _await(row_sums + 2), beta, log_beta, log_rest, KIND)
    return hard, q_hard, d, w, q


@triton.jit
def _write_gradient(
    hard, q_hard, d, w, q, x, ids, keep, part, label, ce_w, kl_w, grad, ce_out, sums, row_sums, scale, cap, sharpness,
    KIND: constexpr, TAUGHT: constexpr, SOFT: constexpr, CAP: constexpr, SCALED: constexpr, BLOCK: constexpr,
):  # fmt: skip
    """Of one tile; its sum of d; and where the label lies the row's CE."""
    counts = (label >= 0) & (ce_w != 0)
    ce_w = tl.where(counts, ce_w, 0.0)
    if TAUGHT:
        tl.store(sums + 7, tl.where(kl_w != 0, tl.sum(d, 0), 0.0))
    if KIND == 0 and TAUGHT and not SOFT:  # the teacher's probabilities sum to one
        g = (ce_w + kl_w) * q_hard + kl_w * w
    else:
        g = ce_w * q_hard
        if TAUGHT:
            slope = -1.0 if KIND == 0 else _await(row_sums + 3)
            g += kl_w * sharpness * (w - q * slope)
    if part == tl.where(counts, label // BLOCK, 0):
        own = ids == label
        g -= tl.where(own, ce_w, 0.0)
        tl.store(ce_out, tl.where(counts, -tl.sum(tl.where(own, hard, 0.0), 0), 0.0))
    if SCALED:
        g *= scale
    if CAP:
        g *= 1 - (x / cap) * (x / cap)
    tl.store(grad + ids, g.to(grad.dtype.element_ty), mask=keep)


@triton.jit
def _rows_kernel(
    logits, taught, grad, labels, ce_weight, kl_weight, ce_out, sums, row_sums, arrived, rows,
    stride, taught_stride, grad_stride, scale, cap, taught_scale, taught_cap, sharpness, beta, log_beta, log_rest,
    VOCAB: constexpr, KIND: constexpr, TAUGHT: constexpr, SOFT: constexpr, CAP: constexpr, TAUGHT_CAP: constexpr,
    SCALED: constexpr, BLOCK: constexpr, PARTS: constexpr, GROUP: constexpr, LAG: constexpr, STAGES: constexpr,
):  # fmt: skip
    """Stages: log-sum-exps; sum w where it is not known (KIND > 0); the gradient.

    `sums` [rows, PARTS, FIELDS]: maximum and sum of a tile of the student's logits, of its softened ones, of the
    teacher's; sum w; sum d. `row_sums` [rows, 4]: log-sum-exps of the three, sum w; UNSET until they are known.
    `arrived` [rows]: programs that have published.
    """
    program = tl.program_id(0)
    slot, place = program // (GROUP * PARTS), program % (GROUP * PARTS)
    stage = slot % STAGES
    row, part = ((slot // STAGES - stage * LAG) * GROUP + place // PARTS).to(tl.int64), place % PARTS
    if (row >= 0) & (row < rows):
        ids = part * BLOCK + tl.arange(0, BLOCK)
        keep = ids < VOCAB
        x = _form(tl.load(logits + row * stride + ids, mask=keep, other=0.0), scale, cap, CAP, SCALED)
        y = x
        if TAUGHT:
            raw = tl.load(taught + row * taught_stride + ids, mask=keep, other=0.0)
            y = _form(raw, taught_scale, taught_cap, TAUGHT_CAP, SCALED)
            if SOFT:
                y *= sharpness
        if part == PARTS - 1:  # beyond the vocabulary: probabilities of zero, with which no sum needs a mask
            x = tl.where(keep, x, _NOTHING)
            y = tl.where(keep, y, _NOTHING)
        sums += row * PARTS * _FIELDS
        row_sums += row * 4
        arrived += row
        if stage == 0:
            _add_up(x, y, sums, part, row_sums, arrived, sharpness, TAUGHT, SOFT, PARTS)
        else:
            hard, q_hard, d, w, q = _compare(x, y, row_sums, sharpness, beta, log_beta, log_rest, KIND, TAUGHT, SOFT)
            if stage < STAGES - 1:
                tl.store(sums + part * _FIELDS + 6, tl.sum(w, 0))
                if _arrive(arrived) == 2 * PARTS - 1:
                    lanes = tl.arange(0, triton.next_power_of_2(PARTS))
                    all_w = tl.load(sums + lanes * _FIELDS + 6, mask=lanes < PARTS, other=0.0, cache_modifier=".cg")
                    tl.store(row_sums + 3, tl.sum(all_w, 0))
            else:
                _write_gradient(
                    hard, q_hard, d, w, q, x, ids, keep, part, tl.load(labels + row), tl.load(ce_weight + row),
                    tl.load(kl_weight + row), grad + row * grad_stride, ce_out + row, sums + part * _FIELDS, row_sums,
                    scale, cap, sharpness, KIND, TAUGHT, SOFT, CAP, SCALED, BLOCK,
                )  # fmt: skip


def score_triton(
    logits: Tensor, taught: Tensor | None, labels: Tensor, ce_weight: Tensor, kl_weight: Tensor, how: Any, out: Tensor
) -> tuple[Tensor, Tensor]:
    """As `losses.rows.score_torch`, from float32 logits."""
    assert logits.dtype == torch.float32, "the kernel reads float32 logits"
    assert logits.stride(1) == out.stride(1) == 1, "the kernel reads and writes whole rows"
    assert taught is None or (taught.dtype == torch.float32 and taught.stride(1) == 1), "teacher logits must be float32"
    divergence, beta, temperature, (student, teacher) = how
    rows, vocab = logits.shape
    block = min(_BLOCK, triton.next_power_of_2(vocab))
    parts, stages = triton.cdiv(vocab, block), 2 if taught is None or divergence == "forward_kl" else 3
    sums, row_sums = logits.new_empty(rows, parts, _FIELDS.value), logits.new_full((rows, 4), _UNSET.value)
    ce, arrived = torch.empty_like(ce_weight), torch.zeros(rows, dtype=torch.int32, device=logits.device)
    mix = (beta, math.log(beta), math.log1p(-beta)) if divergence in ("jsd", "skewed_kl") else (0.0, 0.0, 0.0)
    with torch.cuda.device_of(logits):
        _rows_kernel[((triton.cdiv(rows, _GROUP) + (stages - 1) * _LAG) * stages * _GROUP * parts,)](
            logits, logits if taught is None else taught, out, labels, ce_weight, kl_weight, ce, sums, row_sums, arrived,
            rows, logits.stride(0), 0 if taught is None else taught.stride(0), out.stride(0),
            *map(float, (*student, *teacher)), 1 / temperature, *mix,
            VOCAB=vocab, KIND=_KINDS[divergence], TAUGHT=taught is not None, SOFT=temperature != 1,
            CAP=bool(student.cap), TAUGHT_CAP=bool(teacher.cap), SCALED=(student.scale, teacher.scale) != (1, 1),
            BLOCK=block, PARTS=parts, GROUP=_GROUP, LAG=_LAG, STAGES=stages, num_warps=_WARPS,
        )  # fmt: skip
    return ce, torch.zeros_like(kl_weight) if taught is None else sums[..., 7].sum(1)

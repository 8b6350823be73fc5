"""One program per row: log-sum-exps of student and teacher, CE and divergence, and the gradient over the logits.

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
_BLOCK, _WARPS = 8192, 16  # benchmarks/results/losses_tuning.json


@triton.jit
def _form(raw, scale, cap, CAP: constexpr):
    if CAP:
        return cap * (2 * tl.sigmoid(2 * raw * scale / cap) - 1)  # tanh
    else:
        return raw * scale


@triton.jit
def _grow(top, total, values):
    """Online log-sum-exp: the running maximum and sum with one more block."""
    higher = tl.maximum(top, tl.max(values, 0))
    return higher, total * tl.exp(top - higher) + tl.sum(tl.exp(values - higher), 0)


@triton.jit
def _terms(lq, lp, beta, log_beta, log_rest, KIND: constexpr):
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
def _read(logits, start, lanes, scale, cap, VOCAB: constexpr, CAP: constexpr):
    return _form(tl.load(logits + start + lanes, mask=start + lanes < VOCAB, other=0.0), scale, cap, CAP)


@triton.jit
def _log_sum(logits, scale, cap, sharpness, VOCAB: constexpr, CAP: constexpr, BLOCK: constexpr):
    """Log-sum-exp of sharpness times one row of logits."""
    lanes = tl.arange(0, BLOCK)
    top, total = -float("inf"), 0.0
    for start in range(0, VOCAB, BLOCK):
        x = sharpness * _read(logits, start, lanes, scale, cap, VOCAB, CAP)
        top, total = _grow(top, total, tl.where(start + lanes < VOCAB, x, -float("inf")))
    return top + tl.log(total)


@triton.jit
def _slope(
    logits, taught, scale, cap, taught_scale, taught_cap, lse, taught_lse, sharpness, beta, log_beta, log_rest,
    VOCAB: constexpr, KIND: constexpr, CAP: constexpr, TAUGHT_CAP: constexpr, BLOCK: constexpr,
):  # fmt: skip
    """Sum w over one row."""
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, VOCAB, BLOCK):
        keep = start + lanes < VOCAB
        lq = sharpness * _read(logits, start, lanes, scale, cap, VOCAB, CAP) - lse
        lp = sharpness * _read(taught, start, lanes, taught_scale, taught_cap, VOCAB, TAUGHT_CAP) - taught_lse
        _, w = _terms(lq, lp, beta, log_beta, log_rest, KIND)
        total += tl.where(keep, w, 0.0)
    return tl.sum(total, 0)


@triton.jit
def _write_gradient(
    logits, taught, grad, label, ce_w, kl_w, scale, cap, taught_scale, taught_cap,
    lse, soft_lse, taught_lse, slope, sharpness, beta, log_beta, log_rest,
    VOCAB: constexpr, KIND: constexpr, TAUGHT: constexpr,
    CAP: constexpr, TAUGHT_CAP: constexpr, BLOCK: constexpr,
):  # fmt: skip
    """Over one row; returns sum d, which costs nothing here."""
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, VOCAB, BLOCK):
        keep = start + lanes < VOCAB
        x = _read(logits, start, lanes, scale, cap, VOCAB, CAP)
        g = ce_w * (tl.exp(x - lse) - tl.where(start + lanes == label, 1.0, 0.0))
        if TAUGHT:
            lq = sharpness * x - soft_lse
            lp = sharpness * _read(taught, start, lanes, taught_scale, taught_cap, VOCAB, TAUGHT_CAP) - taught_lse
            d, w = _terms(lq, lp, beta, log_beta, log_rest, KIND)
            total += tl.where(keep, d, 0.0)
            g += kl_w * sharpness * (w - tl.exp(lq) * slope)
        g *= scale
        if CAP:
            g *= 1 - (x / cap) * (x / cap)
        tl.store(grad + start + lanes, g.to(grad.dtype.element_ty), mask=keep)
    return tl.sum(total, 0)


@triton.jit
def _rows_kernel(
    logits, taught, grad, labels, ce_weight, kl_weight, ce_out, kl_out, stride, taught_stride, grad_stride,
    scale, cap, taught_scale, taught_cap, sharpness, beta, log_beta, log_rest,
    VOCAB: constexpr, KIND: constexpr, TAUGHT: constexpr, SOFT: constexpr,
    CAP: constexpr, TAUGHT_CAP: constexpr, BLOCK: constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    taught += row * taught_stride
    grad += row * grad_stride
    label, ce_w, kl_w = tl.load(labels + row), tl.load(ce_weight + row), tl.load(kl_weight + row)
    counts = (label >= 0) & (ce_w != 0)
    ce_w = tl.where(counts, ce_w, 0.0)
    lse = _log_sum(logits, scale, cap, 1.0, VOCAB, CAP, BLOCK)
    own = _form(tl.load(logits + tl.where(counts, label, 0)), scale, cap, CAP)
    tl.store(ce_out + row, tl.where(counts, lse - own, 0.0))
    soft_lse = lse
    taught_lse = 0.0
    if TAUGHT:
        taught_lse = _log_sum(taught, taught_scale, taught_cap, sharpness, VOCAB, TAUGHT_CAP, BLOCK)
        if SOFT:
            soft_lse = _log_sum(logits, scale, cap, sharpness, VOCAB, CAP, BLOCK)
    slope = -1.0  # forward KL: the teacher's probabilities sum to one
    if TAUGHT and KIND != 0:
        slope = _slope(
            logits, taught, scale, cap, taught_scale, taught_cap, soft_lse, taught_lse, sharpness,
            beta, log_beta, log_rest, VOCAB, KIND, CAP, TAUGHT_CAP, BLOCK,
        )  # fmt: skip
    divergence = _write_gradient(
        logits, taught, grad, label, ce_w, kl_w, scale, cap, taught_scale, taught_cap, lse, soft_lse, taught_lse,
        slope, sharpness, beta, log_beta, log_rest, VOCAB, KIND, TAUGHT, CAP, TAUGHT_CAP, BLOCK,
    )  # fmt: skip
    tl.store(kl_out + row, tl.where(kl_w != 0, divergence, 0.0))


def score_triton(
    logits: Tensor, taught: Tensor | None, labels: Tensor, ce_weight: Tensor, kl_weight: Tensor, how: Any, out: Tensor
) -> tuple[Tensor, Tensor]:
    """As `losses.rows.score_torch`, from float32 logits."""
    assert logits.dtype == torch.float32, "the kernel reads float32 logits"
    assert logits.stride(1) == out.stride(1) == 1, "the kernel reads and writes whole rows"
    assert taught is None or (taught.dtype == torch.float32 and taught.stride(1) == 1), "teacher logits must be float32"
    divergence, beta, temperature, (student, teacher) = how
    rows, vocab = logits.shape
    ce, kl = torch.empty_like(ce_weight), torch.empty_like(kl_weight)
    mix = (beta, math.log(beta), math.log1p(-beta)) if divergence in ("jsd", "skewed_kl") else (0.0, 0.0, 0.0)
    with torch.cuda.device_of(logits):
        _rows_kernel[(rows,)](
            logits, logits if taught is None else taught, out, labels, ce_weight, kl_weight, ce, kl,
            logits.stride(0), 0 if taught is None else taught.stride(0), out.stride(0),
            *map(float, (*student, *teacher)), 1 / temperature, *mix,
            VOCAB=vocab, KIND=_KINDS[divergence], TAUGHT=taught is not None, SOFT=temperature != 1,
            CAP=bool(student.cap), TAUGHT_CAP=bool(teacher.cap),
            BLOCK=min(_BLOCK, triton.next_power_of_2(vocab)), num_warps=_WARPS,
        )  # fmt: skip
    return ce, kl

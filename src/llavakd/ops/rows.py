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

_BLOCK, _WARPS = 8192, 16  # benchmarks/results/losses_tuning.json


@triton.jit
def _read(side, start, lanes, VOCAB: constexpr):
    """Logits of a row from `start` on; `side` is (where the row lies, scale, soft cap or None)."""
    logits, scale, cap = side
    raw = tl.load(logits + start + lanes, mask=start + lanes < VOCAB, other=0.0)
    if cap is None:
        return raw * scale
    else:
        return cap * (2 * tl.sigmoid(2 * raw * scale / cap) - 1)  # tanh


@triton.jit
def _log_sum(side, sharpness, VOCAB: constexpr, BLOCK: constexpr):
    """Log-sum-exp of sharpness times one row of logits, online: the running maximum and sum with each more block."""
    lanes = tl.arange(0, BLOCK)
    top, total = -float("inf"), 0.0
    for start in range(0, VOCAB, BLOCK):
        x = tl.where(start + lanes < VOCAB, sharpness * _read(side, start, lanes, VOCAB), -float("inf"))
        higher = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), 0)
        top = higher
    return top + tl.log(total)


@triton.jit
def _terms(lq, lp, mix, KIND: constexpr):
    """(d_v, w_v) of D = sum_v d_v, whose gradient to the softened logits is w_v - Q_v sum_u w_u."""
    # So w_v = Q_v dD/dQ_v, and a constant added to dD/dQ drops out; `mix` is (beta, log beta, log (1 - beta)).
    beta, log_beta, log_rest = mix
    q, p = tl.exp(lq), tl.exp(lp)
    if KIND == "forward_kl":
        return p * (lp - lq), -p
    elif KIND == "reverse_kl":
        d = q * (lq - lp)
        return d, d
    elif KIND == "total_variation":
        gap = q - p
        return tl.abs(gap) / 2, q * tl.where(gap > 0, 0.5, tl.where(gap < 0, -0.5, 0.0))
    else:
        one, other = lp + log_beta, lq + log_rest
        mixture = tl.maximum(one, other) + tl.log(1 + tl.exp(-tl.abs(one - other)))
        if KIND == "jsd":
            own = (1 - beta) * q * (lq - mixture)
            return beta * p * (lp - mixture) + own, own
        else:
            return p * (lp - mixture), -(1 - beta) * tl.exp(lq + lp - mixture)


@triton.jit
def _slope(student, teacher, lse, taught_lse, sharpness, mix, VOCAB: constexpr, KIND: constexpr, BLOCK: constexpr):
    """Sum w over one row."""
    lanes, total = tl.arange(0, BLOCK), tl.zeros([BLOCK], tl.float32)
    for start in range(0, VOCAB, BLOCK):
        keep = start + lanes < VOCAB
        lq = sharpness * _read(student, start, lanes, VOCAB) - lse
        lp = sharpness * _read(teacher, start, lanes, VOCAB) - taught_lse
        _, w = _terms(lq, lp, mix, KIND)
        total += tl.where(keep, w, 0.0)
    return tl.sum(total, 0)


@triton.jit
def _rows_kernel(
    logits, taught, grad, labels, ce_weight, kl_weight, ce_out, kl_out, stride, taught_stride, grad_stride,
    form, taught_form, sharpness, mix, VOCAB: constexpr, KIND: constexpr, SOFT: constexpr, BLOCK: constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    scale, cap = form
    student = (logits + row * stride, scale, cap)
    teacher = None
    label, ce_w, kl_w = tl.load(labels + row), tl.load(ce_weight + row), tl.load(kl_weight + row)
    counts = (label >= 0) & (ce_w != 0)
    ce_w = tl.where(counts, ce_w, 0.0)
    lse = _log_sum(student, 1.0, VOCAB, BLOCK)
    tl.store(ce_out + row, tl.where(counts, lse - _read(student, 0, tl.where(counts, label, 0), VOCAB), 0.0))
    soft_lse, taught_lse = lse, 0.0
    slope = -1.0  # forward KL: the teacher's probabilities sum to one
    if KIND is not None:
        teacher = (taught + row * taught_stride, taught_form[0], taught_form[1])
        taught_lse = _log_sum(teacher, sharpness, VOCAB, BLOCK)
        if SOFT:
            soft_lse = _log_sum(student, sharpness, VOCAB, BLOCK)
        if KIND != "forward_kl":
            slope = _slope(student, teacher, soft_lse, taught_lse, sharpness, mix, VOCAB, KIND, BLOCK)
    lanes, total = tl.arange(0, BLOCK), tl.zeros([BLOCK], tl.float32)
    for start in range(0, VOCAB, BLOCK):  # the divergence costs nothing here
        keep = start + lanes < VOCAB
        x = _read(student, start, lanes, VOCAB)
        g = ce_w * (tl.exp(x - lse) - tl.where(start + lanes == label, 1.0, 0.0))
        if KIND is not None:
            lq = sharpness * x - soft_lse
            lp = sharpness * _read(teacher, start, lanes, VOCAB) - taught_lse
            d, w = _terms(lq, lp, mix, KIND)
            total += tl.where(keep, d, 0.0)
            g += kl_w * sharpness * (w - tl.exp(lq) * slope)
        g *= scale
        if cap is not None:
            g *= 1 - (x / cap) * (x / cap)
        tl.store(grad + row * grad_stride + start + lanes, g.to(grad.dtype.element_ty), mask=keep)
    tl.store(kl_out + row, tl.where(kl_w != 0, tl.sum(total, 0), 0.0))


def score_triton(
    logits: Tensor, taught: Tensor | None, labels: Tensor, ce_weight: Tensor, kl_weight: Tensor, how: Any, out: Tensor
) -> tuple[Tensor, Tensor]:
    """As `losses.rows.score_torch`, from float32 logits."""
    assert logits.dtype == torch.float32, "the kernel reads float32 logits"
    assert logits.stride(1) == out.stride(1) == 1, "the kernel reads and writes whole rows"
    assert taught is None or (taught.dtype == torch.float32 and taught.stride(1) == 1), "teacher logits must be float32"
    divergence, beta, temperature, forms = how
    rows, vocab = logits.shape
    ce, kl = torch.empty_like(ce_weight), torch.empty_like(kl_weight)
    mix = (beta, math.log(beta), math.log1p(-beta)) if divergence in ("jsd", "skewed_kl") else (0.0, 0.0, 0.0)
    with torch.cuda.device_of(logits):
        _rows_kernel[(rows,)](
            logits, taught, out, labels, ce_weight, kl_weight, ce, kl,
            logits.stride(0), 0 if taught is None else taught.stride(0), out.stride(0),
            *((float(form.scale), float(form.cap) or None) for form in forms), 1 / temperature, mix,
            VOCAB=vocab, KIND=None if taught is None else divergence, SOFT=temperature != 1,
            BLOCK=min(_BLOCK, triton.next_power_of_2(vocab)), num_warps=_WARPS,
        )  # fmt: skip
    return ce, kl

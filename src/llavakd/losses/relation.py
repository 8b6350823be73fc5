"""RDist: one minus the cosine between the visual-token Gram matrices of student and teacher."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from llavakd.losses.products import operand_dtype, precise_product, product
from llavakd.losses.rows import refuse_second_derivatives, shared_width

_ROWS = 2**15  # head rows whose gradient is float32 at once
_SQUARES = WeakTensorKeyDictionary()  # frozen head -> (what it was made from, W^T W)


def relation_distance(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    vocab_size: int | None = None,
    center: bool = False,
    row_normalize: bool = False,
    valid: Tensor | None = None,
) -> Tensor:
    """1 - cos(vec(Z_s Z_s^T), vec(Z_t Z_t^T)) per picture (LLaVA-KD, RDist), Z = H W^T the vocabulary logits.

    float32 [B], in [0, 2] (float64 for float64 inputs). Computed as H (W^T W) H^T, so that no [N, V] logits are made;
    W^T W of a frozen head is kept until the head changes. 1 - cos is taken as half the squared distance of the
    normalised matrices, which stays exact where the two nearly agree.

    student_hidden, teacher_hidden: [B, N, D_s] and [B, N, D_t], one picture's visual tokens a row.
    student_head, teacher_head: [V_s, D_s] and [V_t, D_t]; the teacher gets no gradient.
    vocab_size: ids that both share; later head rows are cut off. Heads of unequal width need it (ValueError).
    center: subtract the mean visual token first.
    row_normalize: scale every visual token's logits to length one first.
    valid: bool [B, N], False where a picture has fewer than N tokens; default all.
    """
    options = shared_width(student_head, teacher_head, vocab_size), center, row_normalize, valid
    with torch.no_grad():
        teacher = _unit_gram(teacher_hidden, teacher_head, *options)
    return (_unit_gram(student_hidden, student_head, *options) - teacher).square().sum((-2, -1)) / 2


def gram(hidden: Tensor, head: Tensor) -> Tensor:
    """Z Z^T of the logits Z = H W^T: [B, N, D], [V, D] -> float32 [B, N, N]."""
    return _gram(*_operands(hidden, head, len(head)))


def _unit_gram(hidden: Tensor, head: Tensor, width: int, center: bool, normalize: bool, valid: Tensor | None) -> Tensor:
    """`gram` of Frobenius norm one, [B, N, N]; arguments as `relation_distance`."""
    hidden, square = _operands(hidden, head, width)
    if valid is not None:
        hidden = hidden.where(valid.unsqueeze(-1), 0)
    if center:
        hidden = hidden.to(square.dtype)
        count = hidden.shape[-2] if valid is None else valid.sum(-1)[..., None, None].clamp_min(1)
        hidden = hidden - hidden.sum(-2, keepdim=True) / count
        hidden = hidden if valid is None else hidden.where(valid.unsqueeze(-1), 0)
    matrix = _gram(hidden, square)
    if normalize:
        length = matrix.diagonal(dim1=-2, dim2=-1).clamp_min(torch.finfo(matrix.dtype).tiny).sqrt()
        matrix = matrix / (length.unsqueeze(-1) * length.unsqueeze(-2))
    return matrix / torch.linalg.matrix_norm(matrix, keepdim=True).clamp_min(torch.finfo(matrix.dtype).tiny)


def _operands(hidden: Tensor, head: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Hidden states as narrow as their products are taken, and W^T W of the head, kept where the head does not learn."""
    dtype = operand_dtype(hidden)
    if head.requires_grad and torch.is_grad_enabled():
        return hidden.to(dtype), _Square.apply(head, vocab_size, dtype)
    made_from = (head._version, head.data_ptr(), vocab_size, dtype)
    kept = _SQUARES.get(head)
    if kept is None or kept[0] != made_from:
        kept = _SQUARES[head] = (made_from, _Square.apply(head, vocab_size, dtype))
    return hidden.to(dtype), kept[1]


def _gram(hidden: Tensor, square: Tensor) -> Tensor:
    tokens = hidden.shape[-2]  # Tensor cores want rows of whole 16 bytes; tokens of zeros add zeros.
    with torch.autocast(hidden.device.type, enabled=False):
        return _Gram.apply(nn.functional.pad(hidden, (0, 0, 0, -tokens % 8)), square)[..., :tokens, :tokens]


class _Gram(torch.autograd.Function):
    """H S H^T of hidden states [B, N, D], as narrow as they come, and S [D, D]; float32 products on tensor cores."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, square: Tensor) -> Tensor:
        bent = precise_product(hidden.flatten(0, -2), square).view(hidden.shape)
        ctx.save_for_backward(hidden, square, bent)
        return precise_product(bent, hidden.mT)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        refuse_second_derivatives()
        hidden, square, bent = ctx.saved_tensors
        rows = hidden.flatten(0, -2)
        to_bent = precise_product(grad, hidden).flatten(0, -2)
        to_hidden = precise_product(to_bent, square.T).view(hidden.shape) + precise_product(grad.mT, bent)
        return to_hidden.to(hidden.dtype), precise_product(rows.T, to_bent) if ctx.needs_input_grad[1] else None


class _Square(torch.autograd.Function):
    """W^T W of the first rows of a head, without keeping a float32 copy of the head."""

    @staticmethod
    def forward(ctx: Any, head: Tensor, vocab_size: int, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(head)
        ctx.vocab_size, ctx.dtype = vocab_size, dtype
        weight = head[:vocab_size].to(dtype)
        return product(weight.T, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        refuse_second_derivatives()
        (head,) = ctx.saved_tensors
        result, both = torch.zeros_like(head), grad + grad.T
        for weight, rows in zip(*(rows[: ctx.vocab_size].split(_ROWS) for rows in (head, result)), strict=True):
            rows.copy_(precise_product(weight.to(ctx.dtype), both))
        return result, None, None

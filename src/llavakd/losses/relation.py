"""RDist: one minus the cosine between the visual-token Gram matrices of student and teacher."""

from __future__ import annotations

import torch
from torch import Tensor

from llavakd.losses.rows import shared_width


def relation_distance(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    vocab_size: int | None = None,
    center: bool = False,
    row_normalize: bool = False,
) -> Tensor:
    """1 - cos(vec(Z_s Z_s^T), vec(Z_t Z_t^T)) per picture (LLaVA-KD, RDist), Z = H W^T the vocabulary logits.

    Computed as H (W^T W) H^T in float32, so that no [N, V] logits are made. 1 - cos is taken as half the squared
    distance of the normalised matrices, which stays exact where the two nearly agree.

    Args:
        student_hidden: [B, N, D_s], one picture's visual tokens a row.
        student_head: [V_s, D_s].
        teacher_hidden: [B, N, D_t]; gets no gradient.
        teacher_head: [V_t, D_t].
        vocab_size: ids that both share; later head rows are cut off.
        center: subtract the mean visual token first.
        row_normalize: scale every visual token's logits to length one first.

    Returns:
        float32 [B], in [0, 2].

    Raises:
        ValueError: heads of unequal width without `vocab_size`.
    """
    vocab_size = shared_width(student_head, teacher_head, vocab_size)
    with torch.autocast(student_hidden.device.type, enabled=False):
        student = gram(student_hidden, student_head[:vocab_size], center=center, row_normalize=row_normalize)
        with torch.no_grad():
            teacher = gram(teacher_hidden, teacher_head[:vocab_size], center=center, row_normalize=row_normalize)
        return (_unit(student) - _unit(teacher)).square().sum((-2, -1)) / 2


def gram(hidden: Tensor, head: Tensor, *, center: bool = False, row_normalize: bool = False) -> Tensor:
    """Z Z^T of the logits Z = H W^T: [B, N, D], [V, D] -> float32 [B, N, N]."""
    hidden, head = hidden.float(), head.float()
    if center:
        hidden = hidden - hidden.mean(-2, keepdim=True)
    matrix = hidden @ (head.T @ head) @ hidden.mT
    if row_normalize:
        length = matrix.diagonal(dim1=-2, dim2=-1).clamp_min(torch.finfo(torch.float32).tiny).sqrt()
        matrix = matrix / (length.unsqueeze(-1) * length.unsqueeze(-2))
    return matrix


def _unit(matrix: Tensor) -> Tensor:
    norm = torch.linalg.matrix_norm(matrix, keepdim=True)
    return matrix / norm.clamp_min(torch.finfo(torch.float32).tiny)

"""Segments, weights and counts -> one scalar and its parts: the only place that divides, and it divides once."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from llavakd.config import LossConfig
from llavakd.losses.offline import Taught, distill_rows_topk
from llavakd.losses.relation import relation_distance
from llavakd.losses.rows import IGNORE_INDEX, distill_rows
from llavakd.transfer import sent


class Counts(NamedTuple):
    """What a global batch holds, over all its micro-batches and processes."""

    samples: int
    response_tokens: int
    visual_tokens: int
    images: int


class Objective(NamedTuple):
    """`total` is differentiable; `parts` that weigh something are detached float32 scalars, divided, not weighted."""

    total: Tensor
    parts: dict[str, Tensor]


def count(labels: Tensor, visual: Tensor, image_rows: Tensor, position_ids: Tensor | None = None) -> Counts:
    """Count one micro-batch (CPU tensors), given as to `objective`."""
    rows, supervised = row_places(labels, position_ids)
    return Counts(int(rows.max()) + 1, int(supervised.sum()), int(visual.sum()), len(image_rows))


def objective(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
    *,
    labels: Tensor,
    visual: Tensor,
    image_rows: Tensor,
    losses: LossConfig,
    reduction: str,
    counts: Counts,
    position_ids: Tensor | None = None,
    vocab_size: int | None = None,
    taught: Taught | None = None,
) -> Objective:
    """This micro-batch's share of ce + a response_kl + b visual_kl + c relation (LLaVA-KD, section 3).

    reduction "token": every part is a mean over the global batch's response tokens, visual tokens or pictures.
    reduction "sample": a mean over all rows of the global batch of each row's own mean, which is what the released
    trainer computes at micro-batch 1; a row without a picture adds nothing to visual_kl and relation, yet counts.
    On a GPU nothing waits for the device where labels, places and positions are given on the CPU.

    student_hidden, student_head: final hidden states [B, T, D_s], and [V_s, D_s].
    teacher_hidden, teacher_head: [B, T, D_t] and [V_t, D_t], or None where nothing is distilled.
    labels: int64 [B, T], unshifted; the row that predicts labels[b, t] is position t - 1.
    visual: bool [B, T], picture positions, taken as they are, unshifted.
    image_rows: int64 [P], the row of each picture.
    losses: weights and kind of divergence.
    reduction: "sample" or "token".
    counts: of the whole global batch.
    position_ids: int64 [1, T] of a pack, from 0 in each of its rows; None where each line of B is one row.
    vocab_size: ids shared with the teacher.
    taught: on the CPU, what a teacher without hidden states said at all these places: forward KL at temperature 1 then,
        with the ids that are not stored as one outcome.
    """
    rows, supervised = row_places(labels, position_ids)
    response, seen = supervised.nonzero(), visual.nonzero()  # (line, position that predicts)
    places = torch.cat([response, seen])
    flat, device = places[:, 0] * labels.shape[1] + places[:, 1], student_hidden.device
    owners, chosen = rows.flatten()[flat], sent(flat, device)
    response_weight = _weights(owners[: len(response)], reduction, counts.samples, counts.response_tokens)
    visual_weight = _weights(owners[len(response) :], reduction, counts.samples, counts.visual_tokens)
    student_hidden = student_hidden.flatten(0, 1).index_select(0, chosen)
    teacher_hidden = None if teacher_hidden is None else teacher_hidden.flatten(0, 1).index_select(0, chosen)
    targets = torch.cat([labels[response[:, 0], response[:, 1] + 1], labels.new_full((len(seen),), IGNORE_INDEX)])
    ce_weight = torch.cat([losses.ce * response_weight, torch.zeros_like(visual_weight)])
    kl_weight = torch.cat([losses.response_kl * response_weight, losses.visual_kl * visual_weight])
    how: dict[str, Any] = {"ce_weight": ce_weight, "kl_weight": kl_weight, "vocab_size": vocab_size}
    if taught:
        at = torch.searchsorted(taught.places, flat).clamp_max(len(taught.places) - 1)
        assert torch.equal(taught.places[at], flat), "a place that is distilled was not stored"
        known, how["teacher_tail"] = (taught.ids[at], taught.logp[at]), taught.tail[at]
        scored = distill_rows_topk(student_hidden, student_head, *known, targets, **how)
    else:
        how |= {"divergence": losses.divergence, "beta": losses.beta, "temperature": losses.temperature}
        scored = distill_rows(student_hidden, student_head, teacher_hidden, teacher_head, targets, **how)
    relation = torch.zeros((), device=device)
    if losses.relation and len(image_rows):
        assert teacher_hidden is not None, "the relation needs a teacher"
        assert teacher_head is not None, "the relation needs the teacher's head"
        shape = len(image_rows), -1
        student, teacher = (side[len(response) :].unflatten(0, shape) for side in (student_hidden, teacher_hidden))
        how = {"center": losses.relation_center, "row_normalize": losses.relation_row_normalize}
        relation = relation_distance(student, student_head, teacher, teacher_head, vocab_size=vocab_size, **how)
        if reduction == "sample":
            relation = relation / sent(torch.bincount(image_rows)[image_rows], device)
        relation = relation.sum() / (counts.samples if reduction == "sample" else counts.images)
    response_weight, visual_weight = sent(response_weight, device), sent(visual_weight, device)
    parts = {
        "ce": (scored.ce_rows[: len(response)] * response_weight).sum(),
        "response_kl": (scored.kl_rows[: len(response)] * response_weight).sum(),
        "visual_kl": (scored.kl_rows[len(response) :] * visual_weight).sum(),
        "relation": relation.detach(),
    }
    total = scored.ce + scored.kl + losses.relation * relation
    return Objective(total, {name: value for name, value in parts.items() if losses.weights[name]})


def row_places(labels: Tensor, position_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """The row of each position, [B, T], and which positions predict a label, of their own row: bool [B, T - 1]."""
    if position_ids is None:
        position_ids = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
    rows = (position_ids == 0).flatten().cumsum(0).view_as(labels) - 1
    return rows, (labels[:, 1:] != IGNORE_INDEX) & (position_ids[:, 1:] != 0)


def _weights(rows: Tensor, reduction: str, samples: int, tokens: int) -> Tensor:
    """float32 weight of each token, given its row: 1 / tokens, or 1 / (samples * tokens of its own row)."""
    if reduction == "token":
        return torch.full((len(rows),), 1 / max(tokens, 1), device=rows.device)
    return 1 / (samples * torch.bincount(rows)[rows].float())

"""The contract of a teacher and student pair: shared ids, equal visual tokens, equal pixels, perhaps one tower."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from llavakd.data.samples import IMAGE_TAG
from llavakd.errors import UserError
from llavakd.models.student import VisionLanguageModel


class AlignmentError(UserError):
    """Teacher and student cannot be compared position by position; the message says where they part."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """What holds between a student and a teacher.

    vocab_size: ids [0, vocab_size) mean the same to both; later head rows take no part in any loss.
    shared_tower: both vision towers and their feature selection are equal, so one run serves both.
    """

    vocab_size: int
    shared_tower: bool
    note: str


def align(student: VisionLanguageModel, teacher: VisionLanguageModel) -> Pair:
    """Check a pair; raises AlignmentError naming the first difference that matters."""
    if student.tokens_per_image != teacher.tokens_per_image:
        raise AlignmentError(
            f"visual tokens per picture: student {student.tokens_per_image}, teacher {teacher.tokens_per_image}; give both "
            "the same vision_feature_select_strategy and a tower of the same grid"
        )
    ours, theirs = student.image_processor.to_dict(), teacher.image_processor.to_dict()
    for key in (
        "size",
        "do_resize",
        "do_rescale",
        "rescale_factor",
        "do_normalize",
        "image_mean",
        "image_std",
        "resample",
    ):
        if ours.get(key) != theirs.get(key):
            raise AlignmentError(
                f"image processors differ in {key}: student {ours.get(key)}, teacher {theirs.get(key)}; "
                "both models must see the same pixels"
            )
    vocab_size = shared_vocabulary(student.tokenizer, teacher.tokenizer, len(student.head), len(teacher.head))
    shared = _same_tower(student, teacher)
    note = (
        f"pair: {vocab_size} shared ids (student head {len(student.head)}, teacher head {len(teacher.head)}); "
        f"vision tower {'shared, run once' if shared else 'not equal, each model runs its own'}"
    )
    return Pair(vocab_size=vocab_size, shared_tower=shared, note=note)


def shared_vocabulary(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, student_rows: int, teacher_rows: int
) -> int:
    """How many leading ids mean the same token to both; padded head rows do not count.

    Raises:
        AlignmentError: two different tokenizers, naming the first id that differs.
    """
    ours = {index: token for token, index in student.get_vocab().items()}
    theirs = {index: token for token, index in teacher.get_vocab().items()}
    shared = min(max(ours) + 1, max(theirs) + 1, student_rows, teacher_rows)
    for index in range(shared):
        left, right = ours.get(index), theirs.get(index)
        # The picture mark is never predicted, so its id may differ.
        if left != right and IMAGE_TAG not in (left, right):
            raise AlignmentError(
                f"tokenizers differ: id {index} is {left!r} for the student and {right!r} for the teacher; "
                "use a teacher and a student of one tokenizer"
            )
    return shared


def _same_tower(student: VisionLanguageModel, teacher: VisionLanguageModel) -> bool:
    selection = ("vision_feature_layer", "vision_feature_select_strategy")
    if any(getattr(student.model.config, key) != getattr(teacher.model.config, key) for key in selection):
        return False
    left, right = (_tower_weights(model.parts()["vision_tower"]) for model in (student, teacher))
    if left.keys() != right.keys():
        return False
    return all(
        left[name].shape == right[name].shape and torch.equal(left[name].to(right[name].dtype), right[name])
        for name in left
    )


def _tower_weights(tower: nn.Module) -> dict[str, torch.Tensor]:
    # The pooling head never reaches the features.
    return {name: weight for name, weight in tower.state_dict().items() if not name.startswith("head.")}

"""The contract of a teacher and student pair: shared ids, equal visual tokens, equal pixels, perhaps one tower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from llavakd.data.samples import IMAGE_TAG
from llavakd.errors import UserError
from llavakd.models.student import VisionLanguageModel


class AlignmentError(UserError):
    """Teacher and student cannot be compared position by position; the message says where they part."""


# What decides the pixels that a tower sees; the crop counts only where there is one.
_PIXEL_SETTINGS = (
    "size",
    "do_resize",
    "resample",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "do_center_crop",
    "crop_size",
    "do_pad",
)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """What holds between a student and a teacher.

    vocab_size: ids [0, vocab_size) mean the same to both; later head rows take no part in any loss.
    shared_tower: both vision towers, their feature selection and their pixels are equal, so one run serves both.
    shared_pixels: both image processors make the same pixels; otherwise a batch carries each model's own.
    note: what was decided, for the person who runs it.
    """

    vocab_size: int
    shared_tower: bool
    shared_pixels: bool = True
    note: str


def align(student: VisionLanguageModel, teacher: VisionLanguageModel) -> Pair:
    """Check a pair; raises AlignmentError naming the first difference that matters."""
    if student.tokens_per_image != teacher.tokens_per_image:
        raise AlignmentError(
            f"visual tokens per picture: student {student.tokens_per_image}, teacher {teacher.tokens_per_image}; give both "
            "the same vision_feature_select_strategy and a tower of the same grid"
        )
    rows = {"student": len(student.head), "teacher": len(teacher.head)}
    vocab_size = shared_vocabulary(student.tokenizer, teacher.tokenizer, *rows.values())
    differing = _differing_pixels(student.image_processor, teacher.image_processor)
    shared = not differing and _same_tower(student, teacher)
    dropped = ", ".join(f"{count - vocab_size} of the {side}'s {count}" for side, count in rows.items())
    ends = [model.tokenizer.eos_token for model in (student, teacher)]
    note = (
        f"pair: {vocab_size} shared ids; head columns left out of every loss: {dropped}; "
        f"{student.tokens_per_image} visual tokens per picture; "
        f"vision tower {'shared, run once' if shared else 'not equal, each model runs its own'}"
        + (f"; each model gets its own pixels (image processors differ in {', '.join(differing)})" if differing else "")
        + (f"; end tokens differ: student {ends[0]!r}, teacher {ends[1]!r}" if ends[0] != ends[1] else "")
    )
    return Pair(vocab_size=vocab_size, shared_tower=shared, shared_pixels=not differing, note=note)


def _differing_pixels(student: Any, teacher: Any) -> list[str]:
    """Names of the settings by which two image processors make different pixels."""
    ours, theirs = (processor.to_dict() for processor in (student, teacher))
    return [key for key in _PIXEL_SETTINGS if (ours.get(key) or None) != (theirs.get(key) or None)]


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
    while ours.get(shared - 1) != theirs.get(shared - 1):  # a picture mark at the end, against a word or nothing
        shared -= 1
    return shared


def _same_tower(student: VisionLanguageModel, teacher: VisionLanguageModel) -> bool:
    selection = ("vision_feature_layer", "vision_feature_select_strategy")
    if any(getattr(student.model.config, key) != getattr(teacher.model.config, key) for key in selection):
        return False
    left, right = (_tower_weights(model.parts()["vision_tower"]) for model in (student, teacher))
    if left.keys() != right.keys():
        return False
    return all(  # of outlines, which have no weights, shapes are all that can be told
        left[name].shape == right[name].shape
        and (right[name].is_meta or torch.equal(left[name].to(right[name].dtype), right[name]))
        for name in left
    )


def _tower_weights(tower: nn.Module) -> dict[str, torch.Tensor]:
    # The pooling head never reaches the features.
    return {name: weight for name, weight in tower.state_dict().items() if not name.startswith("head.")}

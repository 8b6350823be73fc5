"""The contract of a teacher and student pair: shared ids, equal visual tokens, equal pixels, perhaps one tower."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from llavakd.data.samples import IMAGE_TAG
from llavakd.errors import UserError
from llavakd.models.student import VisionLanguageModel
from llavakd.templates import render

# What decides the pixels that a tower sees, and which of its hidden states are taken.
_PIXELS = (
    "size do_resize resample do_rescale rescale_factor do_normalize image_mean image_std do_center_crop crop_size do_pad"
).split()
_SELECTION = ("vision_feature_layer", "vision_feature_select_strategy")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """What holds between a student and a teacher."""

    vocab_size: int  # ids [0, vocab_size) mean the same to both; later head rows take no part in any loss
    shared_tower: bool  # both vision towers, their feature selection and pixels are equal, so that one run serves both
    shared_pixels: bool = True  # both image processors make the same pixels; else a batch carries each model's own
    note: str  # what was decided, for the person who runs it


def align(student: VisionLanguageModel, teacher: VisionLanguageModel) -> Pair:
    """Check a pair; raises UserError naming the first difference that matters."""
    if student.tokens_per_image != teacher.tokens_per_image:
        told = f"visual tokens per picture: student {student.tokens_per_image}, teacher {teacher.tokens_per_image}"
        raise UserError(f"{told}; give both the same vision_feature_select_strategy and a tower of the same grid")
    vocab_size = shared_vocabulary(student.tokenizer, teacher.tokenizer, min(len(student.head), len(teacher.head)))
    ours, theirs = (model.image_processor.to_dict() for model in (student, teacher))
    differing = [key for key in _PIXELS if (ours.get(key) or None) != (theirs.get(key) or None)]
    shared = not differing and _same_tower(student, teacher)
    found: dict[str, Any] = {"vocab_size": vocab_size, "shared_tower": shared, "shared_pixels": not differing}
    return Pair(**found, note=render("pair.jinja", student=student, teacher=teacher, differing=differing, **found))


def shared_vocabulary(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, head_rows: int) -> int:
    """How many leading ids mean the same token to both; UserError where tokenizers differ, naming the first id."""
    ours, theirs = ({index: token for token, index in one.get_vocab().items()} for one in (student, teacher))
    shared = min(max(ours) + 1, max(theirs) + 1, head_rows)
    for index in range(shared):
        left, right = ours.get(index), theirs.get(index)
        # The picture mark is never predicted, so its id may differ.
        if left != right and IMAGE_TAG not in (left, right):
            told = f"tokenizers differ: id {index} is {left!r} for the student and {right!r} for the teacher"
            raise UserError(f"{told}; use a teacher and a student of one tokenizer")
    while ours.get(shared - 1) != theirs.get(shared - 1):  # a picture mark at the end, against a word or nothing
        shared -= 1
    return shared


def _same_tower(student: VisionLanguageModel, teacher: VisionLanguageModel) -> bool:
    if any(getattr(student.model.config, key) != getattr(teacher.model.config, key) for key in _SELECTION):
        return False
    left, right = (model.parts()["vision_tower"].state_dict() for model in (student, teacher))
    names = {name for name in left.keys() | right.keys() if not name.startswith("head.")}  # never reaches the features
    return names <= left.keys() & right.keys() and all(
        left[name].shape == right[name].shape  # of outlines, which have no weights, all that can be told
        and (right[name].is_meta or torch.equal(left[name].to(right[name].dtype), right[name]))
        for name in names
    )

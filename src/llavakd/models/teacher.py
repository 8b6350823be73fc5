"""The teacher: loaded, frozen, in eval mode, and never part of what is trained or saved."""

from __future__ import annotations

import torch
from torch import Tensor

from llavakd.config import TeacherConfig
from llavakd.models.student import VisionLanguageModel, final_hidden, load_student

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_teacher(config: TeacherConfig) -> VisionLanguageModel:
    """Load a teacher folder without gradients; raises ModelError."""
    teacher = load_student(config.path, dtype=DTYPES[config.dtype])
    teacher.model.requires_grad_(False).eval()
    return teacher


@torch.no_grad()
def teacher_hidden(
    teacher: VisionLanguageModel, input_ids: Tensor, attention_mask: Tensor, visual: Tensor, features: Tensor | None
) -> Tensor:
    """Final hidden states [B, T, D_t] in the teacher's dtype; see `final_hidden` for the arguments."""
    if features is not None:
        features = features.to(teacher.model.dtype)
    return final_hidden(teacher.model, input_ids, attention_mask, visual, features)

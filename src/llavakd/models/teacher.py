"""The teacher: loaded, frozen, in eval mode, and never part of what is trained or saved."""

import torch

from llavakd.config import TeacherConfig
from llavakd.models.student import VisionLanguageModel, load_student

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_teacher(config: TeacherConfig) -> VisionLanguageModel:
    """Load a teacher folder without gradients; raises ModelError."""
    teacher = load_student(config.path, dtype=DTYPES[config.dtype])
    teacher.model.requires_grad_(False).eval()
    return teacher

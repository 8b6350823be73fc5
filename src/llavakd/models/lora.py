"""Low-rank updates (Hu et al. 2021) by peft: added to a language model for a stage, and merged into what is saved."""

from typing import Any

import torch

from llavakd.config import LoraConfig
from llavakd.errors import UserError
from llavakd.models.student import VisionLanguageModel

try:
    import peft
except ImportError as error:
    raise UserError(f"low-rank updates need peft ({error}); install it: pip install 'llava-kd[lora]'") from error


def add_updates(student: VisionLanguageModel, config: LoraConfig, *, seed: int) -> peft.LoraModel:
    """Let W + (alpha / r) B A stand for each matrix of the language model's layers, B zero; only A and B learn of it.

    What is returned has `merge_and_unload`, after which the student is again what it was, of other weights.
    """
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"r": config.r, "lora_alpha": config.alpha, "lora_dropout": config.dropout}
    settings = peft.LoraConfig(**sizes, target_modules="all-linear")
    return peft.LoraModel(student.parts()["language_model"], settings, "default")

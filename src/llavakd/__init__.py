"""LLaVA-KD: distil a large vision-language model into a small one in three stages (arXiv 2410.16236)."""

import importlib
from typing import Any

_NAMES = {
    "config": "load_recipe",
    "evaluate": "evaluate_model",
    "losses": "distill_rows objective relation_distance",
    "models.student": "build_student load_student",
    "pipeline": "run_pipeline",
    "quickstart": "run_quickstart",
    "report": "write_report",
    "shapes": "write_world",
}
# Looked up on first use: `import llavakd` and `llava-kd --help` need not wait for torch.
_PUBLIC = {name: f"llavakd.{module}" for module, names in _NAMES.items() for name in names.split()}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"llavakd has no {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)

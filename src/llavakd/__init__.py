"""LLaVA-KD: distil a large vision-language model into a small one in three stages (arXiv 2410.16236)."""

import importlib
from typing import Any

# Looked up on first use: `import llavakd` and `llava-kd --help` need not wait for torch.
_PUBLIC = {
    "load_recipe": "llavakd.config",
    "run_pipeline": "llavakd.pipeline",
    "run_quickstart": "llavakd.quickstart",
    "build_student": "llavakd.models.student",
    "load_student": "llavakd.models.student",
    "distill_rows": "llavakd.losses",
    "relation_distance": "llavakd.losses",
    "objective": "llavakd.losses",
    "evaluate_model": "llavakd.evaluate",
    "write_report": "llavakd.report",
    "write_world": "llavakd.shapes",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"llavakd has no {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
